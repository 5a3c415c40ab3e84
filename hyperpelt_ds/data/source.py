"""Bytes of the files behind a URL, asked for again until they are there.

`http(s)://` is read with the standard library (connections kept open, redirects, the environment's proxies) and all
else with fsspec. fsspec's own http needs aiohttp, which no dependency brings, and does not look at an answer's status
(2026.9.0): from a server that ignores Range it gives the whole file as the bytes asked for, without a word.

This file must not know shards or caches.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sized
from typing import Protocol, TypeVar
from urllib.parse import quote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import fsspec

from hyperpelt_ds.data.folder import Unreachable

READ = 1 << 18  # bytes asked of a socket at a time
REDIRECTS = 5
CONNECTIONS = 4  # kept open by a thread: the server and where it redirects to
T = TypeVar("T")


class Refused(OSError):
    """An answer that would be the same if it was asked for again."""


_FINAL = (Refused, FileNotFoundError, PermissionError)


class Source:
    """Reads files below one URL; may be used by several threads, but not by a process forked from its own.

    A read fails when `tries` of its tries in a row brought no bytes; what came before is kept. Between tries are
    `pause` seconds, twice as many each time, with jitter. Over http(s), `stall` seconds without a byte end a try; other
    file systems have limits of their own. Errors are OSErrors: FileNotFoundError, PermissionError, Refused at once.
    """

    def __init__(self, root: str, tries: int, stall: float, pause: float) -> None:
        """Raises ValueError for a URL of a kind that fsspec does not know, or needs another package for."""
        self.root, self.tries, self.pause = root, tries, pause
        self.retries = 0
        self._transport: _Transport = _Http(root, stall) if re.match("https?://", root) else _Fsspec(root)
        self._random = random.Random()  # seeded by the system: ranks must not come back all at once

    def part(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of a file, fewer where it ends earlier."""
        if not size:
            return b""
        content = bytearray()

        def attempt() -> None:
            self._transport.read(name, offset + len(content), offset + size, content)

        self._persist(f"bytes {offset} to {offset + size - 1} of {self.root}/{name}", attempt, content)
        return bytes(content)

    def whole(self, name: str) -> bytes:
        """A file."""

        def attempt() -> bytes:
            content = bytearray()
            self._transport.read(name, 0, None, content)
            return bytes(content)

        return self._persist(f"{self.root}/{name}", attempt)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if it is not there."""
        try:
            return self._persist(f"size of {self.root}/{name}", lambda: self._transport.size(name))
        except FileNotFoundError:
            return None

    def _persist(self, what: str, attempt: Callable[[], T], progress: Sized = ()) -> T:
        failures = 0
        while True:
            before = len(progress)
            try:
                return attempt()
            except _FINAL:
                raise
            except OSError as error:
                failures = 1 if len(progress) > before else failures + 1
                if failures == self.tries:
                    raise Unreachable(f"{what}: given up after {self.tries} tries, the last: {error}") from error
                self.retries += 1
                time.sleep(self.pause * 2 ** (failures - 1) * self._random.uniform(0.5, 1.5))


class _Transport(Protocol):
    def read(self, name: str, start: int, end: int | None, content: bytearray) -> None:
        """Appends bytes start to end (None: all) to `content` as they come; OSError where they end too early."""

    def size(self, name: str) -> int: ...


class _Fsspec:
    """Any file system of fsspec; made anew in every process, for those with an event loop refuse to work in a fork."""

    def __init__(self, root: str) -> None:
        try:
            self.files, self.path = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{root}: {error}") from error
        # those that read through a buffer would fetch megabytes for each sample
        self.options = {} if self.files.async_impl else {"cache_type": "none"}

    def read(self, name: str, start: int, end: int | None, content: bytearray) -> None:
        limits = {} if end is None else {"start": start, "end": end}
        found = self._call(lambda: self.files.cat_file(f"{self.path}/{name}", **limits, **self.options))
        if end is not None and len(found) > end - start:
            raise Refused(f"{self.path}/{name}: {len(found)} bytes came, {end - start} were asked for")
        content += found

    def size(self, name: str) -> int:
        return self._call(lambda: int(self.files.size(f"{self.path}/{name}")))

    def _call(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except OSError:
            raise
        except Exception as error:  # each file system raises the classes of its own client library
            raise OSError(f"{type(error).__name__}: {error}") from error


class _Http:
    """GET with Range over connections that stay open, those of each thread its own."""

    def __init__(self, root: str, stall: float) -> None:
        self.root, self.stall = root, stall
        self._local = threading.local()

    def read(self, name: str, start: int, end: int | None, content: bytearray) -> None:
        with self._get(name, start, end) as response:
            due = response.length if end is None else _limits(name, response, start, end)[0]
            got = 0
            while due is None or got < due:
                chunk = response.read1(READ if due is None else min(READ, due - got))
                if not chunk:
                    break
                content += chunk
                got += len(chunk)
            if due is not None and got < due:
                raise OSError(f"the answer ended after {got} of {due} bytes")

    def size(self, name: str) -> int:
        with self._get(name, 0, 1) as response:
            return _limits(name, response, 0, 1)[1]

    @contextlib.contextmanager
    def _get(self, name: str, start: int, end: int | None) -> Iterator[http.client.HTTPResponse]:
        """The answer, redirects followed, its status 200, 206 or 416; a body that is not read costs the connection."""
        url = f"{self.root}/{quote(name)}"
        headers = {"User-Agent": "hyperpelt_ds", "Accept-Encoding": "identity"}
        if end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
        try:
            for _ in range(REDIRECTS + 1):
                connection, response = self._ask(url, headers)
                try:
                    if response.status not in (301, 302, 303, 307, 308):
                        _check(url, response)
                        yield response
                        return
                    url = urljoin(url, response.headers.get("Location", ""))
                finally:
                    if response.length == 0 and not response.will_close:
                        response.close()
                    else:
                        connection.close()
            raise Refused(f"{url}: more than {REDIRECTS} redirects")
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _ask(self, url: str, headers: dict[str, str]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise Refused(f"{url}: redirected to what is neither http nor https")
        connections = self._local.__dict__.setdefault("connections", {})
        if parts[:2] not in connections:
            if len(connections) == CONNECTIONS:
                connections.pop(next(iter(connections)))[0].close()
            connections[parts[:2]] = _connect(parts.scheme, parts.netloc, self.stall)
        connection, whole_url = connections[parts[:2]]
        target = url if whole_url else urlunsplit(("", "", parts.path or "/", parts.query, ""))
        while True:
            kept = connection.sock is not None
            try:
                connection.request("GET", target, headers=headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if not kept or isinstance(error, TimeoutError):  # else the server may have closed it while it was idle
                    raise


def _connect(scheme: str, host: str, timeout: float) -> tuple[http.client.HTTPConnection, bool]:
    """A connection, not opened yet, and whether it goes to a proxy that is to be told whole URLs."""
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    proxy = None if proxy_bypass(host) else getproxies().get(scheme)
    if proxy is None:
        return kind(host, timeout=timeout), False
    connection = kind(urlsplit(proxy).netloc or proxy, timeout=timeout)
    if scheme == "https":
        connection.set_tunnel(host)
    return connection, scheme == "http"


def _check(url: str, response: http.client.HTTPResponse) -> None:
    """Raises the OSError that a status stands for."""
    answer = f"{url}: {response.status} {response.reason}"
    if response.status in (404, 410):
        raise FileNotFoundError(answer)
    if response.status in (401, 403):
        raise PermissionError(answer)
    if response.status in (408, 429) or response.status >= 500:
        raise OSError(answer)
    if response.status not in (200, 206, 416) or response.headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(f"{answer}, Content-Encoding {response.headers.get('Content-Encoding')}")


def _limits(name: str, response: http.client.HTTPResponse, start: int, end: int) -> tuple[int, int]:
    """How many bytes from `start` on there must be in the answer, and the size of the file."""
    if response.status == 200:
        raise Refused(
            f"{name}: the server ignores Range and answers with the whole file; shards need one that heeds it"
        )
    given = response.headers.get("Content-Range", "")
    if response.status == 416:  # nothing is left to read there
        size = given.rpartition("/")[2]
        return 0, int(size) if size.isdecimal() else start
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", given)
    if found is None or int(found[1]) != start or int(found[2]) >= end:
        raise Refused(f"{name}: bytes={start}-{end - 1} were asked for, the answer has Content-Range {given!r}")
    total = int(found[2]) + 1 if found[3] == "*" else int(found[3])
    return min(end, total) - start, total
