"""A data set behind a URL: its shards from the node's cache, and single samples of those that are not there yet.

The first reads of a shard fetch their bytes alone while a thread fetches the shard; after a twentieth of its bytes
readers wait for all of it, so that a node fetches hardly more than its data once (`Cache.spend`). Sockets, threads and
locks are made by the process that uses them, so that a folder may be pickled, and used before and after a fork.

This file must not know indexes, samples or their order.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyperpelt_ds.data.cache import Cache, Unusable
from hyperpelt_ds.data.folder import checked
from hyperpelt_ds.data.source import Source

if TYPE_CHECKING:
    from hyperpelt_ds.data.manifest import Shard

log = logging.getLogger(__name__)


@dataclass
class Traffic:
    """Bytes that this process fetched: single parts of shards, whole shards, and other files; and its retries."""

    parts: int = 0
    shards: int = 0
    files: int = 0
    retries: int = 0


class RemoteFolder:
    """A folder behind `http(s)://`, or behind any URL that fsspec reads (`s3://`, `gs://`, `hf://`, `memory://`).

    Up to `cache_bytes` of it are kept in `cache_dir` (see cache.py); with 0 or None nothing is, and every sample is
    fetched by itself. A full or broken disk ends the caching, not the reading. `tries`, `stall`, `pause`: see `Source`.
    """

    def __init__(
        self,
        root: str,
        cache_dir: str | Path | None = None,
        cache_bytes: int = 0,
        tries: int = 5,
        stall: float = 30.0,
        pause: float = 1.0,
    ) -> None:
        """Raises ValueError for a URL that cannot be read on this machine, and a cache folder that cannot be used."""
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes: must be at least 0, got {cache_bytes}")
        self.root = root.rstrip("/")
        self._arguments = (root, cache_dir, cache_bytes, tries, stall, pause)
        self._cache = Cache(Path(cache_dir), cache_bytes) if cache_dir and cache_bytes else None
        self._process = -1
        self._start()

    def __reduce__(self) -> tuple[type[RemoteFolder], tuple[Any, ...]]:
        return RemoteFolder, self._arguments

    @property
    def traffic(self) -> Traffic:
        """What this process has fetched so far."""
        self._start()
        self._traffic.retries = self._source.retries
        return self._traffic

    def read(self, name: str, sha256: str | None = None) -> bytes:
        self._start()
        content, cache = None, self._cache
        if cache and sha256:
            try:
                content = cache.file(sha256, lambda: self._file(name))
            except Unusable as error:
                self._do_without(cache, error)
        return checked(f"{self.root}/{name}", self._file(name) if content is None else content, sha256)

    def part(self, shard: Shard, offset: int, size: int) -> bytes:
        self._start()
        content, cache = None, self._cache
        if cache:
            try:
                content = self._cached_part(cache, shard, offset, size)
            except Unusable as error:
                self._do_without(cache, error)
        if content is None:
            content = self._source.part(shard.path, offset, size)
            self._traffic.parts += len(content)
        return content

    def size(self, name: str) -> int | None:
        self._start()
        return self._source.size(name)

    def _start(self) -> None:
        """Makes what a process cannot take over from the one it was forked from."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        self._source = Source(self.root, *self._arguments[3:])
        self._traffic = Traffic()
        self._waiting: dict[str, Shard] = {}
        self._lock = threading.Lock()

    def _file(self, name: str) -> bytes:
        content = self._source.whole(name)
        self._traffic.files += len(content)
        return content

    def _cached_part(self, cache: Cache, shard: Shard, offset: int, size: int) -> bytes | None:
        """From the cache, after waiting for the shard if too much of it was fetched in parts; None: fetch the part."""
        content = cache.part(shard, offset, size)
        if content is None and cache.spend(shard, size):
            self._fetch_soon(cache, shard)
        elif content is None and self._fetch(cache, shard, wait=True):
            content = cache.part(shard, offset, size)  # None if it had to make way already
        return content

    def _fetch(self, cache: Cache, shard: Shard, wait: bool) -> bool:
        def get(offset: int, size: int) -> bytes:
            content = self._source.part(shard.path, offset, size)
            self._traffic.shards += len(content)
            return content

        try:
            return cache.fetch(shard, get, wait)
        except ValueError as error:  # each sample has a checksum too, so that those that are whole can still be used
            log.warning("%s; its samples are fetched one by one", error)
            return False

    def _fetch_soon(self, cache: Cache, shard: Shard) -> None:
        with self._lock:
            if not self._waiting:
                threading.Thread(target=self._fetch_waiting, args=(cache, shard), name="shards", daemon=True).start()
            self._waiting.setdefault(shard.sha256, shard)

    def _fetch_waiting(self, cache: Cache, shard: Shard | None) -> None:
        """Fetches one shard after the other, those that nobody else is at; the thread ends when none waits."""
        while shard:
            try:
                self._fetch(cache, shard, wait=False)
            except Unusable as error:
                self._do_without(cache, error)
            except OSError as error:
                log.warning("shard %s was not fetched: %s", shard.path, error)
            with self._lock:
                del self._waiting[shard.sha256]
                shard = next(iter(self._waiting.values()), None)

    def _do_without(self, cache: Cache, error: Unusable) -> None:
        if self._cache:
            self._cache = None
            log.warning("data.cache %s: %s; from now on every sample is fetched by itself", cache.folder, error)
