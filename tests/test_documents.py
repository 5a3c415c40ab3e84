"""README, CONTRIBUTING and docs/ do what they say: every command is checked, what needs no hub, GPU or cluster is run.

A section's commands run word by word, in order, in a folder like a clone's whose data, backbone and runs are tiny. Only
what is in NOT_RUN is left out; `typed` says what is typed in another way.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, WORDS, free_port, overrides
from PIL import Image
from untrained import save_samples

from hyperpelt_ds import recipes
from hyperpelt_ds.config import Config, to_dict
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    ("README.md", "make "): "makes the environment, fetches packages, trains for minutes or runs these tests",
    ("README.md", "source .venv"): "the tests run in that environment",
    ("README.md", "python data_prep/demo.py"): "fetches packages; `make demo` and tests/test_data_prep.py",
    ("CONTRIBUTING.md", "make "): "runs these tests",
    ("CONTRIBUTING.md", "source .venv"): "the tests run in that environment",
    ("clusters.md", ""): "two nodes: tests/test_multinode.py",
    ("data.md", "--recipe glue_t5_base"): "T5's weights, and GPUs",
    ("data.md", "--weights default"): "an encoder's weights from the network",
    ("export.md", "runs/lora_t5_base"): "a run of T5; tests/test_export.py has a tiny one",
    ("kernels.md", "--suite gpu10"): "a GPU's suite: minutes on one, hours without",
    ("large_backbones.md", "model.quantize=int8"): "needs torchao; tests/test_int8.py",
    ("recipes.md", ""): "official data and weights, and GPUs; tests/test_recipes.py trains each recipe on a tiny model",
    ("study.md", ""): "fetches packages, and takes twelve hours of a core",
}
SHORTER = {"bench_step.py": "--rounds 1 --cases bart_6x6_d512 --batch 1", "launch/train.py": "train.steps=4"}
OWN_PORT = ("deepspeed --num_accelerators", "deepspeed --master_port {} --num_accelerators")
WORD = re.compile(r"[a-z]+\.[a-z_]+=")
TRAINS_DEMO = re.compile(r"train\.py --recipe demo [^\n]*--run_dir runs/demo")


def commands(block: str) -> list[str]:
    """The commands of a block as they are typed, without comments: one may have several lines."""
    found, line = [], ""
    for text in block.splitlines():
        line += text + "\n"
        try:
            shlex.split(line, comments=True)
        except ValueError:  # a quote is still open
            continue
        if not text.endswith("\\"):
            found.append(line.replace("\\\n", " ").strip())
            line = ""
    return [command for command in found if shlex.split(command, comments=True)]


def sections(page: Path) -> dict[str, list[tuple[str, str]]]:
    """Heading -> (language, block) of its bash and Python blocks; headings without any are left out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^#+ ", page.read_text(), flags=re.M):
        blocks = re.findall(r"```(bash|python)\n(.*?)```", part, re.S)
        if blocks:
            found[part.splitlines()[0]] = blocks
    return found


def left_out(page: Path, command: str) -> bool:
    return any(name == page.name and start in command for name, start in NOT_RUN)


def run_here(page: Path, heading: str) -> list[str]:
    """What of a section is run, in order; Python blocks as commands too."""
    found = []
    for language, block in sections(page)[heading]:
        if language == "bash":
            found += [command for command in commands(block) if not left_out(page, command)]
        elif not left_out(page, block):
            found.append(f"python - <<'END'\n{block}END")
    return found


def every_command() -> list[tuple[Path, str]]:
    return [
        (page, command)
        for page in PAGES
        for blocks in sections(page).values()
        for language, block in blocks
        if language == "bash"
        for command in commands(block)
    ]


