"""The benchmark of the ops says what it timed, and times nothing while the ops' tests are red."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from hyperpelt_ds.kernels import cases
from hyperpelt_ds.kernels.cases import LOW_RANK_CASES

sys.path.insert(0, str(ROOT / "launch"))

import bench_kernels
from kernel_peers import low_rank_systems


def test_a_smoke_run_writes_a_line_for_every_system_with_ours_as_one(tmp_path, capsys):
    out = tmp_path / "bench.jsonl"
    bench_kernels.bench_kernels(
        suite="smoke", out=str(out), rounds=1, peers="gather,loop_task", steps="tiny", tests=False
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(line["case"], line["system"]) for line in lines} == {
        ("tasks4_B64_S8_m64", "ours"),
        ("tasks4_B64_S8_m64", "gather"),
        ("tasks4_B64_S8_m64", "loop_task"),
        ("images_B16_S8_m64", "ours"),
        ("images_B16_S8_m64", "gather"),
        *(
            (case, system)
            for case in ("prefix_tasks4_B8_T8_P4", "prefix_images_B8_T8_P9")
            for system in ("copied", "merged", "explicit", "absorbed", "none")
        ),
        *(("step tiny", system) for system in ("ours", "gather", "merged", "floor")),
    }
    for line in lines:
        assert line["min"] <= line["median"] <= line["max"] and line["hardware"]
        assert line["ratio"] == 1 or line["system"] not in ("ours", "copied")
    assert "of the copy rate" in capsys.readouterr().out


def test_red_tests_of_the_ops_stop_it(monkeypatch, capsys):
    def red(*_, **__):
        return type("Done", (), {"returncode": 1, "stdout": "1 failed"})

    monkeypatch.setattr(bench_kernels.subprocess, "run", red)
    with pytest.raises(ValueError, match="the ops' tests fail"):
        bench_kernels.bench_kernels(suite="smoke")
    printed = capsys.readouterr()
    assert printed.out == "" and "1 failed" in printed.err


def test_low_rank_deltas_and_their_peers_give_the_same_outputs():
    for case in LOW_RANK_CASES:
        small = replace(case, samples=min(case.samples, 16), tokens=3, size=24)
        found = low_rank_systems(small, ("ours", "gather", "peft_mixed_batch"), "cpu", torch.float32)
        ours, *others = (action() for action in found.values())
        assert len(others) == 2 and all(torch.allclose(ours, other, atol=1e-5) for other in others)


def test_cases_with_chunks_say_how_many_bytes_were_alive(monkeypatch, tmp_path):
    small = replace(cases.ADAPTER_CASES[-1], samples=16, tokens=2, size=64, bottleneck=16, hyper=4, sites=6)
    monkeypatch.setattr(cases, "ADAPTER_CASES", (small,))
    out = tmp_path / "bench.jsonl"
    bench_kernels.bench_kernels(suite="chunks", out=str(out), rounds=1, peers="chunked", tests=False)
    live = {line["system"]: line["live_bytes"] for line in map(json.loads, out.read_text().splitlines())}
    assert 0 < 2 * live["chunked"] < live["ours"]


@pytest.mark.parametrize("flag", ["suite", "peers", "steps"])
def test_unknown_names_are_refused_with_those_that_exist(flag):
    with pytest.raises(ValueError, match=f"--{flag}.*(allowed are|expected one of)"):
        bench_kernels.bench_kernels(**{flag: "nothing"})
