"""GLUE and the transfer sets, from small files as the hub has them: splits, leaks, errors, official test sets."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT
from test_building import tree

from hyperpelt_ds import recipes
from hyperpelt_ds.contracts import TRAIN, Sample
from hyperpelt_ds.data.choice import choose
from hyperpelt_ds.data.evaluation import read_texts
from hyperpelt_ds.data.manifest import MANIFEST, Manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.tasks.glue import GLUE, halves
from hyperpelt_ds.train.submissions import FORMATS


def script(name: str) -> ModuleType:
    """data_prep/<name>.py as a module; launch/ has files of the same names."""
    spec = importlib.util.spec_from_file_location(f"data_prep_{name}", ROOT / "data_prep" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


glue, transfer = script("glue"), script("transfer")
TRAINED, DEVELOPED, TESTED = 300, 41, 17  # rows of each official split
TEXTS = {
    "cola": ["sentence"], "sst2": ["sentence"], "mrpc": ["sentence1", "sentence2"], "qqp": ["question1", "question2"],
    "stsb": ["sentence1", "sentence2"], "mnli": ["premise", "hypothesis"], "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
}  # fmt: skip
LARGE = {"sst2", "mnli", "qqp", "qnli"}
MNLI_SPLITS = {
    "train": TRAINED, "validation_matched": DEVELOPED, "validation_mismatched": DEVELOPED + 2, "test_matched": TESTED,
    "test_mismatched": TESTED + 1,
}  # fmt: skip


def write(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)


def _label(config: str, split: str, row: int) -> float:
    if split.startswith("test"):
        return -1.0 if config == "stsb" else -1
    return (row % 51) / 10 if config == "stsb" else row % (3 if config == "mnli" else 2)


def write_glue(folder: Path, **changes: dict[str, list[Any]]) -> Path:
    """All of nyu-mll/glue in small: in training, three rows share the first text and every seventh row is repeated."""
    for config, texts in TEXTS.items():
        sizes = MNLI_SPLITS if config == "mnli" else {"train": TRAINED, "validation": DEVELOPED, "test": TESTED}
        for split, size in sizes.items():
            rows = [row - row % 7 if row % 7 == 1 else row for row in range(size)] if split == "train" else range(size)
            columns: dict[str, list[Any]] = {
                text: [f"{config} {split} {text} {row // 3 if place == 0 and len(texts) > 1 else row}" for row in rows]
                for place, text in enumerate(texts)
            }
            columns |= {"label": [_label(config, split, row) for row in rows], "idx": list(range(size))}
            columns |= changes.get(f"{config}_{split}", {})
            write(folder / config / f"{split}-00000-of-00001.parquet", columns)
    return folder


@pytest.fixture(scope="module")
def glue_files(tmp_path_factory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def built(glue_files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built")
    glue.glue(out=str(out), source=str(glue_files), validation=20, official_test=True)
    return out


def _samples(out: Path, task: str, split: str) -> list[Sample]:
    return read_texts(Manifest.load(out / MANIFEST), task, split)


@pytest.mark.parametrize("config", TEXTS)
def test_glue_has_the_papers_splits_and_every_official_row_once(built, config):
    manifest, task = Manifest.load(built / MANIFEST), f"glue_{config}"
    count = {split: manifest.count(task, split) for split in manifest.tasks[task]}
    if config in LARGE:
        assert count["train"] + count["validation"] == TRAINED and 17 <= count["validation"] <= 20
        assert count["test"] == DEVELOPED
    else:
        assert [count[split] for split in ("train", "validation", "test")] == [TRAINED, 20, 21]
        keys = {split: [sample.key for sample in _samples(built, task, split)] for split in ("validation", "test")}
        rows = dict(zip(("validation", "test"), halves(DEVELOPED), strict=True))
        assert keys == {split: [f"validation-{row:06d}" for row in own] for split, own in rows.items()}
    if config == "mnli":
        assert count["test_mismatched"] == DEVELOPED + 2 and count["official_test_mismatched"] == TESTED + 1
    keys = [sample.key for split in ("train", "validation") for sample in _samples(built, task, split)]
    official = {key for key in keys if key.startswith("train-")}
    assert official == {f"train-{row:06d}" for row in range(TRAINED)}


@pytest.mark.parametrize("config", sorted(LARGE))
def test_no_item_is_both_trained_on_and_held_out(built, config):
    train, held_out = (_samples(built, f"glue_{config}", split) for split in ("train", "validation"))
    assert not {sample.item for sample in train} & {sample.item for sample in held_out}
    assert not {sample.source for sample in train} & {sample.source for sample in held_out}
    if config in ("mnli", "qnli"):  # a premise, or question, with all that was asked of it

        def first(sample: Sample) -> str:
            return sample.source.split(f"{TEXTS[config][1]}:")[0]

        assert not set(map(first, train)) & set(map(first, held_out))
    assert len({sample.key.rpartition("-")[2] for sample in held_out}) == len(held_out)
    assert any(int(sample.key[-6:]) > TRAINED / 2 for sample in held_out)  # drawn, not the first


def test_another_seed_draws_other_samples(glue_files, built, tmp_path):
    glue.glue(out=str(tmp_path), source=str(glue_files), validation=20, tasks="sst2,glue_rte", seed=1)
    for task in ("glue_sst2", "glue_rte"):
        assert {s.key for s in _samples(tmp_path, task, "validation")} != {
            s.key for s in _samples(built, task, "validation")
        }


def test_similarities_lie_on_the_grid_of_fifths_and_the_colon_of_mnli_is_there(built):
    for split in ("train", "validation", "test"):
        targets = {sample.target for sample in _samples(built, "glue_stsb", split)}
        assert targets <= {f"{step / 5:.1f}" for step in range(26)} and len(targets) > 10
    assert all(" hypothesis: " in sample.source for sample in _samples(built, "glue_mnli", "train"))


def test_the_official_test_sets_make_the_leaderboards_files(built):
    for task in GLUE:
        for split in [name for name in Manifest.load(built / MANIFEST).tasks[task.name] if name.startswith("official")]:
            samples = _samples(built, task.name, split)
            assert {sample.target for sample in samples} == {""} and all("test" in s.source for s in samples)
            FORMATS["glue"].check(samples)
            files = FORMATS["glue"].files(samples, [task.labels[1]] * len(samples), split)
            ((name, content),) = files.items()
            lines = content.splitlines()
            assert [line.split("\t")[0] for line in lines] == ["index", *map(str, range(len(samples)))]
            if task.name == "glue_mnli":
                assert name == ("MNLI-mm.tsv" if "mismatched" in split else "MNLI-m.tsv")


def test_recipes_find_their_tasks(built):
    tasks = set(Manifest.load(built / MANIFEST).tasks)
    for name in ("glue_t5_base", "glue_bart_base", "hyperformer_pp_t5_base", "lora_t5_base"):
        assert set(recipes.get(name).data.tasks) == tasks


def test_a_kill_in_the_middle_is_mended_by_the_same_command(glue_files, tmp_path):
    out = tmp_path / "out"
    request = {"source": str(glue_files), "tasks": "mrpc,rte,stsb", "shard_size": 3}
    flags = [f"--{name}={value}" for name, value in request.items()]
    process = subprocess.Popen([sys.executable, str(ROOT / "data_prep/glue.py"), f"--out={out}", *flags])
    while not list(out.glob(".building/glue_rte/*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / MANIFEST).exists()
    for folder in (out, tmp_path / "undisturbed"):
        glue.glue(out=str(folder), **request)
    assert tree(out) == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rte_train": {"label": [2] * TRAINED}}, "glue_rte, split train, train-000000: label 2 is not one of 0 to 1"),
        ({"rte_train": {"idx": [5] * TRAINED}}, "'train-000005' comes twice"),
        ({"rte_train": {"sentence2": [None] * TRAINED}}, r"train-\*\.parquet, row 0: 'sentence2' is None, expected a"),
        ({"rte_train": {"sentence1": ["x", " "] * 150, "sentence2": ["y", ""] * 150}}, "row 1: no text in sentence1"),
    ],
)
def test_a_wrong_row_is_named_by_its_file_and_place(tmp_path, change, message):
    write_glue(tmp_path / "files", **change)
    with pytest.raises(ValueError, match=message):
        glue.glue(out=str(tmp_path / "out"), source=str(tmp_path / "files"), tasks="rte")


def test_missing_columns_files_and_damaged_files_are_named(tmp_path):
    def build() -> None:
        glue.glue(out=str(tmp_path / "out"), source=str(tmp_path / "files"), tasks="rte,sst2")

    with pytest.raises(ValueError, match=r"--source .*files: no such folder, and not the name of a data set"):
        build()
    (tmp_path / "files").mkdir()
    with pytest.raises(ValueError, match=r"files: has no glue_sst2/sst2/train-\*\.parquet.*hf download nyu-mll/glue"):
        build()
    write(tmp_path / "files/sst2/train-00000-of-00001.parquet", {"text": ["a"], "label": [1]})
    with pytest.raises(ValueError, match="has no column 'sentence'; it has text, label"):
        build()
    (tmp_path / "files/sst2/train-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"files/sst2/train-\*\.parquet: cannot be read"):
        build()


def test_too_few_training_samples_to_hold_out_are_an_error(glue_files, tmp_path):
    with pytest.raises(ValueError, match="glue_sst2: cannot hold out 1,000 of 300 training samples; see --validation"):
        glue.glue(out=str(tmp_path), source=str(glue_files), tasks="sst2")


def test_without_the_hub_the_command_says_how_to_do_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["glue.py", "--out", str(tmp_path), "--tasks", "cola"])
    with pytest.raises(SystemExit) as stop:
        sys.modules["parts.command_line"].run(glue.glue)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: nyu-mll/glue, cola train: cannot be had from the hub")
    assert "--source FOLDER" in said and "hf download nyu-mll/glue --repo-type dataset --local-dir FOLDER" in said


@pytest.mark.parametrize("name", ["glue", "transfer", "table"])
def test_help_shows_examples(name):
    command = [sys.executable, str(ROOT / "data_prep" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"python data_prep/{name}.py --out data/" in done.stdout + done.stderr


# ---- transfer

SIZES = {"train": 120, "validation": 31, "test": 26}


@pytest.fixture(scope="module")
def transfer_files(tmp_path_factory) -> Path:
    """Every set as its repository has it, in a folder by its task's name."""
    folder = tmp_path_factory.mktemp("transfer")
    for split, size in SIZES.items():
        labels = [-1 if split == "test" else row % 3 for row in range(size)]
        two, rows = [min(label, 1) for label in labels], range(size)

        def texts(name: str, rows: range = rows, split: str = split) -> list[str]:
            return [f"{split} {name} {row}" for row in rows]

        number = f"{split}-00000-of-00001.parquet"
        pair = {"sentence1": texts("one"), "sentence2": texts("two")}
        real = [row % 2 for row in rows]
        write(
            folder / "cb/cb" / number,
            {"premise": texts("p"), "hypothesis": texts("h"), "idx": list(rows), "label": labels},
        )
        write(
            folder / "boolq/boolq" / number,
            {"question": texts("q"), "passage": texts("p"), "idx": list(rows), "label": two},
        )
        write(folder / "paws/labeled_final" / number, {"id": list(rows), **pair, "label": real})
        gold = ["neutral" if row % 2 else "entailment" for row in rows]
        write(folder / "scitail/snli_format" / number, {**pair, "gold_label": gold})
        if split != "validation":
            for name in ("imdb", "yelp_polarity"):
                write(folder / name / "plain_text" / number, {"text": texts(name), "label": real})
            kinds = {"coarse_label": [row % 6 for row in rows], "fine_label": [0] * size}
            write(folder / "trec/default" / split / "0000.parquet", {"text": texts("t"), **kinds})
    write(folder / "imdb/plain_text/unsupervised-00000-of-00001.parquet", {"text": ["a"], "label": [-1]})
    return folder


