"""A training state in full, out of and into whatever DeepSpeed made of it: any ZeRO stage, world size and precision.

Seen with DeepSpeed 0.19.8: at stages 1 and 2 parameters stay whole, and the optimizer updates flat float32 pieces of
them; at stage 3 both are cut, each parameter padded to equal parts; at stage 0 the optimizer is torch's own. This file
must not know files, nor which optimizer it is but that its counter is called "step", as torch's are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperpelt_ds import dist

# Where the wrappers keep the flat pieces of this rank, and the parameters that lie in them on any rank: stages 1 and 2,
# stage 3, and stage 1 in bfloat16.
_PIECES = [
    ("single_partition_of_fp32_groups", "bit16_groups"),
    ("fp32_partitioned_groups_flat", "fp16_groups"),
    ("fp32_groups_flat_partition", "bf16_groups"),
]


@dataclass(frozen=True)
class Snapshot:
    """What training goes on from. Tensors are float32 copies on the host in the parameters' shapes."""

    weights: dict[str, Tensor]
    """By parameter name, also those that are not trained."""
    moments: dict[str, dict[str, Tensor]]
    """By the optimizer's name for it, then by parameter name; a parameter that was never updated may have none."""
    counters: dict[str, Any]
    """JSON-able: updates of each parameter, schedule, steps, loss scale."""


def leave_frozen_maps_alone() -> None:
    """Keeps DeepSpeed's own linear function to the weights that it partitions; all others go through torch's again.

    Stage 3 puts it in torch's place, for all that the process does afterwards. It keeps the input of every map for the
    backward pass, of frozen ones too, whose weights get no gradient: in small T5 and Llama models that was 6 to 14 % of
    all that a micro-batch keeps (0.19.8).
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses, is_zero_param

    if F.linear is not zero3_linear_wrap:
        return
    torchs = InsertPostInitMethodToModuleSubClasses.linear_bk

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        chosen = zero3_linear_wrap if is_zero_param(weight) else torchs
        result: Tensor = chosen(input, weight, bias)
        return result

    F.linear = linear


def gather(engine: Any) -> Snapshot:
    """The whole state on rank 0, with the same counters and no tensors on the others; every rank calls it together."""
    state, pieces = engine.basic_optimizer.state, _pieces(engine)
    for piece, parameters in pieces:
        _link(engine, piece, parameters)
    kinds = sorted(
        {kind for piece, _ in pieces for kind, value in state.get(piece, {}).items() if _is_moment(kind, value)}
    )
    moments: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for kind in kinds:
        for name, parameter in _trainables(engine):
            full = _moment(engine, parameter, kind)
            if full is not None and dist.rank() == 0:
                moments[kind][name] = _copy(full)
    names = {id(parameter): name for name, parameter in _trainables(engine)}
    counted = [(piece, parameters) for piece, parameters in pieces if "step" in state.get(piece, {})]
    counters = {
        "updates": {names[id(p)]: float(state[piece]["step"]) for piece, parameters in counted for p in parameters},
        "schedule": engine.lr_scheduler.state_dict(),
        "steps": engine.global_steps,
        "skipped": engine.skipped_steps,
        "loss_scale": _loss_scale(engine),
    }
    return Snapshot(gather_weights(engine), moments, counters)


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """Every parameter in full and float32, by name, on rank 0's host; {} on the other ranks."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    stage, gathered = engine.zero_optimization_stage(), {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        with deepspeed.zero.GatheredParameters([parameter], enabled=full is None and stage == 3):
            full = parameter.detach().float() if full is None else full  # stage 0, and what is frozen: no copy
        if dist.rank() == 0:
            gathered[name] = _copy(full)
    return gathered


