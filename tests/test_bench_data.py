"""The benchmark of the data, as small as it can be; how fast anything is, is not tested."""

from __future__ import annotations

import json
from typing import Any

import pytest

SMALL = {"rounds": 1, "texts": 640, "images": 256, "shards": 5, "drawn": 6400, "rate_mb": 200}


@pytest.fixture
def measured(run_python, tmp_path):
    """Runs suites; gives what they wrote: the header and the lines."""

    def run(suites: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        folder, out = tmp_path / "folder", tmp_path / "out.jsonl"
        folder.mkdir()
        sizes = [f"--{name}={size}" for name, size in SMALL.items()]
        done = run_python("python", "launch/bench_data.py", "--suite", suites, "--out", out, "--folder", folder, *sizes)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert not list(folder.iterdir()), "generated data is left behind"
        head, *lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert all(0 <= line["min"] <= line["median"] <= line["max"] for line in lines)
        return head, lines

    return run


def test_every_local_case_is_measured_beside_its_target(measured):
    head, lines = measured("read,stream,resume")
    assert head.items() >= SMALL.items() and {"hardware", "cores", "load", "torch", "webdataset"} <= set(head)
    reads, others = lines[:18], lines[18:]
    assert [line["system"] for line in reads] == ["hyperpelt_ds", "webdataset", "raw tar scan"] * 6
    assert len({line["case"] for line in reads if "B/sample" in line["case"]}) == 6
    assert all(line["ratio"] > 0 and line["stored_bytes"] > line["sample_bytes"] > 500 for line in reads)
    assert {line["target"] for line in reads if line["system"] == "hyperpelt_ds"} == {"ratio >= 3"}
    expected = ["samples/s"] * 3 + ["us/sample"] * 2 + ["first batch s"] * 6 + ["shards touched"] * 3
    assert [line["metric"] for line in others] == expected
    assert all(line["median"] > 0 for line in others)
    assert sum("met" in line for line in others) == 1 + 1 + 6


@pytest.mark.slow
def test_the_remote_store_gives_every_sample_once_and_memory_and_files_are_watched(measured):
    _, lines = measured("remote,memory")
    found = {(line["metric"], line["system"]): line["median"] for line in lines}
    for workers in (0, 2):
        for kind, least, most in (("cold", 0.9, 1.1), ("warm", 0.0, 0.01)):
            system = f"{kind}, {workers} workers"
            assert found["lost + repeated", system] == 0
            assert least <= found["fetched / data", system] <= most
            assert (found["shards touched", system] > 0) == (kind == "cold")
    assert 0 < found["open files", "0 workers"] <= 64
    assert ("growth MB", "0 workers") in found
