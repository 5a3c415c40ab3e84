"""Rows of a data set of the Hugging Face hub, from there or from a folder that holds the same files, by `datasets`.

This file must not know tasks or samples.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 1000


@dataclass(frozen=True)
class Rows:
    """The rows of one split, to be read as often as one likes. `where` names it in messages."""

    where: str
    table: Any  # datasets.Dataset, or an IterableDataset that reads local files as it goes

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(number, row), from 0; raises ValueError if the files cannot be read to their end."""
        number = itertools.count()
        try:
            for batch in self.table.iter(BATCH):  # one by one, rows cost several times as much
                for values in zip(*batch.values(), strict=True):
                    yield next(number), dict(zip(batch, values, strict=True))
        except _unreadable() as error:
            raise ValueError(f"{self.where}: cannot be read: {error}") from error


@dataclass(frozen=True)
class Repository:
    """A data set of the hub: `name`, one `config` of it, the columns that are needed, and those that it may have.

    exported: what lies in the repository is a program, which `datasets` no longer runs; the hub's own conversion of it
    to parquet files is read instead.
    """

    name: str
    config: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    exported: bool = False

    def split(self, split: str, source: str = "", revision: str = "", folders: Sequence[str] = ("",)) -> Rows:
        """One split, from `source`: "" for the repository itself, another repository, or a local folder.

        A folder holds parquet files as the hub names them, `SPLIT-00000-of-00001.parquet`, in the first of its
        `folders` that has any ("" for itself). Raises ValueError that says what is missing and how to get it.
        """
        if source and Path(source).is_dir():
            rows = self._local(split, Path(source), folders)
        elif not source or re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            rows = self._remote(split, source or self.name, revision)
        else:
            raise ValueError(
                f"--source {source}: no such folder, and not the name of a data set of the hub (OWNER/NAME)"
            )
        found = rows.table.column_names
        missing = [column for column in self.columns if column not in found]
        if missing:
            raise ValueError(f"{rows.where}: has no column {missing[0]!r}; it has {', '.join(found)}")
        wanted = [column for column in (*self.columns, *self.optional) if column in found]
        return Rows(rows.where, rows.table.select_columns(wanted))

    def _local(self, split: str, folder: Path, folders: Sequence[str]) -> Rows:
        names = (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet", f"data/{split}-*.parquet")
        for inner in folders:
            for name in names:
                files = sorted(str(path) for path in (folder / inner).glob(name))
                if files:
                    return local(files, str(folder / inner / name))
        raise ValueError(
            f"--source {folder}: has no {Path(folders[0]) / names[0]}; where the hub can be reached, "
            f"`{self._download()}` gets the files"
        )

    def _remote(self, split: str, name: str, revision: str) -> Rows:
        import datasets  # takes seconds, here and below; --help should not

        where = f"{name}, {self.config} {split}"
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        wanted: dict[str, Any] = {"name": self.config, "revision": revision or None}
        if self.exported and name == self.name and not revision:
            files = {split: f"{self.config}/{split}/*.parquet"}
            wanted = {"data_files": files, "revision": "refs/convert/parquet"}
        try:
            return Rows(where, datasets.load_dataset(name, split=split, **wanted))
        except _unreadable() as error:
            raise ValueError(
                f"{where}: cannot be had from the hub: {error}. Without the hub: --source FOLDER, with the files that "
                f"`{self._download()}` gets where it can be reached"
            ) from error

    def _download(self) -> str:
        branch = " --revision refs/convert/parquet" if self.exported else ""
        return f"hf download {self.name} --repo-type dataset{branch} --local-dir FOLDER"


def local(files: list[str], where: str) -> Rows:
    """The rows of parquet files; `where` names them in messages. ValueError if they are none."""
    import datasets

    try:  # as a stream: converted files in the library's cache would take the disk twice
        return Rows(
            where, datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, batch_size=BATCH)
        )
    except _unreadable() as error:
        raise ValueError(f"{where}: cannot be read: {error}") from error


def _unreadable() -> tuple[type[Exception], ...]:
    """What reading raises where files cannot be had or are damaged."""
    import datasets
    import pyarrow

    return OSError, pyarrow.ArrowException, datasets.exceptions.DatasetsError
