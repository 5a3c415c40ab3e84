"""Labelled text data sets as entries: which rows are trained on, validated with and tested on.

What a row becomes is its task's business (hyperpelt_ds/tasks), where rows come from is hub.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hyperpelt_ds.tasks.glue import halves
from hyperpelt_ds.terminal import progress
from parts.building import Entry, item_of, share
from parts.hub import Repository, Rows


@dataclass(frozen=True)
class TextSet:
    """One data set of the hub. "Its own" splits are named as there; its column `idx`, if any, numbers its rows.

    texts: the columns with text; label: that with the label. item: those of `texts` that say which examples belong
    together (all if left out): what is held out of train shares no item with the rest.
    test: our splits for testing -> its own. halved: its own split whose random halves, by rows as in HyperFormer, are
    validation and test; a premise or passage of several rows can be in both.
    validation: its own split for validation; without one, `held_out` samples of train are for it.
    unlabelled: our splits without answers -> its own. exported: see Repository.
    """

    repository: str
    config: str
    texts: tuple[str, ...]
    label: str = "label"
    item: tuple[str, ...] = ()
    test: Mapping[str, str] = field(default_factory=dict)
    halved: str = ""
    validation: str = ""
    held_out: int = 0
    unlabelled: Mapping[str, str] = field(default_factory=dict)
    exported: bool = False

    def rows(self, split: str, source: str, revision: str, folders: Sequence[str]) -> Rows:
        """One of its own splits; see Repository.split."""
        columns = (*self.texts, self.label)
        repository = Repository(self.repository, self.config, columns, ("idx",), self.exported)
        return repository.split(split, source, revision, folders)


def read(
    sets: Mapping[str, TextSet], source: str, revision: str, held_out: int, seed: int, unlabelled: bool = False
) -> dict[str, dict[str, Iterable[Entry]]]:
    """Task -> split -> entries, which are read lazily, of every one of `sets` (task -> its data set).

    source: see Repository.split; in a folder, those named like the task or the set's configuration are looked into.
    held_out: 0 for as many training samples as each set says. Raises ValueError naming data set, split and row.
    """
    if source and not Path(source).is_dir() and len({own.repository for own in sets.values()}) > 1:
        raise ValueError(f"--source {source}: one data set of the hub for {', '.join(sets)}; choose one of --tasks")
    configs = Counter(own.config for own in sets.values())

    def rows(task: str, split: str) -> Rows:
        own = sets[task]
        folders = [f"{task}/{own.config}", task]
        folders += [own.config] if configs[own.config] == 1 else []  # two sets may have a configuration "plain_text"
        folders += [""] if len(sets) == 1 else []
        return own.rows(split, source, revision, folders)

    return {task: _splits(task, own, partial(rows, task), held_out, seed, unlabelled) for task, own in sets.items()}


def _splits(
    task: str, own: TextSet, rows: Callable[[str], Rows], held_out: int, seed: int, unlabelled: bool
) -> dict[str, Iterable[Entry]]:
    part = partial(_Entries, task, own)
    train = rows("train")
    splits: dict[str, Iterable[Entry]] = {"train": part("train", train)}
    if own.halved:
        both = rows(own.halved)
        validation, test = halves(sum(1 for _ in both), seed)
        splits["validation"] = part(own.halved, both, only=set(validation))
        splits["test"] = part(own.halved, both, only=set(test))
    elif own.validation:
        splits["validation"] = part(own.validation, rows(own.validation))
    else:
        items = progress((e.item for e in part("train", train)), f"{task}: looking for samples to hold out")
        numbers = _held_out(task, list(items), held_out or own.held_out, seed)
        splits = {"train": part("train", train, without=numbers), "validation": part("train", train, only=numbers)}
    splits |= {split: part(theirs, rows(theirs)) for split, theirs in own.test.items()}
    if unlabelled:
        splits |= {split: part(theirs, rows(theirs), labelled=False) for split, theirs in own.unlabelled.items()}
    return splits


@dataclass(frozen=True)
class _Entries:
    """The entries of a split: of all rows, of `only` those with these numbers, or of all `without` these."""

    task: str
    own: TextSet
    split: str
    rows: Rows
    only: Collection[int] | None = None
    without: Collection[int] = ()
    labelled: bool = True

    def __iter__(self) -> Iterator[Entry]:
        for number, row in self.rows:
            if number in self.without or (self.only is not None and number not in self.only):
                continue
            texts = {column: _text(self.rows.where, number, column, row[column]) for column in self.own.texts}
            if not any(text.strip() for text in texts.values()):
                raise ValueError(f"{self.rows.where}, row {number}: no text in {', '.join(texts)}")
            item = item_of(self.task, *(texts[column] for column in self.own.item or self.own.texts))
            example = row if self.labelled else {**row, self.own.label: 0}
            key = f"{self.split}-{row.get('idx', number):06d}"
            yield Entry(key, item, example, labelled=self.labelled)


def _text(where: str, number: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}, row {number}: {column!r} is {value!r}, expected a text")
    return value


def _held_out(task: str, items: Sequence[str], count: int, seed: int) -> set[int]:
    """The rows, `count` together, of whole items that `seed` draws; items: the item of every row."""
    if count * 2 > len(items):
        raise ValueError(f"{task}: cannot hold out {count:,} of {len(items):,} training samples; see --validation")
    sizes, taken = Counter(items), 0
    chosen: set[str] = set()
    for item in sorted(sizes, key=lambda item: share(f"{seed} {item}")):
        if taken + sizes[item] <= count:
            chosen.add(item)
            taken += sizes[item]
    return {number for number, item in enumerate(items) if item in chosen}
