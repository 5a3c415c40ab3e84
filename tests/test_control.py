"""Leaving together, skipping, going back, hanging, and being started again: real signals, processes and files."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from test_launch import call  # noqa: F401  a fixture

from hyperpelt_ds.config import TrainConfig
from hyperpelt_ds.train import control, outcome, supervision
from hyperpelt_ds.train.control import BadSteps, Control, RollBack
from hyperpelt_ds.train.outcome import DataFault, Diverged, NotFinite, Preempted
from hyperpelt_ds.train.supervision import Supervisor
from hyperpelt_ds.train.watchdog import EVALUATION, STEP, Watchdog

# --- the word of all ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_only_asks_and_the_next_word_says_so(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Control() as word:
        assert word.poll(3) == (3, False, False)
        os.kill(os.getpid(), number)
        assert word.poll(usable=5, fault=True) == (5, True, True)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_second_ctrl_c_does_not_wait():
    with Control():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_two_ranks_agree_and_see_when_they_do_not(run_python, tmp_path):
    done = run_python(
        *("deepspeed", "--master_port", free_port(), "--num_accelerators", 2, "tests/two_ranks_agree.py", tmp_path)
    )
    assert done.returncode == 0 and "held" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


# --- steps that changed nothing


def bad_lines(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / control.BAD_STEPS).read_text().splitlines()]


def test_bad_steps_are_lines_and_a_run_that_goes_on_drops_those_it_does_again(tmp_path):
    bad = BadSteps(tmp_path, 0, 8)
    bad.add(3, (16, 24), "not finite", ["easy_vqa/train-3"])
    bad.add(5, (32, 40), "no sample can be used")
    assert bad_lines(tmp_path)[0] == {
        "step": 3, "samples": [16, 24], "reason": "not finite", "culprits": ["easy_vqa/train-3"],
    }  # fmt: skip
    assert bad.count == 2 and BadSteps(tmp_path, 4, 8).count == 1 == len(bad_lines(tmp_path))


def test_only_steps_in_a_row_are_too_many(tmp_path):
    bad = BadSteps(tmp_path, 0, 2)
    for step in range(1, 9, 2):
        bad.judge(step, (8 * step, 8 * step + 8), checkpoint=True)
        bad.good()
    bad.judge(9, (72, 80), checkpoint=True)
    with pytest.raises(RollBack):
        bad.judge(10, (80, 88), checkpoint=True)


def test_the_run_goes_back_once_without_the_samples_around_and_then_ends(tmp_path):
    bad = BadSteps(tmp_path, 0, 2)
    bad.judge(9, (64, 72), checkpoint=True)
    with pytest.raises(RollBack):
        bad.judge(10, (72, 80), checkpoint=True)
    again = BadSteps(tmp_path, 4, 2)
    assert [again.leaves_out(first) for first in (40, 48, 56, 64, 72, 80)] == [False, True, True, True, True, False]
    again.judge(12, (88, 96), checkpoint=True)
    with pytest.raises(NotFinite, match=r"2 steps in a row up to step 13 .* again after going back once"):
        again.judge(13, (96, 104), checkpoint=True)


def test_without_a_checkpoint_there_is_no_way_back(tmp_path):
    with pytest.raises(NotFinite, match="no checkpoint to go back to"):
        BadSteps(tmp_path, 0, 1).judge(1, (0, 8), checkpoint=False)
    assert not (tmp_path / control.ROLLBACK).exists()


# --- the watchdog

HANG = """
import sys, time
from pathlib import Path
from hyperpelt_ds.config import TrainConfig
from hyperpelt_ds.train.watchdog import Watchdog

def asleep_for_ever():
    time.sleep(10_000)

with Watchdog(Path(sys.argv[1]), TrainConfig(start_limit=0.0, step_limit=1.0)) as dog:
    dog.step(1)
    dog.step(2)
    asleep_for_ever()
