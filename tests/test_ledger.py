"""What could not be used is written once, survives a restart, and stops the run when there is too much of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperpelt_ds.config import DataConfig
from hyperpelt_ds.contracts import Hole
from hyperpelt_ds.train.ledger import Ledger


def hole(position: int) -> Hole:
    return Hole(position, "vqa", "train", position % 7, "vqa/train-000000.tar", f"key{position % 7}", "crc32 is 0")


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "holes" / "rank_0.jsonl").read_text().splitlines()]


def test_every_draw_of_a_sample_that_cannot_be_used_is_a_line_with_shard_key_and_reason(tmp_path):
    ledger = Ledger(tmp_path, 0, DataConfig())
    ledger.write(1, [])
    assert not (tmp_path / "holes").exists() and ledger.count(64) == 0
    ledger.write(2, [hole(70), hole(71)])
    assert lines(tmp_path)[0] == {
        "step": 2, "position": 70, "task": "vqa", "split": "train", "index": 0, "shard": "vqa/train-000000.tar",
        "key": "key0", "reason": "crc32 is 0",
    }  # fmt: skip
    assert ledger.count(128) == 2


def test_a_run_that_goes_on_drops_what_it_does_again_and_counts_the_rest_once(tmp_path):
    ledger = Ledger(tmp_path, 0, DataConfig())
    for step in (1, 2, 5, 6):
        ledger.write(step, [hole(step)])
    other = tmp_path / "holes" / "rank_1.jsonl"  # of a run on two ranks before; killed in the middle of a line
    other.write_text(json.dumps({"step": 4, "reason": "x"}) + "\n" + json.dumps({"step": 5})[:-3])
    again = Ledger(tmp_path, 4, DataConfig())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2] and other.read_text().count("\n") == 1
    again.write(5, [hole(5)])
    assert again.count(400) == 4


def test_the_run_stops_over_both_limits_and_says_where_to_look(tmp_path):
    ledger = Ledger(tmp_path, 0, DataConfig(max_holes=3, max_hole_share=0.1))
    ledger.write(1, [hole(n) for n in range(3)])
    assert ledger.count(10) == 3  # many, but not more than max_holes
    ledger.write(2, [hole(3)])
    assert ledger.count(100) == 4  # more, but no large share
    ledger.write(3, [hole(4)])
    with pytest.raises(
        ValueError, match=r"5 of the 40 samples .* data\.max_holes=3 .* vqa/train-000000\.tar \(1\)\. .*verify\.py"
    ):
        ledger.count(40)
    assert len(lines(tmp_path)) == 5
