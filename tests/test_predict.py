"""Answers as files: lines and manifests in, our own lines or a leaderboard's files out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_launch
from conftest import ROOT, free_port, save_manifest, tiny_samples
from damage import damage
from PIL import Image
from untrained import save_samples, untrained_run

from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.model import load
from hyperpelt_ds.train import predict
from hyperpelt_ds.train.submissions import FORMATS

call = test_launch.call  # the fixture that runs an entry point in this process
COLORS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def run_dir(config: Config, tmp_path_factory) -> Path:
    """The tiny run's four tasks, weights random."""
    return untrained_run(tmp_path_factory.mktemp("untrained") / "run", config)


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """Eleven lines of three tasks in mixed order, some with pictures, a key or an empty line."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "pictures").mkdir()
    for color in COLORS:
        Image.new("RGB", (8, 8), color).save(folder / "pictures" / f"{color}.png")
    texts = ["a good film", "the film is very bad", "a", "dull dull dull story", "funny"]
    asked = [{"task": "movie_sentiment", "source": text} for text in texts]
    asked += [{"task": "easy_vqa", "text": "what color", "image": f"pictures/{color}.png"} for color in COLORS]
    asked += [{"task": "movie_rating", "source": text, "key": f"film-{i}"} for i, text in enumerate(texts[:3])]
    mixed = [asked[i * 7 % 11] for i in range(11)]
    path = folder / "questions.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in mixed) + "\n")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_answered_as_it_would_be_alone_in_the_order_of_the_input(call, run_dir, lines, tmp_path):
    out = tmp_path / "new" / "answers"
    code, _, err = call(test_launch.script("predict").predict, "--run_dir", run_dir, "--input", lines, "--out", out)
    assert code == 0, err
    asked = [json.loads(line) for line in lines.read_text().splitlines() if line]
    found = read(out / "predictions.jsonl")
    assert [answer["task"] for answer in found] == [line["task"] for line in asked]
    run = load(run_dir)
    for line, answer in zip(asked, found, strict=True):
        text = line.get("source", line.get("text"))
        images = [lines.parent / line["image"]] if "image" in line else None
        assert answer["prediction"] == run.generate(line["task"], [text], images)[0]
        assert "key" not in line or answer["key"] == line["key"]
    places = [answer["key"] for answer in found if answer["task"] == "movie_sentiment"]
    assert places == ["0", "1", "2", "3", "4"], "a line without a key is named by its place in its task"
    assert len({answer["prediction"] for answer in found}) > 2


def test_a_split_of_a_manifest_is_answered_from_its_stored_features(call, run_dir, tmp_path):
    config = load(run_dir).config
    flags = ("--input", config.data.manifest, "--out", tmp_path, "--split", "validation")
    code, _, err = call(test_launch.script("predict").predict, "--run_dir", run_dir, *flags)
    assert code == 0, err
    found = read(tmp_path / "predictions.jsonl")
    manifest = Manifest.load(config.data.manifest)
    assert len(found) == 48 and [a["task"] for a in found[::12]] == list(manifest.tasks)
    assert [answer["key"] for answer in found[:12]] == [s.key for s in tiny_samples("validation", 12)["easy_vqa"]]

    code, _, err = call(test_launch.script("predict").predict, "--run_dir", run_dir, *flags, "--task", "easy_vqa")
    assert code == 0, err
    assert read(tmp_path / "predictions.jsonl") == [answer for answer in found if answer["task"] == "easy_vqa"]


@pytest.mark.slow
def test_two_ranks_write_what_one_does(run_python, run_dir, lines, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    predict.predict(run_dir, lines, one, "jsonl")
    done = run_python(
        *("deepspeed", "--master_port", free_port(), "--num_accelerators", 2, "launch/predict.py"),
        *("--run_dir", run_dir, "--input", lines, "--out", two),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (one / "predictions.jsonl").read_bytes() == (two / "predictions.jsonl").read_bytes()


def test_a_trained_run_predicts(call, finished_run, lines, tmp_path):
    flags = ("--run_dir", finished_run(2), "--input", lines, "--out", tmp_path)
    code, _, err = call(test_launch.script("predict").predict, *flags)
    assert code == 0, err
    assert len(read(tmp_path / "predictions.jsonl")) == 11


GOOD = '{"task": "movie_rating", "source": "a"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n{{", "line 2: not JSON"),
        (f"{GOOD}\n\n\xff", "line 3: not JSON"),
        ('["a"]', "line 1: expected an object, for example"),
        ('{"task": "movie_rating"}', "line 1: expected one of the fields 'source' and 'text', got neither"),
        ('{"task": "movie_rating", "source": "a", "text": "a"}', "got source and text"),
        ('{"source": "a"}', "line 1: no field 'task', and no --task"),
        (
            '{"task": "movie_ratin", "source": "a"}',
            "line 1: task 'movie_ratin' is not one of the run; did you mean movie",
        ),
        ('{"task": "movie_rating", "source": 3}', "line 1: field 'source' must be a text, got 3"),
        ('{"task": "movie_rating", "source": "a", "key": true}', "line 1: field 'key' must be"),
        ('{"task": "easy_vqa", "source": "a"}', "line 1: task 'easy_vqa' needs a field 'image'"),
        ('{"task": "easy_vqa", "source": "a", "image": "no.png"}', "no.png does not exist"),
        (
            "\n".join(3 * ['{"task": "movie_rating", "source": "a", "key": 7}']),
            "line 2: key '7' of task 'movie_rating' is line 1's",
        ),
        ("\n \n", "in.jsonl: holds no lines"),
        ('{"task": "movie_rating", "source": "cut \\ud83d"}', "line 1: field 'source' holds half a character"),
        ('{"task": "easy_vqa", "source": "a", "image": null}', "line 1: task 'easy_vqa' needs a field 'image'"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(call, run_dir, tmp_path, text, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(text.encode("latin-1"))
    code, _, err = call(
        test_launch.script("predict").predict, "--run_dir", run_dir, "--input", path, "--out", tmp_path / "out"
    )
    assert code == 2 and message in err and "in.jsonl" in err and err.count("error") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_named_before_hours_of_answering(call, run_dir, tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text(GOOD)
    monkeypatch.setattr(predict, "answers", lambda *_: pytest.fail("was asked"))
    out = path / "x"
    code, _, err = call(test_launch.script("predict").predict, "--run_dir", run_dir, "--input", path, "--out", out)
    assert code == 2 and f"--out {out}: no folder that can be written to: Not a directory" in err


def test_lines_without_a_task_take_the_flag(run_dir, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"source": "a good film", "target": "left alone"}\n{"task": "movie_sentiment", "source": ""}\n')
    predict.predict(run_dir, path, tmp_path, "jsonl", task="movie_rating")
    assert [answer["task"] for answer in read(tmp_path / "predictions.jsonl")] == ["movie_rating", "movie_sentiment"]


def test_an_image_for_a_run_without_images_is_refused(config, lines, tmp_path):
    run = untrained_run(
        tmp_path / "run", config.override(["vision.encoder=null", "data.tasks=movie_sentiment,movie_rating"])
    )
    path = lines.parent / "image.jsonl"
    path.write_text('{"task": "movie_rating", "source": "a", "image": "pictures/red.png"}')
    with pytest.raises(ValueError, match=r"image\.jsonl, line 1: has an image, but the run was trained without"):
        predict.predict(run, path, tmp_path / "out", "jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "no.jsonl"), "--input no.jsonl: expected an existing file"),
        (("--input", ROOT / "README.md"), "README.md: expected an existing file, NAME.jsonl or a manifest.json"),
        (("--format", "csv"), "--format csv: unknown; there are jsonl, glue, vqa"),
        (("--format", "glue"), "--format glue: 'movie_sentiment' is none of GLUE's tasks: glue_cola,"),
        (("--format", "vqa"), "--format vqa: 'movie_sentiment' is none of vqa_v2, okvqa"),
        (("--task", "movie_ratin"), "task 'movie_ratin' is not one of"),
        (("--split", "dev"), "has no split 'dev'"),
        (("--out", ROOT / "README.md"), "README.md: is a file, expected a folder"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_answered(call, run_dir, tmp_path, flags, message):
    config = load(run_dir).config
    given = {"--input": config.data.manifest, "--out": tmp_path / "out", "--run_dir": run_dir}
    given.update(dict(zip(flags[::2], flags[1::2], strict=True)))
    code, _, err = call(test_launch.script("predict").predict, *(word for pair in given.items() for word in pair))
    assert code == 2 and message in err and err.count("error") == 1
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_other_features_or_other_tasks_is_refused(run_dir, tmp_path):
    path = save_manifest(tmp_path / "data", 4, 4)
    tree = json.loads(path.read_text())
    tree["features"]["encoder"] = {"encoder": "another"}
    path.write_text(json.dumps(tree))
    with pytest.raises(
        ValueError, match=r"holds features of {'encoder': 'another'}, .* was trained on {'encoder': 'eff"
    ):
        predict.predict(run_dir, path, tmp_path / "out", "jsonl")
    path = save_samples(tmp_path / "other", {"glue_rte": {"test": [Sample("k", "glue_rte", "a", "0")]}})
    with pytest.raises(ValueError, match="holds glue_rte, but not movie_sentiment or movie_rating or easy_vqa"):
        predict.predict(run_dir, path, tmp_path / "out", "jsonl")


def submitted(form: str, task: str, keys: list[str], texts: list[str], split: str = "test") -> dict[str, str]:
    samples = [Sample(key, task, "", "") for key in keys]
    FORMATS[form].check(samples)
    return FORMATS[form].files(samples, texts, split)


def test_glue_files_have_the_servers_names_header_and_words():
    expected = {
        "glue_cola": ("CoLA.tsv", ["0", "1"]),
        "glue_sst2": ("SST-2.tsv", ["0", "1"]),
        "glue_mrpc": ("MRPC.tsv", ["0", "1"]),
        "glue_qqp": ("QQP.tsv", ["0", "1"]),
        "glue_qnli": ("QNLI.tsv", ["entailment", "not_entailment"]),
        "glue_rte": ("RTE.tsv", ["entailment", "not_entailment"]),
    }
    for task, (name, words) in expected.items():
        content = f"index\tprediction\n0\t{words[1]}\n1\t{words[0]}\n"
        assert submitted("glue", task, ["0", "1"], ["1", "0"]) == {name: content}
    nli = submitted("glue", "glue_mnli", ["0", "1", "2"], ["2", "0", "1"], "test_matched")
    assert nli == {"MNLI-m.tsv": "index\tprediction\n0\tcontradiction\n1\tentailment\n2\tneutral\n"}
    assert list(submitted("glue", "glue_mnli", ["0"], ["2"], "test_mismatched")) == ["MNLI-mm.tsv"]
    numbers = submitted("glue", "glue_stsb", ["0", "1", "2"], ["3.2", "7", "much"])
    assert numbers == {"STS-B.tsv": "index\tprediction\n0\t3.200\n1\t5.000\n2\t0.000\n"}


def test_glue_lines_are_sorted_by_index_and_never_empty(caplog):
    found = submitted("glue", "glue_rte", ["test-10", "test-9", "test-0"], ["0", "1", "perhaps"])
    assert found["RTE.tsv"].splitlines()[1:] == ["0\tentailment", "9\tnot_entailment", "10\tentailment"]
    assert "1 of 3 answers are no label" in caplog.text


def test_vqa_files_are_lists_of_question_ids_and_answers():
    found = submitted("vqa", "vqa_v2", ["vqa-262148001", "262148000"], ["2 dogs", "caf\xe9"])
    assert list(found) == ["vqa_v2.json"]
    assert json.loads(found["vqa_v2.json"]) == [
        {"question_id": 262148001, "answer": "2 dogs"}, {"question_id": 262148000, "answer": "caf\xe9"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "task", "keys", "message"),
    [
        ("glue", "cb", ["0"], "'cb' is none of GLUE's tasks"),
        ("vqa", "gqa", ["0"], "'gqa' is none of vqa_v2, okvqa"),
        ("glue", "glue_rte", ["0", "one"], "key 'one' of task 'glue_rte' must end with the number"),
        ("vqa", "vqa_v2", ["a-1", "b-1"], "keys 'a-1' and 'b-1' of task 'vqa_v2' end with the same number"),
    ],
)
def test_samples_without_a_place_in_the_format_are_refused(form, task, keys, message):
    with pytest.raises(ValueError, match=message):
        submitted(form, task, keys, ["0"] * len(keys))


def test_a_glue_split_without_labels_is_answered_into_its_file(config, tmp_path):
    train = [Sample(f"train-{i}", "glue_rte", "sentence1: a good film", str(i % 2)) for i in range(4)]
    unlabelled = [Sample(f"test-{i}", "glue_rte", "sentence1: a bad film", "") for i in (2, 0, 1)]
    manifest = save_samples(
        tmp_path / "data", {"glue_rte": {"train": train, "validation": train, "official": unlabelled}}
    )
    settings = config.override([f"data.manifest={manifest}", "data.tasks=glue_rte", "vision.encoder=null"])
    run = untrained_run(tmp_path / "run", settings)
    predict.predict(run, manifest, tmp_path / "out", "glue", split="official")
    lines = (tmp_path / "out" / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}


def test_what_cannot_be_read_is_answered_with_nothing_and_named(run_dir, tmp_path, caplog, capsys):
    path = save_manifest(tmp_path / "data", 4, 4)
    manifest = Manifest.load(path)
    texts = manifest.shards("easy_vqa", "test")[0]
    for shard in manifest.features.shards:
        for position in range(shard.samples):
            damage(path.parent, shard.path, "flipped data byte", position)
    damage(path.parent, texts.path, "flipped data byte", 0)
    predict.predict(run_dir, path, tmp_path / "out", "jsonl", task="easy_vqa")
    found = read(tmp_path / "out" / "predictions.jsonl")
    keys = [sample.key for sample in tiny_samples("test", 4)["easy_vqa"]]
    assert [(a["key"], a["prediction"]) for a in found] == [(key, "") for key in [*keys[1:], keys[0]]]
    assert "4 of 4 samples cannot be read" in capsys.readouterr().out
    assert ", ".join(f"easy_vqa/{answer['key']}" for answer in found) in caplog.text


def test_a_picture_that_cannot_be_read_leaves_the_other_lines_their_answers(run_dir, tmp_path, caplog, capsys):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:30])
    texts, names = ["a good film", "what color", "funny", "dull dull story"], ["red", "broken", "red", None]
    asked = [
        {"task": "easy_vqa" if name else "movie_rating", "source": text} | ({"image": f"{name}.png"} if name else {})
        for text, name in zip(texts, names, strict=True)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, asked)))
    predict.predict(run_dir, tmp_path / "in.jsonl", tmp_path, "jsonl")
    assert "1 of 4 samples cannot be read" in capsys.readouterr().out
    assert "no answer for easy_vqa/1: cannot read image" in caplog.text
    good = [line for line in asked if line.get("image") != "broken.png"]
    pictures = [tmp_path / line["image"] if "image" in line else None for line in good]
    first, third, last = load(run_dir).generate([x["task"] for x in good], [x["source"] for x in good], pictures)
    assert [a["prediction"] for a in read(tmp_path / "predictions.jsonl")] == [first, "", third, last]
    assert last