"""


def test_a_process_that_hangs_writes_its_stacks_and_ends_with_70(run_python, tmp_path):
    done = run_python("python", "-c", HANG, tmp_path / "run")
    assert done.returncode == 70, done.stderr[-2000:]
    stacks = (tmp_path / "run" / "stack_0.txt").read_text()
    assert "asleep_for_ever" in stacks and "in phase 'step', step 2" in stacks
    status = outcome.read_status(tmp_path / "run")
    assert (status["state"], status["step"], status["code"]) == ("hung", 2, 70)


def test_it_also_ends_when_nothing_can_be_written_and_nobody_reads_what_it_prints(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    child = subprocess.Popen(
        [sys.executable, "-c", HANG, str(tmp_path / "run")], cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    child.stderr.close()
    assert child.wait(60) == 70


LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], env={**os.environ, **ENVIRONMENT})
print(rank.pid, flush=True)
rank.wait()
"""
RANK = """
import sys, time
from pathlib import Path
from hyperpelt_ds.config import TrainConfig
from hyperpelt_ds.train.control import Control
from hyperpelt_ds.train.watchdog import Watchdog

folder = Path(sys.argv[1])
with Watchdog(folder, TrainConfig(start_limit=0, step_limit=0, eval_limit=0, save_limit=0)), Control() as control:
    (folder / "ready").touch()
    while not control.poll().stop and not (folder / "enough").exists():
        time.sleep(0.05)
    (folder / "left").write_text("enough" if (folder / "enough").exists() else "asked to stop")
"""


@pytest.mark.parametrize("rank", ["0", None])
def test_a_rank_whose_launcher_is_killed_is_asked_to_stop_and_a_process_of_its_own_is_not(tmp_path, rank):
    script = LAUNCHER.replace("ENVIRONMENT", repr({"RANK": rank, "WORLD_SIZE": "2"} if rank else {}))
    command = [sys.executable, "-c", script, RANK, str(tmp_path)]
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE)
    process = int(launcher.stdout.readline())
    wait_for(lambda: (tmp_path / "ready").exists(), launcher)
    launcher.kill()
    launcher.wait()
    if rank is None:
        time.sleep(3)
        assert alive(process)
        (tmp_path / "enough").touch()
    wait_for(lambda: not alive(process))
    assert (tmp_path / "left").read_text() == ("asked to stop" if rank else "enough")


def test_a_step_may_take_its_limit_or_twenty_medians_and_0_is_no_limit(tmp_path):
    dog = Watchdog(tmp_path, TrainConfig(step_limit=60.0, eval_limit=0.0))
    assert dog.limit(STEP) == 60.0 and dog.limit(EVALUATION) == 0.0
    dog._durations.extend([1.0, 10.0, 90.0])
    assert dog.limit(STEP) == 200.0
    assert Watchdog(tmp_path, TrainConfig(step_limit=0.0)).limit(STEP) == 0.0


# --- exit codes


@pytest.mark.parametrize("kind, code", [(Preempted, 75), (DataFault, 65), (NotFinite, 66), (Diverged, 67)])
def test_a_run_that_its_ranks_left_exits_with_the_code_that_says_why(call, kind, code):  # noqa: F811
    def command() -> None:
        raise kind("the reason")

    assert call(command) == (code, "", "the reason\n")


def test_what_follows_two_dashes_is_passed_on_as_it_is(call):  # noqa: F811
    seen = []

    def command(*words: str, number: int = 0) -> None:
        seen.append((words, number))

    assert call(command, "--number", 2, "--", "deepspeed", "--resume", "a=1", "--help")[0] == 0
    assert seen == [(("deepspeed", "--resume", "a=1", "--help"), 2)]


# --- the supervisor, over commands that leave behind what a run does

RUN = """
import os, signal, subprocess, sys, time
from pathlib import Path
from hyperpelt_ds.train import outcome, supervision

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
with (folder / "starts").open("a") as file:
    print(*sys.argv[2:], file=file)
start = len((folder / "starts").read_text().splitlines())
outcome.begin(folder)
supervision.take_over(folder, print)
supervision.record_process(folder, 0)

def save(step):
    (folder / "LATEST").write_text(f"step_{step:08d}\\n")

def end(state, code):
    outcome.write_status(folder, state, start, code)
    sys.exit(code)
"""


