"""The lists of images that builders leave beside their tasks, put together: which images, and in which order.

This file must not know what an image looks like or what is made of it.
"""

from __future__ import annotations

import filecmp
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from parts import official, places

Files = tuple[str, ...]


def wanted_images(folder: Path, tasks: Iterable[str], shard_size: int, limit: int) -> dict[str, Files]:
    """Image -> files, each image once, in the order of first use; the tasks take turns, by a shard's worth of images,
    so that the neighbours in a task remain neighbours."""
    paths = {task: folder / places.IMAGES / f"{task}.jsonl" for task in tasks}
    lists = {task: _listed(path) for task, path in paths.items() if path.is_file()}
    turn = min(shard_size, -(-limit // max(len(lists), 1)) or shard_size)
    wanted: dict[str, Files] = {}
    while lists:
        for task in list(lists):
            taken = 0
            for where, image, files in lists[task]:
                if image not in wanted:
                    taken += 1
                known = wanted.setdefault(image, files)
                if _names(known) != _names(files) and not _same_content(known, files):
                    raise ValueError(f"{where}: image {image!r} is {files} here, but {wanted[image]} in another task")
                if taken == turn:
                    break
            else:
                del lists[task]
    if not wanted:
        raise ValueError(
            f"{folder / places.IMAGES}: holds no list of images for any of {', '.join(tasks)}; builders of "
            "tasks with images write them"
        )
    wanted = dict(itertools.islice(wanted.items(), limit or None))
    counts = {len(files): image for image, files in wanted.items()}
    if len(counts) > 1:
        examples = ", ".join(f"{image!r} has {count}" for count, image in sorted(counts.items()))
        raise ValueError(
            f"{folder / places.IMAGES}: not all images have the same number of files ({examples}); the features of a "
            "data set have one size: build such tasks into data sets of their own"
        )
    return wanted


def _listed(path: Path) -> Iterator[tuple[str, str, Files]]:
    for where, fields in official.lines(path):
        files = official.get(fields, "files", list, where)
        if not files or not all(isinstance(file, str) for file in files):
            raise ValueError(f"{where}: field 'files' must list one path or several, got {files!r}")
        yield where, official.get(fields, "image", str, where), tuple(files)


def _same_content(files: Files, others: Files) -> bool:
    """Whether they are the same pictures under other names, all of them there."""
    try:
        return all(filecmp.cmp(file, other, shallow=False) for file, other in zip(files, others, strict=True))
    except (OSError, ValueError):
        return False


def _names(files: Files) -> list[str]:
    return [Path(file).name for file in files]
