"""The README's commands do what they say: run on a tiny run instead of the demo's, and otherwise as written.

`make demo` itself and `make test` are left out; everything else between ```bash and ```python fences is run.
"""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ROOT, free_port, overrides
from PIL import Image

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [command for command in words if command and command[0] != "make"]


def test_there_are_commands_to_try():
    assert {command[0] for command in commands()} == {"deepspeed", "python"}
    assert blocks("python")


def by_length() -> list:
    """Every command; those that take longest, a training and a benchmark, in `make test-all`."""
    long = ("launch/train.py", "launch/bench_step.py")
    return [pytest.param(c, marks=pytest.mark.slow if set(long) & set(c) else ()) for c in commands()]


@pytest.mark.parametrize("command", by_length(), ids=lambda command: " ".join(command[:5]))
def test_a_command_of_the_readme_runs(command, run_python, finished_run, config, tmp_path):
    replaced = {"runs/demo": finished_run(2), "runs/mine": tmp_path / "run", "bench_step.jsonl": tmp_path / "out.jsonl"}
    replaced |= {name: tmp_path / "out" / name for name in ("exported/sentiment", "answers")}
    replaced["reviews.jsonl"] = tmp_path / "reviews.jsonl"
    replaced |= {"tickets.csv": tmp_path / "tickets.csv", "data/mine": tmp_path / "mine"}
    replaced["tickets.csv"].write_text("text,team\n" + "".join(f"the door {i},{'ab'[i % 2]}\n" for i in range(99)))
    replaced["data/mine/manifest.json"] = config.data.manifest
    replaced["reviews.jsonl"].write_text('{"text": "a moving story"}\n')
    command = [str(replaced.get(word, word)) for word in command]
    if "launch/train.py" in command:
        own = [word for word in command if "=" in word]
        command = [word for word in command if word not in own]
        command += [*overrides(config), *own, "data.tasks=movie_sentiment,easy_vqa", "train.steps=2"]
    if "launch/bench_step.py" in command:
        command += ["--rounds", "1", "--cases", "bart_6x6_d512", "--batch", "1"]
    if command[0] == "deepspeed":
        command[1:1] = ["--master_port", str(free_port())]
    done = run_python(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_of_the_readme_runs(block, finished_run, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "shape.png")
    monkeypatch.chdir(tmp_path)
    exec(block.replace("runs/demo", str(finished_run(2))), {})
