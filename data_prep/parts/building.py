"""What every builder shares: entries become samples, samples shards, and shards part of a manifest.

Nothing here may know a source's files or fields, nor the command line. Everything is written beside the data set and
moved into it at the end, so that a build that is killed at any moment leaves a manifest of whole shards and is simply
given again. What a build deletes is what a builder made of the same task before; anything else stops it first.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hyperpelt_ds import tasks as records
from hyperpelt_ds.tasks import Task
from hyperpelt_ds.tasks.task import Example, check_target, normalise
from hyperpelt_ds.terminal import progress
from parts.places import IMAGES, MADE, SHOTS, check_place

if TYPE_CHECKING:  # what needs torch is imported where it is used: it takes seconds, and --help should not
    from hyperpelt_ds.contracts import Sample
    from hyperpelt_ds.data.manifest import Manifest, Shard

LOCK, STAGING = ".lock", ".building"
SHOWN = 400  # characters of a text in the summary's example


@dataclass(frozen=True)
class Entry:
    """One example of one item. `key` is unique within a split of a task; `example` is what the task's `render` reads.

    image, group, references: as in a Sample. files: of the image, one or several (whose cells are stored one after the
    other). labelled: False for an example of a test set without answers; the builder fills in any, `render` makes the
    source of it, and the stored target is empty.
    """

    key: str
    item: str
    example: Example
    image: str | None = None
    group: str | None = None
    references: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    labelled: bool = True


@dataclass(frozen=True)
class LeftOut:
    """In place of an Entry: an example that gives no sample, for a reason that the summary counts."""

    reason: str


NO_LABEL = LeftOut("no label")


@dataclass
class _Part:
    """One split of one task, once it is written."""

    shards: list[Shard]
    left_out: Counter[str]
    first: Sample


def build(
    out: str | Path,
    tasks: Mapping[str, Mapping[str, Iterable[Entry | LeftOut]]],
    about: Mapping[str, Any],
    shard_size: int = 4096,
    limit: int = 0,
    following: str = "",
) -> None:
    """Writes tasks (task -> split -> entries) into the data set `out`, whose other tasks and features stay as they are.

    Entries are read once, as they are written. about: what the tasks are made from, for the manifest: JSON, and nothing
    that would differ between two builds of the same. limit: samples of each split at most, 0 for all. following: the
    command to run next, for the summary. A task with images gets a list of them, `images/TASK.jsonl`, from which
    data_prep/features.py makes their features.

    Raises ValueError naming task, split and key for what cannot be a sample, for an `out` that another builder is
    writing to, and, before anything is written, for files in a task's place that no builder made of it.
    """
    from hyperpelt_ds.data.manifest import MANIFEST, Manifest

    folder, start = Path(out), time.monotonic()
    for name in (IMAGES, SHOTS):
        if name in tasks:
            raise ValueError(f"task {name!r}: {folder / name} is not for a task's shards; choose another name")
    with locked(folder):
        try:
            before = Manifest.load(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
        except ValueError as error:
            raise ValueError(f"--out {out}: {error}. Delete {folder / MANIFEST} to build all of it anew") from None
        for name in tasks:
            check_place(folder, name, before)
        staging = folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        try:
            parts = {
                name: _write(staging, records.get(name), splits, shard_size, limit) for name, splits in tasks.items()
            }
            _publish(
                folder, before, {name: {s: p.shards for s, p in own.items()} for name, own in parts.items()}, about
            )
        except OSError as error:
            error.filename = error.filename or str(folder)  # a full disk names none
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    _summarise(folder, parts, following, time.monotonic() - start)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Within, no other builder writes to `out`; ValueError if one does. A killed process loses its lock by itself."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--out {out}: another builder is writing to it and holds {out / LOCK}; run this when it has ended"
            ) from None
        yield


def render(task: Task, split: str, entry: Entry) -> Sample | None:
    """The sample that a task makes of an entry; None if the entry carries no label for the task.

    Raises ValueError naming task, split, key and what is wrong: a field that is missing, a label that is none of the
    task's, no text where one is needed.
    """
    from hyperpelt_ds.contracts import Sample

    where = f"{task.name}, split {split}, {entry.key}"
    try:
        texts = task.render(entry.example)
    except KeyError as error:
        raise ValueError(f"{where}: no field {error}; there are {', '.join(entry.example)}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    if texts is None:
        return None
    source, target = texts[0], texts[1] if entry.labelled else ""
    if not source.strip() and task.modality == "text":
        raise ValueError(f"{where}: the source is empty")
    if entry.labelled:
        if not target.strip():
            raise ValueError(f"{where}: the target is empty")
        check_target(task, entry.key, target)
    return Sample(entry.key, task.name, source, target, entry.item, entry.image, entry.group, entry.references)


def item_of(prefix: str, *texts: str) -> str:
    """The name of an item that its texts make: the same for texts that differ in case and punctuation only, unless they
    are nothing else."""
    words = [normalise(text) for text in texts]
    said = words if any(words) else [text.strip() for text in texts]  # symbols only, all different
    return f"{prefix}-{hashlib.sha256(' | '.join(said).encode()).hexdigest()[:16]}"


def share(item: str) -> float:
    """A number in 0..1 that the item alone decides, spread evenly."""
    return int(hashlib.sha256(item.encode()).hexdigest()[:12], 16) / 16**12


class _ImageList:
    """A task's images with their files, each image once, in the order of first use. There is no file without images."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._seen: dict[str, int] = {}  # image -> hash of its files, which for a million images are best not kept

    def add(self, where: str, entry: Entry) -> None:
        """Raises ValueError for an image without files, or with other files than it had before."""
        if entry.image is None:
            return
        if not entry.files:
            raise ValueError(f"{where}: no file is given for its image {entry.image!r}")
        files = hash(entry.files)
        if entry.image not in self._seen:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
            print(json.dumps({"image": entry.image, "files": entry.files}, ensure_ascii=False), file=self._file)
        if self._seen.setdefault(entry.image, files) != files:
            raise ValueError(f"{where}: its image {entry.image!r} had other files before than {', '.join(entry.files)}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _write(
    staging: Path, task: Task, splits: Mapping[str, Iterable[Entry | LeftOut]], shard_size: int, limit: int
) -> dict[str, _Part]:
    """Writes one task into `staging`; its splits."""
    from hyperpelt_ds.data.shards import write_task

    images, parts = _ImageList(staging / IMAGES / f"{task.name}.jsonl"), {}
    try:
        for split, entries in splits.items():
            left_out: Counter[str] = Counter()
            samples = itertools.islice(_samples(task, split, entries, images, left_out), limit or None)
            first = next(samples, None)
            if first is None:
                why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "the source has none"
                raise ValueError(f"{task.name}, split {split}: no samples to write; {why}")
            counted = progress(itertools.chain([first], samples), f"{task.name} {split}")
            parts[split] = _Part(write_task(staging, task.name, split, counted, shard_size), left_out, first)
    finally:
        images.close()
    return parts


