"""Forecasts as text: of one run for launch/estimate.py, and the tables of docs/scaling.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperpelt_ds import recipes
from hyperpelt_ds.config import Config
from hyperpelt_ds.counts import amount
from hyperpelt_ds.forecast import memory, step_time
from hyperpelt_ds.forecast.micro_batch import Look, Mix, look
from hyperpelt_ds.forecast.step_time import Machine
from hyperpelt_ds.train import traffic, zero
from hyperpelt_ds.train.traffic import Traffic
from hyperpelt_ds.train.zero import Setup

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "demo": ("demo", ("train.micro_batch=16",)),
    "T5-base": ("glue_t5_base", ("model.dtype=bfloat16",)),
    "T5-XXL": (
        "glue_t5_base",
        ("model.backbone=google/t5-v1_1-xxl", "model.dtype=bfloat16", "train.micro_batch=8"),
    ),
    "T5-XXL, 300 M": (
        "glue_t5_base",
        (
            *("model.backbone=google/t5-v1_1-xxl", "model.dtype=bfloat16", "train.micro_batch=8"),
            *("modules.bottleneck=64", "hypernet.hyper_size=551"),
        ),
    ),
}
"""What docs/scaling.md foretells: name -> recipe and overrides."""
WORLDS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Forecast:
    """All that is said of a run."""

    setup: Setup
    mix: Mix
    seen: Look
    backend: str
    memory: dict[str, int]
    host: int
    traffic: Traffic

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types; sizes in bytes, of a rank and an optimizer step."""
        chosen = {name: str(value) if "torch." in str(value) else value for name, value in vars(self.setup).items()}
        return {
            "setup": chosen,
            "micro_batch": {**dataclasses.asdict(self.mix), **dataclasses.asdict(self.seen.micro_batch)},
            "memory_bytes": {**self.memory, "total": sum(self.memory.values()), "on the host": self.host},
            "sent_bytes": {**dataclasses.asdict(self.traffic), "total": self.traffic.total, "backend": self.backend},
        }


