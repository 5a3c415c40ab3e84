"""What lies where in one tar, found by reading it once and kept beside it in `<shard>.idx`.

An index file is a safetensors file of plain arrays (about 45 bytes and a key a sample), so that opening one costs
0.1 ms and no object a sample. This file must not know what a manifest is, nor what a sample means to a task.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

VERSION = 2  # of indexes and manifests alike
SAMPLE_BYTES = (1 << 31) - 4096  # samples are smaller: a read of the system gives at most so much at once
_CHUNK = 1 << 20
_META = re.compile("__[^/]*__/")
_HEAD, _KEYS = "head", "keys"
_ARRAYS = {
    "key_edges": np.uint32,
    "starts": np.uint64,
    "sizes": np.uint32,
    "crc32": np.uint32,
    "lengths": np.uint32,
    "target_lengths": np.uint32,
    "member_edges": np.uint32,
    "member_suffixes": np.uint32,
    "member_offsets": np.uint32,
    "member_sizes": np.uint32,
}


@dataclass(frozen=True, eq=False)
class Index:
    """Where each sample of one tar lies; arrays over its n samples and m members, in the order of the tar.

    A sample's span runs from the header of its first member to the last data byte of its last, headers and padding
    between them included: one read fetches a sample, and crc32 over it finds damage to a header as well.
    """

    tar_bytes: int
    tar_sha256: str
    suffixes: tuple[str, ...]
    keys: bytes  # UTF-8, one behind the other
    key_edges: np.ndarray  # (n + 1,)
    starts: np.ndarray  # (n,) first byte of the span in the tar
    sizes: np.ndarray  # (n,) bytes of the span
    crc32: np.ndarray  # (n,) over the span
    lengths: np.ndarray  # (n,) UTF-8 bytes of source and target, 0 where there is no such text
    target_lengths: np.ndarray  # (n,) UTF-8 bytes of the target
    member_edges: np.ndarray  # (n + 1,) which members are a sample's
    member_suffixes: np.ndarray  # (m,) index into suffixes
    member_offsets: np.ndarray  # (m,) of the data, from the start of the sample's span
    member_sizes: np.ndarray  # (m,) bytes of the data

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """Memory taken, in bytes."""
        return len(self.keys) + sum(getattr(self, name).nbytes for name in _ARRAYS)

    def key(self, i: int) -> str:
        """The key of sample i."""
        return self.keys[self.key_edges.item(i) : self.key_edges.item(i + 1)].decode()

    def span(self, i: int) -> tuple[int, int]:
        """First byte and size of sample i's span in the tar."""
        return self.starts.item(i), self.sizes.item(i)

    def member(self, i: int, suffix: str) -> tuple[int, int] | None:
        """Where in sample i's span the data of one member begins, and its size; None if there is no such member."""
        for m in range(self.member_edges.item(i), self.member_edges.item(i + 1)):
            if self.suffixes[self.member_suffixes.item(m)] == suffix:
                return self.member_offsets.item(m), self.member_sizes.item(m)
        return None

    def members(self, i: int) -> list[tuple[str, int, int]]:
        """(suffix, offset in the tar, size) of each member of sample i."""
        start = self.starts.item(i)
        return [
            (
                self.suffixes[self.member_suffixes.item(m)],
                start + self.member_offsets.item(m),
                self.member_sizes.item(m),
            )
            for m in range(self.member_edges.item(i), self.member_edges.item(i + 1))
        ]

    def hashes(self) -> np.ndarray:
        """(n,) uint64, a hash of each key: what two keys share only if they are the same, but for one pair in 2^64."""
        edges = self.key_edges.tolist()
        digests = b"".join(key_digest(self.keys[a:b]) for a, b in itertools.pairwise(edges))
        return np.frombuffer(digests, np.uint64)

    def encode(self) -> bytes:
        """The content of an index file; equal indexes give equal bytes."""
        head = {
            "version": VERSION,
            "tar_bytes": self.tar_bytes,
            "tar_sha256": self.tar_sha256,
            "suffixes": self.suffixes,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        texts = {_HEAD: json.dumps(head, ensure_ascii=False).encode(), _KEYS: self.keys}
        return safetensors.numpy.save(arrays | {name: np.frombuffer(text, np.uint8) for name, text in texts.items()})

    @classmethod
    def decode(cls, content: bytes) -> Index:
        """The index in an index file; raises ValueError for anything else."""
        try:
            arrays = safetensors.numpy.load(content)
            head = json.loads(arrays.pop(_HEAD).tobytes())
            if head["version"] != VERSION:
                raise ValueError(f"it has version {head['version']}, this program reads version {VERSION}")
            keys = arrays.pop(_KEYS).tobytes()
            return cls(head["tar_bytes"], head["tar_sha256"], tuple(head["suffixes"]), keys, **arrays)
        except (SafetensorError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"not an index written by data_prep ({error!r})") from None


def key_digest(key: bytes) -> bytes:
    """8 bytes that stand for a key (or an image id) in UTF-8."""
    return hashlib.blake2b(key, digest_size=8).digest()


def index_path(tar: Path) -> Path:
    return tar.with_suffix(".idx")


def read_index(tar: Path) -> Index:
    """The index beside a tar; raises OSError if there is none, and ValueError naming the shard if it is not ours."""
    try:
        return Index.decode(index_path(tar).read_bytes())
    except ValueError as error:
        raise ValueError(f"shard {tar}: its index {index_path(tar).name} cannot be read: {error}") from None


def refresh_index(tar: Path) -> tuple[Index, bool]:
    """The index of a tar, written beside it unless it is there already; and whether it was written.

    Raises OSError if the tar cannot be read, and ValueError naming it if it cannot be indexed, if it is not called
    `.tar` (`a.tar` and `a.tar2` would have one index between them), or if what lies in the index's place is of another
    program (`.idx` is a common name).
    """
    if tar.suffix != ".tar":
        raise ValueError(f"shard {tar}: its name must end with .tar")
    path, index = index_path(tar), None
    if path.is_file():
        content = path.read_bytes()
        if b'"member_edges"' not in content[:_CHUNK]:
            raise ValueError(f"shard {tar}: {path} beside it is of another program; move it away to have it indexed")
        try:
            index = Index.decode(content)
        except ValueError:
            index = None  # of an older version
    if index is not None and index.tar_bytes == tar.stat().st_size:
        with tar.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == index.tar_sha256:
                return index, False
    index = index_shard(tar)
    replace(path, index.encode())
    return index, True


def find_shards(patterns: str) -> list[Path]:
    """The files that webdataset's way of naming shards stands for: braces, several joined by `::`; and globs as well.

    Files that braces name need not be there. Raises ValueError for a glob that no file fits, and for URLs.
    """
    from webdataset.shardlists import expand_urls  # webdataset loads torch, for which --help should not wait

    found: dict[Path, None] = {}
    for name in expand_urls(patterns):
        if "://" in name or name.startswith("pipe:"):
            raise ValueError(f"{name!r}: only files of this machine can be indexed, beside which the index is written")
        names = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not names:
            raise ValueError(f"{name!r}: no file fits; a pattern in quotes starts at the folder that you are in")
        found |= dict.fromkeys(map(Path, names))
    return list(found)


def index_shard(tar: Path) -> Index:
    """Indexes an existing tar by reading it once.

    Raises ValueError naming the shard (and key) for a tar that is damaged or cut, a key that comes twice, members of
    one key that are not adjacent (webdataset would make two broken samples of them), links, bad JSON, and no samples at
    all.
    """
    with tar.open("rb") as file:
        return index_file(file, str(tar))


def index_file(file: BinaryIO, name: str) -> Index:
    """`index_shard` of an open tar; `name` is what errors call it.

    Python's tar reader ends quietly at a damaged header, hence the look at what follows the last member.
    """
    scan = _Scan(name, file)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg():
                    scan.add(member)
                elif member.islnk() or member.issym():
                    raise ValueError(
                        f"shard {name}: member {member.name} is a link to {member.linkname}, which readers would "
                        "leave out; GNU tar stores the files themselves with --dereference --hard-dereference"
                    )
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"shard {name}: damaged or cut, or not an uncompressed tar: {error}") from None
    scan.finish(end)
    return scan.index()


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