def flags_of(program: Path) -> set[str]:
    """The flags of an entry point: the parameters of the function that it hands to `run`."""
    tree = ast.parse(program.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run"]
    name = ast.unparse(calls[-1].args[0])
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


@pytest.mark.parametrize(("page", "command"), every_command(), ids=lambda part: getattr(part, "name", part)[:60])
def test_programs_flags_and_fields_of_a_command_exist(page, command):
    words = shlex.split(command, comments=True)
    for place, word in enumerate(words):
        if not re.fullmatch(r"(launch|data_prep)/\w+\.py", word):
            continue
        own = words[place + 1 :]
        own = own[: own.index("--")] if "--" in own else own
        known = flags_of(ROOT / word)
        given = {text.removeprefix("--").partition("=")[0] for text in own if text.startswith("--")}
        assert given <= known, f"{page.name}: {word} has no {given - known}"
        for text in filter(WORD.match, own):
            section, _, key = text.partition("=")[0].partition(".")
            assert key in to_dict(Config()).get(section, {}), f"{page.name}: {text}"
        if "--recipe" in own and "$" not in command:
            recipes.get(own[own.index("--recipe") + 1]).override(filter(WORD.match, own))


def test_everything_that_is_left_out_is_there():
    for name, start in NOT_RUN:
        assert any(page.name == name and start in command for page, command in every_command()), (name, start)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def generator(name: str) -> ModuleType:
    """docs/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_configuration_is_what_the_dataclasses_say():
    """`make docs` writes it anew; a field without a docstring fails here."""
    assert (ROOT / "docs" / "configuration.md").read_text() == generator("configuration").page()


def test_the_demos_figure_and_table_are_those_of_its_record():
    demo = generator("demo")
    assert demo.FIGURE.read_text() == demo.figure(demo.record())
    assert demo.README.read_text() == demo.readme(demo.README.read_text(), demo.record())


def test_figure_and_table_show_the_cells_that_are_lost():
    demo = generator("demo")
    rows = demo.record()
    lost = {name for name, row in rows.items() if row["score"] < max(row["baseline"], row["bag_of_words"] or 0)}
    assert lost, "none is lost now: look whether that is so"
    for name in lost:
        line = next(line for line in demo.table(rows).splitlines() if demo.TITLES[name] in line)
        assert f"**{max(rows[name]['baseline'], rows[name]['bag_of_words'] or 0):.3f}**" in line
    drawn = sum(row[key] is not None for row in rows.values() for key in demo.MARKS)
    marks = len(re.findall("<circle|<path [^>]*(?:fill=|stroke-width=.2)", demo.figure(rows)))
    assert marks == drawn + len(demo.MARKS)  # the legend has one of each


def typed(command: str, config: Config) -> str:
    """A command as it is typed here: shorter, on a free port, on the tiny data, and for each of two nodes."""
    for program, more in SHORTER.items():
        command += f" {more}" if program in command else ""
    command = command.replace(OWN_PORT[0], OWN_PORT[1].format(free_port()))
    if TRAINS_DEMO.search(command):
        command += " " + " ".join(map(shlex.quote, overrides(config)))
    if command.startswith("torchrun --nnodes 2"):
        first = command.replace("10.0.0.1", "127.0.0.1").replace("29500", str(free_port()))
        second = first.replace("--node_rank 0", "--node_rank 1")
        return f"{first} &\nfirst=$!\n{second} &\nsecond=$!\nwait $first\nwait $second"
    return command


def make_folder(folder: Path, text: str, finished_run: Callable[[int], Path], backbone: Path) -> None:
    """What the commands of `text` are given: this repository, and small stand-ins for data, a backbone and runs."""
    for name in ("launch", "data_prep", "ds_configs", "hyperpelt_ds"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data" / "demo").mkdir(parents=True)
    (folder / "data" / "demo" / "backbone").symlink_to(backbone)
    exported = "exported/sentiment" in text and "--out exported/sentiment" not in text
    if exported or ("runs/demo" in text and not TRAINS_DEMO.search(text)):
        shutil.copytree(finished_run(2), folder / "runs" / "demo")
    if exported:
        run = ["launch/export.py", "--run_dir", "runs/demo", "--task", "movie_sentiment", "--out", "exported/sentiment"]
        subprocess.run([sys.executable, *run], cwd=folder, check=True, capture_output=True)
    articles = {split: numbered("wikipedia_topic", split, 200) for split in ("train", "validation", "test")}
    shards.write_task(folder / "data" / "demo", "wikipedia_topic", "train", articles["train"])
    if "--out data/mine" not in text:
        own = {name: {split: numbered(name, split, 80) for split in articles} for name in ("my_task", "subjects")}
        save_samples(folder / "data" / "mine", own)
    if "part-{000000..000099}" in text:
        (folder / "data" / "mine").mkdir()
        for number in range(100):
            write_part(folder / "data" / "mine" / f"part-{number:06d}.tar", number)
    Image.new("RGB", (8, 8), "red").save(folder / "shape.png")
    (folder / "reviews.jsonl").write_text('{"text": "a moving story"}\n')
    rows = "".join(f"the door {number},{('it', 'sales')[number % 2]}\n" for number in range(99))
    (folder / "tickets.csv").write_text("text,team\n" + rows)


def numbered(task: str, split: str, count: int) -> list[Sample]:
    """Samples with sources of their own and one of two targets."""
    return [
        Sample(f"{split}-{n}", task, f"the {WORDS[n % 20]} story {split} {n}", ("good", "bad")[n % 2], f"{split}-{n}")
        for n in range(count)
    ]


def write_part(path: Path, number: int) -> None:
    """A shard of one sample without an index, as it may come from elsewhere."""
    sample = {"task": "summary", "source": f"the story {number}", "target": "good"}
    data = json.dumps(sample).encode()
    with tarfile.open(path, "w") as shard:
        member = tarfile.TarInfo(f"{number:06d}.json")
        member.size = len(data)
        shard.addfile(member, io.BytesIO(data))


def runnable() -> Iterator[object]:
    for page in PAGES:
        for heading in sections(page):
            if run_here(page, heading):
                yield pytest.param(page, heading, id=f"{page.name}: {heading}")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "heading"), runnable())
def test_the_commands_of_a_section_run(page, heading, finished_run, backbone_folder, config, tmp_path):
    given = run_here(page, heading)
    make_folder(tmp_path, "\n".join(given), finished_run, backbone_folder)
    text = "\n".join(typed(command, config) for command in given)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
