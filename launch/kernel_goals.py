"""The goals that the kernels were given for a GPU, judged from a benchmark's own lines: met, missed, or not measured.

Names as in docs/kernels.md. Ratios of `median` are of wall-clock time, those of `gpu_s` of the time of all kernels.
What tests decide (determinism, accuracy) is met where they were run and green, or nothing would have been timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

TASKS, LONG, IMAGES, LONG_IMAGES = (
    "tasks8_B64_S64_m64",
    "tasks8_B64_S512_m64",
    "images_B64_S64_m64",
    "images_B64_S512_m64",
)
WIDE, WIDE_IMAGES, MANY, MANY_IMAGES = (
    "tasks8_B64_S64_m64_d4096",
    "images_B64_S64_m64_d4096",
    "tasks8_B256_S64_m64",
    "images_B256_S64_m64",
)
PREFIX = "prefix_images_B64_T20_P49"
GRAPH_CASES = (TASKS, LONG, IMAGES, LONG_IMAGES)
COMPILED_CASES = (TASKS, LONG, IMAGES)

# goal, case, slower system, faster system, field, at least
RATIOS = (
    ("G1", TASKS, "loop_task", "graph", "median", 40),
    ("G1", LONG, "loop_task", "graph", "median", 8),
    ("G2", IMAGES, "loop_example", "graph", "median", 100),
    ("G2", LONG_IMAGES, "loop_example", "graph", "median", 40),
    ("G3", TASKS, "eager_bmm", "ours", "gpu_s", 5),
    ("G3", LONG, "eager_bmm", "ours", "gpu_s", 2.4),
    ("G3", WIDE, "eager_bmm", "ours", "gpu_s", 6),
    ("G4", IMAGES, "eager_bmm", "ours", "gpu_s", 2.3),
    ("G4", LONG_IMAGES, "eager_bmm", "ours", "gpu_s", 2),
    ("G4", WIDE_IMAGES, "eager_bmm", "ours", "gpu_s", 2.5),
    ("G5", LONG, "compiled", "ours", "gpu_s", 1.6),
    ("G5", TASKS, "compiled", "ours", "gpu_s", 3.5),
    ("G5", IMAGES, "compiled", "ours", "gpu_s", 1.4),
    ("G7", MANY, "eager_bmm", "ours", "beyond_x_bytes", 8),
    ("G7", MANY_IMAGES, "eager_bmm", "chunked", "beyond_x_bytes", 8),
    ("G9", "step t5_base", "gather", "ours", "gpu_s", 1.3),
    ("G9", "step t5_base_long", "gather", "ours", "gpu_s", 1.1),
    ("G9", "step t5_xxl_6x6_layers", "gather", "ours", "gpu_s", 1.1),
)

# goal, step, at most so much of the frozen model's own time on top
OVERHEADS = (
    ("G8", "step t5_base", 0.10),
    ("G8", "step t5_base_long", 0.06),
    ("G8", "step t5_xxl_6x6_layers", 0.03),
    ("G8", "step t5_base_images", 0.30),
)


class Verdict(NamedTuple):
    """One goal at one case; `found` is None where it was not measured."""

    goal: str
    case: str
    what: str
    target: float
    found: float | None
    met: bool | None

    def __str__(self) -> str:
        found = "not measured" if self.found is None else f"{self.found:.3g}, {'met' if self.met else 'missed'}"
        return f"{self.goal:4}{self.case:28} {self.what:44} goal {self.target:g}: {found}"


Lines = Mapping[tuple[str, str], Mapping[str, Any]]


def judged(lines: Iterable[Mapping[str, Any]], cases: Iterable[Any], rate: float) -> list[Verdict]:
    """A verdict for every goal; `cases` are the adapters' shapes, `rate` the bytes a second of a copy, in this run."""
    of: Lines = {(line["case"], line["system"]): line for line in lines if "median" in line}
    shapes = {case.name: case for case in cases}
    found = [
        _at_least(goal, case, f"{slow} / {fast}, {field}", least, _ratio(of, case, slow, fast, field))
        for goal, case, slow, fast, field, least in RATIOS
    ]
    for goal, case, most in OVERHEADS:
        ratio = _ratio(of, case, "ours", "floor", "gpu_s")
        found.append(_at_most(goal, case, "on top of the frozen model", most, None if ratio is None else ratio - 1))
    for case, least in ((LONG, 0.8), (WIDE, 0.8), (TASKS, 0.55)):
        found.append(_at_least("G6", case, "forward kernel, of the copy rate", least, _forward(of, shapes, case, rate)))
        found.append(_at_least("G6", case, "backward kernels, of x, dy, dx", 0.45, _backward(of, shapes, case, rate)))
    for case in (TASKS, IMAGES):
        found.append(
            _at_least("G6", case, "generating product, of the copy rate", 0.7, _product(of, shapes, case, rate))
        )
    for case in (TASKS, IMAGES):
        found.append(_at_most("G10", case, "launches of a pass, a site", 3, _launches(of, shapes, case)))
        found.append(_at_least("G10", case, "captured in a graph", 1, None if (case, "graph") not in of else 1))
    for field, least in (("gpu_s", 4), ("peak_bytes", 20)):
        best = [_beyond(of, "copied", other, field) for other in ("absorbed", "explicit")]
        known = [ratio for ratio in best if ratio is not None]
        found.append(_at_least("G16", PREFIX, f"copied / map absorbed, {field}", least, max(known, default=None)))
    return found