def mix_of(config: Config, tasks: int, world_size: int, batch_tasks: int = 0, batch_images: int = -1) -> Mix:
    """The mix of a micro-batch, by default the most expensive: as many tasks as there are, and an image a sample."""
    size = min(config.train.micro_batch, config.train.global_batch // world_size)
    images = batch_images if batch_images >= 0 else size if config.vision.encoder is not None else 0
    return Mix(size, batch_tasks or min(tasks, size), images)


def forecast(config: Config, ds_config: str | Path, world_size: int, tasks: int, mix: Mix, backend: str) -> Forecast:
    """What a run of `config` costs a rank. Raises ValueError as `zero.read` and `micro_batch.look` do, and for a
    backend that is not known."""
    if backend not in traffic.BACKENDS:
        raise ValueError(f"backend {backend!r}: allowed are {', '.join(traffic.BACKENDS)}")
    chosen = zero.read(ds_config, config, world_size)
    config = config.override([f"model.shard_backbone={str(chosen.splits_backbone).lower()}"])  # alone nothing is split
    return combine(chosen, mix, look(config, tasks, mix, chosen.autocast, chosen.weights), backend)


def combine(chosen: Setup, mix: Mix, seen: Look, backend: str) -> Forecast:
    """The same for a model that was looked at before: ranks and stages do not change what a micro-batch does."""
    held = memory.per_rank(chosen, seen.trainables, seen.frozen, seen.micro_batch)
    return Forecast(
        *(chosen, mix, seen, backend, held),
        host=memory.on_host(chosen, seen.trainables),
        traffic=traffic.per_rank(chosen, seen.trainables, backend, seen.micro_batch.gathered),
    )


def text(found: Forecast) -> str:
    """The forecast of one run."""
    chosen, mix, held, sent = found.setup, found.mix, found.memory, found.traffic
    images = f", {mix.images} images" if mix.images else ""
    lines: list[tuple[str, str]] = [
        (f"memory of a rank, {chosen.world_size} ranks, ZeRO {chosen.stage}", amount(sum(held.values()))),
        *((f"  {name}", amount(size)) for name, size in held.items() if size),
        *([("  and on the host", amount(found.host))] if found.host else []),
        (f"sent by a rank in an optimizer step ({found.backend})", amount(round(sent.total))),
        ("  gradients", amount(round(sent.gradients))),
        ("  weights", amount(round(sent.weights))),
        ("  agreement and norms", amount(round(sent.control))),
        ("  of the frozen backbone", amount(round(sent.backbone))),
    ]
    flops = found.seen.micro_batch.forward_flops + found.seen.micro_batch.backward_flops
    lines.append(("computed in a micro-batch", f"{flops / 1e12:.3f} TFLOP"))
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    said = (
        f"{chosen.accumulation} micro-batches of {mix.samples} samples ({mix.tasks} tasks{images}) a step; "
        f"trainables in {_name(chosen.weights)}, gradients cross in {_name(chosen.reduced)}"
    )
    return "\n".join([said, *(f"{a:<{widths[0]}}  {b:>{widths[1]}}" for a, b in lines)])


def scaling(cases: Mapping[str, tuple[str, Sequence[str]]], folder: Path, machine: Machine) -> str:
    """Memory by stage, and step time by stage and ranks, of every case as markdown; DeepSpeed JSONs from `folder`."""
    memories, times = [], []
    for name, (recipe, overrides) in cases.items():
        config = recipes.get(recipe).override(overrides)
        tasks = len(config.data.tasks) or 8
        mix = mix_of(config, tasks, 1)
        seen: Look | None = None
        for stage in range(4):
            for world in WORLDS:
                run = _one_micro_batch(config, world)
                chosen = zero.read(folder / f"zero{stage}.json", run, world)
                seen = seen or look(config, tasks, mix, chosen.autocast, chosen.weights)
                found = combine(chosen, mix, seen, "nccl")
                if world == WORLDS[0]:
                    memories.append(_memory_row(name, found))
                predicted = step_time.predict(chosen, seen.micro_batch, found.traffic, config.data.workers, machine)
                times.append((name, stage, world, found.traffic.total, predicted))
    return "\n\n".join(
        [
            _markdown(["case, 8 ranks", "ZeRO", "total", *_SHOWN, "everything else"], memories),
            _markdown(
                ["case", "ZeRO", f"sent at {WORLDS[-1]}, MB", *(f"{world} GPUs" for world in WORLDS)],
                list(_time_rows(times)),
            ),
        ]
    )


def measured(lines: Iterable[Mapping[str, Any]]) -> str:
    """Bytes on the wire beside their formula, from the records of tests/measure_wire.py."""
    rows = [[line["name"], str(line["world_size"]), line["network"], *_measured_cells(line)] for line in lines]
    header = ["run", "ranks", "network", "trainables, MB", "backbone, MB", "sent, MB a step", "formula, MB", "ratio"]
    return _markdown(header, rows)


def _measured_cells(line: Mapping[str, Any]) -> list[str]:
    megabytes = [4 * line["trainable"] / 1e6, 4 * line["backbone"] / 1e6, line["sent"] / 1e6, line["formula"] / 1e6]
    ratio = f"{line['sent'] / line['formula']:.3f}" if line["formula"] else ""
    return [*(f"{size:.2f}" for size in megabytes), ratio]


_SHOWN = ("frozen backbone", "kept activations")
_STATES = ("trainable weights", "gathered weights", "float32 masters", "optimizer state", "gradients")


def _memory_row(name: str, found: Forecast) -> list[str]:
    total = sum(found.memory.values())
    shown = [found.memory[part] for part in _SHOWN]
    return [name, str(found.setup.stage), *(f"{size / 2**30:.2f} GiB" for size in (total, *shown, total - sum(shown)))]


def _one_micro_batch(config: Config, world: int) -> Config:
    """The run on so many ranks with one micro-batch a rank and step: where communication weighs most."""
    batch = config.train.micro_batch * world
    return config.override([f"train.global_batch={batch}", f"data.lanes={world}"])


def _time_rows(times: Sequence[tuple[str, int, int, float, step_time.StepTime]]) -> Iterable[list[str]]:
    for name, stage in dict.fromkeys((name, stage) for name, stage, *_ in times):
        own = [line for line in times if line[:2] == (name, stage)]
        cells = [f"{1e3 * time.total:.0f} ms, {100 * time.efficiency:.0f} %" for *_, time in own]
        yield [name, str(stage), f"{own[-1][3] / 1e6:.0f}", *cells]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
