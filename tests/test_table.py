"""A user's own table as a task: from its file to a score, and every way in which a file can be wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT
from PIL import Image
from test_building import build, entries, tree
from test_text_builders import script
from untrained import untrained_run

from hyperpelt_ds import recipes, tasks
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.check import check_samples
from hyperpelt_ds.data.collate import collator_for
from hyperpelt_ds.data.evaluation import read_texts
from hyperpelt_ds.data.loader import TrainStream
from hyperpelt_ds.data.manifest import MANIFEST, Manifest
from hyperpelt_ds.model import load
from hyperpelt_ds.tasks import metrics
from hyperpelt_ds.train import loop
from hyperpelt_ds.train.answering import answers, asker

table = script("table").table
TEAMS = ("it", "sales", "red tape")


@pytest.fixture(autouse=True)
def only_the_packages_tasks() -> Iterator[None]:
    """What a test adopts is forgotten after it."""
    before = dict(tasks.TASKS)
    yield
    tasks.TASKS.clear()
    tasks.TASKS.update(before)


def rows(n: int = 200) -> list[dict[str, Any]]:
    """The same text comes twice in a row, once in other letters."""
    return [
        {
            "text": f'Ticket "{row // 2}",\nplease' if row % 2 else f'ticket "{row // 2}",\nPLEASE',
            "team": TEAMS[row // 2 % 3],
            "part": ("train", "validation", "extra")[row % 3],
        }
        for row in range(n)
    ]


def write(path: Path, own: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(own), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, "excel-tab" if path.suffix == ".tsv" else "excel")
            writer.writerows([list(own[0]), *(list(row.values()) for row in own)])
    return path


def _request(out: Path, **change: Any) -> dict[str, Any]:
    return {"out": str(out), "task": "tickets", "source": "text", "target": "team", **change}


def _samples(out: Path, split: str, task: str = "tickets") -> list[Sample]:
    return read_texts(Manifest.load(out / MANIFEST), task, split)


def test_what_comes_next_fits_what_was_built(tmp_path, capsys):
    """Training does not begin on data without samples to validate on, so no command is shown that would."""
    alone = write(tmp_path / "alone.jsonl", rows())
    table(**_request(tmp_path / "alone", train=str(alone)))
    shown = capsys.readouterr().out
    assert "next: build it again with some to validate on" in shown and "launch/train.py" not in shown
    table(**_request(tmp_path / "held_out", data=str(alone)))
    assert "launch/train.py --recipe glue_t5_base" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_data_set(tmp_path, suffix):
    data = write(tmp_path / f"t{suffix}", rows())
    table(**_request(tmp_path / "out", data=str(data), labels="auto", validation="0.2", test="0.3"))
    manifest = Manifest.load(tmp_path / "out" / MANIFEST)
    samples = {split: _samples(tmp_path / "out", split) for split in ("train", "validation", "test")}
    assert [len(own) / 200 for own in samples.values()] == pytest.approx([0.5, 0.2, 0.3], abs=0.12)
    assert sorted(s.key for own in samples.values() for s in own) == [f"row-{row:08d}" for row in range(200)]
    first = next(sample for own in samples.values() for sample in own if sample.key == "row-00000000")
    assert (first.source, first.target) == ('ticket "0",\nPLEASE', "it")
    items = [{sample.item for sample in own} for own in samples.values()]
    assert not items[0] & items[1] | items[0] & items[2] | items[1] & items[2]
    assert len(items[0] | items[1] | items[2]) == 100  # the two spellings of a text are one item
    assert manifest.about["records"]["tickets"]["labels"] == sorted(TEAMS)


def test_splits_come_from_a_column_or_from_files(tmp_path):
    data = write(tmp_path / "t.jsonl", rows(30))
    table(**_request(tmp_path / "a", data=str(data), split_by="part"))
    manifest = Manifest.load(tmp_path / "a" / MANIFEST)
    assert {split: manifest.count("tickets", split) for split in manifest.tasks["tickets"]} == {
        "train": 10, "validation": 10, "extra": 10
    }  # fmt: skip
    for number in (0, 1):
        write(tmp_path / f"part-{number}.csv", rows(6))
    table(**_request(tmp_path / "b", train=str(tmp_path / "part-*.csv"), test=str(data), limit=8))
    assert [sample.key for sample in _samples(tmp_path / "b", "train")] == [f"train-{row:08d}" for row in range(8)]
    assert list(Manifest.load(tmp_path / "b" / MANIFEST).tasks["tickets"]) == ["train", "test"]


def test_an_item_column_keeps_what_it_names_together(tmp_path):
    own = [{**row, "text": f"text {number}", "customer": f"c {number % 9}"} for number, row in enumerate(rows(90))]
    table(
        **_request(
            tmp_path / "out", data=str(write(tmp_path / "t.jsonl", own)), item="customer", validation="0.4", test="0"
        )
    )
    items = [{sample.item for sample in _samples(tmp_path / "out", split)} for split in ("train", "validation")]
    assert not items[0] & items[1] and items[0] | items[1] <= {f"c {number}" for number in range(9)}


def test_a_text_that_looks_like_a_date_or_a_number_stays_as_it_is(tmp_path):
    own = [{"text": "2020-01-01", "team": "2020-01-01 10:00:00"}, {"text": "007", "team": "NA"}] * 10
    for suffix in (".jsonl", ".csv"):
        data = write(tmp_path / f"t{suffix}", own)
        table(**_request(tmp_path / suffix, train=str(data)))
        found = [(sample.source, sample.target) for sample in _samples(tmp_path / suffix, "train")[:2]]
        assert found == [("2020-01-01", "2020-01-01 10:00:00"), ("007", "NA")]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("t.jsonl", '{"text": "a", "team": "it"}\n\n{"text": "a", "team": ""}\n', "line 3, column 'team': is empty"),
        ("t.jsonl", '{"text": " ", "team": "it"}\n', "line 1, column 'text': is empty"),
        ("t.jsonl", '{"text": "a", "team": 3}\n', r"line 1, column 'team': expected a text, got 3 \(int\)"),
        ("t.jsonl", '{"text": "a", "team": null}\n', "line 1, column 'team': expected a text, got nothing"),
        ("t.jsonl", '{"txt": "a", "team": "it"}\n', r"line 1: has no column 'text'; did you mean 'txt'"),
        ("t.jsonl", '{"text": "a", "team": "it"}\n{"text"\n', "line 2: is not JSON"),
        ("t.jsonl", '["a", "b"]\n', "line 1: expected an object"),
        ("t.jsonl", b'{"text": "\xff", "team": "it"}\n', "line 1: is not JSON"),
        ("t.csv", 'text,team\n"a\nb",it\nc,it,x\n', "line 4: has 3 fields, the first line names 2 columns"),
        ("t.csv", "text,team\na,\n", "line 2, column 'team': is empty"),
        ("t.csv", 'text,team\na,"it\n', "after line 2: cannot be read"),
        ("t.csv", b"text,team\na,\xff\n", "cannot be read"),
        ("t.csv", "text,text\na,b\n", "its first line must name the columns, each once"),
        ("t.csv", "", "its first line must name the columns"),
        ("t.parquet", b"PAR1 nothing", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_by_file_line_and_column(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        table(**_request(tmp_path / "out", train=str(tmp_path / file)))
    assert str(error.value).startswith(str(tmp_path / file))


def test_wrong_values_of_parquet_are_named_by_their_row(tmp_path):
    data = write(tmp_path / "t.parquet", [{"text": "a", "team": "it"}, {"text": "b", "team": None}])
    with pytest.raises(ValueError, match=r"t\.parquet, row 2, column 'team': expected a text, got nothing"):
        table(**_request(tmp_path / "out", train=str(data)))
    data = write(tmp_path / "n.parquet", [{"text": "a", "team": 1}])
    with pytest.raises(ValueError, match=r"n\.parquet, row 1, column 'team': expected a text, got 1 \(int\)"):
        table(**_request(tmp_path / "out", train=str(data)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "it,sales"}, r"line 10, column 'team': .*'red tape' is not one of it, sales"),
        ({"task": "cb"}, "task 'cb' is one of this package"),
        ({"metrics": "accuracy"}, "task 'tickets': metric 'accuracy' compares classes and needs the task's labels"),
        ({"metrics": "acuracy"}, "unknown metric 'acuracy'; there are exact_match"),
        ({"metrics": "f1", "labels": "auto"}, "metric 'f1' is of two labels, the second positive; got 3"),
        ({"train": "x.csv"}, "give either --data FILE, which is split, or --train FILE"),
        ({"data": ""}, "give either --data FILE, which is split, or --train FILE"),
        ({"data": "none-*.csv"}, r"--data none-\*\.csv: no such file"),
        ({"validation": "dev.csv"}, r"--validation dev\.csv: beside --data, expected a share"),
        ({"validation": "0.5", "test": "0.5"}, "leave nothing to train on"),
        ({"validation": "0.0001"}, r"no row for 'validation'; rows: .*; --validation 0.0001 is too small a share"),
        ({"split_by": "part", "test": "0.1"}, "--split_by names each row's split"),
        ({"split_by": "team"}, r"no row for 'train'; rows: it 68, sales 66, red tape 66"),
        ({"source": ""}, "--source= needs --image"),
        ({"task": "my task"}, "task 'my task': must be letters"),
        ({"references": "part"}, r"line 2, column 'part': expected a list of texts"),
        ({"group": "prt"}, "line 2: has no column 'prt'; did you mean 'part'"),
        ({"limit": -1}, "--limit must be a whole number"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_and_leave_nothing(tmp_path, change, message):
    data = write(tmp_path / "t.csv", rows())
    with pytest.raises(ValueError, match=message):
        table(**_request(tmp_path / "out", **{"data": str(data), **change}))
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "t.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"t\.xlsx: expected a file whose name ends with \.jsonl, \.csv, \.tsv"):
        table(**_request(tmp_path / "out", data=str(tmp_path / "t.xlsx")))


def test_a_pattern_goes_into_folders_and_a_name_may_look_like_one(tmp_path):
    for number, place in enumerate(("t.csv", "a/t.csv", "a/b/t.csv")):
        write(tmp_path / place, [{"text": f"text {number}", "team": "it"}])
    table(**_request(tmp_path / "out", train=f"{tmp_path}/**/*.csv"))
    assert sorted(sample.source for sample in _samples(tmp_path / "out", "train")) == ["text 0", "text 1", "text 2"]
    write(tmp_path / "t[1].parquet", rows(6))
    table(**_request(tmp_path / "out", train=str(tmp_path / "t[1].parquet")))
    assert len(_samples(tmp_path / "out", "train")) == 6


@pytest.mark.parametrize(
    ("targets", "change", "same", "note"),
    [
        (["-5", "5"], {}, True, "'-5' and '5' are the same words, and so the same answer; --compare exact"),
        (["-5", "5"], {"compare": "exact"}, False, ""),
        (["Yes", "yes"], {}, True, ""),
        (["+", "yes"], {}, False, ""),
        (["c++", "C#"], {"labels": "auto", "metrics": "exact_match"}, False, ""),
    ],
)
def test_how_answers_are_compared_is_said_where_it_is_not_plain(tmp_path, capsys, targets, change, same, note):
    own = [{"text": f"text {row}", "team": targets[row % 2]} for row in range(8)]
    table(**_request(tmp_path / "out", train=str(write(tmp_path / "t.jsonl", own)), **change))
    said = capsys.readouterr().out
    assert note in said if note else "the same words" not in said
    tasks.adopt(Manifest.load(tmp_path / "out" / MANIFEST).about["records"])
    parse = tasks.get("tickets").parse
    assert (parse(targets[0]) == parse(targets[1])) is same


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        ({"team": "3,5"}, {"metrics": "pearson"}, r"line 2, column 'team': metric 'pearson' compares numbers.*'3,5'"),
        (
            {"refs": ["a"]},
            {"metrics": "vqa_accuracy", "references": "refs"},
            r"line 2, .* more than 3, got 1 references",
        ),
        ({"text": "cut \ud83d"}, {}, r"line 2, column 'text': holds half a character"),
    ],
)
def test_what_a_metric_or_a_tokenizer_could_not_take_is_named_before_anything_is_built(tmp_path, row, change, message):
    own = [{"text": "a", "team": "-1", "refs": ["a"] * 10}, {"text": "b", "team": "2", "refs": ["b"] * 10}]
    own[1] |= row
    with pytest.raises(ValueError, match=message):
        table(**_request(tmp_path / "out", train=str(write(tmp_path / "t.jsonl", own)), **change))
    assert not (tmp_path / "out").exists()


# ---- images


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two folders with an a.png each, of different colours; blue/b.png is red/a.png's picture."""
    for name, color in (("red/a.png", "red"), ("blue/a.png", "blue"), ("blue/b.png", "red")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), color).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def _shots(names: list[str], **more: Any) -> list[dict[str, Any]]:
    return [{"text": "what colour?", "team": "it", "photo": name, **more} for name in names]


