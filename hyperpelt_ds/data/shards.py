"""The layout on disk: shards, their indexes and the manifest. The only file that knows it, and the only writer.

    manifest.json                     tasks, features, about; written last
    <task>/<split>-000000.tar         a plain webdataset shard: one `key.json` a sample
    <task>/<split>-000000.idx.json    where each sample lies, its crc32 and its length
    features/features-000000.tar      one `image.npy` (V, F) float16 an image, stored once however many samples use it

The same samples give the same bytes. This file must not know in which order samples are trained on, nor what a
tokenizer or a model is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from hyperpelt_ds.contracts import Sample

VERSION = 1
MANIFEST = "manifest.json"
FEATURES = "features"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_KEY_BYTES = 90  # a ustar name holds 100 bytes, with the suffix


@dataclass(frozen=True)
class Shard:
    """One tar as the manifest lists it. `path` is relative to the manifest's folder, `bytes` is the tar's size."""

    path: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class FeatureSet:
    """The stored image features: V cells of F channels, and a description of the encoder that made them."""

    cells: int
    channels: int
    encoder: dict[str, Any]
    shards: list[Shard]


@dataclass(frozen=True)
class Index:
    """What lies where in one tar; one entry a sample in each list, in the order of the tar.

    members: (suffix, offset, size) of each member in bytes; crc32 runs over the members' bytes in that order;
    lengths: UTF-8 bytes of source plus target, 0 where a sample has no such text.
    """

    version: int
    bytes: int
    sha256: str
    keys: list[str]
    members: list[list[tuple[str, int, int]]]
    crc32: list[int]
    lengths: list[int]


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".idx.json")


def index_shard(tar: Path) -> Index:
    """Indexes an existing tar by reading it once.

    Raises ValueError naming the shard (and key) for a tar that is damaged or cut, a key that comes twice, members of
    one key that are not adjacent (webdataset would make two broken samples of them), bad JSON, and no samples at all.
    Python's tar reader ends quietly at a damaged header, hence the look at what follows the last member.
    """
    keys: list[str] = []
    members: list[list[tuple[str, int, int]]] = []
    crc32: list[int] = []
    lengths: list[int] = []
    with tar.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        for name, offset, content in _members(tar, file):
            key, suffix = base_plus_ext(name)
            if key is None:  # webdataset skips it as well
                continue
            if not keys or keys[-1] != key:
                keys.append(key)
                members.append([])
                crc32.append(0)
                lengths.append(0)
            elif any(suffix == other for other, _, _ in members[-1]):
                raise ValueError(f"shard {tar}: key {key!r} comes twice")
            members[-1].append((suffix, offset, len(content)))
            crc32[-1] = zlib.crc32(content, crc32[-1])
            if suffix == "json":
                lengths[-1] = _text_length(tar, key, content)
        size = file.seek(0, os.SEEK_END)
    if not keys:
        raise ValueError(f"shard {tar}: holds no samples")
    if len(set(keys)) < len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"shard {tar}: key {twice!r} comes twice, or its members are not adjacent")
    return Index(VERSION, size, sha256, keys, members, crc32, lengths)


def read_index(tar: Path) -> Index:
    """The index beside a tar; raises ValueError naming the shard if it is not one of ours."""
    try:
        index = Index(**json.loads(index_path(tar).read_bytes()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"shard {tar}: its index {index_path(tar).name} cannot be read: {error}") from None
    if index.version != VERSION:
        raise ValueError(f"shard {tar}: its index has version {index.version}, this program reads version {VERSION}")
    return index


def write_task(folder: Path, task: str, split: str, samples: Iterable[Sample], per_shard: int = 4096) -> list[Shard]:
    """Writes one split of one task under `folder`, with indexes; returns the shards for the manifest.

    Raises ValueError naming the sample: keys must be unique and, like image ids, free of '.' and '/' (webdataset
    splits a name at its first dot), and every sample must be of `task`.
    """
    for what, name in (("task", task), ("split", split)):
        if not _NAME.fullmatch(name) or name == FEATURES:
            raise ValueError(f"{what} {name!r}: must be letters, digits, '_' and '-', and not {FEATURES!r}")

    def encode(sample: Sample) -> tuple[str, dict[str, bytes]]:
        if sample.task != task:
            raise ValueError(f"sample {sample.key!r} is of task {sample.task!r}, cannot be written to task {task!r}")
        if sample.image is not None:
            _check_key(sample.image, f"image id of sample {sample.key!r} of task {task!r}")
        fields = {name: value for name, value in dataclasses.asdict(sample).items() if name != "key"}
        if not sample.references:
            del fields["references"]  # so that data without them has the bytes it had before there were any
        try:
            return sample.key, {"json": json.dumps(fields, ensure_ascii=False).encode()}
        except UnicodeEncodeError as error:
            raise ValueError(f"sample {sample.key!r} of task {task!r}: text that is not Unicode: {error}") from None

    return _write(folder, f"{task}/{split}", map(encode, samples), per_shard)


def write_features(folder: Path, features: Iterable[tuple[str, np.ndarray]], per_shard: int = 1024) -> list[Shard]:
    """Writes (image id, (V, F) array) pairs as float16 `.npy` members; returns the shards for a FeatureSet.

    Raises ValueError naming the image for an id that comes twice or has '.' or '/', a shape that differs from the
    first image's, and values that are not finite in float16.
    """
    shape: tuple[int, ...] | None = None

    def encode(pair: tuple[str, np.ndarray]) -> tuple[str, dict[str, bytes]]:
        nonlocal shape
        image, array = pair
        shape = shape or array.shape
        if array.ndim != 2 or array.shape != shape:
            raise ValueError(f"image {image!r}: features of shape {array.shape}, expected (cells, channels) = {shape}")
        with np.errstate(over="ignore"):  # reported with the image's name below
            half = np.ascontiguousarray(array, dtype=np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"image {image!r}: features hold values that are not finite in float16")
        content = io.BytesIO()
        np.save(content, half, allow_pickle=False)
        return image, {"npy": content.getvalue()}

    return _write(folder, f"{FEATURES}/{FEATURES}", map(encode, features), per_shard)


def write_manifest(
    folder: Path, tasks: dict[str, dict[str, list[Shard]]], features: FeatureSet | None, about: dict[str, Any]
) -> Path:
    """Writes `manifest.json`, to be called last: with it the data set exists. `about` is any JSON-able note."""
    tree = {
        "version": VERSION,
        "tasks": {t: {s: [dataclasses.asdict(x) for x in shards] for s, shards in tasks[t].items()} for t in tasks},
        "features": features and dataclasses.asdict(features),
        "about": about,
    }
    path = folder / MANIFEST
    _replace(path, json.dumps(tree, indent=1).encode() + b"\n")
    return path


@dataclass(frozen=True)
class Manifest:
    """A data set: its tasks (task -> split -> shards), its image features, and `digest`, which names its content."""

    folder: Path
    tasks: dict[str, dict[str, list[Shard]]]
    features: FeatureSet | None
    about: dict[str, Any]
    digest: str

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Reads a manifest and checks every shard cheaply (existence, tar size, index); no tar is read.

        Raises ValueError that names the manifest or the shard, and what differs.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"manifest {path}: no such file")
        try:
            tree = json.loads(path.read_bytes())
            if tree["version"] != VERSION:
                raise ValueError(f"manifest {path}: version {tree['version']!r}, this program reads version {VERSION}")
            tasks = {
                t: {s: [Shard(**x) for x in xs] for s, xs in splits.items()} for t, splits in tree["tasks"].items()
            }
            features = tree["features"] and FeatureSet(
                **{**tree["features"], "shards": [Shard(**x) for x in tree["features"]["shards"]]}
            )
            about = tree["about"]
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"manifest {path}: not a manifest written by data_prep ({error!r})") from None
        canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        manifest = cls(path.parent, tasks, features, about, hashlib.sha256(canonical.encode()).hexdigest())
        for shard in manifest._shards():
            manifest._check(shard)
        return manifest

    def count(self, task: str, split: str) -> int:
        """Samples of one split of one task; 0 if the task has no such split."""
        return sum(shard.samples for shard in self.shards(task, split))

    def shards(self, task: str, split: str) -> list[Shard]:
        """The shards of one split, [] if the task has no such split; ValueError for a task that is not there."""
        if task not in self.tasks:
            raise ValueError(f"task {task!r} is not in {self.folder / MANIFEST}; it holds {', '.join(self.tasks)}")
        return self.tasks[task].get(split, [])

    def verify(self) -> None:
        """Re-reads every tar and compares its sha256; raises ValueError naming the first shard that differs."""
        for shard in self._shards():
            self._check(shard)
            with (self.folder / shard.path).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise ValueError(f"shard {shard.path}: content differs from the manifest: sha256 {found}")

    def _shards(self) -> Iterator[Shard]:
        for splits in self.tasks.values():
            for shards in splits.values():
                yield from shards
        yield from self.features.shards if self.features else []

    def _check(self, shard: Shard) -> None:
        tar = self.folder / shard.path
        for path in (tar, index_path(tar)):
            if not path.is_file():
                raise ValueError(f"shard {shard.path}: missing: {path} does not exist")
        size = tar.stat().st_size
        if size != shard.bytes:
            raise ValueError(
                f"shard {shard.path}: size differs from the manifest: {size} bytes, expected {shard.bytes}"
            )
        found = hashlib.sha256(index_path(tar).read_bytes()).hexdigest()
        if found != shard.index_sha256:
            raise ValueError(
                f"shard {shard.path}: index differs from the manifest: {index_path(tar)} has sha256 {found}"
            )
        indexed = len(read_index(tar).keys)
        if indexed != shard.samples:
            raise ValueError(f"shard {shard.path}: the manifest says {shard.samples} samples, its index has {indexed}")


def _write(folder: Path, stem: str, samples: Iterable[tuple[str, dict[str, bytes]]], per_shard: int) -> list[Shard]:
    """Writes (key, {suffix: bytes}) samples to `<stem>-000000.tar`, ...; no partial file ever has that name."""
    if per_shard < 1:
        raise ValueError(f"per_shard: must be greater than 0, got {per_shard}")
    shards: list[Shard] = []
    seen: set[str] = set()
    for number, chunk in enumerate(_chunks(samples, per_shard)):
        path = f"{stem}-{number:06d}.tar"
        tar = folder / path
        tar.parent.mkdir(parents=True, exist_ok=True)
        partial = tar.with_suffix(".tar.partial")
        with partial.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as writer:
            for key, members in chunk:
                _check_key(key, f"key in shard {path}")
                if key in seen:
                    raise ValueError(f"shard {path}: key {key!r} comes twice in {stem}")
                seen.add(key)
                writer.write({"__key__": key, **members})
        index = index_shard(partial)
        content = json.dumps(dataclasses.asdict(index), separators=(",", ":"), ensure_ascii=False).encode()
        os.replace(partial, tar)
        _replace(index_path(tar), content)
        shards.append(Shard(path, len(index.keys), index.bytes, index.sha256, hashlib.sha256(content).hexdigest()))
    if not shards:
        raise ValueError(f"{stem}: no samples to write")
    return shards


T = TypeVar("T")


def _chunks(items: Iterable[T], size: int) -> Iterator[Iterator[T]]:
    """Iterators over `size` consecutive items each; each must be used up before the next is asked for."""
    rest = iter(items)
    for first in rest:
        yield itertools.chain([first], itertools.islice(rest, size - 1))


def _check_key(key: str, what: str) -> None:
    if not key or re.search(r"[./\x00-\x1f]", key) or len(key.encode()) > _KEY_BYTES:
        raise ValueError(f"{what}: {key!r} must have 1 to {_KEY_BYTES} bytes and no '.', '/' or control characters")


def _members(tar: Path, file: BinaryIO) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset, content) of every regular member; ValueError if the tar does not run to its own end mark."""
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg():
                    reader = archive.extractfile(member)
                    assert reader is not None  # it is None only for what is no regular file
                    yield member.name, member.offset_data, reader.read()
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"shard {tar}: damaged or not a tar: {error}") from None
    file.seek(end)
    rest = file.read()
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise ValueError(f"shard {tar}: damaged or cut: no proper end after byte {end}")


def _text_length(tar: Path, key: str, content: bytes) -> int:
    try:
        fields = json.loads(content)
        texts = [fields.get("source"), fields.get("target")] if isinstance(fields, dict) else []
        return sum(len(text.encode()) for text in texts if isinstance(text, str))
    except ValueError as error:
        raise ValueError(f"shard {tar}: sample {key!r} is not JSON in UTF-8: {error}") from None


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
