"""A bounded folder of fetched shards, shared by all processes of a node and by runs that follow each other.

`<sha256>.tar` and `<sha256>.file` are whole and checked, `<sha256>.<bytes>.partial` is on its way and counts with the
size it will have. Whoever fetches holds a file lock, which the kernel takes from a process that dies; the next one goes
on where it ended. What was not used for longest gives way, but not what is in use: where the shards that a run draws
from at a time do not fit, fetching them over and over would cost far more than fetching the rest of them in parts. The
folder must be on a file system of the node itself.

This file must not know URLs: bytes come from a function it is given. Only disks fail here: with Unusable.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from hyperpelt_ds.data.folder import OpenFiles

if TYPE_CHECKING:
    from hyperpelt_ds.data.manifest import Shard

log = logging.getLogger(__name__)

PIECE = 8 << 20  # bytes of a shard fetched at a time: what a killed process may lose, and what fetching needs of memory
RANGED = 20  # at most one in so many bytes of a shard is fetched by itself before the whole shard is
WRONG = 5  # times that a shard may come with another sha256
REFUSED_SECONDS = 3600  # for so long nobody tries again to fetch a shard that is not what the manifest says
TOUCH_SECONDS = 1.0  # between two notes of which shards were used, and two looks for room where there was none
_OURS = re.compile(r"[0-9a-f]{64}\.(?:tar|file|([0-9]+)\.partial)")  # nothing else in the folder is ever touched

_held: set[int] = set()  # descriptors of this process's locks


def _let_go() -> None:
    """A forked child shares its parent's locks and would keep them after the parent's death."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


class Unusable(Exception):
    """The cache's disk is full or broken: reading goes on without a cache."""