class _Scan:
    """Gathers the arrays of an index while a tar is read from its first byte to its last, each byte once."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name, self.file = name, file
        self.sha256 = hashlib.sha256()
        self.done = 0  # bytes of the tar read and hashed: up to the last data byte of the last member
        from webdataset.tariterators import base_plus_ext  # late, as above

        self._key_and_suffix = base_plus_ext
        self.keys: set[str] = set()
        self.texts: list[bytes] = []  # the keys in order
        self.key = ""  # of the sample at hand, and the suffixes it has so far
        self.present: set[str] = set()
        self.suffixes: dict[str, int] = {}
        self.arrays: dict[str, array[int]] = {name: array("Q") for name in _ARRAYS}

    def add(self, member: tarfile.TarInfo) -> None:
        key, suffix = self._key_and_suffix(member.name)
        if key is None or _META.match(member.name):  # webdataset skips them as well, and reads suffixes in lower case
            return
        suffix = suffix.lower()
        if member.issparse():
            raise ValueError(f"shard {self.name}: {member.name!r} is stored as a sparse file; pack it without --sparse")
        new = not self.keys or key != self.key
        if new:
            self._begin(key, member.offset)
        start = self.arrays["starts"][-1]
        if suffix in self.present:
            raise ValueError(f"shard {self.name}: key {key!r} comes twice")
        self.present.add(suffix)
        end = member.offset_data + member.size
        if (size := end - start) >= SAMPLE_BYTES:
            raise ValueError(
                f"shard {self.name}: sample {key!r} has {size} bytes or more, fewer than {SAMPLE_BYTES} can be read"
            )
        block = self._read(end, member.name)
        span = memoryview(block)[start - (self.done - len(block)) :] if new else block
        self.arrays["crc32"][-1] = zlib.crc32(span, self.arrays["crc32"][-1])
        self.arrays["sizes"][-1] = self.done - start
        self.arrays["member_suffixes"].append(self.suffixes.setdefault(suffix, len(self.suffixes)))
        self.arrays["member_offsets"].append(member.offset_data - start)
        self.arrays["member_sizes"].append(member.size)
        if suffix == "json":
            self._measure(block[len(block) - member.size :])

    def finish(self, end: int) -> None:
        """Hashes the rest, and raises ValueError if `end`, behind the last member, is not the tar's own end mark."""
        self._read(max(end, self.done), "padding")
        clean, size = True, 0
        while chunk := self.file.read(_CHUNK):
            self.sha256.update(chunk)
            size += len(chunk)
            clean = clean and not chunk.strip(b"\0")
        if size < tarfile.BLOCKSIZE or not clean:
            raise ValueError(f"shard {self.name}: damaged or cut: no proper end after byte {end}")
        self.done += size
        if not self.keys:
            raise ValueError(f"shard {self.name}: holds no samples")

    def index(self) -> Index:
        self.arrays["member_edges"].append(len(self.arrays["member_sizes"]))
        self.arrays["key_edges"] = array("Q", itertools.accumulate(map(len, self.texts), initial=0))
        arrays = {name: np.array(self.arrays[name], dtype) for name, dtype in _ARRAYS.items()}
        return Index(self.done, self.sha256.hexdigest(), tuple(self.suffixes), b"".join(self.texts), **arrays)

    def _begin(self, key: str, start: int) -> None:
        if key in self.keys:
            raise ValueError(f"shard {self.name}: key {key!r} comes twice, or its members are not adjacent")
        try:
            self.texts.append(key.encode())
        except UnicodeEncodeError:  # tarfile gives bytes that are not UTF-8 as lone surrogates
            raise ValueError(f"shard {self.name}: key {key!r} is not UTF-8") from None
        self.keys.add(key)
        self.key, self.present = key, set()
        self.arrays["starts"].append(start)
        self.arrays["member_edges"].append(len(self.arrays["member_sizes"]))
        for name in ("sizes", "crc32", "lengths", "target_lengths"):
            self.arrays[name].append(0)

    def _read(self, end: int, what: str) -> bytes:
        """All bytes not yet read up to `end`."""
        self.file.seek(self.done)
        block = self.file.read(end - self.done)
        self.sha256.update(block)
        self.done += len(block)
        if self.done < end:
            raise ValueError(f"shard {self.name}: cut short: ends at byte {self.done}, inside of {what!r}")
        return block

    def _measure(self, content: bytes) -> None:
        try:
            fields = json.loads(content)
            texts = [fields.get("source"), fields.get("target")] if isinstance(fields, dict) else [None, None]
            source, target = (len(text.encode()) if isinstance(text, str) else 0 for text in texts)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"shard {self.name}: sample {self.key!r} is not JSON in UTF-8: {error}") from None
        self.arrays["lengths"][-1], self.arrays["target_lengths"][-1] = source + target, target
