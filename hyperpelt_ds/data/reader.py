"""Random access to stored samples and image features, every byte checked against the index.

This file must not know the order of a run, tokens or batches. Where things lie it asks of index.py and lookup.py,
and the bytes it asks of the manifest's folder.
"""

from __future__ import annotations

import bisect
import functools
import io
import itertools
import math
import tokenize
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import orjson
from isal import isal_zlib

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.folder import Unreachable
from hyperpelt_ds.data.index import Index
from hyperpelt_ds.data.lookup import Lookup
from hyperpelt_ds.data.manifest import FEATURES, Manifest, Shard

T = TypeVar("T")
_REQUIRED = ("task", "source", "target")
_FIELDS = {
    **dict.fromkeys(_REQUIRED, (str,)),
    "item": (str,),
    "image": (str, type(None)),
    "group": (str, type(None)),
    "references": (list,),
}
# All that numpy's reading of a .npy lets through (2.5); its parser tokenizes a header that it cannot understand.
_NO_ARRAY = (ValueError, EOFError, MemoryError, SyntaxError, tokenize.TokenError)
# Indexes of some five million samples: the windows of 64 lanes x 4 shards for five large tasks, all touched in turn.
# An index that was dropped takes 0.4 ms to read and check again, forty times a sample.
INDEX_BYTES = 256 << 20


class DamagedSample(ValueError):
    """One stored sample (or image) that cannot be used: in which shard, under which key, and why."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"shard {self.shard}, key {self.key!r}: {self.reason}"


class Reader:
    """Reads the samples and features of a manifest by position and by image id.

    Nothing is opened before it is needed; of the indexes, those last used stay in memory. A forked process may go on
    using its parent's reader, a pickled reader starts anew; threads may not share one.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._indexes: OrderedDict[str, Index] = OrderedDict()
        self._index_bytes = 0
        self._wrong: dict[str, str] = {}  # index files that will not be right next time either, and why
        self._splits: dict[tuple[str, str], tuple[list[Shard], list[int]]] = {}  # with the running sum of their samples
        self._lookup: Lookup | None = None

    def __reduce__(self) -> tuple[type[Reader], tuple[Manifest]]:
        return Reader, (self.manifest,)

    def sample(self, task: str, split: str, index: int) -> Sample:
        """Sample number `index` of one split of one task; raises DamagedSample if it is not as it was written."""
        shard, position = self._find(task, split, index)
        key, content = self._member(shard, position, "json")
        try:
            fields = orjson.loads(content)  # 0.6 us where the standard library takes 1.5
        except ValueError as error:
            raise DamagedSample(shard.path, key, f"not JSON: {error}") from None
        fault = schema_fault(task, fields)
        if fault:
            raise DamagedSample(shard.path, key, fault)
        if "references" in fields:
            fields["references"] = tuple(fields["references"])
        fields["task"] = task  # one text for all samples, which crosses between processes once a message
        return Sample(key, **fields)

    def place(self, task: str, split: str, index: int) -> tuple[str, str]:
        """The shard that a sample lies in and its key, from the index alone; "" for a key that cannot be read."""
        shard, position = self._find(task, split, index)
        try:
            return shard.path, self.index(shard).key(position)
        except DamagedSample:
            return shard.path, ""

    def length(self, task: str, split: str, index: int) -> int:
        """UTF-8 bytes of a sample's source and target, from the index alone; 0 if that cannot be read."""
        return sum(self.lengths(task, split, index))

    def lengths(self, task: str, split: str, index: int) -> tuple[int, int]:
        """UTF-8 bytes of a sample's source, and of its target, from the index alone; 0 if that cannot be read."""
        shard, position = self._find(task, split, index)
        try:
            own = self.index(shard)
        except DamagedSample:
            return 0, 0
        target = own.target_lengths.item(position)
        return own.lengths.item(position) - target, target

    def image(self, image: str) -> np.ndarray:
        """The stored features of an image, (V, F) float16; raises DamagedSample if there are none or not such."""
        found = self._find_image(image)
        if found is not None and self.manifest.features is not None:
            shard, position = self.manifest.features.shards[found[0]], found[1]
            if self.index(shard).key(position) == image:
                return self.stored_image(shard, position)
        raise DamagedSample(FEATURES, image, "no features are stored for this image")

    def stored_image(self, shard: Shard, position: int) -> np.ndarray:
        """The features at one place of a feature shard, as `image` gives them."""
        assert self.manifest.features is not None
        expected = (self.manifest.features.cells, self.manifest.features.channels)
        key, content = self._member(shard, position, "npy")
        header = _npy_header(expected)
        if len(content) == len(header) + 2 * math.prod(expected) and content[: len(header)] == header:
            return np.frombuffer(content, np.float16, offset=len(header)).reshape(expected)  # 1 us, np.load takes 65
        try:
            array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        except _NO_ARRAY as error:
            raise DamagedSample(shard.path, key, f"not a .npy array: {error}") from None
        if array.shape != expected or array.dtype.kind != "f":
            found = f"{array.dtype} features of shape {array.shape}"
            raise DamagedSample(shard.path, key, f"image has {found}, expected float16 of {expected}")
        return array

    def has_image(self, image: str) -> bool:
        """Whether features of this image are stored, from the lookup alone; raises DamagedSample without one."""
        return self._find_image(image) is not None

    def images(self, samples: Iterable[Sample]) -> dict[str, np.ndarray]:
        """The features of every image that the samples name, by image id; an error names a sample that needs it."""
        arrays: dict[str, np.ndarray] = {}
        for sample in samples:
            if sample.image is not None and sample.image not in arrays:
                try:
                    arrays[sample.image] = self.image(sample.image)
                except DamagedSample as error:
                    user = f"image {sample.image!r} in {error.shard}, of sample {sample.key!r} of task {sample.task!r}"
                    reason = f"{error.reason} ({user})"
                    raise DamagedSample(error.shard, error.key, reason) from None
        return arrays

    def index(self, shard: Shard) -> Index:
        """The index of a shard, checked when it is read; raises DamagedSample, with no key, if it cannot be used."""
        index = self._indexes.get(shard.path)
        if index is not None:
            self._indexes.move_to_end(shard.path)
            return index
        index = self._load(shard.path, shard.index_path, shard.index_sha256, Index.decode)
        if len(index) != shard.samples:
            reason = f"{shard.index_path} has {len(index)} samples, the manifest says {shard.samples}"
            raise DamagedSample(shard.path, "", reason)
        self._indexes[shard.path] = index
        self._index_bytes += index.nbytes
        while self._index_bytes > INDEX_BYTES and len(self._indexes) > 1:
            self._index_bytes -= self._indexes.popitem(last=False)[1].nbytes
        return index

    def _find(self, task: str, split: str, index: int) -> tuple[Shard, int]:
        found = self._splits.get((task, split))
        if found is None:
            shards = self.manifest.shards(task, split)
            found = shards, list(itertools.accumulate((shard.samples for shard in shards), initial=0))
            self._splits[task, split] = found
        shards, edges = found
        if not 0 <= index < edges[-1]:
            raise IndexError(f"sample {index} of task {task!r}, split {split!r}, which has {edges[-1]} samples")
        number = bisect.bisect_right(edges, index) - 1
        return shards[number], index - edges[number]

    def _find_image(self, image: str) -> tuple[int, int] | None:
        features = self.manifest.features
        if features is None:
            return None
        if self._lookup is None:
            self._lookup = self._load(features.lookup, features.lookup, features.lookup_sha256, Lookup.decode)
        return self._lookup.find(image)

    def _load(self, shard: str, name: str, sha256: str, decode: Callable[[bytes], T]) -> T:
        """What a small file holds, after a look at its sha256. One that was found to be wrong is not read again."""
        if name in self._wrong:
            raise DamagedSample(shard, "", self._wrong[name])
        try:
            return decode(self.manifest.folder.read(name, sha256))
        except Unreachable:
            raise
        except OSError as error:
            raise DamagedSample(shard, "", f"{name} cannot be read: {error}") from None
        except ValueError as error:
            self._wrong[name] = f"{name} cannot be used: {error}"
            raise DamagedSample(shard, "", self._wrong[name]) from None

    def _member(self, shard: Shard, position: int, suffix: str) -> tuple[str, memoryview]:
        """A sample's key and one of its members, after its whole span was found to be as it was written."""
        index = self.index(shard)
        key, (start, size) = index.key(position), index.span(position)
        try:
            span = self.manifest.folder.part(shard, start, size)
        except Unreachable:
            raise
        except OSError as error:
            raise DamagedSample(shard.path, key, f"cannot be read: {error}") from None
        if len(span) < size:
            reason = f"cut short: the tar ends at byte {start + len(span)}, this sample at {start + size}"
            raise DamagedSample(shard.path, key, reason)
        crc32 = isal_zlib.crc32(span)  # that of zlib, ten times as fast (75 KB: 1.4 us, not 18)
        if crc32 != index.crc32.item(position):
            raise DamagedSample(shard.path, key, f"crc32 is {crc32:08x}, expected {index.crc32[position]:08x}")
        place = index.member(position, suffix)
        if place is None:
            raise DamagedSample(shard.path, key, f"has no .{suffix} member")
        return key, memoryview(span)[place[0] : place[0] + place[1]]


