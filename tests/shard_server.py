"""A loopback HTTP server of one folder with Range requests, for tests and benchmarks of remote shards.

It can fail on purpose: 5xx answers, reset connections, stalls in the middle of a body and bodies shorter than their
Content-Length. It can be slow (a rate over all connections) and can ignore Range. It counts requests and the bytes of
bodies that it sent for each path; `GET /_counts` answers them as JSON. What happens to a request depends on the seed,
its path, its range and how often that was asked for, so that it does not depend on how processes take turns.

As a script it prints its port and serves until it is ended:

    python tests/shard_server.py --root DIR [--port 0] [--rate 20e6] [--errors 0.1] [--resets 0.05] ...
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SLICE = 1 << 14  # bytes sent at a time


@dataclass(frozen=True)
class Behaviour:
    """Shares of requests that fail (0 to 1), and what holds for all of them."""

    errors: float = 0.0
    """Answered with 503."""
    resets: float = 0.0
    """Half of the body, then a TCP reset."""
    stalls: float = 0.0
    """Half of the body, then nothing for `stall_seconds`."""
    short: float = 0.0
    """Half of the body, then an orderly end of the connection."""
    stall_seconds: float = 60.0
    rate: float = 0.0
    """Bytes a second over all connections; 0: no limit."""
    idle_seconds: float = 0.0
    """After how long a connection without requests is closed; 0: never."""
    ignore_range: bool = False
    """Answers every request with the whole file."""
    seed: int = 0


class ShardServer(ThreadingHTTPServer):
    """Serves `root` from threads of this process while used as a context manager. `/moved/x` redirects to `/x`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path, behaviour: Behaviour = Behaviour(), port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.root, self.behaviour = root, behaviour
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.stopped = threading.Event()

    def __enter__(self) -> ShardServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, address: Any) -> None:
        """Says nothing of clients that went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, address)

    def total(self, suffix: str = "") -> int:
        """Bytes of bodies sent for the paths that end so."""
        return sum(count for path, count in self.bytes.items() if path.endswith(suffix))

    def fault(self, path: str, bytes_range: str) -> str | None:
        """What goes wrong with this request; counts it."""
        with self._lock:
            self.requests[path] += 1
            self._asked[path, bytes_range] += 1
            draw = random.Random(
                f"{self.behaviour.seed} {path} {bytes_range} {self._asked[path, bytes_range]}"
            ).random()
            for kind in ("errors", "resets", "stalls", "short"):
                draw -= getattr(self.behaviour, kind)
                if draw < 0:
                    self.faults[kind] += 1
                    return kind
        return None

    def sent(self, path: str, count: int) -> None:
        """Counts bytes of a body, and waits as long as they take at the server's rate."""
        with self._lock:
            self.bytes[path] += count
            self._free_at = max(self._free_at, time.monotonic())
            if self.behaviour.rate:
                self._free_at += count / self.behaviour.rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            self.stopped.wait(wait)

    def counts(self) -> dict[str, Any]:
        with self._lock:
            return {"requests": dict(self.requests), "bytes": dict(self.bytes), "faults": dict(self.faults)}


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self.timeout = self.server.behaviour.idle_seconds or None
        super().setup()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)  # a client that takes this for its proxy asks for a whole URL
        if path == "/_counts":
            return self._small(200, json.dumps(self.server.counts()).encode())
        if path.startswith("/moved/"):
            return self._small(302, b"", Location=path.removeprefix("/moved"))
        bytes_range = self.headers.get("Range", "")
        fault = self.server.fault(path, bytes_range)
        file = self.server.root / path.lstrip("/")
        if fault == "errors":
            return self._small(503, b"a failure on purpose")
        if ".." in path or not file.is_file():
            return self._small(404, b"no such file")
        size = file.stat().st_size
        start, end, status = 0, size, 200
        if bytes_range and not self.server.behaviour.ignore_range:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", bytes_range)
            if found is None:
                return self._small(400, b"only bytes=A-B is understood")
            start, end, status = int(found[1]), min(int(found[2]) + 1, size), 206
            if start >= size:
                return self._small(416, b"", **{"Content-Range": f"bytes */{size}"})
        self.send_response(status)
        self.send_header("Content-Length", str(end - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        with file.open("rb") as content:
            content.seek(start)
            self._body(path, content.read(end - start), fault)

    def _body(self, path: str, content: bytes, fault: str | None) -> None:
        given = content[: len(content) // 2] if fault else content
        for at in range(0, len(given), SLICE):
            try:
                self.wfile.write(given[at : at + SLICE])
            except OSError:  # the client has gone
                self.close_connection = True
                return
            self.server.sent(path, min(SLICE, len(given) - at))
        if fault:
            self.close_connection = True
        if fault == "stalls":
            self.server.stopped.wait(self.server.behaviour.stall_seconds)
        if fault == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # without lingering: sends RST

    def _small(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    for field in dataclasses.fields(Behaviour):
        if field.name == "ignore_range":
            parser.add_argument("--ignore_range", action="store_true")
        else:
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    server = ShardServer(arguments.pop("root"), port=arguments.pop("port"))
    server.behaviour = Behaviour(**arguments)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _main()
