"""What each way costs, as measured by launch/bench_step.py and launch/bench_adapters.py: tables, and one figure.

This file must not know how a score came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hyperpelt_ds.study import plan

Line = Mapping[str, Any]
"""A line of a benchmark: case, system, metric, median, min, max, ratio, hardware, threads."""

FIGURE = "results/image.svg"
"""Where the figure is, seen from the page."""
SYSTEMS = {
    "weights": f"{plan.OWN}/images",
    "tokens": "image/tokens",
    "both": "image/both",
    "neither": f"{plan.OWN}/mixed",
}
"""How the image enters -> the system of the benchmark that does so."""
METRICS = {
    "train_step_s": "train step",
    "decode_16_s": "16-token decode",
    "train_step_mflops": "train MFLOP",
    "decode_16_mflops": "decode MFLOP",
    "saved_bytes": "kept for backward, MB",
    "task_bytes": "one task's own, KB",
}
_SCALES = {"saved_bytes": 1e6, "task_bytes": 1e3}


def table(lines: Sequence[Line]) -> str:
    """The section on cost."""
    if not lines:
        return "## Cost\n\nNot measured yet."
    rows = [
        [system, *_cells(lines, system, list(METRICS))] for system in dict.fromkeys(line["system"] for line in lines)
    ]
    first = lines[0]
    said = (
        f"{first['case']}, {first['hardware']}, {first['threads']} thread(s). Times are ratios to the frozen floor, "
        "median over rounds (seconds, least to most); no optimizer step. FLOPs and bytes are of one sample. Systems "
        "of the `adapters` package ran in its own environment, against the floor measured there."
    )
    return f"## Cost\n\n{said}\n\n{markdown(['system', *METRICS.values()], rows)}"


def image_table(scores: Mapping[str, float], lines: Sequence[Line]) -> str:
    """Score beside cost, by how the image enters, and the figure of it."""
    if not lines:
        return "What each way costs was not measured yet."
    shown = [metric for metric in METRICS if metric != "task_bytes"]
    rows = [
        [way, f"{scores[way]:.3f}" if way in scores else "", *_cells(lines, system, shown)]
        for way, system in SYSTEMS.items()
    ]
    said = f"Every sample with an image of its own, {plan.IMAGE_CELLS} cells; see Cost below for what is measured."
    header = ["way", "mean of easy-VQA and caption", *(METRICS[metric] for metric in shown)]
    parts = [said, markdown(header, rows), f"![score against training FLOPs]({FIGURE})" if scores else ""]
    return "\n\n".join(part for part in parts if part)


def image_figure(scores: Mapping[str, float], lines: Sequence[Line]) -> str:
    """The score of the tasks with images against training FLOPs, by how the image enters, as SVG; "" without any."""
    found = {line["system"]: line["median"] for line in lines if line["metric"] == "train_step_mflops"}
    points = {way: (found[SYSTEMS[way]], score) for way, score in scores.items() if SYSTEMS[way] in found}
    return _scatter(points, "training, MFLOP a sample", "mean of easy-VQA and caption") if points else ""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(lines: Sequence[Line], system: str, metrics: Sequence[str]) -> list[str]:
    found = {line["metric"]: line for line in lines if line["system"] == system}
    cells = []
    for metric in metrics:
        line = found.get(metric)
        if line is None:
            cells.append("")
        elif metric.endswith("_s"):
            cells.append(f"{line['ratio']:.2f}x ({line['min']:.2f} to {line['max']:.2f})")
        elif metric in _SCALES:
            cells.append(f"{line['median'] / _SCALES[metric]:.1f}")
        else:
            cells.append(f"{line['median']:.0f}")
    return cells


def _scatter(points: Mapping[str, tuple[float, float]], across: str, up: str) -> str:
    """Named points on two axes from 0; the second ends at 1."""
    width, height, left, below = 520, 320, 60, 50
    most = 1.1 * max(x for x, _ in points.values())

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / most * (width - left - 20), height - below - y * (height - below - 20)

    x0, y0 = place(0, 0)
    x1, y1 = place(most, 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{x0:.0f} {y1:.0f}V{y0:.0f}H{x1:.0f}" fill="none" stroke="black"/>',
        f'<text x="{(x0 + x1) / 2:.0f}" y="{height - 10}" text-anchor="middle">{across}</text>',
        f'<text transform="translate(14 {(y0 + y1) / 2:.0f}) rotate(-90)" text-anchor="middle">{up}</text>',
    ]
    for tenth in range(0, 11, 2):
        _, y = place(0, tenth / 10)
        parts.append(f'<text x="{x0 - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{tenth / 10:.1f}</text>')
    for part in range(5):
        x, _ = place(most * part / 4, 0)
        parts.append(f'<text x="{x:.0f}" y="{y0 + 16:.0f}" text-anchor="middle">{most * part / 4:.0f}</text>')
    for name, (flops, score) in points.items():
        x, y = place(flops, score)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#1f5fa8"/>')
        parts.append(f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{name} {score:.3f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
