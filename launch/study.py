"""Runs the study that docs/study.md plans, and writes docs/results.md from its records."""

from __future__ import annotations

import json
import os
from pathlib import Path

from command import run


def study(
    *,
    suite: str = "small",
    out: str | None = None,
    runs: str = "runs/study",
    jobs: int = 2,
    minutes: int = 0,
    only: str = "",
    report: str | None = None,
    report_only: bool = False,
) -> None:
    """Run what is missing of the study, several cells at a time, and write its page of results.

    Can be interrupted at any time and given again: a finished cell is a line of the records and is not run again. The
    page also shows what `launch/bench_step.py --cases study` (cost.jsonl) and launch/bench_adapters.py
    (cost_adapters.jsonl) wrote beside the records.

    Examples:
        python data_prep/demo.py --out data/demo
        python launch/study.py --suite small --jobs 2 --minutes 60
        python launch/study.py --suite small --only grid,core
        python launch/study.py --suite small --report_only

    Args:
        suite: the plan: small, or extended (on other data, which data_prep/extended.py builds)
        out: file of the records, docs/results/SUITE.jsonl unless given
        runs: folder for the runs; weights are deleted once a run is scored
        jobs: runs at a time, one thread each
        minutes: start nothing after so many; 0 for no limit
        only: groups of cells separated by commas, of grid, core, image, ablation, transfer and description
        report: the page; docs/results.md unless given, of another suite docs/results_SUITE.md
        report_only: write the page from the records as they are
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["DS_ACCELERATOR"], os.environ["TOKENIZERS_PARALLELISM"] = "cpu", "false"
    from hyperpelt_ds.study import costs, plan, runner
    from hyperpelt_ds.study import report as page
    from hyperpelt_ds.study.records import image_scores

    if suite not in plan.SUITES:
        raise ValueError(f"--suite: unknown suite {suite!r}; there is {', '.join(plan.SUITES)}")
    groups = [name for name in only.split(",") if name]
    for name in groups:
        if name not in plan.GROUPS:
            raise ValueError(f"--only: unknown group {name!r}; there are {', '.join(plan.GROUPS)}")
    if jobs < 1 or minutes < 0:
        raise ValueError(f"--jobs must be at least 1 and --minutes at least 0, got {jobs} and {minutes}")
    records = Path(out or f"docs/results/{suite}.jsonl")
    if not report_only:
        left = runner.run(plan.SUITES[suite], records, Path(runs), jobs, minutes, groups)
        print(f"{left} cells are still missing; give the command again" if left else "all cells are recorded")
    found = runner.read(records)
    if suite == "extended":
        target = Path(report or "docs/results_extended.md")
        target.write_text(page.write_extended(found))
        print(f"wrote {target}")
        return
    target = Path(report or "docs/results.md")
    files = [records.parent / name for name in ("cost.jsonl", "cost_adapters.jsonl")]
    lines = [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines()]
    target.write_text(page.write(found, lines))
    figure = target.parent / costs.FIGURE
    drawn = costs.image_figure(image_scores(found), lines)
    if drawn:
        figure.parent.mkdir(parents=True, exist_ok=True)
        figure.write_text(drawn)
    print(f"wrote {target}")


if __name__ == "__main__":
    run(study)
