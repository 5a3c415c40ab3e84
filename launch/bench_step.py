"""What generated weights cost on top of the frozen model: one train step and one 16-token decode, side by side.

Every system of a case runs in the same process, in turn, round by round, on the same inputs. Always measured:

    floor               the frozen model alone: forward, and backward to its input embeddings (no weight gradients)
    hyperpelt/one_task  HyperPELT with every sample of one task
    hyperpelt/mixed     HyperPELT with eight tasks in the batch
    hyperpelt/images    HyperPELT with eight tasks and a different image for every sample
    peft_lora           peft LoRA of rank 8 on the query and value projections

and in the case `study`, whose model has the shape of the demo's, every method of docs/study.md too, with its sizes
there, on five tasks mixed; `/images` beside a name: every sample has an image, in the method's own way.

Models are random (speed does not depend on the values); a case's name gives its sizes. A train step is forward and
backward of the trainables; with `--optimizer` one AdamW step as well. Time: `ratio` is the median over rounds of this
system's time to the floor's time in the same round. `saved_bytes` are held between forward and backward, frozen weights
left out; `task_bytes` belong to one task alone, in fp32, and are all that a further task would add. FLOPs are those of
matrix products and attention, forward and backward together for a train step.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from command import run
from turns import keep, take_turns

if TYPE_CHECKING:
    from hyperpelt_ds.config import Config
    from hyperpelt_ds.contracts import Batch

DECODE_TOKENS = 16
STUDY = "study"
VISION = dict(cells=49, channels=512)
STUDY_VISION = dict(cells=16, channels=1280)
_BART_6X6 = dict(
    model_type="bart",
    d_model=512,
    encoder_layers=6,
    decoder_layers=6,
    encoder_attention_heads=8,
    decoder_attention_heads=8,
    encoder_ffn_dim=2048,
    decoder_ffn_dim=2048,
    vocab_size=32128,
    dropout=0.0,
)
MODELS: dict[str, dict[str, Any]] = {
    "t5_small": dict(
        model_type="t5", d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32128, dropout_rate=0.0
    ),
    "bart_6x6_d512": _BART_6X6,
    STUDY: _BART_6X6
    | dict(d_model=256, decoder_layers=2, encoder_ffn_dim=1536, decoder_ffn_dim=1536, vocab_size=32000),
}


class System(NamedTuple):
    """One way to do it. Each call of `act` is one train step or one decode."""

    act: Callable[[], None]
    weights: Sequence[Any]
    """All that is there before and after."""
    update: Callable[[], None] | None = None
    """What follows a train step, where anything is trained."""
    own: int | None = None
    """Bytes that belong to one task alone, where that is known."""


def bench_step(
    *,
    out: str | None = None,
    cases: str = "t5_small,bart_6x6_d512",
    rounds: int = 5,
    batch: int = 16,
    source: int = 32,
    target: int = 8,
    optimizer: bool = False,
) -> None:
    """Time every system of every case and write JSON lines (case, system, metric, median, min, max, ratio).

    Examples:
        python launch/bench_step.py --out bench_step.jsonl
        python launch/bench_step.py --out bench_step.jsonl --rounds 9 --cases t5_small
        python launch/bench_step.py --out docs/results/cost.jsonl --rounds 9 --cases study --source 24 --target 4

    Args:
        out: file for the JSON lines; a table is printed either way
        cases: names separated by commas, of t5_small, bart_6x6_d512 and study
        rounds: counted rounds after one warm-up round
        batch: samples in a batch
        source: source tokens of a sample
        target: target tokens of a sample
        optimizer: count an AdamW step on the trainables into the train step
    """
    names = [name for name in cases.split(",") if name]
    for name in names:
        if name not in MODELS:
            raise ValueError(f"--cases: unknown case {name!r}; allowed are {', '.join(MODELS)}")
    for flag, value in {"rounds": rounds, "batch": batch, "source": source, "target": target}.items():
        if value < 1:
            raise ValueError(f"--{flag} must be at least 1, got {value}")
    if out and not Path(out).resolve().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {Path(out).parent}")
    import torch

    from hyperpelt_ds import dist

    device = dist.device().type
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds")
    lines: list[dict[str, Any]] = []

    def add(case: str, system: str, metric: str, own: list[float], floor: list[float], unit: str) -> None:
        ratios = [mine / other for mine, other in zip(own, floor, strict=True)]
        median, low, high = statistics.median(own), min(own), max(own)
        line = {"case": case, "system": system, "metric": metric, "median": median, "min": low, "max": high}
        lines.append(
            {**line, "ratio": statistics.median(ratios), "hardware": hardware, "threads": torch.get_num_threads()}
        )
        ratio = f"x{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"{case:30} {metric:14} {system:24} {median:10.4g} {unit} [{low:.4g}, {high:.4g}]  {ratio}", flush=True)

    for name in names:
        case = f"{name} B{batch} S{source} T{target} float32"
        for kind in ("train_step", f"decode_{DECODE_TOKENS}"):
            train = kind == "train_step"
            systems = _systems(name, batch, source, target, train, optimizer, device)
            times = take_turns({key: _whole(system) for key, system in systems.items()}, rounds, device)
            for system, seconds in times.items():
                add(case, system, f"{kind}_s", seconds, times["floor"], "s")
            counted = {system: _flops(own.act) / batch / 1e6 for system, own in systems.items()}
            for system, flops in counted.items():
                add(case, system, f"{kind}_mflops", [flops], [counted["floor"]], "MFLOP a sample")
            held = {system: _saved(own) / batch for system, own in systems.items()} if train else {}
            for system, size in held.items():
                add(case, system, "saved_bytes", [size], [held["floor"]], "bytes a sample")
            for system, own in systems.items() if train else ():
                if own.own is not None:
                    add(case, system, "task_bytes", [own.own], [own.own or 1], "bytes a task")
    keep(lines, out, "docs/kernels.md")


def _whole(system: System) -> Callable[[], None]:
    def step() -> None:
        system.act()
        if system.update:
            system.update()

    return step


def _flops(action: Callable[[], None]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def _saved(system: System) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass; weights do not count, nor views twice."""
    import torch

    weights = {tensor.untyped_storage().data_ptr() for tensor in system.weights}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, or the next one would get the address of a freed one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        system.act()
    return sum(storage.nbytes() for storage in kept.values())