def test_images_have_safe_and_unique_names_and_are_listed_with_their_files(tmp_path, photos):
    names = ["red/a.png", "blue/a.png", "blue/b.png", "red/../red/a.png"]
    data = write(photos / "t.jsonl", _shots(names, answers=["it", "IT"], kind="easy"))
    more = {"image": "photo", "references": "answers", "group": "kind"}
    table(**_request(tmp_path / "out", train=str(data), **more))
    samples = _samples(tmp_path / "out", "train")
    images = [sample.image for sample in samples]
    assert len(set(images)) == 3 and images[0] == images[3] and images[0].startswith("a-png-")
    assert samples[0].item == samples[2].item != samples[1].item  # the same picture under another name
    assert (samples[0].references, samples[0].group) == (("it", "IT"), "easy")
    listed = [json.loads(line) for line in (tmp_path / "out/images/tickets.jsonl").read_text().splitlines()]
    files = [str((photos / name).resolve()) for name in names[:3]]
    assert listed == [{"image": image, "files": [file]} for image, file in zip(images[:3], files, strict=True)]
    assert tasks.needs_image("tickets")


def test_two_tasks_may_have_the_same_picture_under_names_that_look_alike(tmp_path, photos):
    """A name's letters that are not plain are left out of an image's id."""
    from parts.image_lists import wanted_images

    (photos / "к.png").write_bytes((photos / "red/a.png").read_bytes())
    (photos / "п.png").symlink_to(photos / "red/a.png")
    for task, name in (("one", "к.png"), ("two", "п.png")):
        data = write(photos / f"{task}.jsonl", _shots([name]))
        table(**_request(tmp_path / "out", train=str(data), image="photo", task=task))
    (files,) = wanted_images(tmp_path / "out", ["one", "two"], 8, 0).values()
    assert files == (str(photos / "к.png"),)
    (photos / "к.png").unlink()
    with pytest.raises(ValueError, match=r"two\.jsonl, line 1: image .* in another task"):
        wanted_images(tmp_path / "out", ["one", "two"], 8, 0)


