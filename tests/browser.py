"""A real Chromium without a window, asked through its debugging pipe: what a page shows, loads and looks like."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--no-first-run", "--disable-sync", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),  # TensorBoard's projector draws with WebGL
)

# All text of the page, that inside of web components and frames included.
_SHOWN = """(function text(node) {
  if (node.nodeType === 3) return node.data;
  if (["STYLE", "SCRIPT"].includes(node.nodeName)) return "";
  const inner = node.shadowRoot ? [...node.shadowRoot.childNodes] : [];
  if (node.contentDocument?.body) inner.push(node.contentDocument.body);
  return [...inner, ...node.childNodes].map(text).join(" ");
})(document.body).replace(/\\s+/g, " ")"""


class Page:
    """One tab. `requests` are the addresses that it asked for, `complaints` what the browser had to say."""

    def __init__(self, to: int, back: int):
        self._to, self._back, self._number, self._read = to, back, 0, b""
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def show(self, address: str, width: int = 1400, height: int = 2000, dark: bool = False) -> None:
        """Loads an address anew in a window of that size, on a system set to light or dark."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        for place in ("about:blank", address):  # what differs behind the # alone would not be loaded
            self.call("Page.navigate", url=place)
            self._until("Page.loadEventFired")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def shown(self) -> str:
        """All words of the page."""
        return str(self.ask(_SHOWN) or "")

    def picture(self, file: Path) -> None:
        """Saves what is seen as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _until(self, event: str) -> None:
        while self._next().get("method") != event:
            pass

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._back], [], [], 180)
            got = os.read(self._back, 1 << 16) if ready else b""
            assert got, "the browser has ended or does nothing"
            self._read += got
        first, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"]["text"])
        return message


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with one page, which ends with the block."""
    theirs_in, to = os.pipe()
    back, theirs_out = os.pipe()
    command = [str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}"]
    shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(to, back)
    finally:
        process.terminate()
        process.wait(30)
        os.close(to)
        os.close(back)


def wait_until(holds: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Fails if `holds()` stays false for so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not in {seconds:.0f} s: {what}"
        time.sleep(0.3)