def _systems(
    name: str, batch: int, source: int, target: int, train: bool, optimizer: bool, device: str
) -> dict[str, System]:
    """What is run for a case."""
    import torch

    torch.manual_seed(0)
    vocabulary = MODELS[name]["vocab_size"]
    ids = torch.randint(3, vocabulary, (batch, source), device=device)
    labels = torch.randint(3, vocabulary, (batch, target), device=device)
    mask = torch.ones_like(ids)
    systems: dict[str, System] = {"floor": _floor(name, ids, mask, labels, train, device)}

    def ours(settings: list[str], tasks: int, vision: dict[str, int] | None) -> System:
        return _ours(name, settings, tasks, vision, ids, mask, labels, train, optimizer, device)

    if name == STUDY:
        from hyperpelt_ds.study import plan

        for key in ("hyperpelt", plan.OWN):
            systems[f"{key}/one_task"] = ours(list(plan.METHODS[key].settings), 1, None)
        for key, method in plan.METHODS.items():
            blind = [setting for setting in method.settings if not setting.startswith("vision.")]
            systems[f"{key}/mixed"] = ours(blind, len(plan.TASKS), None)
            systems[f"{key}/images"] = ours(list(method.settings), len(plan.TASKS), STUDY_VISION)
        for key, settings in plan.IMAGE_WAYS.items():
            if key != "neither":
                systems[f"image/{key}"] = ours(list(settings), len(plan.TASKS), STUDY_VISION)
    else:
        sizes = ["modules.prefix_length=16", "modules.bottleneck=24"]
        systems["hyperpelt/one_task"] = ours(sizes, 1, None)
        systems["hyperpelt/mixed"] = ours(sizes, 8, None)
        systems["hyperpelt/images"] = ours(sizes, 8, VISION)
    systems["peft_lora"] = _peft_lora(name, ids, mask, labels, train, optimizer, device)
    return systems


