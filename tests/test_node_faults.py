"""Nodes that lose power, their cable or their launcher in a step: who notices, what is left, and how the run ends."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cluster import Cluster
from conftest import BIN, ROOT
from test_control import wait_for
from test_multinode import losses, training, world
from test_stopping import latest
from test_train import final_weights

from hyperpelt_ds.config import Config
from hyperpelt_ds.train import outcome

pytestmark = [pytest.mark.multinode, pytest.mark.slow, pytest.mark.long]
STEPS = 80
LIMIT = 15.0
"""Seconds of a step without progress."""
SECONDS = 900

Run = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def config(config: Config) -> Config:
    changes = [f"train.steps={STEPS}", f"train.eval_every={STEPS}", "train.save_every=10", "train.log_every=1"]
    return config.override([*changes, f"train.step_limit={LIMIT}", "model.dropout=0.1"])


@pytest.fixture
def logged(cluster: Cluster, typed: Run, tmp_path: Path) -> Run:
    """Starts a command on a node; what it says goes to tmp_path/NODE.log."""

    def start(node: str, *command: object) -> subprocess.Popen[str]:
        return typed(node, "bash", "-c", f'exec "$@" >> {tmp_path / node}.log 2>&1', "start", *command)

    return start


@pytest.fixture
def supervised(cluster: Cluster, logged: Run) -> Run:
    """A training with a rank on each node, supervised and started over ssh on n1."""

    def start(config: Config, run_dir: Path) -> subprocess.Popen[str]:
        supervise = (BIN / "python", ROOT / "launch" / "supervise.py", "--wait", 2, "--grace", 30, "--cycles", 6, "--")
        group = ("--hostfile", cluster.hostfile(1), "--master_addr", cluster.address["n1"], "--master_port", 29500)
        return logged("n1", *supervise, BIN / "deepspeed", *group, *training(config, run_dir, True))

    return start


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two ranks, both on n1, which nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = (BIN / "deepspeed", "--num_accelerators", 2, "--master_port", 29500, *training(config, run))
    done = cluster.run("n1", *command, timeout=SECONDS, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-6000:]
    return run


def reaches(child: subprocess.Popen[str], run: Path, step: int) -> None:
    wait_for(lambda: (run / "metrics.jsonl").exists() and max(losses(run), default=0) >= step, child, SECONDS)


def assert_same(run: Path, undisturbed: Path) -> None:
    assert world(run) == world(undisturbed) == 2
    assert outcome.read_status(run)["state"] == "finished" and (run / "DONE").exists()
    assert losses(run) == losses(undisturbed) and len(losses(run)) == STEPS
    assert all(torch.equal(tensor, final_weights(run)[name]) for name, tensor in final_weights(undisturbed).items())


def starts(tmp_path: Path) -> int:
    return (tmp_path / "n1.log").read_text().count("supervise: started")


def assert_noticed(run: Path, rank: int) -> None:
    """That a rank ended itself because a step took too long, and wrote where it stood."""
    said = (run / f"stack_{rank}.txt").read_text()
    waited = re.search(r"no progress for (\d+) s in phase 'step'", said)
    assert waited and int(waited[1]) >= LIMIT and "Thread" in said


def test_a_partition_shorter_than_the_limit_only_costs_its_time(cluster, supervised, config, undisturbed, tmp_path):
    run = tmp_path / "run"
    child = supervised(config.override(["train.step_limit=120"]), run)
    reaches(child, run, 12)
    cluster.partition("n2")
    time.sleep(2)  # what was on its way
    stood = max(losses(run))
    time.sleep(3)
    assert max(losses(run)) == stood < STEPS
    cluster.heal("n2")
    assert child.wait(SECONDS) == 0 and starts(tmp_path) == 1
    assert_same(run, undisturbed)


def test_a_longer_one_is_noticed_on_both_sides_and_the_run_started_again(
    cluster, supervised, config, undisturbed, tmp_path
):
    run = tmp_path / "run"
    child = supervised(config, run)
    reaches(child, run, 12)
    cluster.partition("n2")
    wait_for(lambda: (run / "stack_0.txt").exists() and (run / "stack_1.txt").exists(), child, SECONDS)
    wait_for(lambda: cluster.processes("n2") == [], child, SECONDS)
    cluster.heal("n2")
    assert child.wait(2 * SECONDS) == 0, (tmp_path / "n1.log").read_text()[-6000:]
    for rank in range(2):
        assert_noticed(run, rank)
    assert starts(tmp_path) > 1 and "supervise: exit code 70" in (tmp_path / "n1.log").read_text()
    assert_same(run, undisturbed)


def test_a_node_without_power_is_noticed_and_the_run_goes_on_when_it_is_back(
    cluster, supervised, config, undisturbed, tmp_path
):
    """Its ssh connection never says a word, so that the launcher on n1 would wait for ever."""
    run = tmp_path / "run"
    child = supervised(config, run)
    reaches(child, run, 12)
    cluster.power_off("n2")
    wait_for(lambda: "supervise: exit code 70" in (tmp_path / "n1.log").read_text(), child, SECONDS)
    assert_noticed(run, 0)
    cluster.power_on("n2")
    assert child.wait(2 * SECONDS) == 0, (tmp_path / "n1.log").read_text()[-6000:]
    assert_same(run, undisturbed)


def test_when_the_launchers_node_loses_power_nothing_stays_on_the_other_and_the_run_can_be_started_again(
    cluster, supervised, config, undisturbed, tmp_path
):
    run = tmp_path / "run"
    child = supervised(config, run)
    reaches(child, run, 12)
    cluster.power_off("n1")
    wait_for(lambda: cluster.processes("n2") == [], None, SECONDS)
    assert_noticed(run, 1)
    cluster.power_on("n1")
    assert supervised(config, run).wait(SECONDS) == 0, (tmp_path / "n1.log").read_text()[-6000:]
    assert_same(run, undisturbed)


def test_when_a_launcher_is_killed_all_ranks_save_and_leave_and_the_run_goes_on_bitwise(
    cluster, logged, config, undisturbed, tmp_path
):
    run = tmp_path / "run"

    def start() -> list[subprocess.Popen[str]]:
        group = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", cluster.address["n1"], "--master_port", 29500]
        return [
            logged(node, BIN / "torchrun", *group, "--node_rank", rank, *training(config, run), "--resume")
            for rank, node in enumerate(cluster.nodes)
        ]

    children = start()
    reaches(children[0], run, 12)
    killed = cluster.run("n1", "pkill", "-KILL", "-f", "^[^ ]*python[^ ]* [^ ]*/torchrun ")
    assert killed.returncode == 0
    for node, child in zip(cluster.nodes, children, strict=True):
        assert child.wait(SECONDS) != 0
        wait_for(lambda node=node: cluster.processes(node) == [], None, SECONDS)
    status = outcome.read_status(run)
    assert (status["state"], status["code"]) == ("preempted", 75) and latest(run) == status["step"] < STEPS
    assert not list(run.glob("stack_*.txt")), "nobody had to wait for a limit"
    for child in start():
        assert child.wait(SECONDS) == 0, (tmp_path / "n1.log").read_text()[-6000:]
    assert_same(run, undisturbed)
