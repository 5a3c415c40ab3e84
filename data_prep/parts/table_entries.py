"""A table's rows as entries: which split each is in, what its item is, and how its image is named.

Images are named by file and content, so that two tables can have an image "1.jpg" each; the same picture in two files
is one item.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hyperpelt_ds.contracts import TRAIN, VALIDATION
from hyperpelt_ds.tasks import Task
from hyperpelt_ds.tasks.metrics import check_answer
from hyperpelt_ds.tasks.task import check_target, normalise
from hyperpelt_ds.terminal import progress
from parts.building import Entry, item_of, share
from parts.table_files import Row, check, rows

TEST = "test"
MOST_LABELS = 1000
SEEN = 1_000_000  # different targets that are compared with one another


def files_and_shares(
    data: str, train: str, validation: str, test: str, split_by: str
) -> tuple[dict[str, str], dict[str, float] | None]:
    """Split -> file, with no shares; or one file under "", with the shares of its items that are held out."""
    if bool(data) == bool(train):
        raise ValueError("give either --data FILE, which is split, or --train FILE with --validation and --test files")
    if train:
        files = {TRAIN: train, VALIDATION: validation, TEST: test}
        if split_by:
            raise ValueError("--split_by goes with --data; beside --train, the files are the splits")
        files = {split: pattern for split, pattern in files.items() if pattern}
        for flag, pattern in files.items():
            check(flag, pattern)
        return files, None
    check("data", data)
    if split_by and (validation or test):
        raise ValueError("--split_by names each row's split; --validation and --test do not go with it")
    if split_by:
        return {"": data}, {}
    shares = {VALIDATION: _share("validation", validation, 0.05), TEST: _share("test", test, 0.1)}
    if sum(shares.values()) >= 1:
        raise ValueError(f"--validation {validation} --test {test}: leave nothing to train on")
    return {"": data}, shares


def _share(flag: str, value: str, otherwise: float) -> float:
    try:
        share = float(value) if value else otherwise
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"--{flag} {value}: beside --data, expected a share of its items, from 0 to less than 1")
    return share


class Survey(NamedTuple):
    """What a table holds: its splits, those with names of their own last; its targets, if they are to be labels; two
    targets that differ in more than case and spaces but are the same words, and one without any, "" if there are none.
    """

    splits: list[str]
    targets: list[str]
    same: tuple[str, str] | tuple[()]
    wordless: str


class _SameWords:
    """Looks for the first two targets that are the same words though they are not the same; of a million at most."""

    def __init__(self) -> None:
        self._seen: dict[int, str] = {}  # hash of the words -> one target
        self.pair: tuple[str, str] | tuple[()] = ()
        self.wordless = ""

    def add(self, target: str) -> None:
        words = normalise(target)
        self.wordless = self.wordless or ("" if words else target)
        if self.pair or len(self._seen) >= SEEN:
            return
        one = self._seen.setdefault(hash(words), target)
        if one.casefold().split() != target.casefold().split():
            self.pair = one, target


@dataclass(frozen=True)
class Table:
    """files and shares: see `files_and_shares`. columns: what for -> name, "" for none."""

    files: Mapping[str, str]
    shares: Mapping[str, float] | None
    columns: Mapping[str, str]
    image_root: Path | None
    images: dict[Path, tuple[str, str]] = field(default_factory=dict)  # path as it is given -> image id, file
    by_content: dict[str, str] = field(default_factory=dict)  # image id -> its first file

    def survey(self, task: str, record: Task | None, metrics: Sequence[str]) -> Survey:
        """Reads everything once.

        Raises ValueError naming file, line and column for a value that cannot be used, also by one of the metrics, a
        target that is no label of `record` and more targets than labels may be if there is no record; and for a split
        without rows.
        """
        counts: Counter[str] = Counter(dict.fromkeys(self.files if self.shares is None else self.shares, 0))
        targets: set[str] = set()
        same = _SameWords()
        for row, split, entry in progress(self._rows(), f"{task}: looking through the table"):
            counts[split] += 1
            same.add(entry.example["target"])
            try:
                check_answer(metrics, entry.example["target"], entry.references)
                if record is not None:
                    check_target(record, entry.key, entry.example["target"])
                elif len(targets) < MOST_LABELS:
                    targets.add(entry.example["target"])
                elif entry.example["target"] not in targets:
                    raise ValueError(f"--labels auto: more than {MOST_LABELS:,} different values, which are no labels")
            except ValueError as error:
                raise ValueError(f"{row.place}, column {self.columns['target']!r}: {error}") from None
        wanted = [TRAIN, *(split for split in counts if not self.shares or self.shares.get(split, 1))]
        for split in wanted:
            if not counts[split]:
                rows_of = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "there are none"
                more = ""
                if self.shares and split != TRAIN:
                    more = f"; --{split} {self.shares[split]} is too small a share, or there are too few items"
                raise ValueError(f"{', '.join(self.files.values())}: no row for {split!r}; rows: {rows_of}{more}")
        known = (TRAIN, VALIDATION, TEST)
        names = sorted(split for split in counts if counts[split])
        names.sort(key=lambda name: known.index(name) if name in known else len(known))
        return Survey(names, sorted(targets), same.pair, same.wordless)

    def entries(self, split: str) -> Iterator[Entry]:
        return (entry for _, own, entry in self._rows(split) if own == split)

    def _rows(self, only: str = "") -> Iterator[tuple[Row, str, Entry]]:
        """(row, split, entry) of every row, or of the files that hold one split."""
        for own, pattern in self.files.items():
            for number, row in enumerate(rows(pattern) if not only or own in ("", only) else ()):
                entry = self._entry(f"{own or 'row'}-{number:08d}", row)
                yield row, own or self._split(row, entry.item), entry

    def _entry(self, key: str, row: Row) -> Entry:
        column = self.columns
        source = row.text(column["source"]) if column["source"] else ""
        if not source.strip() and not column["image"]:
            row.filled(column["source"])  # raises
        image, file = self._image(row) if column["image"] else (None, None)
        item = f"image-{image.rpartition('-')[2]}" if image else item_of("text", source)
        return Entry(
            key,
            row.filled(column["item"]) if column["item"] else item,
            {"source": source, "target": row.filled(column["target"])},
            image,
            row.filled(column["group"]) if column["group"] else None,
            row.texts(column["references"]) if column["references"] else (),
            (file,) if file else (),
        )

    def _split(self, row: Row, item: str) -> str:
        if self.columns["split"]:
            return row.filled(self.columns["split"])
        assert self.shares is not None
        place = share(item)
        if place < self.shares[VALIDATION]:
            return VALIDATION
        return TEST if place < self.shares[VALIDATION] + self.shares[TEST] else TRAIN

    def _image(self, row: Row) -> tuple[str, str]:
        column = self.columns["image"]
        path = (self.image_root or row.folder) / row.filled(column)
        if path not in self.images:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ValueError(f"{row.place}, column {column!r}: {path} cannot be read: {error.strerror}") from None
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.name)[:40]
            image = f"{name}-{hashlib.sha256(content).hexdigest()[:16]}"
            self.images[path] = image, self.by_content.setdefault(image, os.path.abspath(path))
        return self.images[path]