def restore(engine: Any, snapshot: Snapshot) -> None:
    """Puts a state that any engine gathered into this one; every rank has the whole of it.

    Raises ValueError if the parameters are not the same ones.
    """
    _check(engine, snapshot)
    _fill(engine, snapshot)
    for name, parameter in engine.module.named_parameters():
        _put_weight(engine, parameter, snapshot.weights[name])
        for kind, values in snapshot.moments.items():
            if name in values:
                _put(engine, parameter, values[name], kind)
    counters = snapshot.counters
    engine.lr_scheduler.load_state_dict(dict(counters["schedule"]))
    for group, rate in zip(engine.basic_optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    engine.global_steps, engine.skipped_steps = counters["steps"], counters["skipped"]
    _put_loss_scale(engine, counters["loss_scale"])


def _trainables(engine: Any) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _pieces(engine: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """What the optimizer updates on this rank, each with the parameters that lie in it on any rank."""
    wrapper, optimizer = engine.optimizer, engine.basic_optimizer
    if wrapper is optimizer:
        return [(parameter, [parameter]) for group in optimizer.param_groups for parameter in group["params"]]
    for flat, parameters in _PIECES:
        if hasattr(wrapper, flat):
            return list(zip(getattr(wrapper, flat), getattr(wrapper, parameters), strict=True))
    raise RuntimeError(f"DeepSpeed's {type(wrapper).__name__} keeps its parameters where they are not looked for")


def _is_moment(kind: str, value: Any) -> bool:
    return kind != "step" and isinstance(value, Tensor)


def _moment(engine: Any, parameter: Tensor, kind: str) -> Tensor | None:
    from deepspeed.utils import safe_get_full_optimizer_state

    full = safe_get_full_optimizer_state(parameter, kind)
    return engine.basic_optimizer.state.get(parameter, {}).get(kind) if full is None else full


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _check(engine: Any, snapshot: Snapshot) -> None:
    here = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()}
    there = {name: tuple(tensor.shape) for name, tensor in snapshot.weights.items()}
    differ = sorted(name for name in here | there if here.get(name) != there.get(name))
    if differ:
        name = differ[0]
        raise ValueError(
            f"the checkpoint holds other parameters than this run has, {len(differ)} differ: {name!r} is "
            f"{there.get(name, 'missing')} there and {here.get(name, 'missing')} here; start a new run_dir"
        )


def _fill(engine: Any, snapshot: Snapshot) -> None:
    """Makes the optimizer's state, which torch makes with the first update.

    ZeRO counts a piece's updates together, so a piece has the counter of its parameter with most.
    """
    names = {id(parameter): name for name, parameter in _trainables(engine)}
    updates = snapshot.counters["updates"]
    optimizer = engine.basic_optimizer
    for piece, parameters in _pieces(engine):
        own = {names[id(parameter)] for parameter in parameters}
        state = {kind: torch.zeros_like(piece) for kind, values in snapshot.moments.items() if own & values.keys()}
        if counts := [updates[name] for name in own if name in updates]:
            state["step"] = torch.tensor(max(counts))
        optimizer.state[piece] = state
        _link(engine, piece, parameters)


def _link(engine: Any, piece: Tensor, parameters: list[Tensor]) -> None:
    """Makes what safe_* reads and writes at stages 1 and 2 the optimizer's state as it now is.

    DeepSpeed does it once, after the first group's first update, when that of the other groups is not there yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if hasattr(parameters[0], "_hp_mapping"):
        lazy_init_hp_params_optimizer_state(parameters, piece, engine.basic_optimizer.state)


def _put_weight(engine: Any, parameter: Tensor, value: Tensor) -> None:
    """Into what is computed with, in its own type, and into the float32 that is updated."""
    import deepspeed

    cut = engine.zero_optimization_stage() == 3
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if cut else None, enabled=cut):
        parameter.copy_(value)
    if parameter.requires_grad:
        _put(engine, parameter, value)


def _put(engine: Any, parameter: Any, value: Tensor, kind: str | None = None) -> None:
    """This rank's part of a moment, or of the float32 weight, where ZeRO keeps one."""
    from deepspeed import utils

    if hasattr(parameter, "ds_id"):
        # safe_set_full_* cuts without padding, and fails where the last rank's part is padded
        size = parameter.partition_numel()
        padded = F.pad(value.flatten(), (0, size * dist.world_size() - value.numel()))
        own = padded.narrow(0, size * dist.rank(), size)
        if kind is None:
            utils.safe_set_local_fp32_param(parameter, own)
        else:
            utils.safe_set_local_optimizer_state(parameter, own, kind)
    elif hasattr(parameter, "_hp_mapping"):
        if kind is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
    elif kind is not None:
        engine.basic_optimizer.state[parameter][kind].copy_(value)


def scalers(engine: Any) -> tuple[Any, Any]:
    """What adapts float16's loss scale, DeepSpeed's and, under autocast, torch's; None where nothing does."""
    own = getattr(engine.optimizer, "loss_scaler", None)
    autocast = getattr(engine.optimizer, "torch_autocast_gradscaler", None) or engine.torch_autocast_z0_gradscaler
    return own if own is not None and own.dynamic else None, autocast


def _loss_scale(engine: Any) -> dict[str, Any]:
    own, autocast = scalers(engine)
    numbers = vars(own) if own is not None else {}
    changing = {name: value for name, value in numbers.items() if name.startswith(("cur_", "last_"))}
    return {"deepspeed": changing, "autocast": autocast.state_dict() if autocast is not None else {}}


def _put_loss_scale(engine: Any, saved: dict[str, Any]) -> None:
    """A scaler that the saved state did not have starts as it does in a new run."""
    own, autocast = scalers(engine)
    if own is not None:
        vars(own).update(saved["deepspeed"])
    if autocast is not None and saved["autocast"]:
        autocast.load_state_dict(saved["autocast"])
