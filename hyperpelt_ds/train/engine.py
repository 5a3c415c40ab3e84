"""DeepSpeed, behind one small class. Only this file and partitions.py import it or ask for the ZeRO stage.

Here ranks find each other, and the trainables, an optimizer and a schedule become an engine. This file must not know
what a task, a batch's content or a checkpoint's layout is.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import math
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hyperpelt_ds import config as configuration
from hyperpelt_ds import dist
from hyperpelt_ds.config import Config, TrainConfig
from hyperpelt_ds.train import deepspeed_json, partitions
from hyperpelt_ds.train.partitions import Snapshot

_COMPILES_SECONDS = 900.0
"""DeepSpeed's op is compiled in less than a minute; a lock that is this old is of nobody."""

log = dist.logger(__name__)


def start_distributed() -> None:
    """Joins this process's group; works under `deepspeed`, `torchrun` and plain `python` (a group of one).

    The timeout is long because the first start on a machine compiles DeepSpeed's shared-memory op. Raises ValueError
    for processes that Slurm started as several and nobody numbered: each would train alone.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise ValueError(
                "srun started several processes without a RANK; start one torchrun a node (docs/clusters.md)"
            )
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's name for it
    if dist.has_gpu():
        torch.cuda.set_device(dist.device())
    elif Path("/dev/nvidia0").exists():
        why = "DS_ACCELERATOR=cpu says so" if os.environ.get("DS_ACCELERATOR") == "cpu" else "torch sees none of them"
        log.warning("this machine has GPUs and they are not used: %s", why)
    deepspeed = _deepspeed()
    _drop_old_locks()
    with contextlib.redirect_stdout(io.StringIO()):  # seen in 0.19.8: it prints on every rank that its op was built
        deepspeed.init_distributed(timeout=timedelta(minutes=30), auto_mpi_discovery=False, verbose=False)
    dist.barrier()
    dist.host_sum([0])  # hosts talk over gloo, whatever devices use: known to work before a model is loaded
    _shared_buffer().unlink(missing_ok=True)


def _drop_old_locks() -> None:
    """Deletes an old lock on DeepSpeed's op, which torch 2.11 would wait for until the file is gone: for ever, if a
    start was killed while it compiled, or if torch 2.14 used the folder, which leaves the file on purpose (seen). That
    one locks the file itself; nothing is done there."""
    from torch.utils import cpp_extension

    if not hasattr(cpp_extension, "FileBaton"):
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in root.glob("**/deepspeed_*/lock"):
        with contextlib.suppress(FileNotFoundError):  # another rank of this machine was faster
            if time.time() - lock.stat().st_mtime > _COMPILES_SECONDS:
                lock.unlink()
                log.warning("%s is older than any compilation takes and would be waited for: deleted", lock)


def _shared_buffer() -> Path:
    """The file in memory that DeepSpeed (seen in 0.19.8) makes for a rank's shared-memory reductions on CPUs.

    It never removes these 66 MiB. Once all ranks have mapped it, it needs no name, and goes with the process.
    """
    run = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{dist.rank()}"
    return Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{run}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The weights of linear maps decay, also those that are parameters of modules without a generator; embeddings,
    norms, biases, prefixes and scales do not. No group is ever empty, because the engine drops an empty one and so
    renumbers those after it."""
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    matrices |= {id(getattr(module, n)) for module in model.modules() for n in getattr(module, "linear_maps", ())}
    matrices -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}  # tied ones
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_factor(train: TrainConfig) -> Callable[[int], float]:
    """update number (from 0) -> factor of the learning rate: a linear warm-up, then the schedule, to 0 at the end."""

    def factor(update: int) -> float:
        if update < train.warmup_steps:
            return (update + 1) / (train.warmup_steps + 1)
        done = min(1.0, (update - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[train.schedule]

    return factor


Monitor = Callable[[int, Mapping[str, float]], None]
"""Takes the scalars of a step, on rank 0."""


class Engine:
    """The trainables under DeepSpeed. All methods are called by every rank together."""

    def __init__(self, engine: Any, precision: dict[str, Any], monitor: Monitor | None = None):
        self._engine = engine
        self.monitor = monitor
        """Takes scalars to where the DeepSpeed JSON wants them; None if it names no place."""
        self.precision = precision
        """The sections of the DeepSpeed configuration that decide in which type things are computed."""
        self.model: nn.Module = engine.module
        self.stage = int(engine.zero_optimization_stage())
        self.accumulation = int(engine.gradient_accumulation_steps())
        """What DeepSpeed divides a micro-batch's loss by."""
        self._guarded = hasattr(engine.optimizer, "overflow")
        """Whether DeepSpeed itself leaves out an update that is not finite. Seen in 0.19.8: all of its own optimizers
        do, given the settings that `deepspeed_json.merge` insists on; at stage 0 in float32 or autocast there is only
        torch's."""
        own, self._autocast_scaler = partitions.scalers(engine)
        self.searches_scale = own is not None or self._autocast_scaler is not None
        """Whether updates are left out on purpose now and then, to find float16's loss scale."""
        self._gradient_norm = torch.zeros(())

    @property
    def computes_in(self) -> str:
        """The type of numbers of a step, in words."""
        names = {"bf16": "bfloat16", "fp16": "float16"}
        found = [name for section, name in names.items() if self.precision.get(section, {}).get("enabled")]
        autocast = self.precision.get("torch_autocast", {})
        return f"autocast to {autocast['dtype']}" if autocast.get("enabled") else (found or ["float32"])[0]

    def forward(self, batch: Any, last: bool) -> Any:
        """The model on a micro-batch; `last` if it is the step's last one.

        A step may have more or fewer than `accumulation`, but must have the same number on every rank.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the micro-batch just forwarded, divided by `accumulation` and the world size.

        That of an infinite loss can be finite. Here it never is, so that the gradient alone, which all ranks share by
        the time of `step`, says whether the loss of any of them was not finite.
        """
        self._engine.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def step(self) -> bool:
        """Applies the accumulated gradient; False on every rank if it was not finite, or a rank's loss was not.

        Then weights, moments and schedule are what they were. Waits for the device, as DeepSpeed's own norm does.
        """
        scaler, applied = self._autocast_scaler, True
        if not self._guarded:  # then the engine also forgets the norm that it clips by
            self._gradient_norm = _norm(self.model) / (scaler.get_scale() if scaler else 1.0)
            applied = bool(self._gradient_norm.isfinite())
        if applied:
            self._engine.step()
            applied = bool(self._engine.was_step_applied())
        else:
            self._engine.zero_grad()
        if scaler and not applied:  # seen in DeepSpeed 0.19.8: its stages 1 and 2 would keep the scale for ever
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        return applied

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient that `step` would apply, in full, before clipping; None if there is none."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    def loss_scale(self) -> float:
        """What losses, and so the gradients of all that is not a parameter, are multiplied by for float16's sake."""
        own = getattr(self._engine.optimizer, "loss_scaler", None)
        return float(self._autocast_scaler.get_scale() if self._autocast_scaler else own.loss_scale if own else 1.0)

    def checksums(self) -> dict[str, int]:
        """A sum over the bits of every trainable as this rank holds it, by name. Waits for the device."""
        sums = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                with _deepspeed().zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
                    sums[name] = parameter.detach().view(bits).sum(dtype=torch.int64)
        return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))

    def gradient_norm(self) -> float:
        """Norm of the last step's gradient over all trainables, before clipping. Waits for the device."""
        norm = self._engine.get_global_grad_norm()
        return float(self._gradient_norm if norm is None else norm)

    def learning_rate(self) -> float:
        """The rate that the next step will be taken with."""
        return float(self._engine.get_lr()[0])

    def weights(self) -> dict[str, Tensor]:
        """Every parameter in full and fp32, by name, on rank 0's host; {} on the other ranks."""
        return partitions.gather_weights(self._engine)

    def snapshot(self) -> Snapshot:
        """The training state between two steps; the other ranks get no tensors. Waits for the copy to rank 0's host."""
        return partitions.gather(self._engine)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a snapshot, whole on every rank, of whatever stage, world size and precision it was.

        Raises ValueError if it is of other parameters.
        """
        partitions.restore(self._engine, snapshot)


def start(model: nn.Module, config: Config, ds_config_path: str | Path) -> Engine:
    """Wraps `model`, whose registered parameters are exactly the trainables, already on the device.

    Call `start_distributed` first. Raises RuntimeError on every rank if the ranks differ in configuration or weights.
    """
    settings = deepspeed_json.merge(ds_config_path, config, dist.world_size())
    dist.agree("the configuration", configuration.to_dict(config))
    dist.agree(f"the DeepSpeed configuration {ds_config_path}", settings)
    dist.agree("the initial weights", _fingerprint(model))
    train = config.train
    decay = 0.0 if config.transfer.train == "embeddings" else train.weight_decay  # other tasks' rows would decay too
    optimizer = torch.optim.AdamW(parameter_groups(model, decay), lr=train.learning_rate)
    # The schedule must be handed over here: one that the engine does not know is not saved with it.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(train))
    # Kept from the engine, which would write figures of its own and wait for the device in every micro-batch.
    monitors = {key: settings.pop(key) for key in deepspeed_json.MONITORS if key in settings}
    try:
        engine, *_ = _deepspeed().initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
        monitor = _monitor(monitors)
    except ValidationError as error:  # what DeepSpeed's own sections say of an unknown or ill-typed key
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(f"{ds_config_path}: {faults}") from None
    partitions.leave_frozen_maps_alone()
    return Engine(engine, {key: settings[key] for key in deepspeed_json.PRECISION if key in settings}, monitor)


def _monitor(sections: dict[str, Any]) -> Monitor | None:
    """DeepSpeed's own writers for what `sections` enable."""
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    config = get_monitor_config(sections)
    if not config.enabled:
        return None
    master = MonitorMaster(config)

    def write(step: int, values: Mapping[str, float]) -> None:
        master.write_events([(name, value, step) for name, value in values.items()])

    return write


@functools.cache
def _deepspeed() -> ModuleType:
    """DeepSpeed, imported late (it takes seconds) and after its environment: it looks for `ninja` on PATH, which a
    venv that was not activated lacks, and probes for accelerators unless told. What concerns neither the run nor its
    user is left out: that there is no CUDA where none is used, and which of torch's functions DeepSpeed should call."""
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    if not dist.has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    return deepspeed


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _norm(model: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