@pytest.fixture
def supervise(tmp_path) -> Callable[..., int]:
    def run(body: str, cycles: int = 3) -> int:
        script = tmp_path / "run.py"
        script.write_text(RUN + textwrap.dedent(body))
        command = [sys.executable, str(script), str(tmp_path / "run")]
        return Supervisor(command, tmp_path / "run", cycles, 0.01, 2.0, print).run()

    return run


def starts(tmp_path: Path) -> list[str]:
    return (tmp_path / "run" / "starts").read_text().splitlines()


def test_a_run_is_started_again_from_its_checkpoint_until_it_is_done(supervise, tmp_path):
    assert supervise("""
        save(start)
        if start == 1: end("hung", 70)
        if start == 2: end("preempted", 75)
        if start == 3: os.kill(os.getpid(), signal.SIGKILL)
        if start == 4: sys.exit(0)  # a launcher may call a death success
        end("finished", 0)
    """) == 0  # fmt: skip
    assert starts(tmp_path) == ["--resume"] * 5


def test_three_starts_without_a_newer_checkpoint_are_enough(supervise, tmp_path):
    assert supervise("save(min(start, 2)); end('hung', 70)") == 70
    assert len(starts(tmp_path)) == 5


@pytest.mark.parametrize("code", [65, 66, 67])
def test_what_needs_a_human_is_not_started_again(supervise, tmp_path, code):
    assert supervise(f"end('state', {code})") == code
    assert len(starts(tmp_path)) == 1


def test_a_wrong_request_is_not_started_again(supervise, tmp_path):
    assert supervise("sys.exit(2)") == 2
    assert len(starts(tmp_path)) == 1


def alive(process: int) -> bool:
    return supervision.began(process) is not None


def test_nothing_of_a_cycle_is_left_when_the_next_begins(supervise, tmp_path):
    assert supervise("""
        if start == 1:  # a child in the same group, and a rank that left it, as torchrun's do
            child = subprocess.Popen(["sleep", "1000"])
            rank = subprocess.Popen(["setsid", "sleep", "1000"])
            time.sleep(0.5)
            (folder / "left").write_text(f"{child.pid} {rank.pid}")
            import json
            record = {"host": os.uname().nodename, "pid": rank.pid, "start": supervision.began(rank.pid)}
            (folder / "processes" / "rank_1.json").write_text(json.dumps(record))
            rank.returncode = 0
            sys.exit(1)
        left = (folder / "left").read_text().split()
        (folder / "found").write_text(str([supervision.began(int(pid)) for pid in left]))
        end("finished", 0)
    """) == 0  # fmt: skip
    assert (tmp_path / "run" / "found").read_text() == "[None, None]"


def test_a_launcher_that_waits_on_after_the_run_has_said_how_it_ended_is_ended(supervise, tmp_path):
    """As pdsh does, when the machine at the other end of a connection is gone without a word."""
    assert supervise("""
        if start == 1:
            outcome.write_status(folder, "hung", 3, 70)
            (folder / "launcher").write_text(str(os.getpid()))
            time.sleep(10_000)
        end("finished", 0)
    """) == 0  # fmt: skip
    assert len(starts(tmp_path)) == 2 and not alive(int((tmp_path / "run" / "launcher").read_text()))


def is_past(file: Path, step: int) -> bool:
    return file.exists() and int(file.read_text() or 0) > step


TRAINS = """
def leave(*_):
    save(reached)
    end("preempted", 75)
signal.signal(signal.SIGTERM, leave)
reached = int((folder / "LATEST").read_text()[5:]) if (folder / "LATEST").exists() else 0
while reached < 60:
    reached += 1
    (folder / "reached").write_text(str(reached))
    time.sleep(0.1)
save(reached)
end("finished", 0)
"""


