"""Damage to real shards, one kind a function, and what of a shard each kind must hurt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hyperpelt_ds.data.index import Index, index_path, read_index
from hyperpelt_ds.data.shards import list_shard

Damage = Callable[[bytes, Index, int], bytes]
"""The content of a tar, its index, and the position of a sample in it, to the content when that sample is damaged."""


def rename(content: bytes, start: int, name: str) -> bytes:
    """With another name in the header at `start`, whose checksum is right."""
    header = tarfile.TarInfo.frombuf(content[start : start + 512], "utf-8", "strict")
    header.name = name
    return content[:start] + header.tobuf(tarfile.USTAR_FORMAT) + content[start + 512 :]


def _start(index: Index, i: int) -> int:
    return index.span(i)[0]


def _data(index: Index, i: int) -> tuple[int, int]:
    [(_, offset, size)] = index.members(i)
    return offset, size


def _overwrite(content: bytes, start: int, new: bytes) -> bytes:
    return content[:start] + new + content[start + len(new) :]


def _flip(content: bytes, index: Index, i: int) -> bytes:
    place = _data(index, i)[0] + _data(index, i)[1] // 2
    return _overwrite(content, place, bytes([content[place] ^ 4]))


def _remove(content: bytes, index: Index, i: int) -> bytes:
    end = _start(index, i + 1) if i + 1 < len(index) else index.span(i)[0] + -(-index.span(i)[1] // 512) * 512
    return content[: _start(index, i)] + content[end:]


ONE: dict[str, Damage] = {
    "header overwritten": lambda c, x, i: _overwrite(c, _start(x, i), b"\xff" * 512),
    "header zeroed": lambda c, x, i: _overwrite(c, _start(x, i), b"\0" * 512),
    "flipped data byte": _flip,
    "duplicate key": lambda c, x, i: rename(c, _start(x, i), f"{x.key(i - 1)}.{x.suffixes[0]}"),
    "renamed member": lambda c, x, i: rename(c, _start(x, i), f"{x.key(i)}.other"),
}
"""Kinds that hurt one sample. webdataset loses every sample behind an overwritten or zeroed header."""

REST: dict[str, Damage] = {
    "cut at a header": lambda c, x, i: c[: _start(x, i)],
    "cut inside a header": lambda c, x, i: c[: _start(x, i) + 100],
    "cut inside data": lambda c, x, i: c[: _data(x, i)[0] + _data(x, i)[1] // 2],
    "removed member": _remove,
}
"""Kinds that hurt a sample and all that follow it in its shard."""


def damage(folder: Path, path: str, kind: str, position: int) -> set[int]:
    """Damages one sample of the tar `path` of a data set in `folder`; the positions that this hurts."""
    tar, index = folder / path, read_index(folder / path)
    tar.write_bytes((ONE | REST)[kind](tar.read_bytes(), index, position))
    return {position} if kind in ONE else set(range(position, len(index)))


def rewrite(folder: Path, path: str, position: int, content: bytes) -> None:
    """Puts `content`, padded with spaces, in the place of a member's, and lists the shard as if that were right."""
    tar, index = folder / path, read_index(folder / path)
    offset, size = _data(index, position)
    assert len(content) <= size
    tar.write_bytes(_overwrite(tar.read_bytes(), offset, content.ljust(size)))
    relist(folder, path, index)


def relist(folder: Path, path: str, index: Index) -> None:
    """Makes the index and the manifest say of a tar what it now holds, at the places that `index` names."""
    content = (folder / path).read_bytes()
    spans = [index.span(i) for i in range(len(index))]
    crc32 = np.array([zlib.crc32(content[start : start + size]) for start, size in spans], np.uint32)
    index = dataclasses.replace(index, crc32=crc32, tar_bytes=len(content), tar_sha256=sha256(content))
    index_path(folder / path).write_bytes(index.encode())
    manifest = folder / "manifest.json"
    tree = json.loads(manifest.read_text())
    lists = [shards for splits in tree["tasks"].values() for shards in splits.values()]
    for shards in [*lists, tree["features"]["shards"] if tree["features"] else []]:
        shards[:] = [dataclasses.asdict(list_shard(path, index)) if s["path"] == path else s for s in shards]
    manifest.write_text(json.dumps(tree))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
