"""What a run reports: figures by their formulas, and the two files that must say the same."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from hyperpelt_ds import lines
from hyperpelt_ds.contracts import Batch, Sample
from hyperpelt_ds.train.metrics import OBSERVATIONS, SAMPLES, Window, Writer


def batch(tasks: list[int], lengths: list[int], targets: list[int], weights: list[float]) -> Batch:
    """Samples of the given tasks with `lengths` source and `targets` target tokens, padded to the longest."""
    rows = sorted(set(tasks))
    mask = torch.tensor([[int(place < n) for place in range(max(lengths))] for n in lengths])
    labels = torch.tensor([[3 if place < n else -100 for place in range(max(targets))] for n in targets])
    return Batch(
        input_ids=mask,
        attention_mask=mask,
        labels=labels,
        targets=(labels.flatten() != -100).nonzero().squeeze(1),
        tasks=torch.tensor(rows),
        task_rows=torch.tensor([rows.index(task) for task in tasks]),
        images=None,
        image_rows=None,
        loss_weights=torch.tensor(weights),
        samples=(),
    )


def add(window: Window, batch: Batch, losses: torch.Tensor) -> None:
    window.add(batch, losses)
    window.keep()


def test_losses_are_means_over_valid_samples_of_the_whole_window():
    window = Window(["a", "b", "c"], torch.device("cpu"))
    add(window, batch([0, 2, 2], [4, 2, 1], [1, 1, 2], [1.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 100.0]))
    add(window, batch([0, 0], [2, 2], [1, 1], [1.0, 1.0]), torch.tensor([3.0, 5.0]))
    values = window.read()
    assert values["train/loss"] == pytest.approx((1 + 2 + 3 + 5) / 4)
    assert values["train/a/loss"] == pytest.approx(3.0)
    assert values["train/c/loss"] == pytest.approx(2.0)
    assert "train/b/loss" not in values, "a task that was not drawn has no loss"


def test_a_step_that_is_dropped_counts_nowhere_and_names_the_samples_that_were_not_finite():
    window = Window(["a"], torch.device("cpu"))
    samples = tuple(Sample(str(key), "a", "", "") for key in range(3))
    bad = batch([0, 0, 0], [1, 1, 1], [1, 1, 1], [1.0, 1.0, 0.0])._replace(samples=samples)
    window.add(bad, torch.tensor([1.0, torch.nan, torch.inf]))
    assert window.drop() == ["a/1"]
    assert "train/loss" not in window.read(), "a mean over nothing"
    window.add(bad, torch.tensor([1.0, torch.nan, torch.inf]))
    window.drop()
    add(window, batch([0], [1], [1], [1.0]), torch.tensor([7.0]))
    assert window.read()["train/loss"] == pytest.approx(7.0)


def test_padding_share_counts_source_and_target_places():
    window = Window(["a"], torch.device("cpu"))
    add(window, batch([0, 0], [4, 2], [1, 3], [1.0, 1.0]), torch.zeros(2))
    assert window.read()["data/padding_share"] == pytest.approx(1 - (4 + 2 + 1 + 3) / (2 * 4 + 2 * 3))


def test_a_read_begins_a_new_window():
    window = Window(["a"], torch.device("cpu"))
    add(window, batch([0], [1], [1], [1.0]), torch.tensor([7.0]))
    window.read()
    add(window, batch([0], [1], [1], [1.0]), torch.tensor([1.0]))
    assert window.read()["train/loss"] == pytest.approx(1.0)


def test_waiting_counts_in_the_wait_share_and_a_pause_counts_nowhere():
    window = Window(["a"], torch.device("cpu"))
    with window.waiting():
        torch.randn(300, 300) @ torch.randn(300, 300)
    start = window._start
    with window.paused():
        torch.randn(300, 300) @ torch.randn(300, 300)
    assert window._start > start
    add(window, batch([0], [1], [1], [1.0]), torch.tensor([1.0]))
    assert 0 < window.read()["data/wait_fraction"] <= 1


def test_tensorboard_and_lines_hold_the_same_names_and_values(tmp_path):
    writer = Writer(tmp_path, 0)
    writer.write(10, {"train/loss": 2.5, "train/a/loss": 1.5})
    writer.write(20, {"train/loss": 2.25})
    writer.write(20, {"eval/mean": 0.5})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {(name, line["step"]): value for line in lines for name, value in line.items() if "/" in name}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {(name, e.step): e.value for name in board.Tags()["scalars"] for e in board.Scalars(name)}
    assert found == shown
    assert found == {
        ("train/loss", 10): 2.5, ("train/a/loss", 10): 1.5, ("train/loss", 20): 2.25, ("eval/mean", 20): 0.5
    }  # fmt: skip


def test_a_continued_run_drops_what_was_written_after_its_checkpoint(tmp_path):
    writer = Writer(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')  # a process that died while writing
    writer = Writer(tmp_path, 1)
    writer.write(2, {"train/loss": 20.0})
    writer.close()
    written = lines.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["train/loss"]) for line in written] == [(1, 1.0), (2, 20.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]


def test_a_line_ends_where_we_ended_it_whatever_its_answers_hold_and_wherever_it_was_cut(tmp_path):
    """Answers from the web hold what Python takes for ends of lines too; a kill may cut a character in two."""
    writer = Writer(tmp_path, 0)
    said = [{"step": step, "prediction": "one\u2028two\x85three é"} for step in (1, 2, 3)]
    writer.append(SAMPLES, said)
    writer.close()
    file = tmp_path / SAMPLES
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: whole.index("é".encode()) + 1])
    assert lines.read(file) == said and lines.newest(file, 2) == said[1:] and lines.newest(file, 9) == said
    Writer(tmp_path, 2).close()
    assert lines.read(file) == said[:2]


def test_going_on_does_not_write_what_is_kept(tmp_path, monkeypatch):
    """A kill while a file is written anew would lose it."""
    Writer(tmp_path, 0).append(SAMPLES, [{"step": step, "prediction": "x"} for step in range(1, 1000)])
    file, opened = tmp_path / SAMPLES, []
    size, whole = file.stat().st_size, file.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", lambda *_: opened.append("written"))
    for step, left in ((999, 999), (500, 500), (0, 0), (0, 0)):
        Writer(tmp_path, step).close()
        assert len(lines.read(file)) == left and whole.startswith(file.read_bytes()) and not opened
    assert size > file.stat().st_size == 0 and lines.newest(file, 3) == []


def test_a_full_disk_costs_figures_and_a_warning_and_not_the_run(tmp_path, monkeypatch, caplog):
    writer = Writer(tmp_path, 0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        for name in ("add_scalar", "add_image", "flush", "close"):
            patched.setattr(writer._board, name, full)
        for step in (1, 2):
            writer.write(step, {"train/loss": 1.0})
            writer.show(step, images={"a": np.zeros((2, 2, 3), np.uint8)})
            writer.append(SAMPLES, [{"step": step}])
    said = [record.message for record in caplog.records if "lacks figures from here on" in record.message]
    assert len(said) == 3 and all("No space left on device" in text for text in said)  # each file once
    writer.write(3, {"train/loss": 1.0})
    assert [line["step"] for line in lines.read(tmp_path / "metrics.jsonl")] == [3]


def test_what_is_shown_comes_back_from_the_event_file(tmp_path):
    writer = Writer(tmp_path, 0)
    numbers, image = np.array([0.0, 1.0, 1.0, 5.0]), np.full((4, 6, 3), 200, np.uint8)
    writer.show(3, histograms={"h": numbers}, images={"i": image}, texts={"t": "some *words*"})
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [histogram], [shown], [text] = board.Histograms("h"), board.Images("i"), board.Tensors("t/text_summary")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.max) == (3, 4, 5)
    read = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    assert shown.step == 3 and np.array_equal(read, image)
    assert text.tensor_proto.string_val[0] == b"some *words*"


def test_the_projector_gets_every_point_with_its_labels_and_only_the_newest(tmp_path):
    writer = Writer(tmp_path, 0)
    for factor in (1.0, 2.0):
        writer.project("tasks", ("task",), [("a",), ("b",)], factor * np.array([[1.0, 2.0], [3.0, 4.0]]))
    writer.project("sites", ("task", "layer"), [("a", "0")], np.array([[0.5]]))
    writer.close()
    config = ProjectorConfig()
    text_format.Parse((tmp_path / "tensorboard" / "projector_config.pbtxt").read_text(), config)
    assert [embedding.tensor_name for embedding in config.embeddings] == ["sites", "tasks"]
    sites, tasks = ([(tmp_path / "tensorboard" / path).read_text() for path in (e.tensor_path, e.metadata_path)]
                    for e in config.embeddings)  # fmt: skip
    assert tasks == ["2\t4\n6\t8\n", "a\nb\n"]
    assert sites == ["0.5\n", "task\tlayer\na\t0\n"]


def test_a_monitor_gets_the_same_scalars_and_other_lines_are_dropped_like_those_of_metrics(tmp_path):
    got = []
    writer = Writer(tmp_path, 0, lambda step, values: got.append((step, dict(values))))
    writer.write(5, {"train/loss": 1.5})
    for name in (OBSERVATIONS, SAMPLES):
        writer.append(name, [{"step": 5, "said": "café"}, {"step": 6, "said": "b"}])
    writer.close()
    assert got == [(5, {"train/loss": 1.5})]
    Writer(tmp_path, 5).close()
    for name in (OBSERVATIONS, SAMPLES):
        assert (tmp_path / name).read_text() == '{"step": 5, "said": "café"}\n'
