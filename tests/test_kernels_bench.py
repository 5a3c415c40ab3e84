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
import kernel_goals
import kernel_steps
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
        *(("ceilings", system) for system in ("copy", "product")),
    }
    for line in lines[2:]:
        assert line["min"] <= line["median"] <= line["max"] and line["hardware"]
        assert line["ratio"] == 1 or line["system"] not in ("ours", "copied")
    assert "of the copy rate" in capsys.readouterr().out


def _tests(folder, **green):
    """A checkout whose ops' tests are so."""
    (folder / "tests").mkdir()
    for op, fine in green.items():
        (folder / "tests" / f"test_kernels_{op}.py").write_text(f"def test_it():\n    assert {fine}\n")
    return folder


def test_red_tests_of_the_ops_stop_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_kernels, "ROOT", _tests(tmp_path, adapter=False, prefix=False))
    with pytest.raises(ValueError, match="the ops' tests fail"):
        bench_kernels.bench_kernels(suite="smoke")
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("1 failed") == 2


def test_red_tests_of_one_op_leave_the_other_its_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_kernels, "ROOT", _tests(tmp_path, adapter=True, prefix=False))
    out = tmp_path / "bench.jsonl"
    with pytest.raises(ValueError, match="the tests of prefixes fail"):
        bench_kernels.bench_kernels(suite="smoke", out=str(out), rounds=1, peers="", steps="tiny")
    systems = {(line["case"], line["system"]) for line in map(json.loads, out.read_text().splitlines())}
    assert ("tasks4_B64_S8_m64", "ours") in systems and ("step tiny", "ours") in systems
    assert not any(case.startswith("prefix") or system == "merged" for case, system in systems)


def test_a_system_that_cannot_run_is_left_out_with_its_reason_and_the_others_stay(tmp_path, capsys):
    def fails():
        raise RuntimeError("no kernel takes it\nmore")

    out = tmp_path / "bench.jsonl"
    bench = bench_kernels._Bench(1, str(out))
    bench.compare("case", {"ours": lambda: None, "peer": fails}, "ours")
    left_out, ours = map(json.loads, out.read_text().splitlines()[2:])
    assert (left_out["system"], left_out["metric"]) == ("peer", "left_out")
    assert left_out["reason"] == "no kernel takes it" and ours["ratio"] == 1
    assert "no kernel takes it" in capsys.readouterr().out
    bench.compare("case", {"ours": fails, "peer": lambda: None}, "ours")
    assert len(out.read_text().splitlines()) == 5, "nothing to compare with"


def test_a_train_step_in_half_precision_with_images_runs_every_system():
    actions, flops = kernel_steps.actions(kernel_steps.STEPS["tiny_images"], "cpu", torch.bfloat16)
    for action in actions.values():
        action()
    assert flops > 0 and list(actions) == ["ours", "gather", "merged", "floor"]


def test_goals_are_judged_from_the_lines_of_a_run():
    case = cases.ADAPTER_CASES[6]
    assert case.name == kernel_goals.TASKS

    def line(system, gpu_s, **more):
        return {"case": case.name, "system": system, "median": 1.0, "gpu_s": gpu_s, **more}

    moved = 4 * 4096 * 768 + 2 * 4096 * 64 + 2 * 8 * case.parameters
    kernels = {"forward_kernel": [24, 24 * moved / 1e12 / 0.6], "backward_input_kernel": [24, 1.0]}
    lines = [line("ours", 1e-3, kernels=kernels, launches=240), line("eager_bmm", 6e-3), line("graph", 1e-3)]
    lines += [{"case": "step t5_base", "system": system, "median": 1.0, "gpu_s": s} for system, s in STEP]
    lines.append({"case": case.name, "system": "compiled", "metric": "left_out", "reason": "none"})
    found = {(v.goal, v.case, v.what): v for v in kernel_goals.judged(lines, cases.ADAPTER_CASES, 1e12)}
    assert len(found) == len(kernel_goals.judged([], cases.ADAPTER_CASES, 1e12))

    def verdict(goal, of=case.name, what=""):
        (one,) = (v for (g, c, w), v in found.items() if (g, c) == (goal, of) and what in w)
        return one

    assert verdict("G3").found == pytest.approx(6) and verdict("G3").met
    assert verdict("G5").found is None and "not measured" in str(verdict("G5"))
    assert verdict("G6", what="forward").found == pytest.approx(0.6) and verdict("G6", what="forward").met
    assert verdict("G6", what="backward").met is None
    assert verdict("G8", "step t5_base").found == pytest.approx(0.2) and "missed" in str(verdict("G8", "step t5_base"))
    assert verdict("G10", what="launches").found == 10 and not verdict("G10", what="launches").met


STEP = (("ours", 1.2e-3), ("floor", 1e-3))


def test_goals_are_of_cases_that_gpu10_times():
    timed = {*cases.SUITES["gpu10"], *(f"step {name}" for name in bench_kernels.SUITE_STEPS["gpu10"])}
    assert {verdict.case for verdict in kernel_goals.judged([], cases.ADAPTER_CASES, 1.0)} <= timed


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
    live = {line["system"]: line["live_bytes"] for line in map(json.loads, out.read_text().splitlines()[2:])}
    assert 0 < 2 * live["chunked"] < live["ours"]


@pytest.mark.parametrize("flag", ["suite", "peers", "steps"])
def test_unknown_names_are_refused_with_those_that_exist(flag):
    with pytest.raises(ValueError, match=f"--{flag}.*(allowed are|expected one of)"):
        bench_kernels.bench_kernels(**{flag: "nothing"})
