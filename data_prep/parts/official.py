"""Official files of vision-and-language data sets: found by name, read, and their fields checked.

Every error names the file, and the item in it. This file must not know what a data set asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

# What captions, VQA v2 and GQA are built for, once all three and their features are there.
MULTI_TASK = "deepspeed launch/train.py --recipe vl_t5_base --ds_config ds_configs/zero2.json --run_dir runs/vl_t5_base"

T = TypeVar("T")
_LARGE = 10_000_000  # bytes, from which on reading a file takes a while


def find(source: str, names: Mapping[str, str], flag: str = "source") -> dict[str, Path]:
    """The files of folder `source`, which `flag` gave; names: name -> where it comes from.

    Raises ValueError naming all that are missing and where they come from.
    """
    folder = Path(source).expanduser()
    missing: dict[str, list[str]] = {}
    for name, origin in names.items():
        if not (folder / name).exists():
            missing.setdefault(origin, []).append(name)
    if missing:
        fault = "lacks" if folder.is_dir() else "is not a folder; it must hold"
        what = "; ".join(f"{', '.join(own)} (from {origin})" for origin, own in missing.items())
        raise ValueError(f"--{flag} {source}: {fault} {what}")
    return {name: folder / name for name in names}


def sizes(files: Iterable[Path]) -> dict[str, int]:
    """Name -> bytes, which tells releases of the files apart in a manifest."""
    return {path.name: path.stat().st_size for path in files}


def load(path: Path, kind: type[T], keep: Callable[[dict[str, Any]], Any] | None = None) -> T:
    """The JSON value of a file, a `kind` (dict or list). `keep` is given every object in it as soon as it is read and
    returns what to hold in its place: most of a file of a gigabyte is never asked for, and as Python objects it would
    take several times that."""
    size = path.stat().st_size
    if size > _LARGE:
        print(f"reading {path.name}, {size / 1e6:,.0f} MB", flush=True)
    try:
        with path.open(encoding="utf-8") as file:
            tree = json.load(file, object_hook=keep)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: cannot be read, damaged or not fully downloaded: {error}") from None
    if not isinstance(tree, kind):
        raise ValueError(f"{path}: expected {_KINDS[kind]}, found {_name(tree)}")
    return tree


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for each line of a file of JSON lines; `where` names file and line. Read as it goes."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: cannot be read, damaged or not fully downloaded: {error}") from None
            if not isinstance(fields, dict):
                raise ValueError(f"{where}: expected an object, found {_name(fields)}")
            yield where, fields


def objects(fields: Mapping[str, Any], name: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for each of the objects listed in field `name`."""
    for place, value in enumerate(get(fields, name, list, where)):
        here = f"{where}, {name}[{place}]"
        if not isinstance(value, dict):
            raise ValueError(f"{here}: expected an object, found {_name(value)}")
        yield here, value


def get(fields: Mapping[str, Any], name: str, kind: type[T], where: str) -> T:
    """Field `name`, which must be there and a `kind`; ValueError saying where it is not."""
    if name not in fields:
        raise ValueError(f"{where}: field {name!r} is missing")
    value = fields[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: field {name!r} must be {_KINDS[kind]}, got {value!r}")
    return value


_KINDS: dict[type, str] = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def _name(value: object) -> str:
    return _KINDS.get(type(value), repr(value))