def test_paths_of_images_start_at_the_root_that_is_given_and_a_missing_one_is_named(tmp_path, photos):
    data = write(tmp_path / "t.csv", _shots(["red/a.png"]))
    table(**_request(tmp_path / "out", train=str(data), image="photo", image_root=str(photos), source=""))
    (sample,) = _samples(tmp_path / "out", "train")
    assert sample.source == "" and sample.target == "it"
    with pytest.raises(ValueError, match=r"t\.csv, line 2, column 'photo': .*red/a\.png cannot be read: No such file"):
        table(**_request(tmp_path / "out", train=str(data), image="photo"))


# ---- from the table to a score


def test_the_commands_it_says_next_would_train_on_what_was_built(tmp_path, capsys):
    data = write(tmp_path / "t.csv", rows())
    table(**_request(tmp_path / "out", data=str(data), labels="auto"))
    commands = _commands(capsys.readouterr().out)
    assert [words[words.index("--recipe") + 1] for words in commands] == ["glue_t5_base", "demo"]
    for words in commands:
        config = _config(words)
        assert (ROOT / words[words.index("--ds_config") + 1]).is_file()
        manifest = Manifest.of(config.data)
        assert loop.resolve(config, manifest).data.tasks == ("tickets",)
        assert config.vision.encoder is None, "the task has no images"
        assert config.train.steps <= 2000, "a recipe's own number is for millions of samples"


