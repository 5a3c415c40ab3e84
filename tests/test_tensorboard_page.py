"""What a run writes, as a person sees it: TensorBoard in a real browser."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import CHROMIUM, browser, wait_until
from PIL import Image
from test_observation import TASKS, seen, step, three_tasks, tiny

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.train import display
from hyperpelt_ds.train.metrics import Writer

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)"),
]

# Pictures that have arrived, those inside of web components included.
PICTURES = """(function count(node) {
  const inner = [...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children];
  return (node.nodeName === "IMG" && node.naturalWidth > 0) + inner.map(count).reduce((a, b) => a + b, 0);
})(document.body)"""


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None, "tensorboard ended"
        try:
            return bool(urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=5).read() != b"{}")
        except OSError:
            return False

    try:
        wait_until(answers, f"{address} shows a run")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def test_tensorboard_draws_a_curve_for_every_figure_of_a_run(tmp_path):
    writer = Writer(tmp_path / "run", 0)
    names = ["train/loss", "train/movie_sentiment/loss", "eval/mean", "perf/samples_per_second"]
    for at in range(1, 30):
        writer.write(at, {name: math.exp(-at / 10) + i for i, name in enumerate(names)})
    writer.close()
    with tensorboard(tmp_path / "run") as address, browser(tmp_path / "profile") as tab:
        tab.show(f"{address}/?tagFilter=.#timeseries")
        titles = "[...document.querySelectorAll('scalar-card-component [title]')].map(node => node.title)"
        wait_until(lambda: set(names) <= set(tab.ask(titles)), "a card for every figure")
        cards = 'document.querySelectorAll("scalar-card-component canvas").length'
        wait_until(lambda: tab.ask(cards) >= len(names), "a curve on every card")
        # the curve is drawn on a canvas; the table below it reads the last point from the same data
        wait_until(lambda: tab.shown().count(" 29 ") >= len(names), "the last step on every card")


def test_tensorboard_shows_what_a_look_found_and_what_was_answered(tmp_path):
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(pictures / "red.png")
    model, config = tiny()
    writer = Writer(run, 0)
    found = seen(model, config, step(model, three_tasks(model)))
    writer.write(7, found.scalars)
    display.show_look(writer, found)
    answers = [
        (Sample("1", "a", "what is *said* here", "this", references=("this", "that")), "something"),
        (Sample("2", "b", "what colour is it?", "red", image="red"), "blue"),
    ]
    display.show_answers(writer, run, pictures, 7, 0, answers)
    writer.close()
    with tensorboard(run) as address, browser(tmp_path / "profile") as tab:

        def shows(place: str, *words: str) -> None:
            tab.show(f"{address}/#{place}")
            wait_until(lambda: all(word in tab.shown() for word in words), f"{words} in {place}")
            tab.picture(tmp_path / f"{place}.png")

        shows("histograms", "generated/task/encoder_ffn/adapter", "hyper_embeddings")
        shows("text", "what is *said* here", "answered: something", "expected: this / that", "answered: blue")
        shows("images", "gradients/cosine_adapter", "gradients/cosine_prefix", "samples", "mixture")
        wait_until(lambda: tab.ask(PICTURES) >= 2, "both matrices of the first group")
        points = len(TASKS) * len(model.backbone.geometry.sites)
        shows("projector", "task_hyper_embeddings", f"Points: {points}", "block", "layer")
