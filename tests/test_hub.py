"""Backbones by hub id: fetched once a node however many ranks ask, and one clear error where there is no network.

The hub is a loopback server with the few paths that are asked of it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NODES, RANKS = 2, 2
WEIGHTS = "model.safetensors"
CODE = """
import sys
from hyperpelt_ds.backbones import load_backbone
from hyperpelt_ds.config import ModelConfig
for name in sys.argv[1:]:
    try:
        print(load_backbone(ModelConfig(backbone=name)).fingerprint())
    except ValueError as error:
        print(error)
"""


class Hub(ThreadingHTTPServer):
    """Has one model, org/tiny. Hands out its weights only when every rank has asked about them, so that all want them
    at once."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.sent = folder, Counter[str]()
        self.all_asked = threading.Barrier(NODES * RANKS)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        content = self.answer()
        if content:
            self.server.sent[self.path.rpartition("/")[2]] += 1
            self.wfile.write(content)

    def answer(self) -> bytes:
        owner, _, name = self.path.partition("/resolve/main/")
        file = self.server.folder / name
        content = file.read_bytes() if owner == "/org/tiny" and name and file.is_file() else b""
        if name == WEIGHTS and self.command == "HEAD":
            self.server.all_asked.wait(60)
        self.send_response(200 if content else 404)
        self.send_header("Content-Length", str(len(content)))
        if content:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return content

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def hub(backbone_folder: Path) -> Iterator[Hub]:
    server = Hub(backbone_folder)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(cache: Path, *models: str, hub: Hub | None = None) -> subprocess.Popen[str]:
    """Starts a process that loads backbones with its cache in `cache`, offline without a hub; it prints a line each."""
    network = {"HF_HUB_OFFLINE": "1"}
    if hub is not None:
        network = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        network |= {"HF_HUB_ETAG_TIMEOUT": "100", "HF_HUB_DOWNLOAD_TIMEOUT": "100"}  # the hub waits for the slowest
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *models],
        env={**os.environ, "HF_HOME": str(cache), **network},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_the_ranks_of_a_node_fetch_a_backbone_once_and_then_need_no_network(hub, tmp_path):
    ranks = [load(tmp_path / f"node{node}", "org/tiny", hub=hub) for node in range(NODES) for _ in range(RANKS)]
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert {rank.returncode for rank in ranks} == {0}, said[0][1][-3000:]
    assert set(hub.sent) >= {WEIGHTS, "config.json", "tokenizer.json"}
    assert set(hub.sent.values()) == {NODES}, hub.sent
    fingerprint = load(tmp_path / "node0", "org/tiny").communicate(timeout=120)[0]
    assert len(fingerprint) == 65 and {out for out, _ in said} == {fingerprint}


@pytest.mark.slow
def test_a_model_that_is_not_whole_in_the_cache_is_one_clear_error_offline(backbone_folder, tmp_path):
    """The cache as huggingface_hub lays it out."""
    present = {
        "org/nothing": (),
        "org/configured": ("config.json",),
        "org/weightless": ("config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    for name, files in present.items():
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        for file in files:
            shutil.copy(backbone_folder / file, snapshot)
    errors, noise = load(tmp_path, *present).communicate(timeout=120)
    assert len(errors.splitlines()) == len(present), errors + noise[-3000:]
    for name, error in zip(present, errors.splitlines(), strict=True):
        assert error.startswith(f"model.backbone: cannot load {name!r}: HF_HUB_OFFLINE is set")
        for part in (str(tmp_path / "hub"), f"hf download {name}", "give a local folder"):
            assert part in error
