"""The real launchers over two real nodes (tests/cluster.py): whichever starts the ranks, they train the same."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from conftest import BIN, ROOT, free_port

from hyperpelt_ds.config import Config, to_dict

pytestmark = [pytest.mark.multinode, pytest.mark.slow]
HOSTFILE = ROOT / "launch" / "hostfile.example"
SECONDS = 300


@pytest.fixture(scope="module")
def brief(config: Config) -> Config:
    """Six steps, one validation and one checkpoint."""
    return config.override(["train.steps=6", "train.eval_every=6", "train.save_every=6"])


def training(config: Config, run_dir: Path, again_through_a_shell: bool = False) -> list[str]:
    """launch/train.py and its arguments; pdsh hands them to another shell, which would eat the quotes."""
    tree = to_dict(config)
    del tree["recipe"]
    values = [
        f"{section}.{key}={json.dumps(value, separators=(',', ':'))}"
        for section in tree
        for key, value in tree[section].items()
    ]
    words = [str(ROOT / "launch" / "train.py"), "--recipe", "demo", "--run_dir", str(run_dir)]
    words += ["--ds_config", str(ROOT / "ds_configs" / "zero2_cpu.json"), *values]
    return [shlex.quote(word) for word in words] if again_through_a_shell else words


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def world(run_dir: Path) -> int:
    return int(json.loads((run_dir / "environment.json").read_text())["world_size"])


@pytest.fixture(scope="module")
def one_node(cluster: Cluster, brief: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of four ranks on one node."""
    run_dir = tmp_path_factory.mktemp("one_node") / "run"
    done = cluster.run(
        *("n1", BIN / "deepspeed", "--num_accelerators", 4, "--master_port", free_port()),
        *training(brief, run_dir),
        timeout=SECONDS,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert world(run_dir) == 4 and len(losses(run_dir)) == 6
    return losses(run_dir)


def over_pdsh(cluster: Cluster) -> list[object]:
    return [BIN / "deepspeed", "--hostfile", HOSTFILE, "--master_addr", cluster.address["n1"], "--master_port", 29500]


def test_pdsh_two_nodes_of_two_ranks(cluster, typed, brief, one_node, tmp_path):
    command = [*over_pdsh(cluster), *training(brief, tmp_path / "run", again_through_a_shell=True)]
    done = cluster.finish(typed("n1", *command), timeout=SECONDS)[0]
    assert done.returncode == 0, done.stdout[-6000:]
    assert "n2: " in done.stdout and world(tmp_path / "run") == 4
    assert losses(tmp_path / "run") == pytest.approx(one_node, rel=1e-6)


def test_no_ssh_two_nodes_of_two_ranks(cluster, typed, brief, one_node, tmp_path):
    started = [
        typed(node, *over_pdsh(cluster), "--no_ssh", f"--node_rank={rank}", *training(brief, tmp_path / "run"))
        for rank, node in enumerate(cluster.nodes)
    ]
    for done in cluster.finish(*started, timeout=SECONDS):
        assert done.returncode == 0, done.stdout[-6000:]
    assert world(tmp_path / "run") == 4
    assert losses(tmp_path / "run") == pytest.approx(one_node, rel=1e-6)


def test_torchrun_two_nodes_of_two_ranks(cluster, typed, brief, one_node, tmp_path):
    group = ["--nnodes", 2, "--nproc_per_node", 2, "--master_addr", cluster.address["n1"], "--master_port", 29500]
    started = [
        typed(node, BIN / "torchrun", *group, "--node_rank", rank, *training(brief, tmp_path / "run"))
        for rank, node in enumerate(cluster.nodes)
    ]
    for done in cluster.finish(*started, timeout=SECONDS):
        assert done.returncode == 0, done.stdout[-6000:]
    assert world(tmp_path / "run") == 4
    assert losses(tmp_path / "run") == pytest.approx(one_node, rel=1e-6)


def test_one_slot_of_the_other_node(cluster, typed, brief, one_node, tmp_path):
    """With a single host left, the launcher starts the ranks where it was typed unless --force_multi is given."""
    only = ["--include", "n2:0", "--force_multi"]
    address = ["--master_addr", cluster.address["n2"], "--master_port", 29500]
    done = cluster.finish(
        typed(
            *("n1", BIN / "deepspeed", "--hostfile", HOSTFILE, *only, *address),
            *training(brief, tmp_path / "run", again_through_a_shell=True),
        ),
        timeout=SECONDS,
    )[0]
    assert done.returncode == 0, done.stdout[-6000:]
    assert "n2: step 6/6" in done.stdout and world(tmp_path / "run") == 1
    assert losses(tmp_path / "run") == pytest.approx(one_node, rel=1e-6)


# What ranks get, and what was given to the launcher: commas pass, and quotes do if quoted for the second shell, or by
# DeepSpeed itself because there is a space; others are lost.
ARRIVED = {
    "data.tasks=a,b": "data.tasks=a,b",
    'data.tasks=["a","b"]': shlex.quote('data.tasks=["a","b"]'),
    'data.tasks=["a", "b"]': 'data.tasks=["a", "b"]',
    "data.tasks=[a,b]": 'data.tasks=["a","b"]',
}
PROBE = """
import json, os, socket, sys
rank = os.environ["RANK"]
with open(f"rank{rank}.json", "w") as file:
    json.dump({"host": socket.gethostname(), "environment": dict(os.environ), "arguments": sys.argv[1:]}, file)
"""


def test_the_environment_file_reaches_every_rank_and_nothing_else_does(cluster, typed, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    start = typed("n1", *over_pdsh(cluster), "--no_local_rank", "probe.py", *ARRIVED.values(), ONLY_HERE="1")
    done = cluster.finish(start, timeout=SECONDS)[0]
    assert done.returncode == 0, done.stdout[-6000:]
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [rank["host"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    wanted = dict(line.split("=", 1) for line in (tmp_path / ".deepspeed_env").read_text().splitlines())
    for number, rank in enumerate(ranks):
        environment = rank["environment"]
        assert wanted.items() <= environment.items() and "ONLY_HERE" not in environment
        assert environment["PYTHONPATH"] == f"{tmp_path}:{ROOT}"
        assert environment["LOCAL_RANK"] == str(number % 2) and environment["LOCAL_SIZE"] == "2"
        assert rank["arguments"] == [*ARRIVED]


def test_a_killed_rank_ends_the_run_on_every_node_and_shows(cluster, typed, brief, tmp_path):
    endless = brief.override(["train.steps=100000", "train.eval_every=100000", "train.save_every=100000"])
    start = typed("n1", *over_pdsh(cluster), *training(endless, tmp_path / "run", again_through_a_shell=True))
    late = time.monotonic() + SECONDS
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run"):
        assert start.poll() is None and time.monotonic() < late, cluster.finish(start, timeout=1)[0].stdout[-6000:]
        time.sleep(0.5)
    killed = cluster.run("n2", "pkill", "-KILL", "-f", "^[^ ]*python[^ ]* -u [^ ]*train.py --local_rank=1")
    assert killed.returncode == 0
    done = cluster.finish(start, timeout=SECONDS)[0]
    assert done.returncode != 0
    assert "exits with return code = -9" in done.stdout
    late = time.monotonic() + 10  # a helper of a process may outlive it a little
    while any(map(cluster.processes, cluster.nodes)) and time.monotonic() < late:
        time.sleep(0.2)
    for node in cluster.nodes:
        assert cluster.processes(node) == []
