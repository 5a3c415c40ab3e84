"""All cells of a plan in several processes, each recorded as soon as it ends: the records are the only state.

This file must not know what the cells are for.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.study import cells, plan, references
from hyperpelt_ds.study.cells import Record
from hyperpelt_ds.study.plan import Cell, Suite
from hyperpelt_ds.study.records import validation

CELLS_A_PROCESS = 12
"""A process is then replaced: starting one costs ten seconds, and what engines leave behind goes with it."""


def run(suite: Suite, out: Path, folder: Path, jobs: int, minutes: float = 0, only: Sequence[str] = ()) -> int:
    """Runs what is missing in `out`, adds a line for every cell, and returns how many known cells are still missing.

    With `minutes`, no cell is started after so many. `only` names groups of cells (what a name begins with). ValueError
    for records of another plan or other data.
    """
    began = time.monotonic()
    records = read(out)
    _head(suite, out, records)
    running: dict[Future[Record], Cell] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _quiet, max_tasks_per_child=CELLS_A_PROCESS) as pool:
        while True:
            todo = [cell for cell in missing(suite, records, only) if cell not in running.values()]
            late = minutes and time.monotonic() - began > 60 * minutes
            for cell in todo[: jobs - len(running)] if not late else []:
                start = next((other for other in suite.cells(validation(records)) if other.name == cell.start), None)
                if start is not None and not (folder / start.name / "LATEST").is_file():
                    if start in running.values():
                        continue
                    cell = start  # recorded, but its weights are not on this machine
                running[pool.submit(cells.run, cell, folder)] = cell
            if not running:
                return len(missing(suite, records, only))
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                record = future.result() | {"made_with": cells.fingerprint(cell)}
                _forget(folder / cell.name, keep=cell.name in plan.KEPT)
                if cell.name not in records:
                    records[cell.name] = record
                    _append(out, record)
                left = len(missing(suite, records, only))
                figures = f"validation {record['validation']:.3f}  {record['cpu_seconds']:.0f} s of CPU"
                print(f"{cell.name}  {figures}  {left} to go", flush=True)


def read(out: Path) -> dict[str, Record]:
    """The records in `out` by cell; the head under the name "". A last line cut by a kill is left out."""
    if not out.is_file():
        return {}
    records = {}
    for number, line in enumerate(out.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{out}, line {number} is no record; delete it, and its cell is run again") from None
        records[record.get("cell", "")] = record
    return records


def missing(suite: Suite, records: dict[str, Record], only: Sequence[str] = ()) -> list[Cell]:
    """The cells that are known and not recorded; ValueError for a record that was made with other settings."""
    known = suite.cells(validation(records))
    for cell in known:
        if cell.name in records and records[cell.name]["made_with"] != cells.fingerprint(cell):
            raise ValueError(f"the record of {cell.name} was made with other settings than the plan has now; delete it")
    return [
        cell
        for cell in known
        if cell.name not in records and (not only or cell.name.split("/")[0] in (*only, "grid", "search"))
    ]


def _head(suite: Suite, out: Path, records: dict[str, Record]) -> None:
    """What is recorded before any cell: the data, which test samples belong to one item, and the rows that no model
    makes. Compared with what is there already."""
    manifest = Manifest.of(plan.base().override(suite.data).data)
    places: dict[str, int] = {}
    items = {}
    groups = {}
    for name in suite.tasks:
        samples = cells.test_samples(manifest, name)
        items[name] = [places.setdefault(sample.item, len(places)) for sample in samples]
        groups[name] = [sample.group or "" for sample in samples]
    head: dict[str, Any] = {
        "data": manifest.digests(suite.tasks),
        "items": items,
        "groups": {name: own for name, own in groups.items() if any(own)},
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "packages": {name: version(name) for name in ("torch", "deepspeed", "transformers", "numpy")},
    }
    if "" not in records:
        out.parent.mkdir(parents=True, exist_ok=True)
        records[""] = head
        _append(out, head)
    if references.NAME not in records:
        records[references.NAME] = references.measure(manifest, suite.tasks)
        _append(out, records[references.NAME])
    for part in ("data", "items"):
        if records[""][part] != head[part]:
            raise ValueError(f"{out} holds results on other data than {manifest.path} has now ({part} differ)")


def _append(out: Path, record: Record) -> None:
    with out.open("a") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _quiet() -> None:
    """In every process, before its first cell: one thread, since there are as many processes as cores."""
    import torch

    torch.set_num_threads(1)


def _forget(run_dir: Path, keep: bool) -> None:
    """Deletes the weights of a finished cell (200 MB for full fine-tuning); its metrics.jsonl stays."""
    for path in run_dir.glob("*") if not keep else ():
        if path.is_dir():
            shutil.rmtree(path)
