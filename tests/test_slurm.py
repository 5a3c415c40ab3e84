"""launch/slurm.example.sbatch under a real Slurm on two nodes (tests/cluster.py): stopped by its signal, it goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator

import pytest
from cluster import Cluster
from conftest import BIN, ROOT
from test_control import wait_for
from test_multinode import losses, training, world
from test_stopping import latest

from hyperpelt_ds.config import Config
from hyperpelt_ds.train import outcome

pytestmark = [pytest.mark.multinode, pytest.mark.slow, pytest.mark.long]
STEPS = 80
SECONDS = 900
_CONF = """
ClusterName=tests
SlurmctldHost=n1
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
NodeName=n1 NodeAddr={n1} CPUs=1 State=UNKNOWN
NodeName=n2 NodeAddr={n2} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""
Slurm = Callable[..., str]


@pytest.fixture(scope="module")
def slurm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Runs a command of Slurm's on n1."""
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch")
        if not shutil.which(name, path="/usr/sbin:/usr/bin")
    ]
    if missing:
        pytest.skip(f"needs the packages munge, slurmctld, slurmd and slurm-client: no {missing[0]}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(_CONF.format(folder=folder, **cluster.address))
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin"}
    environment |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"}

    def run(node: str, *command: object) -> str:
        done = cluster.run(node, *command, env=environment, cwd=ROOT, timeout=SECONDS)
        assert done.returncode == 0, done.stdout
        return done.stdout

    places = [f"--{name}={folder / name}" for name in ("log-file", "pid-file", "seed-file")]
    run("n1", "mkdir", "-p", "/run/munge")  # all nodes see one /run
    run("n1", "munged", "--force", f"--key-file={folder / 'key'}", "--socket=/run/munge/munge.socket.2", *places)
    run("n1", "slurmctld")
    for node in cluster.nodes:
        run(node, "slurmd")
    wait_for(lambda: run("n1", "sinfo", "-h", "-o", "%D%t").split() == ["2idle"], None, SECONDS)
    yield lambda *command: run("n1", *command)


def test_the_example_stops_before_its_time_is_over_is_queued_again_and_finishes(slurm, config: Config, tmp_path):
    run = tmp_path / "run"
    changes = [f"train.steps={STEPS}", f"train.eval_every={STEPS}", "train.save_every=10", "train.log_every=1"]
    script = (ROOT / "launch" / "slurm.example.sbatch").read_text()
    [line] = [line for line in script.splitlines() if "launch/train.py" in line]
    words = " ".join(f"'{word}'" for word in training(config.override(changes), run))
    for old, new in {
        line: f"    {words} &",
        "--gpus-per-node=8": "--nodelist=n1,n2",
        "--cpus-per-task=64": "--cpus-per-task=1",
        "RANKS=8": "RANKS=1",
        "hyperpelt-%j.log": str(tmp_path / "log"),
    }.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    (tmp_path / "job.sbatch").write_text(script)
    job = slurm("sbatch", "--parsable", tmp_path / "job.sbatch").strip()
    wait_for(lambda: (run / "metrics.jsonl").exists() and max(losses(run), default=0) >= 12, None, SECONDS)
    slurm("scancel", "--signal=USR1", "--batch", job)  # what --signal has Slurm do
    wait_for(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), None, SECONDS)
    status = outcome.read_status(run)
    assert (status["state"], status["code"]) == ("preempted", 75) and latest(run) == status["step"] < STEPS
    wait_for(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job), None, SECONDS)
    # it would wait two minutes; at once, slurmd refuses it as the job that has just ended (seen in 22.05)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+10")
    wait_for(lambda: re.search(r"JobState=(COMPLETED|FAILED)", slurm("scontrol", "show", "job", job)), None, SECONDS)
    assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), (tmp_path / "log").read_text()[-4000:]
    assert outcome.read_status(run)["state"] == "finished" and world(run) == 2
    assert list(losses(run)) == list(range(1, STEPS + 1)), json.dumps(losses(run))
