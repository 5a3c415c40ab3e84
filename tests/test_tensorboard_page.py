"""What a run writes, as a person sees it: TensorBoard in a real browser."""

from __future__ import annotations

import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from hyperpelt_ds.train.metrics import Writer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)"),
]


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(120):
        assert process.poll() is None, "tensorboard ended"
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"nothing answers at {url}")


def page(url: str, profile: Path) -> str:
    """The document after its scripts have run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    command += ["--window-size=1400,3000", "--virtual-time-budget=30000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def test_tensorboard_draws_a_curve_for_every_figure_of_a_run(tmp_path):
    writer = Writer(tmp_path / "run", 0)
    names = ["train/loss", "train/movie_sentiment/loss", "eval/mean", "perf/samples_per_second"]
    for step in range(1, 30):
        writer.write(step, {name: math.exp(-step / 10) + i for i, name in enumerate(names)})
    writer.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "run"), "--port", str(port)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", server)
        for attempt in range(6):  # a busy machine may not have drawn all cards when the browser's virtual time is up
            document = page(f"http://127.0.0.1:{port}/?tagFilter=.#timeseries", tmp_path / f"profile{attempt}")
            if all(f'title="{name}"' in document for name in names):
                break
    finally:
        server.terminate()
        server.wait(30)
    for card in names:
        assert f'title="{card}"' in document, card
    cards = document.split("<scalar-card-component")[1:]
    assert len(cards) == len(names)
    for card in cards:  # the curve is drawn on a canvas; the table below it reads the last point from the same data
        assert "<canvas" in card
        assert re.search(r">\s*29\s*<", card), "the last step"
