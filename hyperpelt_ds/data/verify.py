"""Finds all damage of a data set: re-reads every byte, and every sample as training would read it.

This file must not know how faults are shown, nor what a run does about them.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hyperpelt_ds.contracts import TRAIN, VALIDATION
from hyperpelt_ds.data.folder import Folder
from hyperpelt_ds.data.index import Index, index_file
from hyperpelt_ds.data.lookup import Lookup
from hyperpelt_ds.data.manifest import Manifest, Shard
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.tasks import TASKS
from hyperpelt_ds.tasks.task import check_target

_BLOCK = 1 << 20  # bytes of a tar read at a time


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, with a sample or image, or with a whole file (key is then "")."""

    shard: str
    key: str
    reason: str


def faults(manifest: Manifest) -> Iterator[Fault]:
    """All that is wrong with a data set, shard by shard; of a sample the reason that the Reader gives as well.

    A tar or an index that is not there at all is one fault, and its samples are not listed; `manifest` is to be loaded
    with check_files=False to get that far. Targets are held against the labels of tasks that are known by then.
    """
    for _, found in faults_by_shard(manifest):
        yield from found


def faults_by_shard(manifest: Manifest) -> Iterator[tuple[str, list[Fault]]]:
    """Every shard as it is checked, with its faults; a split's last shard also names the keys that others repeat."""
    reader = Reader(manifest)
    for task, splits in manifest.tasks.items():
        for split, shards in splits.items():
            first = 0
            for shard in shards:
                found = list(_file_faults(manifest.folder, reader, shard))
                if _readable(reader, shard):
                    found += _sample_faults(reader, shard, task, split, first)
                first += shard.samples
                yield shard.path, found + (list(_repeated(reader, shards)) if shard is shards[-1] else [])
    if manifest.features:
        for shard in manifest.features.shards:
            found = list(_file_faults(manifest.folder, reader, shard))
            if _readable(reader, shard):
                found += _image_faults(reader, shard)
            yield shard.path, found
        found = [*_repeated(reader, manifest.features.shards), *_lookup_faults(manifest, reader)]
        yield manifest.features.lookup, found


def _readable(reader: Reader, shard: Shard) -> bool:
    return _index_fault(reader, shard) is None and reader.manifest.folder.size(shard.path) is not None


def _index_fault(reader: Reader, shard: Shard) -> str | None:
    try:
        reader.index(shard)
    except DamagedSample as error:
        return error.reason
    return None


def _file_faults(folder: Folder, reader: Reader, shard: Shard) -> Iterator[Fault]:
    """What is wrong with a tar and its index as files."""
    size, unusable = folder.size(shard.path), _index_fault(reader, shard)
    if unusable:
        yield Fault(shard.path, "", f"{unusable}; none of its {shard.samples} samples can be read")
    if size is None:
        yield Fault(shard.path, "", f"missing; none of its {shard.samples} samples can be read")
        return
    found, refused = None, ""
    try:
        found = index_file(_open(folder, shard), shard.path)
        sha256 = found.tar_sha256
    except ValueError as error:
        refused = str(error).removeprefix(f"shard {shard.path}: ")
        sha256 = hashlib.file_digest(_open(folder, shard), "sha256").hexdigest()
    except OSError as error:
        yield Fault(shard.path, "", f"cannot be read: {error}")
        return
    why = f"; {refused}" if refused else ""
    if size != shard.bytes:
        yield Fault(shard.path, "", f"size differs from the manifest: {size} bytes, not {shard.bytes}{why}")
    elif sha256 != shard.sha256:
        yield Fault(shard.path, "", f"content differs from the manifest: sha256 is {sha256}, not {shard.sha256}{why}")
    elif refused:
        yield Fault(shard.path, "", refused)
    elif found and not unusable and found.encode() != reader.index(shard).encode():
        yield Fault(shard.path, "", f"its index is not of what it holds{_difference(found, reader.index(shard))}")


def _difference(found: Index, index: Index) -> str:
    for i, j in zip(range(len(found)), range(len(index)), strict=False):
        if (found.key(i), found.span(i), found.members(i)) != (index.key(j), index.span(j), index.members(j)):
            return f", from key {found.key(i)!r} on"
    return ""


def _sample_faults(reader: Reader, shard: Shard, task: str, split: str, first: int) -> Iterator[Fault]:
    """What is wrong with the samples of one shard, whose first is number `first` of its split."""
    without, features = 0, reader.manifest.features
    for i in range(first, first + shard.samples):
        try:
            sample = reader.sample(task, split, i)
            if task in TASKS and (sample.target or split in (TRAIN, VALIDATION)):  # test sets may lack answers
                check_target(TASKS[task], sample.key, sample.target)
            if sample.image is not None and features is None:
                without += 1
            elif sample.image is not None and not reader.has_image(sample.image):
                yield Fault(shard.path, sample.key, f"no features are stored for its image {sample.image!r}")
        except DamagedSample as error:
            if features is None or error.shard != features.lookup:  # which is a fault of its own
                yield Fault(error.shard, error.key, error.reason)
        except ValueError as error:  # of check_target
            yield Fault(shard.path, sample.key, str(error))
    if without:
        reason = f"{without} samples name images, but the data set holds no image features (data_prep/features.py)"
        yield Fault(shard.path, "", reason)


def _image_faults(reader: Reader, shard: Shard) -> Iterator[Fault]:
    for position in range(shard.samples):
        try:
            array = reader.stored_image(shard, position)
        except DamagedSample as error:
            yield Fault(error.shard, error.key, error.reason)
        else:
            if not np.isfinite(array).all():
                yield Fault(shard.path, reader.index(shard).key(position), "features hold values that are not finite")


def _repeated(reader: Reader, shards: Sequence[Shard]) -> Iterator[Fault]:
    """Keys that come twice in the shards of one split, or of the features."""
    own = [shard for shard in shards if _index_fault(reader, shard) is None]
    for (first, _), (second, position) in Lookup.build(map(reader.index, own)).repeated():
        key = reader.index(own[second]).key(position)
        yield Fault(own[second].path, key, f"its key comes twice, in {own[first].path} as well")


def _lookup_faults(manifest: Manifest, reader: Reader) -> Iterator[Fault]:
    assert manifest.features is not None
    name = manifest.features.lookup
    try:
        stored = manifest.folder.read(name, manifest.features.lookup_sha256)
    except (OSError, ValueError) as error:
        yield Fault(name, "", f"cannot be read: {error}; no image can be found without it")
        return
    shards = manifest.features.shards
    if any(_index_fault(reader, shard) for shard in shards):
        return  # what it should be cannot be known
    if stored != Lookup.build(map(reader.index, shards)).encode():
        yield Fault(name, "", "it is not of what the feature shards hold")


def _open(folder: Folder, shard: Shard) -> io.BufferedReader:
    return io.BufferedReader(_Tar(folder, shard), _BLOCK)


class _Tar(io.RawIOBase):
    """A shard as a file that is read from its start."""

    def __init__(self, folder: Folder, shard: Shard) -> None:
        self.folder, self.shard, self.at = folder, shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self.at = offset
        return offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self.folder.part(self.shard, self.at, len(buffer))
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)