@pytest.fixture(scope="module")
def moved(transfer_files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("moved")
    transfer.transfer(out=str(out), source=str(transfer_files), validation=10, shots="4,16,500", seeds="0,3")
    return out


def test_transfer_sets_have_the_splits_that_are_documented(moved):
    manifest = Manifest.load(moved / MANIFEST)
    counts = {task: [manifest.count(task, s) for s in ("train", "validation", "test")] for task in manifest.tasks}
    assert counts == {
        "cb": [120, 15, 16], "boolq": [120, 15, 16], "imdb": [120, 13, 13], "paws": [120, 31, 26],
        "trec": [110, 10, 26], "scitail": [120, 31, 26], "yelp_polarity": [110, 10, 26],
    }  # fmt: skip
    keys = {split: {sample.key for sample in _samples(moved, "trec", split)} for split in ("train", "validation")}
    assert not keys["train"] & keys["validation"]
    assert _samples(moved, "scitail", "train")[1].target == "1"
    assert {sample.target for sample in _samples(moved, "trec", "test")} == set("012345")


def test_the_shots_that_are_written_down_are_those_that_a_run_draws(moved):
    manifest = Manifest.load(moved / MANIFEST)
    for task in ("cb", "imdb"):
        said = json.loads((moved / "shots" / f"{task}.json").read_text())
        assert list(said) == ["4", "16", "500"] and list(said["4"]) == ["0", "3"]
        for shots, seed in ((4, 0), (16, 3)):
            drawn = choose(Reader(manifest), task, TRAIN, manifest.count(task, TRAIN), shots, str(seed))
            keys = [sample.key for sample in _samples(moved, task, TRAIN)]
            assert said[str(shots)][str(seed)] == [keys[place] for place in drawn]
            assert len(set(said[str(shots)][str(seed)])) == shots
        assert said["4"]["0"] != said["4"]["3"] and len(said["500"]["0"]) == 120


def test_a_task_that_is_built_again_forgets_its_shots(moved, transfer_files, tmp_path):
    arguments = {"out": str(tmp_path), "source": str(transfer_files), "tasks": "cb"}
    transfer.transfer(**arguments, shots="4", seeds="0")
    transfer.transfer(**arguments)
    assert not (tmp_path / "shots/cb.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "a/b", "tasks": "cb,imdb"}, "--source a/b: one data set of the hub for cb, imdb"),
        ({"shots": "4,x"}, "--shots: expected whole numbers separated by commas, got '4,x'"),
        ({"tasks": "cbb"}, "--tasks: unknown 'cbb'; did you mean cb"),
        ({"source": ""}, "aps/super_glue, cb train: cannot be had from the hub"),
        (
            {"source": "", "tasks": "trec"},
            "hf download CogComp/trec --repo-type dataset --revision refs/convert/parquet",
        ),
        ({"limit": -1}, "--limit must be a whole number, at least 0"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(transfer_files, tmp_path, change, message):
    request: dict[str, Any] = {"out": str(tmp_path), "source": str(transfer_files), "tasks": "cb,boolq", **change}
    with pytest.raises(ValueError, match=message):
        transfer.transfer(**request)


def test_one_task_may_be_read_from_its_own_folder_and_two_never_share_one(transfer_files, tmp_path):
    transfer.transfer(out=str(tmp_path), source=str(transfer_files / "imdb"), tasks="imdb", limit=5)
    assert Manifest.load(tmp_path / MANIFEST).count("imdb", "test") == 5
    with pytest.raises(ValueError, match=r"has no imdb/plain_text/train"):
        transfer.transfer(out=str(tmp_path), source=str(transfer_files / "imdb"), tasks="imdb,yelp_polarity")
