"""Indexes shards that others made, and puts them into a manifest. Thin: what an index holds is hyperpelt_ds/data/'s."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from parts.building import locked
from parts.command_line import at_least, run
from parts.places import MADE

from hyperpelt_ds.data.folder import LocalFolder
from hyperpelt_ds.data.index import find_shards, refresh_index
from hyperpelt_ds.data.lookup import Lookup
from hyperpelt_ds.data.manifest import MANIFEST, Manifest, Shard, write_manifest
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.data.shards import check_names, list_shard
from hyperpelt_ds.terminal import progress


def index(*, shards: str, task: str = "", split: str = "train", out: str = "", workers: int = 2) -> None:
    """Write the index of each webdataset shard beside it, and list the shards in a manifest if --task and --out say so.

    Indexes that are up to date stay as they are, so that a command that was killed is simply given again. A shard that
    cannot be indexed is reported, the others are done, and the exit code is 1; 2 stands for a command that could not be
    understood.

    Examples:
        python data_prep/index.py 'shards/part-{000000..000099}.tar' --workers 8
        python data_prep/index.py 'data/mine/*.tar' --task summary --split train --out data/mine/manifest.json

    Args:
        shards: tars by name, with braces or as a glob, in quotes; several in a row. The flag's name may be left out
        task: put the shards into a manifest under this task; each sample's JSON then needs task, source and target
        split: and into this split of it
        out: that manifest, new or to be added to; the shards must lie in its folder or below
        workers: processes
    """
    at_least(1, workers=workers)
    start, tars = time.monotonic(), find_shards(shards)
    names = _names(tars, task, split, out)
    made, refused, listed = 0, 0, []
    with ProcessPoolExecutor(min(workers, len(tars))) as pool:
        results = _waited_for(pool.map(_index, tars))
        for tar, result in progress(zip(tars, results, strict=True), "shards", len(tars)):
            if isinstance(result, str):
                print(f"refused: {result.removeprefix(f'shard {tar}: ')} ({tar})", flush=True)
                refused += 1
            else:
                made += result[1]
                listed.append(dataclasses.replace(result[0], path=names.get(tar, "")))
    samples = sum(shard.samples for shard in listed)
    print(
        f"\n{len(tars):,} shards: {made:,} indexed, {len(listed) - made:,} up to date, {refused:,} refused; "
        f"{samples:,} samples, {time.monotonic() - start:.0f} s"
    )
    if refused:
        print(f"next: mend or leave out what was refused{f'; {out} is as it was' if task else ''}")
        sys.exit(1)
    if not task:
        print("next: the same with --task NAME --split train --out FOLDER/manifest.json, to train on them")
    elif not _add(Path(out), task, split, listed):
        print(f"next: mend these shards; {out} is as it was")
        sys.exit(1)
    else:
        print(f"{out}: {samples:,} samples of {task} {split}\nnext: python data_prep/verify.py {out}")


def _waited_for(results: Iterator[tuple[Shard, bool] | str]) -> Iterator[tuple[Shard, bool] | str]:
    try:
        yield from results
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed (out of memory?). Fewer --workers take less; what is indexed is kept"
        ) from None


def _index(tar: Path) -> tuple[Shard, bool] | str:
    """A shard and whether its index had to be written, or why it cannot be indexed."""
    try:
        index, written = refresh_index(tar)
    except (OSError, ValueError) as error:
        return str(error)
    return list_shard("", index), written


def _names(tars: Sequence[Path], task: str, split: str, out: str) -> dict[Path, str]:
    """The shards' paths as the manifest `out` is to name them; {} without one. ValueError if it could not."""
    if bool(task) != bool(out):
        raise ValueError(f"--{'out' if task else 'task'} is missing: a manifest needs both --task and --out")
    if not task:
        return {}
    check_names(task, split)
    manifest = Path(os.path.abspath(out))
    if manifest.name != MANIFEST:
        raise ValueError(f"--out {out}: a manifest is a file of the name {MANIFEST}")
    names = {tar: Path(os.path.abspath(tar)) for tar in tars}
    for tar, path in names.items():
        if not path.is_relative_to(manifest.parent):
            raise ValueError(f"--out {out}: shard {tar} does not lie under its folder; put it there or --out above it")
    return {tar: path.relative_to(manifest.parent).as_posix() for tar, path in names.items()}


def _add(path: Path, task: str, split: str, shards: list[Shard]) -> bool:
    """Puts shards into a manifest, after a look at every sample; False, having said why, if they cannot be there."""
    with locked(path.parent):
        before = Manifest.load(path) if path.is_file() else None
        tasks, features, about = (before.tasks, before.features, before.about) if before else ({}, None, {})
        new = {shard.path for shard in shards}
        listed = {s.path: (name, own) for name, splits in tasks.items() for own in splits for s in splits[own]}
        for path_of in sorted(new):
            if listed.get(path_of, (task, split)) != (task, split):
                name, own = listed[path_of]
                raise ValueError(
                    f"--out {path}: shard {path_of} is listed for task {name!r}, split {own} already; samples would be "
                    f"in both"
                )
        kept = [shard for shard in tasks.get(task, {}).get(split, []) if shard.path not in new]
        reader = Reader(
            Manifest(str(path), LocalFolder(path.parent), {task: {split: kept + shards}}, features, about, "")
        )
        faults = list(_unusable(reader, task, split, kept, shards))
        for fault in faults:
            print(f"unusable: {fault}", flush=True)
        if faults:
            return False
        if task in about.get(MADE, {}) and new - listed.keys():  # not a builder's alone: another build would delete it
            about = {**about, MADE: {name: made for name, made in about[MADE].items() if name != task}}
        write_manifest(path.parent, {**tasks, task: {**tasks.get(task, {}), split: kept + shards}}, features, about)
        return True


def _unusable(reader: Reader, task: str, split: str, kept: list[Shard], shards: list[Shard]) -> Iterator[str]:
    """Of each shard the first sample that is none of ours, and the first key that it repeats."""
    first = sum(shard.samples for shard in kept)
    for shard in progress(shards, "shards checked", len(shards)):
        for number in range(first, first + shard.samples):
            try:
                reader.sample(task, split, number)
            except DamagedSample as error:
                yield str(error)
                break
        first += shard.samples
    every, seen = kept + shards, set()
    for (one, _), (other, position) in Lookup.build(map(reader.index, every)).repeated():
        if other in seen:
            continue
        seen.add(other)
        key = reader.index(every[other]).key(position)
        yield f"shard {every[other].path}, key {key!r}: its key comes twice, in {every[one].path} as well"


if __name__ == "__main__":
    values = list(itertools.takewhile(lambda value: not value.startswith("-"), sys.argv[1:]))
    if values:
        sys.argv[1 : len(values) + 1] = ["--shards", "::".join(values)]
    run(index)