def test_for_images_it_says_where_the_settings_of_vision_come_from(tmp_path, photos, capsys):
    data = write(tmp_path / "t.csv", _shots(["red/a.png"]))
    table(**_request(tmp_path / "out", train=str(data), validation=str(data), image="photo", image_root=str(photos)))
    said = capsys.readouterr().out
    assert "next: image features of images/tickets.jsonl: python data_prep/features.py" in said
    for words in _commands(said):
        assert words[-1] == "VISION" and _config(words[:-1]).data.tasks == ("tickets",)
    assert "VISION are the settings vision.... that data_prep/features.py prints" in said


def _commands(said: str) -> list[list[str]]:
    found = [line.split() for line in said.splitlines() if line.startswith("  deepspeed ")]
    assert len(found) == 2
    return found


def _config(words: list[str]) -> Config:
    values = [word for word in words if "=" in word]
    return recipes.get(words[words.index("--recipe") + 1]).override(values)


def test_a_table_trains_and_is_scored_beside_a_task_of_the_package(tmp_path, config):
    out = tmp_path / "out"
    build(out, {"glue_cola": {"train": entries(20), "validation": entries(6, "validation")}}, {})
    data = write(tmp_path / "t.jsonl", [{**row, "text": "the film is very good"} for row in rows(40)])
    table(**_request(out, data=str(data), labels="auto", metrics="accuracy,mcc", split_by="part"))
    tasks.TASKS.pop("tickets")  # as another process begins
    manifest = Manifest.load(out / MANIFEST)
    tasks.adopt_all(manifest.tasks, manifest.about)
    assert list(manifest.tasks) == ["glue_cola", "tickets"] and tasks.get("tickets").labels == tuple(sorted(TEAMS))
    assert not tasks.needs_image("tickets")

    own = config.override([f"data.manifest={out / MANIFEST}", "vision.encoder=null"])
    run = load(untrained_run(tmp_path / "run", own))
    check_samples(
        manifest, tuple(manifest.tasks), collator_for(own, tuple(manifest.tasks), run.collator.tokenizer), 0, 1
    )
    stream = TrainStream(manifest, own, tuple(manifest.tasks), run.collator.tokenizer, 0, 1)
    drawn = [sample.task for batch in next(iter(stream)) for sample in batch.samples]
    assert len(drawn) == own.train.global_batch and set(drawn) == {"glue_cola", "tickets"}
    samples = _samples(out, "validation")
    from hyperpelt_ds.data.reader import Reader

    texts = answers(samples, asker(run, Reader(manifest)), 8)
    assert len(texts) == len(samples)
    assert metrics.score(tasks.get("tickets"), [sample.target.upper() for sample in samples], samples) == {
        "accuracy": 1.0, "mcc": 1.0
    }  # fmt: skip
    assert set(metrics.score(tasks.get("tickets"), texts, samples)) == {"accuracy", "mcc"}


