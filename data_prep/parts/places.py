"""The place of a task in a data set's folder: what may be replaced there, and what is somebody else's.

Building a task again deletes what was built of it. This file makes sure that nothing else goes with it.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperpelt_ds.data.manifest import Manifest

IMAGES, SHOTS = "images", "shots"  # folders of the data set that are no task's
MADE = "made_from"  # in a manifest's notes: what each task was made from that builders made, and they alone
_LEFT = re.compile(r"[A-Za-z0-9_-]+-\d{6,}\.(tar|idx)(\.partial)?")  # what builders name their files of a task


def check_place(folder: Path, name: str, before: Manifest | None) -> None:
    """Raises ValueError naming the files if replacing a task would delete any that a builder did not make of it."""
    advice = "choose another --out, or for a task of your own another --task, or move what is there"
    for place in (folder / name, folder / IMAGES, folder / SHOTS):
        linked = place == folder / name and place.is_symlink()
        if linked or (place.exists() and not place.is_dir()):
            raise ValueError(f"task {name!r}: {place} is {'a link' if linked else 'no folder'}; {advice}")
    mine, adopted, others = set(), set(), {}
    for task, splits in before.tasks.items() if before else ():
        paths = {path for shards in splits.values() for s in shards for path in (s.path, s.index_path)}
        if task != name:
            others.update(dict.fromkeys(paths, task))
        elif before and task in before.about.get(MADE, {}):
            mine = paths
        else:
            adopted = paths
    foreign = []
    for path in sorted((folder / name).rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if relative in others:
            raise ValueError(
                f"task {name!r}: {folder / name} holds {path.name}, which the manifest lists for task "
                f"{others[relative]!r}, and building would delete it; {advice}"
            )
        if relative in mine or (path.is_dir() and not path.is_symlink()):
            continue
        if relative in adopted or path.parent != folder / name or not _left_by_build(path, name):
            foreign.append(path)
    lists = (folder / IMAGES / f"{name}.jsonl", _lists_images), (folder / SHOTS / f"{name}.json", _lists_shots)
    foreign += [path for path, is_ours in lists if path.exists() and not is_ours(path)]
    if foreign:
        shown = ", ".join(str(path.relative_to(folder)) for path in foreign[:3]) + (", ..." if foreign[3:] else "")
        raise ValueError(
            f"task {name!r}: {folder} holds files in the task's place that no builder made of it, {len(foreign):,} "
            f"in all ({shown}), and building would delete them; {advice}"
        )


def _left_by_build(path: Path, name: str) -> bool:
    """Whether a file that no manifest lists is what a killed build, or one whose manifest was deleted, left of a task.

    Other people's shards may have the same names, so of a tar the first sample must be of the task.
    """
    if not _LEFT.fullmatch(path.name) or path.suffix != ".tar":
        return bool(_LEFT.fullmatch(path.name))
    try:
        with tarfile.open(path, "r:") as tar:
            first = tar.next()
            file = tar.extractfile(first) if first and first.name.endswith(".json") else None
            return file is not None and json.load(file)["task"] == name
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError):
        return False  # damaged, or none of ours


def _lists_images(path: Path) -> bool:
    """Whether a file is a list of images as `_ImageList` writes it, by its first line."""
    try:
        with path.open(encoding="utf-8") as file:
            fields = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and set(fields) == {"image", "files"}


def _lists_shots(path: Path) -> bool:
    """Whether a file is a choice of shots: number of shots -> seed -> keys."""
    try:
        counts = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(counts, dict) and all(n.isdigit() and isinstance(seeds, dict) for n, seeds in counts.items())