def _at_least(goal: str, case: str, what: str, target: float, found: float | None) -> Verdict:
    return Verdict(goal, case, what, target, found, None if found is None else found >= target)


def _at_most(goal: str, case: str, what: str, target: float, found: float | None) -> Verdict:
    return Verdict(goal, case, what, target, found, None if found is None else found <= target)


def _ratio(of: Lines, case: str, slow: str, fast: str, field: str) -> float | None:
    parts = [of.get((case, system), {}).get(field) for system in (slow, fast)]
    return float(parts[0] / parts[1]) if parts[0] and parts[1] else None


def _beyond(of: Lines, slow: str, fast: str, field: str) -> float | None:
    """The ratio of what two systems take beyond attention without a prefix."""
    none, *both = (of.get((PREFIX, system), {}).get(field) for system in ("none", slow, fast))
    if none is None or None in both or both[1] <= none:
        return None
    return float((both[0] - none) / (both[1] - none))


def _seconds(of: Lines, case: str, *names: str) -> float | None:
    """Of one site, of kernels of ours."""
    kernels = of.get((case, "ours"), {}).get("kernels", {})
    if any(name not in kernels for name in names):
        return None
    return float(sum(kernels[name][1] / kernels[name][0] for name in names))


def _forward(of: Lines, shapes: Mapping[str, Any], case: str, rate: float) -> float | None:
    """x read and y written (x is its own residual here), z written, weights read, two bytes a number."""
    seconds, shape = _seconds(of, case, "forward_kernel"), shapes[case]
    tokens = shape.samples * shape.tokens
    moved = 4 * tokens * shape.size + 2 * tokens * shape.bottleneck + 2 * shape.groups * shape.parameters
    return None if not seconds else moved / rate / seconds


def _backward(of: Lines, shapes: Mapping[str, Any], case: str, rate: float) -> float | None:
    seconds, shape = _seconds(of, case, "backward_input_kernel", "backward_weight_kernel"), shapes[case]
    return None if not seconds else 6 * shape.samples * shape.tokens * shape.size / rate / seconds


def _product(of: Lines, shapes: Mapping[str, Any], case: str, rate: float) -> float | None:
    """Weights of all sites written and the map read."""
    seconds, shape = of.get((case, "generation"), {}).get("gpu_s"), shapes[case]
    moved = 2 * shape.sites * shape.groups * shape.parameters + 2 * shape.parameters * shape.hyper
    return None if not seconds else moved / rate / seconds


def _launches(of: Lines, shapes: Mapping[str, Any], case: str) -> float | None:
    """All of a pass: also sums of the scales' gradients, x's two gradients added, and what is there once."""
    launches = of.get((case, "ours"), {}).get("launches")
    return None if launches is None else launches / shapes[case].sites
