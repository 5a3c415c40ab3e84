"""Files of lines of JSON, each with its step, read and cut from their ends: a long run's are large.

A last line that is not yet whole, or was never finished, counts as not written. Standard library only.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """All objects; none if there is no file. ValueError names file and line of one that cannot be read."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else (), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} cannot be read: {error}") from None
    return found


def newest(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` objects, in their order; ValueError names the file and the place of one that cannot be read."""
    found: list[dict[str, Any]] = []
    for begin, line in _backwards(path):
        if len(found) == count:
            break
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, the line from byte {begin} cannot be read: {error}") from None
    return found[::-1]


def drop_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`, and does not touch them, so that a kill at any moment loses none."""
    if not path.is_file():
        return
    size, kept = path.stat().st_size, 0
    for begin, line in _backwards(path):
        if json.loads(line)["step"] <= step:
            kept = begin + len(line) + 1
            break
    if kept < size:
        os.truncate(path, kept)


def _backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """(first byte, line without its end) of every whole line, the last one first."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n")
        while end >= 0:
            begin = content.rfind(b"\n", 0, end) + 1
            yield begin, content[begin:end]
            end = begin - 1