def test_of_two_supervisors_of_one_run_the_second_takes_it_over_and_the_first_leaves(tmp_path):
    (tmp_path / "run.py").write_text(RUN + TRAINS)
    run, children = tmp_path / "run", []
    command = [sys.executable, "launch/supervise.py", "--wait", "0", "--", sys.executable, str(tmp_path / "run.py")]
    try:
        for step in (5, 15):
            children.append(subprocess.Popen([*command, str(run), f"--run-dir={run}"], cwd=ROOT, env=environment()))
            wait_for(functools.partial(is_past, run / "reached", step), children[-1])
        assert [child.wait(60) for child in children] == [75, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert len(starts(tmp_path)) == 2 and (run / "LATEST").read_text() == "step_00000060\n"


def test_what_runs_after_another_start_took_over_is_let_alone(supervise, tmp_path):
    """The supervisor of the first may be late to see that it has ended."""
    assert supervise("""
        import json
        taker = subprocess.Popen(["setsid", "sleep", "1000"])
        time.sleep(0.5)
        record = {"host": os.uname().nodename, "pid": taker.pid, "start": supervision.began(taker.pid)}
        (folder / "processes" / "rank_0.json").write_text(json.dumps(record))
        outcome.write_small(folder / "TAKEN.json", {"start": "another"})
        (folder / "taker").write_text(str(taker.pid))
        taker.returncode = 0
        end("preempted", 75)
    """) == 75  # fmt: skip
    taker = int((tmp_path / "run" / "taker").read_text())
    assert alive(taker) and len(starts(tmp_path)) == 1
    os.kill(taker, signal.SIGKILL)


def test_what_a_start_that_is_taken_over_says_is_not_the_new_ones_word(supervise, tmp_path):
    """The first is slow to say how it ended, and the second must not be ended for that."""
    assert supervise("""
        earlier = {"state": "preempted", "step": 3, "code": 75, "start": "an earlier start"}
        outcome.write_small(folder / "STATUS.json", earlier)
        time.sleep(4)  # longer than the grace
        end("finished", 0)
    """) == 0  # fmt: skip
    assert len(starts(tmp_path)) == 1


@pytest.mark.parametrize("file", ["STATUS.json", "processes/rank_0.json", "LATEST"])
def test_a_small_file_that_cannot_be_read_just_now_ends_no_supervisor(supervise, tmp_path, file):
    assert supervise(f"""
        (folder / {file!r}).write_text("")
        time.sleep(3)
        if start == 2: end("finished", 0)
        sys.exit(1)
    """) == 0  # fmt: skip
    assert len(starts(tmp_path)) == 2


def test_a_run_that_does_not_save_in_time_is_said_to_be_lost(tmp_path, capfd):
    script = tmp_path / "run.py"
    script.write_text(RUN + textwrap.dedent("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        save(4)
        outcome.write_status(folder, "running", 7)
        (folder / "ready").touch()
        time.sleep(1000)
    """))  # fmt: skip
    command = [sys.executable, "launch/supervise.py", "--grace", "1", "--", sys.executable, script, tmp_path / "run"]
    child = subprocess.Popen(
        [*map(str, command), "--run_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup, if it began the tests, ignores it
    )
    try:
        wait_for(lambda: (tmp_path / "run" / "ready").exists(), child)
        child.send_signal(signal.SIGHUP)
        said = child.communicate(timeout=60)[0].decode()
    finally:
        child.kill()
    assert child.returncode == 75 and "did not save within 1 s (--grace); after the checkpoint of step 4 all is" in said


def test_a_new_start_ends_what_an_earlier_one_left_on_its_machine_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "_TAKE_OVER_SECONDS", 2.0)
    sleep = "import time; print(flush=True); time.sleep(1000)"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + sleep
    scripts = {"obeys": sleep, "hangs": deaf, "elsewhere": sleep, "reused": sleep}
    children = {
        name: subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        for name, script in scripts.items()
    }
    (tmp_path / "processes").mkdir()
    for number, (name, child) in enumerate(children.items()):
        child.stdout.readline()
        host = "another" if name == "elsewhere" else os.uname().nodename
        start = supervision.began(child.pid) - (name == "reused")
        record = {"host": host, "pid": child.pid, "start": start}
        (tmp_path / "processes" / f"rank_{number}.json").write_text(json.dumps(record))
    supervision.record_process(tmp_path, 9)  # the one that takes over, of the same process before
    said = []
    try:
        supervision.take_over(tmp_path, said.append)
        assert [child.poll() for child in children.values()] == [-signal.SIGTERM, -signal.SIGKILL, None, None]
        assert len(said) == 3
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def test_a_recorded_number_that_now_is_another_process_is_let_alone(tmp_path):
    sleeper = subprocess.Popen(["sleep", "100"])
    (tmp_path / "processes").mkdir()
    record = {"host": os.uname().nodename, "pid": sleeper.pid, "start": supervision.began(sleeper.pid) - 1}
    (tmp_path / "processes" / "rank_0.json").write_text(json.dumps(record))
    try:
        Supervisor([sys.executable, "-c", "raise SystemExit(2)"], tmp_path, 1, 0.0, 0.0, print).run()
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_supervisor_lets_the_run_save_and_ends_both(tmp_path, number):
    script = tmp_path / "run.py"
    script.write_text(RUN + textwrap.dedent("""
        def leave(*_):
            save(7)
            end("preempted", 75)
        signal.signal(signal.SIGTERM, leave)
        (folder / "ready").touch()
        time.sleep(1000)
    """))  # fmt: skip
    command = [sys.executable, "launch/supervise.py", "--", sys.executable, script, tmp_path / "run"]
    command += ["--run_dir", tmp_path / "run"]
    child = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment())
    wait_for(lambda: (tmp_path / "run" / "ready").exists(), child)
    child.send_signal(number)
    assert child.wait(60) == 75
    assert (tmp_path / "run" / "LATEST").read_text() == "step_00000007\n" and len(starts(tmp_path)) == 1


def test_supervise_needs_a_command_with_a_run_dir(call):  # noqa: F811
    from test_launch import script

    code, _, err = call(script("supervise").supervise, "--", "deepspeed", "launch/train.py", "--run_dir")
    assert code == 2 and "has no --run_dir" in err


# --- processes that read

READERS = """
import multiprocessing, sys, time
from torch.utils.data import Dataset
from hyperpelt_ds.data.handover import in_turn

class Doubles(Dataset):
    def __getitems__(self, items):
        return [2 * item for item in items]

items = in_turn(Doubles(), 2, iter(range(10**9)))
for item in items:
    if item % 40 == 0:
        print(item, *(child.pid for child in multiprocessing.active_children()), flush=True)
    if item == 1000 and sys.argv[1] == '0.0': raise RuntimeError("a crash, with the iterator still in a traceback")
    time.sleep(float(sys.argv[1]))
"""


def readers(pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READERS, str(pause)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=-1, stderr=-1)


def test_workers_let_signals_pass_and_end_with_their_parent():
    process = readers(0.01)
    workers = [int(pid) for pid in process.stdout.readline().split()[1:]]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    later = [int(process.stdout.readline().split()[0]) for _ in range(5)]
    assert later == [40, 80, 120, 160, 200] and all(map(alive, workers)), "as if there had been no signal"
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, workers)))


def test_a_crash_ends_the_workers_and_is_not_held_up_by_them():
    process = readers(0.0)
    workers = [int(pid) for pid in process.stdout.readline().split()[1:]]
    assert process.wait(120) == 1 and "a crash" in process.stderr.read()
    assert not any(map(alive, workers))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def wait_for(true: Callable[[], bool], child: subprocess.Popen | None = None, limit: float = 240.0) -> None:
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end and (child is None or child.poll() is None)
        time.sleep(0.02)