def test_a_record_survives_being_stored_and_labels_that_are_no_words_are_compared_as_they_are():
    tasks.adopt({"mine": {"metrics": ["accuracy"], "labels": ["+", "-"], "description": "Say it.", "has_images": True}})
    stored = tasks.own_records(["mine", "cb"])
    assert list(stored) == ["mine"]
    record = tasks.get("mine")
    tasks.adopt(stored)
    assert tasks.get("mine") == record and record.parse(" - ") == "-" and record.modality == "vision"
    with pytest.raises(ValueError, match="task 'mine': the data set's record of it cannot be read"):
        tasks.adopt({"mine": {"metric": "x"}})
    with pytest.raises(ValueError, match="task 'cb' is one of this package"):
        tasks.adopt({"cb": {}})


def test_a_task_of_foreign_shards_without_a_record_is_scored_by_exact_match():
    tasks.adopt_all(["cb", "elsewhere"], {})
    assert tasks.get("elsewhere").metrics == ("exact_match",) and tasks.get("cb").labels == ("0", "1", "2")


def test_the_same_table_gives_the_same_bytes_after_other_tasks_too(tmp_path):
    data = write(tmp_path / "t.csv", rows())
    for out in (tmp_path / "a", tmp_path / "b"):
        table(**_request(out, data=str(data)))
    table(**_request(tmp_path / "b", data=str(data), task="another"))
    table(**_request(tmp_path / "a", data=str(data), task="another"))
    table(**_request(tmp_path / "a", data=str(data)))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
