"""In which feature shard an image lies, by the hash of its id: one small file instead of every shard's index.

This file must not know what an image or its features are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from hyperpelt_ds.data.index import VERSION, Index, key_digest


@dataclass(frozen=True, eq=False)
class Lookup:
    """Places of n keys over several shards, sorted by hash; 16 bytes a key."""

    hashes: np.ndarray  # (n,) uint64, ascending
    shards: np.ndarray  # (n,) uint32, number of the shard
    positions: np.ndarray  # (n,) uint32, in that shard

    @classmethod
    def build(cls, indexes: Iterable[Index]) -> Lookup:
        """The places of all keys of these shards, of which one index at a time is held."""
        parts = [index.hashes() for index in indexes]
        sizes = [len(part) for part in parts]
        hashes = np.concatenate([*parts, np.zeros(0, np.uint64)])
        order = np.argsort(hashes, kind="stable")
        shards = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
        positions = np.concatenate([np.arange(size, dtype=np.uint32) for size in [*sizes, 0]])
        return cls(hashes[order], shards[order], positions[order])

    def repeated(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Pairs of places, each (shard, position), that have the same key; the second of them is the later one."""
        for i in np.flatnonzero(self.hashes[1:] == self.hashes[:-1]).tolist():
            first, second = ((self.shards.item(j), self.positions.item(j)) for j in (i, i + 1))
            yield first, second

    def find(self, key: str) -> tuple[int, int] | None:
        """(shard, position) of a key, None if it is not there; one in 2^64 / n keys that are not there is found."""
        wanted = int.from_bytes(key_digest(key.encode()), "little")
        i = int(self.hashes.searchsorted(np.uint64(wanted)))
        if i == len(self.hashes) or self.hashes.item(i) != wanted:
            return None
        return self.shards.item(i), self.positions.item(i)

    def encode(self) -> bytes:
        version = np.array([VERSION], np.uint32)
        arrays = {"hashes": self.hashes, "shards": self.shards, "positions": self.positions, "version": version}
        return safetensors.numpy.save(arrays)

    @classmethod
    def decode(cls, content: bytes) -> Lookup:
        """Raises ValueError for what is no such file."""
        try:
            arrays = safetensors.numpy.load(content)
            if arrays.pop("version").tolist() != [VERSION]:
                raise ValueError(f"a lookup of another version than {VERSION}")
            return cls(**arrays)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"not a lookup written by data_prep ({error!r})") from None
