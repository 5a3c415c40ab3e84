"""Random access to stored samples and image features, every byte checked against the index.

This file must not know the order of a run, tokens or batches. Where things lie it asks of shards.py.
"""

from __future__ import annotations

import bisect
import functools
import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable
from io import FileIO

import numpy as np

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.shards import Index, Manifest, Shard, read_index

_REQUIRED = {"task": str, "source": str, "target": str}
_OPTIONAL = {"item": str, "image": str | None, "group": str | None, "references": list}
_FIELDS = _REQUIRED | _OPTIONAL


class DamagedSample(ValueError):
    """One stored sample (or image) that cannot be used: in which shard, under which key, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"shard {self.shard}, key {self.key!r}: {self.reason}"


class Reader:
    """Reads the samples and features of a manifest by position and by image id.

    Indexes and files are opened when first needed. Reads are positional, so a forked process may go on using the
    files of its parent; a pickled reader starts with none.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._indexes: dict[str, Index] = {}
        self._files: dict[str, FileIO] = {}
        self._edges: dict[tuple[str, str], list[int]] = {}
        self._images: dict[str, tuple[Shard, int]] = {}

    def __reduce__(self) -> tuple[type[Reader], tuple[Manifest]]:
        return Reader, (self.manifest,)

    def sample(self, task: str, split: str, index: int) -> Sample:
        """Sample number `index` of one split of one task; raises DamagedSample if it is not as it was written."""
        shard, position = self._find(task, split, index)
        key = self._index(shard).keys[position]
        content = self._member(shard, position, "json")
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise DamagedSample(shard.path, key, f"not JSON: {error}") from None
        _check_fields(shard.path, key, task, fields)
        references = tuple(fields.pop("references", ()))
        return Sample(key=key, references=references, **fields)

    def key(self, task: str, split: str, index: int) -> str:
        """The key of a sample, from the index alone."""
        shard, position = self._find(task, split, index)
        return self._index(shard).keys[position]

    def length(self, task: str, split: str, index: int) -> int:
        """UTF-8 bytes of a sample's source and target, from the index alone."""
        shard, position = self._find(task, split, index)
        return self._index(shard).lengths[position]

    def image(self, image: str) -> np.ndarray:
        """The stored features of an image, (V, F) float16; raises DamagedSample if there are none or not such."""
        if self.manifest.features is None or not self.has_image(image):
            raise DamagedSample("of image features", image, "no features are stored for this image")
        shard, position = self._images[image]
        content = self._member(shard, position, "npy")
        expected = (self.manifest.features.cells, self.manifest.features.channels)
        header = _npy_header(expected)
        if content.startswith(header) and len(content) == len(header) + 2 * math.prod(expected):
            return np.frombuffer(content, np.float16, offset=len(header)).reshape(expected)  # 1 us, np.load takes 65
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DamagedSample(shard.path, image, f"not a .npy array: {error}") from None
        if array.shape != expected:
            raise DamagedSample(shard.path, image, f"image features of shape {array.shape}, expected {expected}")
        return array

    def has_image(self, image: str) -> bool:
        """Whether features of this image are stored, from the indexes alone."""
        if not self._images and self.manifest.features:
            shards = self.manifest.features.shards
            self._images = {key: (s, i) for s in shards for i, key in enumerate(self._index(s).keys)}
        return image in self._images

    def images(self, samples: Iterable[Sample]) -> dict[str, np.ndarray]:
        """The features of every image that the samples name, by image id; an error names a sample that needs it."""
        arrays: dict[str, np.ndarray] = {}
        for sample in samples:
            if sample.image is not None and sample.image not in arrays:
                try:
                    arrays[sample.image] = self.image(sample.image)
                except DamagedSample as error:
                    reason = f"{error.reason} (needed by sample {sample.key!r} of task {sample.task!r})"
                    raise DamagedSample(error.shard, error.key, reason) from None
        return arrays

    def _find(self, task: str, split: str, index: int) -> tuple[Shard, int]:
        shards = self.manifest.shards(task, split)
        edges = self._edges.get((task, split))
        if edges is None:
            edges = self._edges[task, split] = list(itertools.accumulate((s.samples for s in shards), initial=0))
        if not 0 <= index < edges[-1]:
            raise IndexError(f"sample {index} of task {task!r}, split {split!r}, which has {edges[-1]} samples")
        number = bisect.bisect_right(edges, index) - 1
        return shards[number], index - edges[number]

    def _index(self, shard: Shard) -> Index:
        if shard.path not in self._indexes:
            self._indexes[shard.path] = read_index(self.manifest.folder / shard.path)
        return self._indexes[shard.path]

    def _member(self, shard: Shard, position: int, suffix: str) -> bytes:
        """The bytes of one member, after the checksum over all members of the sample was found to be right."""
        if shard.path not in self._files:
            self._files[shard.path] = open(self.manifest.folder / shard.path, "rb", buffering=0)  # noqa: SIM115
        index, descriptor = self._index(shard), self._files[shard.path].fileno()
        found, crc32 = None, 0
        for name, offset, size in index.members[position]:
            content = os.pread(descriptor, size, offset)
            crc32 = zlib.crc32(content, crc32)
            if name == suffix:
                found = content
        key = index.keys[position]
        if crc32 != index.crc32[position]:
            raise DamagedSample(shard.path, key, f"crc32 is {crc32:08x}, expected {index.crc32[position]:08x}")
        if found is None:
            raise DamagedSample(shard.path, key, f"has no .{suffix} member")
        return found


@functools.lru_cache
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What a float16 `.npy` file of this shape begins with."""
    content = io.BytesIO()
    np.save(content, np.zeros(shape, np.float16))
    return content.getvalue()[: -2 * math.prod(shape)]


def _check_fields(shard: str, key: str, task: str, fields: object) -> None:
    if not isinstance(fields, dict):
        raise DamagedSample(shard, key, f"expected an object with fields {', '.join(_FIELDS)}")
    for name in _REQUIRED:
        if name not in fields:
            raise DamagedSample(shard, key, f"field {name!r} is missing")
    for name, value in fields.items():
        if name not in _FIELDS:
            raise DamagedSample(shard, key, f"unknown field {name!r}; the fields are {', '.join(_FIELDS)}")
        if not isinstance(value, _FIELDS[name]):
            raise DamagedSample(shard, key, f"field {name!r} is of type {type(value).__name__}")
    for text in fields.get("references", ()):
        if not isinstance(text, str):
            raise DamagedSample(shard, key, f"field 'references' holds {text!r}, expected texts only")
    if fields["task"] != task:
        raise DamagedSample(shard, key, f"is of task {fields['task']!r}, but the manifest lists it under {task!r}")
