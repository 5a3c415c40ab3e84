"""The plain sections: setup, counts, what became of the data, environment. Tables of facts, a column for each run."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hyperpelt_ds.report import state
from hyperpelt_ds.report.files import RunFiles
from hyperpelt_ds.report.html import Html, folded, join, number, table, tag
from hyperpelt_ds.report.shown import Shown, facts

_LISTED = 200
"""At most so many lines of a ledger are on the page; the files have all."""


def setup(runs: Sequence[Shown]) -> Html | None:
    """The settings that describe a run, those that differ, and all."""
    if not any(run.files.config for run in runs):
        return None
    flat = [_flat(run.files.config) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))

    def row(name: str) -> list[object]:
        return [tag("code", name), *(_value(settings[name]) if name in settings else "–" for settings in flat)]

    head = ["", *(run.swatch for run in runs)]
    differing = [name for name in names if len({_value(s.get(name)) for s in flat if s}) > 1]
    parts: list[Html] = [facts(runs, _SETUP)]
    if len(runs) > 1:
        parts.append(tag("h3", "Settings that differ"))
        words = table(head, map(row, differing), words=len(head))
        parts.append(words if differing else tag("p", "None.", class_="quiet"))
    parts.append(folded(f"all {len(names)} settings", table(head, map(row, names), words=len(head))))
    return join(parts)


def counts(runs: Sequence[Shown]) -> Html | None:
    """Trainable parameters by part, and samples drawn by task."""
    parts = []
    owners = list(dict.fromkeys(part for run in runs for part in run.files.parameters))
    if owners:
        rows = [[tag("code", part), *(_count(run.files.parameters.get(part)) for run in runs)] for part in owners]
        rows.append([tag("strong", "trainable"), *(_trainable(run.files) for run in runs)])
        totals = [(run.files.results or {}).get("total") for run in runs]
        if any(totals):
            rows.append(["of all parameters", *(_count(total) for total in totals)])
        parts += [tag("h3", "Parameters"), table(["", *(run.swatch for run in runs)], rows)]
    draws = [_draws(run.files) for run in runs]
    tasks = list(dict.fromkeys(task for own in draws for task in own))
    if tasks:
        rows = [[task, *(_count(own.get(task)) for own in draws)] for task in tasks]
        rows.append([tag("strong", "all"), *(tag("strong", _count(sum(own.values()) or None)) for own in draws)])
        parts.append(tag("h3", "Samples drawn, up to the newest checkpoint"))
        parts.append(table(["", *(run.swatch for run in runs)], rows))
    return join(parts) if parts else None


def data(runs: Sequence[Shown]) -> Html | None:
    """Samples that could not be used and steps that changed nothing, of each run; None without any line of metrics."""
    runs = [run for run in runs if run.files.lines or run.files.holes or run.files.bad_steps]
    parts = [part for run in runs for part in (_holes(run), _bad_steps(run))]
    return join(parts) if parts else None


def environment(runs: Sequence[Shown]) -> Html | None:
    """Command, machine and packages."""
    if not any(run.files.environment for run in runs):
        return None
    packages = list(dict.fromkeys(name for run in runs for name in run.files.environment.get("packages", {})))
    rows = [
        ("command", lambda run: tag("code", shlex.join(map(str, run.environment.get("command", []))))),
        *((key, lambda run, key=key: run.environment.get(key)) for key in ("python", "platform", "device", "threads")),
        ("processes", lambda run: number(run.environment.get("world_size"))),
        ("machines", lambda run: ", ".join(sorted(state.hosts(run.folder)))),
        *((name, lambda run, name=name: run.environment.get("packages", {}).get(name)) for name in packages),
    ]
    stacks = [
        folded(join([run.swatch, f" {name}"]), tag("pre", text))
        for run in runs
        for name, text in run.files.stacks.items()
    ]
    return join([facts(runs, rows), tag("h3", "Stacks that the watchdog left") if stacks else None, *stacks])


def _modules(run: RunFiles) -> str:
    sizes = {"prefix": "prefix_length", "adapter": "bottleneck", "lora": "lora_rank"}
    kinds = run.setting("modules.kinds") or []
    return ", ".join(f"{kind} ({run.setting(f'modules.{sizes[kind]}')})" if kind in sizes else kind for kind in kinds)


def _of_checkpoint(run: RunFiles, key: str) -> Any:
    return run.checkpoint.state.get(key) if run.checkpoint else None


def _tasks(run: RunFiles) -> str:
    return ", ".join(run.setting("data.tasks") or [])


def _batch(run: RunFiles) -> str | None:
    whole, micro = run.setting("train.global_batch"), run.setting("train.micro_batch")
    return f"{number(whole)} samples, {number(micro)} at once on a process" if whole else None


def _rate(run: RunFiles) -> str | None:
    rate, schedule = run.setting("train.learning_rate"), run.setting("train.schedule")
    return f"{number(rate)}, {schedule}, {number(run.setting('train.warmup_steps'))} steps of warm-up" if rate else None


def _encoder(run: RunFiles) -> str:
    name = run.setting("vision.encoder")
    return f"{name}, {run.setting('vision.cells')} cells" if name else ""


_SETUP = [
    ("recipe", lambda run: run.setting("recipe")),
    ("frozen model", lambda run: run.setting("model.backbone")),
    ("modules", _modules),
    ("weights from", lambda run: ", ".join(run.setting("hypernet.conditions") or [])),
    ("image encoder", _encoder),
    ("tasks", _tasks),
    ("data", lambda run: run.setting("data.manifest")),
    ("steps", lambda run: number(run.setting("train.steps")) if run.config else None),
    ("batch", _batch),
    ("learning rate", _rate),
    ("seed", lambda run: run.setting("train.seed")),
    ("ZeRO stage", lambda run: _of_checkpoint(run, "zero_stage")),
    ("processes", lambda run: run.environment.get("world_size")),
    ("device", lambda run: run.environment.get("device")),
]


def _holes(run: Shown) -> Html:
    holes = run.files.holes
    if not holes:
        return tag("p", run.swatch, ": every sample that was drawn could be used.")
    reasons = Counter((hole["shard"], hole["reason"]) for hole in holes)
    rows = [[shard, reason, number(n)] for (shard, reason), n in reasons.most_common(20)]
    keys = ("step", "task", "key", "shard", "reason")
    lines = [[hole[key] for key in keys] for hole in holes[-_LISTED:]]
    shown = f"the last {_LISTED} of {number(len(holes))}" if len(holes) > _LISTED else f"all {len(holes)}"
    return join([
        tag("p", run.swatch, f": {number(len(holes))} times a sample was drawn that could not be used."),
        table(["shard", "reason", "times"], rows, words=2),
        folded(shown, table(keys, lines, words=len(keys))),
    ])  # fmt: skip


def _bad_steps(run: Shown) -> Html | None:
    steps, back = run.files.bad_steps, run.files.rollback
    if not steps:
        return None
    rows = [
        [s["step"], f"{s['samples'][0]} to {s['samples'][1] - 1}", s["reason"], ", ".join(s["culprits"])] for s in steps
    ]
    said = f"{number(len(steps))} steps changed no weight."
    if back:
        first, end = back["samples"]
        said += f" At step {back['from_step']} the run went back; samples {first} to {end - 1} are left out since."
    head = ["step", "samples", "reason", "whose loss was not finite"]
    return join([
        tag("p", run.swatch, ": ", said),
        folded(f"{min(len(rows), _LISTED)} steps", table(head, rows[-_LISTED:], words=4)),
    ])  # fmt: skip


def _draws(run: RunFiles) -> dict[str, int]:
    counts = run.checkpoint.state["progress"]["stream"]["counts"] if run.checkpoint else {}
    return {task: sum(lanes) for task, lanes in counts.items()}


def _trainable(run: RunFiles) -> Html:
    return tag("strong", _count(sum(run.parameters.values()) or None))


def _count(value: int | None) -> str:
    return "–" if value is None else number(value)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in config.items():
        own = value if isinstance(value, dict) else {"": value}
        flat |= {f"{section}.{key}".rstrip("."): inner for key, inner in own.items()}
    return flat


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