@functools.lru_cache
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What a float16 `.npy` file of this shape begins with."""
    content = io.BytesIO()
    np.save(content, np.zeros(shape, np.float16))
    return content.getvalue()[: -2 * math.prod(shape)]


_SOUND: set[tuple[object, ...]] = set()
"""Field names and types, in their order, that were found to be right: to look one up takes half as long as to check."""


def schema_fault(task: str, fields: object) -> str | None:
    """What is wrong with the fields of a stored sample that the manifest lists under `task`."""
    if not isinstance(fields, dict):
        return f"expected an object with fields {', '.join(_FIELDS)}"
    shape = (*fields, *map(type, fields.values()))
    if shape not in _SOUND:
        fault = _fault_of_fields(fields)
        if fault:
            return fault
        _SOUND.add(shape)
    for text in fields.get("references", ()):
        if not isinstance(text, str):
            return f"field 'references' holds {text!r}, expected texts only"
    if fields["task"] != task:
        return f"is of task {fields['task']!r}, but the manifest lists it under {task!r}"
    return None


def _fault_of_fields(fields: dict[str, object]) -> str | None:
    for name in _REQUIRED:
        if name not in fields:
            return f"field {name!r} is missing"
    for name, value in fields.items():
        if type(value) not in _FIELDS.get(name, ()):
            if name not in _FIELDS:
                return f"unknown field {name!r}; the fields are {', '.join(_FIELDS)}"
            return f"field {name!r} is of type {type(value).__name__}"
    return None
