"""The writers of shards: samples and image features to plain webdataset tars, each with its index.

The same samples give the same bytes. This file must not know in which order samples are trained on, nor what a
tokenizer or a model is.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.index import Index, index_path, index_shard, replace
from hyperpelt_ds.data.manifest import FEATURES, Shard

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_KEY_BYTES = 90  # a ustar name holds 100 bytes, with the suffix


def write_task(folder: Path, task: str, split: str, samples: Iterable[Sample], per_shard: int = 4096) -> list[Shard]:
    """Writes one split of one task under `folder`, with indexes; returns the shards for the manifest.

    Raises ValueError naming the sample: keys must be unique and, like image ids, free of '.' and '/' (webdataset
    splits a name at its first dot), and every sample must be of `task`.
    """
    check_names(task, split)

    def encode(sample: Sample) -> tuple[str, dict[str, bytes]]:
        if sample.task != task:
            raise ValueError(f"sample {sample.key!r} is of task {sample.task!r}, cannot be written to task {task!r}")
        if sample.image is not None:
            _check_key(sample.image, f"image id of sample {sample.key!r} of task {task!r}")
        fields = {name: value for name, value in sample._asdict().items() if name != "key"}
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


def check_names(task: str, split: str) -> None:
    """Raises ValueError for what cannot be the name of a task or a split."""
    for what, name in (("task", task), ("split", split)):
        if not _NAME.fullmatch(name) or name == FEATURES:
            raise ValueError(f"{what} {name!r}: must be letters, digits, '_' and '-', and not {FEATURES!r}")


def list_shard(path: str, index: Index) -> Shard:
    """A tar as a manifest is to list it under `path`."""
    longest = int(index.target_lengths.max())
    index_sha256 = hashlib.sha256(index.encode()).hexdigest()
    return Shard(path, len(index), index.tar_bytes, index.tar_sha256, index_sha256, longest)


def _write(folder: Path, stem: str, samples: Iterable[tuple[str, dict[str, bytes]]], per_shard: int) -> list[Shard]:
    """Writes (key, {suffix: bytes}) samples to `<stem>-000000.tar`, ...; no partial file ever has that name."""
    if per_shard < 1:
        raise ValueError(f"per_shard: must be greater than 0, got {per_shard}")
    from webdataset import TarWriter  # it loads torch, for which --help should not wait

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
        os.replace(partial, tar)
        replace(index_path(tar), index.encode())
        shards.append(list_shard(path, index))
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
