"""Where the bytes of a data set come from: a folder on this machine, or one behind a URL (remote.py).

This file must not know what a tar or an index holds, nor checksums of samples.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hyperpelt_ds.data.manifest import Shard

OPEN_FILES = 64  # of one process; a run's windows touch about as many shards at a time


class Unreachable(OSError):
    """What a store could not be made to give, time after time: no fault of one file, so no sample is left out."""


class Folder(Protocol):
    """The files of a data set, by names relative to `root`. Picklable; one thread of a process reads at a time."""

    root: str
    """A local path or a URL, without a slash at its end."""

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """A small file as a whole. OSError if it cannot be had, ValueError if its sha256 is not the one given."""

    def part(self, shard: Shard, offset: int, size: int) -> bytes:
        """`size` bytes of a shard, fewer where it ends earlier. OSError if they cannot be had, Unreachable if nothing
        can be had just now."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is no such file."""


def is_url(root: str | Path) -> bool:
    """Whether `root` names something to be fetched: `https://...`, `s3://...`; not a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(root)) is not None


def open_folder(root: str | Path, cache_dir: str | Path | None = None, cache_bytes: int = 0) -> Folder:
    """The folder at a path or URL. Of a URL's files, up to `cache_bytes` are kept in `cache_dir` (0 or None: nothing).

    Raises ValueError for a kind of URL that nothing here can read and a cache folder that cannot be written.
    """
    if not is_url(root):
        return LocalFolder(root)
    from hyperpelt_ds.data.remote import RemoteFolder  # runs on local data never need it

    return RemoteFolder(str(root), cache_dir, cache_bytes)


class OpenFiles:
    """Positional reads of local files, of which the `OPEN_FILES` last used stay open.

    A forked process may go on using its parent's: `pread` moves no shared position.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def part(self, path: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes; raises OSError."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = FileIO(path)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(path)
        return os.pread(file.fileno(), size, offset)

    def __contains__(self, path: str) -> bool:
        return path in self._files

    def close_deleted(self) -> None:
        """Closes the files that were deleted since they were opened: an open file keeps its place on the disk."""
        for path in [path for path, file in self._files.items() if os.fstat(file.fileno()).st_nlink == 0]:
            self._files.pop(path).close()


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root).rstrip("/") or "/"
        self._files = OpenFiles()

    def __reduce__(self) -> tuple[type[LocalFolder], tuple[str]]:
        return LocalFolder, (self.root,)

    def read(self, name: str, sha256: str | None = None) -> bytes:
        return checked(f"{self.root}/{name}", Path(self.root, name).read_bytes(), sha256)

    def part(self, shard: Shard, offset: int, size: int) -> bytes:
        return self._files.part(f"{self.root}/{shard.path}", offset, size)

    def size(self, name: str) -> int | None:
        try:
            return os.stat(f"{self.root}/{name}").st_size
        except FileNotFoundError:
            return None


def checked(file: str, content: bytes, sha256: str | None) -> bytes:
    """`content`, if it has the sha256 that is given (or none is); else ValueError."""
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{file}: its sha256 is {found}, expected {sha256}")
    return content