class Cache:
    """At most `limit` bytes of files in `folder`, at all times and over all processes (locks and counts aside)."""

    def __init__(self, folder: Path, limit: int, in_use: float = 60.0) -> None:
        """What was used within `in_use` seconds stays. Raises ValueError if the folder cannot be written."""
        self.folder, self.limit, self.in_use = folder.expanduser().absolute(), limit, in_use
        self._state = self.folder / "state"
        self._prefix = f"{self.folder}/"
        self._files = OpenFiles()
        self._used: set[str] = set()
        self._touched = 0.0
        self._full_until = 0.0
        try:
            with self._lock("folder"):
                pass
        except Unusable as error:
            raise ValueError(f"data.cache {folder}: cannot keep shards there: {error}") from error

    def part(self, shard: Shard, offset: int, size: int) -> bytes | None:
        """Bytes of a shard, None if it is not here."""
        path = f"{self._prefix}{shard.sha256}.tar"  # a Path takes longer than the read
        self._touch()
        try:
            content = self._files.part(path, offset, size)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unusable(str(error)) from error
        self._used.add(path)
        return content

    def spend(self, shard: Shard, size: int) -> bool:
        """Whether `size` more bytes of a shard that is not here may be fetched by themselves; counts them if so.

        So that all processes together fetch hardly more than each shard once.
        """
        with _disk(), (self._state / f"{shard.sha256}.ranged").open("a+b", buffering=0) as file:
            if sum(_numbers(file)) + size > shard.bytes // RANGED:
                return False
            file.write(struct.pack("<q", size))
            end = file.tell()  # others may have written at the same time: who came first in the file goes first
            return sum(_numbers(file, end)) <= shard.bytes // RANGED

    def fetch(self, shard: Shard, get: Callable[[int, int], bytes], wait: bool) -> bool:
        """Brings a shard here by `get(offset, size)`; whether it is here now.

        If somebody else is at it, waits for them or, with `wait` False, does nothing. False too if it does not fit
        beside what is in use. What `get` raises is raised, and the partial file stays for the next one.
        Raises ValueError if the shard does not have the sha256 of the manifest after several tries; after that, for
        an hour, False.
        """
        tar = self._path(shard.sha256, "tar")
        partial = self._path(shard.sha256, f"{shard.bytes}.partial")
        with self._lock(shard.sha256, wait) as mine:
            if not mine or tar.exists():
                return tar.exists()
            refused = self._state / f"{shard.sha256}.refused"
            if _age(refused) < REFUSED_SECONDS or not self._make_room(shard.bytes, partial):
                return False
            found: list[str] = []
            while shard.sha256 not in found:
                if len(found) == WRONG or len(set(found)) < len(found):
                    with _disk():
                        partial.unlink()
                        refused.touch()
                    raise ValueError(f"shard {shard.path}: what is fetched has sha256 {found[-1]}, not {shard.sha256}")
                found.append(self._download(partial, shard.bytes, get))
            with _disk():
                (self._state / f"{shard.sha256}.ranged").unlink(missing_ok=True)
            self._finish(partial, tar)
            return True

    def file(self, sha256: str, get: Callable[[], bytes]) -> bytes:
        """A small file by its sha256, brought by `get` if it is not here; what has another sha256 is not kept."""
        path = self._path(sha256, "file")
        content = self._small(path, sha256)
        if content is None:
            with self._lock(sha256):
                content = self._small(path, sha256)
                if content is None:
                    content = get()
                    partial = self._path(sha256, f"{len(content)}.partial")
                    right = hashlib.sha256(content).hexdigest() == sha256
                    if right and self._make_room(len(content), partial):
                        with _disk():
                            partial.write_bytes(content)
                        self._finish(partial, path)
        return content

    def _path(self, sha256: str, kind: str) -> Path:
        return self.folder / f"{sha256}.{kind}"

    def _small(self, path: Path, sha256: str) -> bytes | None:
        with _disk(), contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            os.utime(path)
            return content if hashlib.sha256(content).hexdigest() == sha256 else None
        return None

    def _download(self, partial: Path, size: int, get: Callable[[int, int], bytes]) -> str:
        """Completes a partial file; returns its sha256, and empties it if that is not its name's."""
        try:
            with _disk():
                file = partial.open("r+b", buffering=0)
            with file:
                with _disk():
                    done = file.seek(0, os.SEEK_END)
                while done < size and (content := get(done, min(PIECE, size - done))):
                    done += len(content)
                    with _disk():
                        while content:  # a disk that is nearly full takes a part, and the rest is refused
                            content = content[file.write(content) :]
                with _disk():
                    os.fsync(file.fileno())
                    file.seek(0)
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                    if not partial.name.startswith(found):
                        file.truncate(0)
            return found
        except Unusable:
            with contextlib.suppress(OSError):
                partial.unlink()  # on a full disk it would be in the way
            raise

    def _make_room(self, size: int, partial: Path) -> bool:
        """Deletes what was not used for longest until `size` bytes fit, and reserves them for `partial`."""
        if time.monotonic() < self._full_until:
            return False
        with self._lock("folder"), _disk():
            others = [entry for path in self.folder.iterdir() if path != partial and (entry := _entry(path))]
            room = self.limit - sum(count for _, count, _ in others) - size
            for used, count, path in sorted(others):
                if room >= 0 or size > self.limit or time.time() - used < self.in_use:
                    break
                if self._delete(path):
                    room += count
            if room >= 0:
                partial.touch()
                return True
            if not self._full_until:
                gigabytes = self.limit / 1e9
                log.warning("data.cache_gb: %.3g does not hold the shards in use; some are read in parts", gigabytes)
            self._full_until = time.monotonic() + TOUCH_SECONDS
            return False

    def _delete(self, path: Path) -> bool:
        if path.suffix == ".partial":
            with self._lock(path.name.partition(".")[0], wait=False) as nobody_at_it:
                if nobody_at_it:
                    path.unlink(missing_ok=True)
                return nobody_at_it
        path.unlink(missing_ok=True)  # who has it open goes on reading
        return True

    def _finish(self, partial: Path, path: Path) -> None:
        with self._lock("folder"), _disk():  # nobody may count files meanwhile and see neither name
            os.replace(partial, path)
            os.utime(path)

    def _touch(self) -> None:
        """Once a second: notes which shards were used, and lets go of those that others deleted."""
        now = time.monotonic()
        if now - self._touched > TOUCH_SECONDS:
            self._touched = now
            for path in self._used:
                with _disk(), contextlib.suppress(FileNotFoundError):
                    os.utime(path)
            self._used.clear()
            self._files.close_deleted()

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Holds a lock among all processes and threads; gives False if it is another's and is not to be waited for."""
        with _disk():
            self._state.mkdir(parents=True, exist_ok=True)
            file = os.open(self._state / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        _held.add(file)
        try:
            with _disk():
                mine = _flock(file, wait)
            yield mine
        finally:
            _held.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile has the file open too
            os.close(file)


def _flock(file: int, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unusable(str(error)) from error


def _entry(path: Path) -> tuple[float, int, Path] | None:
    """When a file was last used, the bytes it has or will have, and itself; None if it is gone or no file of ours."""
    found = _OURS.fullmatch(path.name)
    if found is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        return status.st_mtime, int(found[1] or status.st_size), path
    return None


def _numbers(file: FileIO, end: int = -1) -> tuple[int, ...]:
    """The numbers that `spend` wrote, up to byte `end`."""
    file.seek(0)
    content = file.read(end)
    return struct.unpack(f"<{len(content) // 8}q", content)


def _age(path: Path) -> float:
    """Seconds since a file was written; infinite if there is none."""
    with _disk(), contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return math.inf
