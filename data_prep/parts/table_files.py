"""Rows of a user's own JSONL, CSV, TSV and Parquet files, each with its place for messages.

Parquet is read by `datasets`. Its readers of text files are not used: they make dates of texts that look like dates,
shift the columns of a CSV line with a field too many, and do not say in which line something is wrong.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperpelt_ds.tasks.task import check_text
from parts.hub import local

csv.field_size_limit(1 << 30)  # its own limit of 128 KB is that of a long document


@dataclass(frozen=True)
class Row:
    """One row: `place` names its file and line, `folder` is where its file lies."""

    place: str
    folder: Path
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The text in a column, may be empty; raises ValueError naming file, line and column for anything else."""
        value = self.value(column)
        if not isinstance(value, str):
            raise ValueError(f"{self.place}, column {column!r}: expected a text, got {_kind(value)}")
        check_text(f"{self.place}, column {column!r}:", value)
        return value

    def filled(self, column: str) -> str:
        """The text in a column; ValueError if it is empty."""
        value = self.text(column)
        if not value.strip():
            raise ValueError(f"{self.place}, column {column!r}: is empty")
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        """The texts of a list; in a CSV file, of a list as JSON writes it."""
        value = self.value(column)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f'{self.place}, column {column!r}: expected a list of texts, such as ["a dog", "dog"]')
        return tuple(value)

    def value(self, column: str) -> Any:
        if column not in self.values:
            near = difflib.get_close_matches(column, self.values, 3, 0.4)
            meant = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"{self.place}: has no column {column!r}{meant} Its columns: {', '.join(self.values)}")
        return self.values[column]


def rows(pattern: str) -> Iterator[Row]:
    """The rows of a file, or of all files that a pattern stands for, one file after the other.

    Raises ValueError naming the file, and the line where it has them, for what cannot be read.
    """
    for path in found(pattern):
        yield from _READERS[_suffix(path)](Path(path))


def found(pattern: str) -> list[str]:
    """The file, or all that a pattern stands for: * within a name, ** any folders. In the order of their names."""
    return [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))


def check(flag: str, pattern: str) -> None:
    """Raises ValueError if there is no such file, or one of no known kind."""
    paths = found(pattern)
    if not paths:
        raise ValueError(f"--{flag} {pattern}: no such file")
    for path in paths:
        if _suffix(path) not in _READERS:
            raise ValueError(f"--{flag} {path}: expected a file whose name ends with {', '.join(_READERS)}")


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: is not JSON: {error}") from None
            if not isinstance(values, dict):
                raise ValueError(f'{place}: expected an object, such as {{"source": ..., "target": ...}}')
            yield Row(place, path.parent, values)


def _separated(path: Path) -> Iterator[Row]:
    """CSV, or with tabs if the name says so; quotes as spreadsheets write them. All values are texts."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter="\t" if _suffix(str(path)) == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header) or not header:
                raise ValueError(f"{path}: its first line must name the columns, each once; it has {header}")
            end = reader.line_num
            for fields in reader:
                place, end = f"{path}, line {end + 1}", reader.line_num
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise ValueError(f"{place}: has {len(fields)} fields, the first line names {len(header)} columns")
                yield Row(place, path.parent, dict(zip(header, fields, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: cannot be read: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    for number, values in local([glob.escape(str(path))], str(path)):
        yield Row(f"{path}, row {number + 1}", path.parent, values)


_READERS = {".jsonl": _json_lines, ".csv": _separated, ".tsv": _separated, ".parquet": _parquet}


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"