def _samples(
    task: Task, split: str, entries: Iterable[Entry | LeftOut], images: _ImageList, left_out: Counter[str]
) -> Iterator[Sample]:
    for entry in entries:
        sample = render(task, split, entry) if isinstance(entry, Entry) else None
        if sample is None or isinstance(entry, LeftOut):
            left_out[(NO_LABEL if isinstance(entry, Entry) else entry).reason] += 1
        else:
            images.add(f"{task.name}, split {split}, {entry.key}", entry)
            yield sample


def _publish(
    folder: Path, before: Manifest | None, written: Mapping[str, dict[str, list[Shard]]], about: Mapping[str, Any]
) -> None:
    """Moves what was written into the data set. While tasks are replaced, the manifest does not name them."""
    from hyperpelt_ds.data.manifest import write_manifest

    kept = {name: splits for name, splits in before.tasks.items() if name not in written} if before else {}
    features, notes = (before.features, before.about) if before else (None, {})
    if before and len(kept) < len(before.tasks):
        write_manifest(folder, kept, features, notes)
    for name in written:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / IMAGES / f"{name}.jsonl").unlink(missing_ok=True)
        (folder / SHOTS / f"{name}.json").unlink(missing_ok=True)
    for path in (folder / STAGING).iterdir():
        if path.name != IMAGES:
            path.rename(folder / path.name)
    for path in (folder / STAGING).glob(f"{IMAGES}/*"):
        (folder / IMAGES).mkdir(exist_ok=True)
        path.rename(folder / IMAGES / path.name)
    notes = _notes(notes, [*kept, *written], written, about)
    write_manifest(folder, {name: {**kept, **written}[name] for name in notes["tasks"]}, features, notes)


def _notes(
    notes: Mapping[str, Any], names: Sequence[str], written: Collection[str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest's `about`: what each task is, what it was made from, and the records of the user's own tasks.

    Tasks come in one order, whatever was built first: as the package lists them, then others by name.
    """
    own = {**notes.get("records", {}), **records.own_records(written)}
    places = {name: place for place, name in enumerate(records.TASKS) if name not in own}
    said = {**notes.get("tasks", {}), **{name: records.get(name).about for name in written}}
    made = {**notes.get(MADE, {}), **{name: dict(about) for name in written}}
    names = sorted(names, key=lambda name: (places.get(name, len(places)), name))
    return {
        **notes,
        "tasks": {name: said.get(name, "") for name in names},
        MADE: {name: made[name] for name in names if name in made},
        "records": {name: own[name] for name in names if name in own},
    }


def _summarise(folder: Path, parts: Mapping[str, Mapping[str, _Part]], following: str, seconds: float) -> None:
    """One screen: counts, what was left out and why, one example, and what to do next."""
    from hyperpelt_ds.data.manifest import MANIFEST

    shards = [shard for splits in parts.values() for part in splits.values() for shard in part.shards]
    samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
    print(f"\n{folder / MANIFEST}: {samples:,} samples in {len(shards)} shards, {size / 1e6:,.1f} MB, {seconds:.0f} s")
    for name, splits in parts.items():
        counts = [f"{split} {sum(shard.samples for shard in part.shards):,}" for split, part in splits.items()]
        print(f"  {name:<16}  {'  '.join(counts)}")
    for name, splits in parts.items():
        for split, part in splits.items():
            for reason, count in part.left_out.items():
                print(f"  left out of {name} {split}: {count:,}, {reason}")
    sample = next(iter(next(iter(parts.values())).values())).first
    print(f"example {sample.key} of {sample.task}")
    shown = {"source": sample.source, "target": sample.target, "image": sample.image}
    for what, text in {**shown, "references": " | ".join(sample.references)}.items():
        if text is not None and (text or what in ("source", "target")):
            print(f"  {what:<10}  {text if len(text) <= SHOWN else text[:SHOWN] + ' ...'}")
    lists = [f"{IMAGES}/{name}.jsonl" for name in parts if (folder / IMAGES / f"{name}.jsonl").is_file()]
    if lists:
        print(f"next: image features of {', '.join(lists)}: python data_prep/features.py --help")
    if following:
        print(f"{'then' if lists else 'next'}: {following}")
