"""Builds the task nlvr2 from the official JSON lines: two images are one condition."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from parts import building, official
from parts.building import Entry
from parts.command_line import at_least, run

TASK = "nlvr2"
ORIGIN = "github.com/lil-lab/nlvr, folder nlvr2/data"
FILES = {"train": "train.json", "validation": "dev.json", "test": "test1.json"}
_IDENTIFIER = re.compile(r"(?P<part>train|dev|test1|test2)-(?P<set>\d+)-(?P<pair>\d+)-\d+")


def nlvr2(*, source: str, out: str, limit: int = 0, shard_size: int = 4096) -> None:
    """Build NLVR2 from its official files: 86,373 pairs for training, 6,982 for validation, 6,967 to test on.

    A pair of images has one id, under which the cells of the left image and then of the right one are stored. A data
    set has features of one size, so this one is built by itself, not beside tasks with one image.

    Images, for features.py, are had by the form on NLVR2's page; --images is the folder that holds their folders
    images/train, dev and test1.

    Examples:
        python data_prep/nlvr2.py --source ~/nlvr/nlvr2/data --out data/nlvr2

    Args:
        source: folder with train.json, dev.json and test1.json (github.com/lil-lab/nlvr, folder nlvr2/data)
        out: the data set to write into; its other tasks and features stay
        limit: samples of each split at most, 0 for all
        shard_size: samples a shard
    """
    at_least(0, limit=limit)
    at_least(1, shard_size=shard_size)
    files = official.find(source, dict.fromkeys(FILES.values(), ORIGIN))
    building.build(
        out,
        {TASK: {split: _entries(files[name]) for split, name in FILES.items()}},
        about={"command": "nlvr2", "files": official.sizes(files.values())},
        shard_size=shard_size,
        limit=limit,
    )


def _entries(path: Path) -> Iterator[Entry]:
    for where, fields in official.lines(path):
        identifier = official.get(fields, "identifier", str, where)
        where = f"{where} ({identifier})"
        found = _IDENTIFIER.fullmatch(identifier)
        if not found:
            raise ValueError(f"{where}: field 'identifier' must read like dev-850-0-1: part, set, pair, sentence")
        pictures, part = f"{found['part']}-{found['set']}-{found['pair']}", found["part"]
        if part == "train":  # 100 folders, by a number that copies of the data also write as a text
            kind = str if isinstance(fields.get("directory"), str) else int
            part = f"images/train/{official.get(fields, 'directory', kind, where)}"
        example = {name: official.get(fields, name, str, where) for name in ("sentence", "label")}
        yield Entry(
            identifier,
            f"nlvr2-{found['part']}-{found['set']}",
            example,
            f"nlvr2-{pictures}",
            files=tuple(f"{part}/{pictures}-img{side}.png" for side in (0, 1)),
        )


if __name__ == "__main__":
    run(nlvr2)
