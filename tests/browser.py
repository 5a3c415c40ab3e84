"""A headless Chromium that opens a page and says what it shows, over its debugging socket."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# All text of the page, that inside of web components and frames included.
SHOWN = """(function text(node) {
  if (node.nodeType === 3) return node.data;
  if (["STYLE", "SCRIPT"].includes(node.nodeName)) return "";
  const inner = node.shadowRoot ? [...node.shadowRoot.childNodes] : [];
  if (node.contentDocument?.body) inner.push(node.contentDocument.body);
  return [...inner, ...node.childNodes].map(text).join(" ");
})(document.body).replace(/\\s+/g, " ")"""


class Browser:
    """One tab of a browser of its own; a context."""

    def __init__(self, profile: Path):
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", "--disable-sync"]
        command += ["--disable-background-networking", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        command += ["--window-size=1400,2000", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._number = 0
        self._file = profile / "DevToolsActivePort"

    def __enter__(self) -> Browser:
        wait_until(lambda: self._file.is_file() and len(self._file.read_text().split()) == 2, "the browser starts")
        port = int(self._file.read_text().split()[0])
        pages = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60).read())
        path = next(urlsplit(page["webSocketDebuggerUrl"]).path for page in pages if page["type"] == "page")
        self._socket = socket.create_connection(("127.0.0.1", port), 120)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._read(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._socket.close()

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def shown(self) -> str:
        return str(self.ask(SHOWN) or "")

    def picture(self, file: Path) -> None:
        """Saves what is seen as a PNG."""
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        text = json.dumps({"id": self._number, "method": method, "params": parameters}).encode()
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))
        self._socket.sendall(struct.pack("!BBH", 0x81, 0x80 | 126, len(text)) + mask + masked)
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self) -> bytes:
        parts, last = b"", False
        while not last:
            first, size = self._read(2)
            last, size = bool(first & 0x80), size & 0x7F
            if size > 125:
                size = int.from_bytes(self._read(2 if size == 126 else 8))
            parts += self._read(size)
        return parts

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            assert more, "the browser ended"
            data += more
        return data


def wait_until(holds: Any, what: str, seconds: float = 120) -> None:
    """Fails if `holds()` stays false for so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not in {seconds:.0f} s: {what}"
        time.sleep(0.3)