def _model(name: str, device: str) -> Any:
    import torch

    from hyperpelt_ds.backbones import random_model

    torch.manual_seed(0)
    model = random_model(**MODELS[name], decoder_start_token_id=0, forced_eos_token_id=None).to(device)
    model.generation_config.eos_token_id = None  # random weights must not stop early
    model.config.eos_token_id = None
    return model


def _decode(model: Any, ids: Any, mask: Any) -> None:
    model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=DECODE_TOKENS, min_new_tokens=DECODE_TOKENS, do_sample=False
    )


def _floor(name: str, ids: Any, mask: Any, labels: Any, train: bool, device: str) -> System:
    model = _model(name, device).requires_grad_(False).train(train)
    weights = list(model.parameters())
    if not train:
        return System(lambda: _decode(model, ids, mask), weights)

    def step() -> None:
        embed = model.get_input_embeddings()
        inputs = embed(ids).requires_grad_()
        decoder_inputs = embed(model.prepare_decoder_input_ids_from_labels(labels=labels)).requires_grad_()
        model(
            inputs_embeds=inputs,
            attention_mask=mask,
            decoder_inputs_embeds=decoder_inputs,
            labels=labels,
            use_cache=False,
        ).loss.backward()

    return System(step, weights)


def _ours(
    name: str,
    settings: list[str],
    tasks: int,
    vision: dict[str, int] | None,
    ids: Any,
    mask: Any,
    labels: Any,
    train: bool,
    optimizer: bool,
    device: str,
) -> System:
    """A run's model with so many tasks in the batch; with `vision` every sample has an image of its own."""
    import torch

    from hyperpelt_ds.backbones import Backbone
    from hyperpelt_ds.config import Config
    from hyperpelt_ds.model import HyperPELT

    seen = [f"vision.{key}={value}" for key, value in vision.items()] + ["vision.encoder=resnet18"] if vision else []
    config = Config().override([*settings, *seen])
    backbone = Backbone(_model(name, device), None, config.modules, config.model.train_backbone)
    model = HyperPELT(config, backbone, [f"task{i}" for i in range(tasks)])
    model.to_device(torch.device(device)).train(train)
    batch = _batch(config, tasks, ids, mask, labels).to(torch.device(device))
    weights = [*model.parameters(), *backbone.model.parameters(), backbone.initial_norms]
    if not train:
        return System(lambda: _drop(model.generate(batch, DECODE_TOKENS)), weights)
    update = _update([p for p in model.parameters() if p.requires_grad], optimizer)
    own = sum(p.nbytes for key, p in model.named_parameters() if key in model.per_task) // tasks
    return System(lambda: model(batch).loss.backward(), weights, update, own)


def _batch(config: Config, tasks: int, ids: Any, mask: Any, labels: Any) -> Batch:
    import torch

    from hyperpelt_ds.contracts import Batch, Sample

    size, vision = len(ids), config.vision if config.vision.encoder else None
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        targets=torch.arange(labels.numel()),
        tasks=torch.arange(tasks),
        task_rows=(torch.arange(size) * tasks // size),
        images=torch.randn(size, vision.cells, vision.channels) if vision else None,
        image_rows=torch.arange(size) if vision else None,
        loss_weights=torch.full((size,), 1 / size),
        samples=tuple(Sample(str(i), "task0", "", "", image=str(i) if vision else None) for i in range(size)),
    )


def _peft_lora(name: str, ids: Any, mask: Any, labels: Any, train: bool, optimizer: bool, device: str) -> System:
    from peft import LoraConfig, get_peft_model

    targets = ["q", "v"] if MODELS[name]["model_type"] == "t5" else ["q_proj", "v_proj"]
    model = get_peft_model(_model(name, device), LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, target_modules=targets))
    model.train(train)
    weights = list(model.parameters())
    if not train:
        return System(lambda: _decode(model, ids, mask), weights)

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()

    return System(step, weights, _update([p for p in weights if p.requires_grad], optimizer))


def _update(parameters: list[Any], optimizer: bool) -> Callable[[], None]:
    """What follows a backward pass: the gradients are dropped, after a step with `optimizer`."""
    import torch

    adam = torch.optim.AdamW(parameters)

    def update() -> None:
        if optimizer:
            adam.step()
        adam.zero_grad()

    return update


def _drop(_: Any) -> None:
    return None


if __name__ == "__main__":
    run(bench_step)
