"""The builders of vision-and-language data, on small files in the official formats that are written here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.recipes import vl_t5_base
from hyperpelt_ds.tasks import TASKS
from hyperpelt_ds.tasks.vqa_accuracy import vqa_accuracy
from hyperpelt_ds.train.submissions import FORMATS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data_prep"))  # as when a script of that folder is run

import coco  # noqa: E402
import gqa  # noqa: E402
import nlvr2  # noqa: E402
import okvqa  # noqa: E402
import snli_ve  # noqa: E402
import vqa  # noqa: E402
from parts import vqa_files  # noqa: E402

INFO = {
    "description": "",
    "url": "http://visualqa.org",
    "version": "2.0",
    "year": 2017,
    "contributor": "",
    "date_created": "",
}
LICENSE = {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "Creative Commons Attribution 4.0"}
# COCO number -> Karpathy's split; up to 20 in train2014, the rest in val2014
PHOTOS = {
    9: "train",
    12: "train",
    13: "train",
    20: "train",
    42: "restval",
    73: "restval",
    133: "val",
    164: "val",
    285: "test",
    397: "test",
}
ANSWERS = ["net"] * 4 + ["netting"] * 2 + ["mesh", "a net", "Nets!", "net "]


def _folder(number: int) -> str:
    return "train2014" if number <= 20 else "val2014"


def _karpathy(folder: Path) -> dict[str, Any]:
    """dataset_coco.json."""
    images = []
    for place, (number, split) in enumerate(PHOTOS.items()):
        raws = [f"A dog  on mat {number}{mark}." for mark in "abcde"]
        sentences = [
            {
                "tokens": raw.lower().rstrip(".").split(),
                "raw": raw + " ",
                "imgid": place,
                "sentid": 1000 + 5 * place + i,
            }
            for i, raw in enumerate(raws)
        ]
        images.append(
            {
                "filepath": _folder(number),
                "sentids": [sentence["sentid"] for sentence in sentences],
                "filename": f"COCO_{_folder(number)}_{number:012d}.jpg",
                "imgid": place,
                "split": split,
                "sentences": sentences,
                "cocoid": number,
            }
        )
    return _save(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def _save(path: Path, content: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return content


def _vqa(
    folder: Path, form: tuple[str, str], numbers: list[int], part: str, question_type: str, answers=ANSWERS
) -> None:
    """Two questions on each of the photos of one part, and their annotations."""
    subtype = {"data_subtype": part, "license": LICENSE, "info": INFO}
    ids = [(number, number * 1000 + place) for number in numbers for place in range(2)]
    questions = [{"image_id": image, "question": f"What is  in {own}?", "question_id": own} for image, own in ids]
    annotations = [
        {
            "question_type": question_type,
            "multiple_choice_answer": "net",
            "answers": [
                {"answer": answer, "raw_answer": answer, "answer_confidence": "maybe", "answer_id": i + 1}
                for i, answer in enumerate(answers)
            ],
            "image_id": image,
            "answer_type": "other" if own % 2 else "yes/no",
            "question_id": own,
        }
        for image, own in reversed(ids)  # no program may rely on the order
    ]
    head = {"task_type": "Open-Ended", "data_type": "mscoco", **subtype}
    _save(folder / form[0].format(part), {**head, "questions": questions})
    if not part.startswith("test"):
        _save(folder / form[1].format(part), {"data_type": "mscoco", **subtype, "annotations": annotations})


VQA = (vqa.QUESTIONS, vqa.ANNOTATIONS)
OKVQA = (okvqa.QUESTIONS, okvqa.ANNOTATIONS)


@pytest.fixture
def vqa_source(tmp_path: Path) -> Path:
    folder = tmp_path / "vqa_source"
    _karpathy(folder)
    for part in ("train2014", "val2014"):
        _vqa(folder, VQA, [number for number in PHOTOS if _folder(number) == part], part, "what is")
    _vqa(folder, VQA, [1, 16], "test2015", "")
    return folder


def _gqa_file(path: Path, images: list[str], questions: int, first: int) -> list[str]:
    """One of GQA's question files: an object of questions by id."""
    made = {}
    for place in range(len(images) * questions):
        image, number = images[place // questions], f"{first + place:08d}"
        made[number] = {
            "semantic": [
                {"operation": "select", "dependencies": [], "argument": "sky (2486325)"},
                {"operation": "verify color", "dependencies": [0], "argument": "dark"},
            ],
            "entailed": [],
            "equivalent": [number],
            "question": f"Is the sky {place} dark?",
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "06-sky_dark"},
            "answer": "yes" if place % 2 else "light blue",
            "semanticStr": "select: sky (2486325)->verify color: dark [0]",
            "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
            "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify" if place % 2 else "query"},
            "fullAnswer": "Yes, the sky is dark.",
        }
    _save(path, made)
    return list(made)


VAL_IMAGES = [str(2370000 + i) for i in range(60)]


@pytest.fixture
def gqa_source(tmp_path: Path) -> Path:
    folder = tmp_path / "gqa_source"
    _gqa_file(folder / "train_balanced_questions.json", ["2354786", "2375429"], 3, 100)
    _gqa_file(folder / "val_balanced_questions.json", VAL_IMAGES, 2, 1000)
    _gqa_file(folder / "testdev_balanced_questions.json", ["n161313", "n288870"], 2, 201307251)
    return folder


def _samples(out: Path, task: str) -> dict[str, list[Sample]]:
    """split -> samples of a task, as a run reads them."""
    manifest = Manifest.load(out / "manifest.json")
    reader = Reader(manifest)
    return {s: [reader.sample(task, s, i) for i in range(manifest.count(task, s))] for s in manifest.tasks[task]}


def _images(out: Path, task: str) -> dict[str, list[str]]:
    rows = [json.loads(line) for line in (out / "images" / f"{task}.jsonl").read_text().splitlines()]
    assert len({row["image"] for row in rows}) == len(rows), "an image is listed twice"
    return {row["image"]: row["files"] for row in rows}


def _content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def _change(path: Path, change) -> None:
    """Rewrites a JSON file after `change` was made to its content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---- VQA v2


def test_vqa_follows_karpathys_split_and_keeps_all_that_is_needed_to_score_and_submit(vqa_source, tmp_path):
    vqa.vqa(source=str(vqa_source), out=str(tmp_path / "out"), official_test=True, shard_size=5)
    found = _samples(tmp_path / "out", "vqa_v2")
    kept = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
    expected = Counter(kept[split] for split in PHOTOS.values())
    assert {split: len(own) for split, own in found.items()} == {
        **{split: 2 * count for split, count in expected.items()},
        "official_test": 4,
    }
    for split in expected:
        for sample in found[split]:
            number = int(sample.key)
            assert sample.image == sample.item == f"coco-{number // 1000:012d}"
            assert kept[PHOTOS[number // 1000]] == split
            assert sample.source == f"What is in {number}?" and sample.references == tuple(ANSWERS)
            assert sample.group == ("other" if number % 2 else "yes/no")
            assert split == "train" or sample.target == "net"
    for sample in found["official_test"]:
        assert sample.target == "" and sample.references == () and sample.group is None
    files = _images(tmp_path / "out", "vqa_v2")
    assert files["coco-000000000009"] == ["train2014/COCO_train2014_000000000009.jpg"]
    assert files["coco-000000000285"] == ["val2014/COCO_val2014_000000000285.jpg"]
    assert files["coco-000000000016"] == ["test2015/COCO_test2015_000000000016.jpg"]
    assert len(files) == len(PHOTOS) + 2
    form = FORMATS["vqa"]
    form.check(found["official_test"])
    answers = json.loads(form.files(found["official_test"], ["a", "b", "c", "d"], "official_test")["vqa_v2.json"])
    assert [answer["question_id"] for answer in answers] == [1000, 1001, 16000, 16001]


def test_training_answers_are_drawn_as_often_as_their_soft_scores_say_and_by_the_seed_alone():
    def drawn(number: int, seed: int) -> str:
        annotation = vqa_files.Annotation(9, tuple(ANSWERS), "other", "what is")
        return vqa_files.entry(vqa_files.Question(number, 9, "train2014", "What?", annotation), seed).example["answer"]

    found = Counter(drawn(number, 0) for number in range(4000))
    # "a net" and "net " are "net" to VQA, "Nets!" is another word: 6 of 10, 2, 1 and 1
    scores = {"net": 1.0, "netting": 0.6, "mesh": 0.3, "Nets!": 0.3}
    assert {answer: vqa_accuracy(answer, ANSWERS) for answer in scores} == pytest.approx(scores)
    for answer, score in scores.items():
        assert found[answer] / 4000 == pytest.approx(score / sum(scores.values()), abs=0.03)
    assert set(found) == set(scores)
    assert [drawn(number, 0) for number in range(50)] != [drawn(number, 1) for number in range(50)]


def test_answers_without_a_word_are_never_a_target_and_a_question_that_has_no_others_is_left_out(tmp_path, capsys):
    folder = tmp_path / "source"
    _vqa(folder, VQA, [9, 12], "train2014", "what is", ["?"] * 9 + ["net"])
    _vqa(folder, VQA, [42], "val2014", "what is")
    path = folder / "v2_mscoco_train2014_annotations.json"
    _change(path, lambda c: c["annotations"][0].update(answers=[{"answer": "?", "answer_id": i} for i in range(10)]))
    vqa.vqa(source=str(folder), out=str(tmp_path / "out"), splits="official")
    found = _samples(tmp_path / "out", "vqa_v2")
    assert [sample.target for sample in found["train"]] == ["net"] * 3
    assert "left out of vqa_v2 train: 1, no label" in capsys.readouterr().out


def test_without_karpathys_file_vqa_says_where_it_is_and_takes_the_official_splits_when_told(
    vqa_source, tmp_path, capsys
):
    (vqa_source / "dataset_coco.json").unlink()
    with pytest.raises(ValueError, match=r"lacks dataset_coco\.json \(from Karpathy's .*; or give --splits official"):
        vqa.vqa(source=str(vqa_source), out=str(tmp_path / "out"))
    vqa.vqa(source=str(vqa_source), out=str(tmp_path / "out"), splits="official")
    found = _samples(tmp_path / "out", "vqa_v2")
    assert {split: len(own) for split, own in found.items()} == {"train": 8, "validation": 12}
    assert "do not put COCO captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            0,
            lambda c: c["questions"][3].pop("question"),
            r"questions\.json, question 12001: field 'question' is missing",
        ),
        (0, lambda c: c["questions"][3].pop("question_id"), r"json, questions\[3\]: field 'question_id' is missing"),
        (
            0,
            lambda c: c["questions"][1].update(image_id="9"),
            r"9001: field 'image_id' must be a whole number, got '9'",
        ),
        (0, lambda c: c["questions"][1].update(question_id=9000), r"_questions\.json: question 9000 comes twice"),
        (0, lambda c: c.pop("questions"), r"train2014_questions\.json: field 'questions' is missing"),
        (1, lambda c: c["annotations"][0].pop("answers"), r"ns\.json, question 20001: field 'answers' is missing"),
        (1, lambda c: c["annotations"][0]["answers"][2].pop("answer"), r"question 20001: field 'answers' must list"),
        (1, lambda c: c["annotations"][0].update(answers=[]), r"question 20001: field 'answers' must list ten"),
        (1, lambda c: c["annotations"][0].update(image_id=12), r"20001: is on image 20, and on image 12 in .*annot"),
        (
            1,
            lambda c: c["annotations"].clear(),
            r"8 questions have no annotation in .*: 9000, 9001, 12000, 12001, 13000, ",
        ),
    ],
)
def test_a_fault_in_a_vqa_file_is_told_with_file_and_question(vqa_source, tmp_path, file, change, message):
    _change(vqa_source / VQA[file].format("train2014"), change)
    with pytest.raises(ValueError, match=message):
        vqa.vqa(source=str(vqa_source), out=str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_that_was_cut_short_is_named(vqa_source, tmp_path):
    path = vqa_source / VQA[1].format("val2014")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"v2_mscoco_val2014_annotations\.json: cannot be read, damaged or not fully down"
    ):
        vqa.vqa(source=str(vqa_source), out=str(tmp_path / "out"))


def test_a_photo_that_karpathys_file_lacks_is_named(vqa_source, tmp_path):
    _change(vqa_source / "dataset_coco.json", lambda content: content["images"].pop(0))
    with pytest.raises(ValueError, match=r"dataset_coco\.json: lacks photo 9 of vqa_v2's question 9000"):
        vqa.vqa(source=str(vqa_source), out=str(tmp_path / "out"))


# ---- OK-VQA


def test_okvqa_tests_on_the_official_validation_and_validates_on_a_tenth_of_the_training_images(tmp_path):
    numbers = list(range(100, 200))
    _vqa(tmp_path / "source", OKVQA, numbers, "train2014", "four")
    _vqa(tmp_path / "source", OKVQA, [500, 501], "val2014", "other")
    okvqa.okvqa(source=str(tmp_path / "source"), out=str(tmp_path / "out"))
    found = _samples(tmp_path / "out", "okvqa")
    images = {split: {sample.image for sample in own} for split, own in found.items()}
    assert images["test"] == {"coco-000000000500", "coco-000000000501"}
    assert images["train"] | images["validation"] == {f"coco-{number:012d}" for number in numbers}
    assert not images["train"] & images["validation"] and 4 <= len(images["validation"]) <= 20
    assert {sample.group for sample in found["train"]} == {"sports"}
    assert {sample.group for sample in found["test"]} == {"other"}
    assert all(sample.references == tuple(ANSWERS) for own in found.values() for sample in own)
    assert {sample.target for sample in found["validation"]} == {"net"}
    assert _images(tmp_path / "out", "okvqa")["coco-000000000500"] == ["val2014/COCO_val2014_000000000500.jpg"]


# ---- COCO captions


def test_captions_are_one_sample_each_in_training_and_one_an_image_elsewhere(tmp_path):
    _karpathy(tmp_path / "source")
    coco.coco(source=str(tmp_path / "source"), out=str(tmp_path / "out"))
    found = _samples(tmp_path / "out", "coco_caption")
    assert {split: len(own) for split, own in found.items()} == {"train": 6 * 5, "validation": 2, "test": 2}
    first = found["train"][0]
    assert (first.key, first.source, first.target) == ("000000000009-1000", "", "A dog on mat 9a.")
    assert first.references == () and first.image == "coco-000000000009"
    assert found["test"][0].key == "000000000285" and found["test"][0].target == "A dog on mat 285a."
    assert found["test"][0].references == tuple(f"A dog on mat 285{mark}." for mark in "abcde")
    assert len(_images(tmp_path / "out", "coco_caption")) == len(PHOTOS)


def test_a_fault_in_karpathys_file_is_told_with_the_photo(tmp_path):
    _karpathy(tmp_path / "source")
    path = tmp_path / "source" / "dataset_coco.json"
    _change(path, lambda content: content["images"][1]["sentences"][2].pop("raw"))
    with pytest.raises(ValueError, match=r"images\[1\] \(cocoid 12\), sentences\[2\]: field 'raw' is missing"):
        coco.coco(source=str(tmp_path / "source"), out=str(tmp_path / "out"))
    _karpathy(tmp_path / "source")
    _change(path, lambda content: content["images"][1].update(split="trainval"))
    with pytest.raises(ValueError, match=r"\(cocoid 12\): split 'trainval' is not one of train, restval, val, test"):
        coco.coco(source=str(tmp_path / "source"), out=str(tmp_path / "out"))


# ---- GQA


def test_gqa_trains_on_train_and_most_of_val_and_no_image_is_in_two_splits(gqa_source, tmp_path):
    gqa.gqa(source=str(gqa_source), out=str(tmp_path / "out"))
    found = _samples(tmp_path / "out", "gqa")
    images = {split: {sample.image for sample in own} for split, own in found.items()}
    assert images["test"] == {"gqa-n161313", "gqa-n288870"}
    assert images["train"] | images["validation"] == {f"gqa-{n}" for n in ["2354786", "2375429", *VAL_IMAGES]}
    assert not images["train"] & images["validation"] and 2 <= len(images["validation"]) <= 14
    assert {"gqa-2354786", "gqa-2375429"} <= images["train"]
    assert sum(map(len, found.values())) == 6 + 120 + 4
    first = found["train"][0]
    assert (first.key, first.source, first.target, first.group) == (
        "00000100",
        "Is the sky 0 dark?",
        "light blue",
        "query",
    )
    assert _images(tmp_path / "out", "gqa")["gqa-2354786"] == ["images/2354786.jpg"]


def test_all_of_gqas_questions_come_from_the_files_of_its_folder(gqa_source, tmp_path):
    (gqa_source / "train_balanced_questions.json").unlink()
    for number in range(2):
        path = gqa_source / "train_all_questions" / f"train_all_questions_{number}.json"
        _gqa_file(path, [f"23{number}"], 2, 100 + 10 * number)
    gqa.gqa(source=str(gqa_source), out=str(tmp_path / "out"), train="all")
    keys = [sample.key for sample in _samples(tmp_path / "out", "gqa")["train"]]
    assert keys[:4] == ["00000100", "00000101", "00000110", "00000111"] and len(keys) > 80


def test_gqa_from_the_hubs_parquet_files_is_the_same_as_from_the_official_ones(gqa_source, tmp_path):
    gqa.gqa(source=str(gqa_source), out=str(tmp_path / "official"))
    hub = tmp_path / "hub"
    for part in ("train", "val", "testdev"):
        rows = json.loads((gqa_source / f"{part}_balanced_questions.json").read_text())
        folder = hub / f"{part}_balanced_instructions"
        folder.mkdir(parents=True)
        # the repository's columns: the id beside the official fields, lists of ids as texts
        table = [
            {"id": key, **row, "entailed": "[]", "equivalent": str(row["equivalent"])} for key, row in rows.items()
        ]
        for row in table:
            row["annotations"] = {name: [] for name in row["annotations"]}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{part}-00000-of-00001.parquet")
    gqa.gqa(source=str(hub), out=str(tmp_path / "out"))
    assert _samples(tmp_path / "out", "gqa") == _samples(tmp_path / "official", "gqa")
    assert _images(tmp_path / "out", "gqa") == _images(tmp_path / "official", "gqa")
    with pytest.raises(ValueError, match="--train all: needs the official files"):
        gqa.gqa(source=str(hub), out=str(tmp_path / "out"), train="all")


def test_gqa_without_the_hub_says_how_to_get_its_files(tmp_path):
    with pytest.raises(
        ValueError, match=r"lmms-lab/GQA, train_balanced_instructions train: cannot be had from the hub"
    ):
        gqa.gqa(source="lmms-lab/GQA", out=str(tmp_path / "out"))


def test_gqa_leaves_out_of_training_what_cocos_tasks_are_tested_on(gqa_source, tmp_path, capsys):
    """Visual Genome's list says which of its photos are COCO's."""
    _karpathy(tmp_path / "coco")
    photo = {
        "width": 800,
        "height": 600,
        "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
        "flickr_id": None,
    }
    known = [(2354786, 285), (2375429, 9), (*map(int, VAL_IMAGES[:1]), None)]
    _save(tmp_path / "coco" / "image_data.json", [{**photo, "image_id": i, "coco_id": c} for i, c in known])
    gqa.gqa(source=str(gqa_source), out=str(tmp_path / "out"), coco=str(tmp_path / "coco"))
    images = {sample.image for sample in _samples(tmp_path / "out", "gqa")["train"]}
    assert "gqa-2354786" not in images and "gqa-2375429" in images
    assert "left out of gqa train: 3, on photos that COCO captions and VQA v2 are tested on" in capsys.readouterr().out
    (tmp_path / "coco" / "image_data.json").unlink()
    with pytest.raises(ValueError, match=r"--coco .*coco: lacks image_data\.json \(from Visual Genome"):
        gqa.gqa(source=str(gqa_source), out=str(tmp_path / "out"), coco=str(tmp_path / "coco"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["00001003"].pop("answer"), r"val_b.*\.json, question 00001003: field 'answer' is missing"),
        (lambda c: c["00001003"].pop("imageId"), r"val_b.*\.json, question 00001003: field 'imageId' is missing"),
        (lambda c: c["00001003"]["types"].pop("structural"), r"question 00001003: field 'structural' is missing"),
        (lambda c: c["00001003"].update(question=7), r"question 00001003: field 'question' must be a text, got 7"),
        (lambda c: c.update({"00001003": "x"}), r"question 00001003: expected an object, got 'x'"),
    ],
)
def test_a_fault_in_a_gqa_file_is_told_with_file_and_question(gqa_source, tmp_path, change, message):
    _change(gqa_source / "val_balanced_questions.json", change)
    with pytest.raises(ValueError, match=message):
        gqa.gqa(source=str(gqa_source), out=str(tmp_path / "out"))


# ---- SNLI-VE


def _snli_ve(folder: Path, id_field: str = "Flickr30K_ID", ending: str = "") -> None:
    """Three files of JSON lines; the third pair of each has no agreed label."""
    folder.mkdir(exist_ok=True)
    for place, part in enumerate(("train", "dev", "test")):
        rows = []
        for i, label in enumerate(["entailment", "neutral", "-", "contradiction"]):
            image = str(4705552913 + place)
            rows.append(
                {
                    id_field: image + ending,
                    "annotator_labels": [label] * 3 + ["neutral", "contradiction"],
                    "captionID": f"{image}.jpg#2",
                    "gold_label": label,
                    "pairID": f"{image}.jpg#2r{i}n",
                    "sentence1": "Two women are embracing while holding to go packages.",
                    "sentence1_binary_parse": "( ( Two women ) )",
                    "sentence1_parse": "(ROOT (S))",
                    "sentence2": f"The sisters {i} are hugging goodbye. ",
                    "sentence2_binary_parse": "( ( The sisters ) )",
                    "sentence2_parse": "(ROOT (S))",
                }
            )
        (folder / f"snli_ve_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("id_field", "ending"), [("Flickr30K_ID", ""), ("Flikr30kID", ".jpg")])
def test_snli_ve_takes_hypotheses_and_leaves_out_what_people_do_not_agree_on(tmp_path, capsys, id_field, ending):
    _snli_ve(tmp_path / "source", id_field, ending)
    snli_ve.snli_ve(source=str(tmp_path / "source"), out=str(tmp_path / "out"))
    found = _samples(tmp_path / "out", "snli_ve")
    assert [sample.target for sample in found["train"]] == ["0", "1", "2"]
    assert {split: len(own) for split, own in found.items()} == {"train": 3, "validation": 3, "test": 3}
    first = found["validation"][0]
    assert (first.key, first.source) == ("4705552914-2r0n", "hypothesis: The sisters 0 are hugging goodbye.")
    assert first.image == first.item == "flickr30k-4705552914"
    assert _images(tmp_path / "out", "snli_ve")[first.image] == ["flickr30k-images/4705552914.jpg"]
    assert capsys.readouterr().out.count(": 1, no label that most people agree on") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gold_label": "maybe"},
            r"snli_ve_dev\.jsonl, line 2 \(4705552914\.jpg#2r1n\): gold_label 'maybe' is not one",
        ),
        ({"sentence2": None}, r"snli_ve_dev\.jsonl, line 2 \(.*\): field 'sentence2' must be a text, got None"),
        ({"pairID": 3}, r"snli_ve_dev\.jsonl, line 2: field 'pairID' must be a text, got 3"),
        (None, r"snli_ve_dev\.jsonl, line 2: cannot be read, damaged or not fully downloaded"),
    ],
)
def test_a_fault_in_a_line_is_told_with_file_and_line(tmp_path, change, message):
    _snli_ve(tmp_path / "source")
    path = tmp_path / "source" / "snli_ve_dev.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change}) if change else lines[1][:50]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        snli_ve.snli_ve(source=str(tmp_path / "source"), out=str(tmp_path / "out"))


# ---- NLVR2


def _nlvr2(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file, part in (("train.json", "train"), ("dev.json", "dev"), ("test1.json", "test1")):
        rows = [
            {
                "validation": {"Worker77": "True"},
                "sentence": "All the bottles are from the same brand. ",
                "left_url": "https://i.pinimg.com/1.jpg",
                "writer": "103",
                "label": label,
                "right_url": "https://i.pinimg.com/2.jpg",
                "synset": "beer bottle",
                "query": "some beer bottles2",
                "identifier": f"{part}-10-{pair}-{sentence}",
                **({"directory": 63} if part == "train" else {"extra_validations": {"56": "True", "43": "False"}}),
            }
            for pair, sentence, label in ((0, 0, "True"), (0, 1, "False"), (3, 0, "False"))
        ]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nlvr2_has_one_condition_for_a_pair_of_images_whatever_is_said_of_it(tmp_path):
    _nlvr2(tmp_path / "source")
    nlvr2.nlvr2(source=str(tmp_path / "source"), out=str(tmp_path / "out"))
    found = _samples(tmp_path / "out", "nlvr2")
    assert {split: len(own) for split, own in found.items()} == {"train": 3, "validation": 3, "test": 3}
    assert [sample.target for sample in found["test"]] == ["true", "false", "false"]
    assert [sample.image for sample in found["train"]] == ["nlvr2-train-10-0"] * 2 + ["nlvr2-train-10-3"]
    assert {sample.item for sample in found["train"]} == {"nlvr2-train-10"}  # both pairs have sentences in common
    assert found["train"][0].source == "All the bottles are from the same brand."
    files = _images(tmp_path / "out", "nlvr2")
    assert files["nlvr2-train-10-3"] == [f"images/train/63/train-10-3-img{side}.png" for side in (0, 1)]
    assert files["nlvr2-dev-10-0"] == ["dev/dev-10-0-img0.png", "dev/dev-10-0-img1.png"]
    assert files["nlvr2-test1-10-0"][1] == "test1/test1-10-0-img1.png" and len(files) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "Maybe"}, r"nlvr2, split train, train-10-0-0: label 'Maybe' is not one of True, False"),
        ({"identifier": "train-10-0"}, r"train\.json, line 1 \(train-10-0\): field 'identifier' must read like dev"),
        ({"directory": None}, r"line 1 \(train-10-0-0\): field 'directory' must be a whole number, got None"),
        ({"sentence": 1}, r"train\.json, line 1 \(train-10-0-0\): field 'sentence' must be a text, got 1"),
    ],
)
def test_a_fault_in_an_nlvr2_file_is_told_with_the_pair(tmp_path, change, message):
    _nlvr2(tmp_path / "source")
    path = tmp_path / "source" / "train.json"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]))
    with pytest.raises(ValueError, match=message):
        nlvr2.nlvr2(source=str(tmp_path / "source"), out=str(tmp_path / "out"))


def test_the_task_of_nlvr2_reads_answers_as_it_writes_them():
    task = TASKS["nlvr2"]
    source, target = task.render({"sentence": "Both dogs sit.", "label": "True"})
    assert (source, target) == ("Both dogs sit.", "true") and task.labels == ("false", "true")
    assert task.parse("True.") == task.parse(target) != task.parse("false")


# ---- all of them


def test_three_tasks_in_one_folder_are_what_the_recipe_asks_for_and_share_no_photo_across_splits(
    vqa_source, gqa_source, tmp_path
):
    out = tmp_path / "vl"
    vqa.vqa(source=str(vqa_source), out=str(out))
    gqa.gqa(source=str(gqa_source), out=str(out))
    coco.coco(source=str(vqa_source), out=str(out))
    manifest = Manifest.load(out / "manifest.json")
    tasks = vl_t5_base().data.tasks
    assert set(manifest.tasks) == set(tasks) == {"vqa_v2", "gqa", "coco_caption"}
    places: dict[str, set[str]] = {}
    for task in tasks:
        assert all(manifest.count(task, split) for split in ("train", "validation", "test"))
        for split, own in _samples(out, task).items():
            for sample in own:
                places.setdefault(sample.image, set()).add(split)
        assert set(_images(out, task)) == {sample.image for own in _samples(out, task).values() for sample in own}
    assert all(len(splits) == 1 for splits in places.values())
    # the same photo has the same id and file in both tasks on COCO, so that it is encoded once
    assert _images(out, "vqa_v2") == _images(out, "coco_caption")


BUILDERS = {
    "vqa": lambda source, out, **flags: vqa.vqa(source=source, out=out, **flags),
    "gqa": lambda source, out, **flags: gqa.gqa(source=source, out=out, **flags),
    "coco": lambda source, out, **flags: coco.coco(source=source, out=out, **flags),
}


@pytest.fixture
def sources(vqa_source, gqa_source) -> dict[str, str]:
    return {"vqa": str(vqa_source), "coco": str(vqa_source), "gqa": str(gqa_source)}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_limit_takes_the_first_samples_of_each_split_and_lists_their_images_alone(sources, tmp_path, name):
    task = {"vqa": "vqa_v2", "gqa": "gqa", "coco": "coco_caption"}[name]
    BUILDERS[name](sources[name], str(tmp_path / "all"))
    BUILDERS[name](sources[name], str(tmp_path / "some"), limit=2)
    every, some = _samples(tmp_path / "all", task), _samples(tmp_path / "some", task)
    assert some == {split: own[:2] for split, own in every.items()}
    assert set(_images(tmp_path / "some", task)) == {sample.image for own in some.values() for sample in own}


def test_a_fault_found_late_leaves_the_data_set_as_it_was_and_mended_it_is_built_to_the_same_bytes(
    gqa_source, tmp_path
):
    out, path = tmp_path / "out", gqa_source / "testdev_balanced_questions.json"
    gqa.gqa(source=str(gqa_source), out=str(out), shard_size=30)
    before, whole = _content(out), path.read_text()
    path.write_text(whole.replace('"answer": "yes"', '"reply": "yes"'))
    with pytest.raises(ValueError, match="question 201307252: field 'answer' is missing"):
        gqa.gqa(source=str(gqa_source), out=str(out), shard_size=30)  # train and validation are written by then
    assert _content(out) == before
    path.write_text(whole)
    gqa.gqa(source=str(gqa_source), out=str(out), shard_size=30)
    assert _content(out) == before


def test_one_task_built_again_leaves_the_others_alone(vqa_source, tmp_path):
    out = tmp_path / "out"
    coco.coco(source=str(vqa_source), out=str(out))
    vqa.vqa(source=str(vqa_source), out=str(out))
    captions = _samples(out, "coco_caption")
    vqa.vqa(source=str(vqa_source), out=str(out), seed=1)
    assert _samples(out, "coco_caption") == captions
    assert len(_samples(out, "vqa_v2")["train"]) == 12


@pytest.mark.parametrize(
    ("build", "first", "origin"),
    [
        (vqa.vqa, "v2_OpenEnded_mscoco_train2014_questions.json", r"visualqa\.org"),
        (okvqa.okvqa, "OpenEnded_mscoco_train2014_questions.json", r"okvqa\.allenai\.org"),
        (gqa.gqa, "train_balanced_questions.json", r"questions1\.2\.zip"),
        (coco.coco, "dataset_coco.json", r"caption_datasets\.zip"),
        (snli_ve.snli_ve, "snli_ve_train.jsonl", r"necla-ml/SNLI-VE"),
        (nlvr2.nlvr2, "train.json", r"lil-lab/nlvr"),
    ],
)
def test_official_files_that_are_missing_are_named_with_what_to_download(tmp_path, build, first, origin):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"--source .*empty: lacks {first}.*\(from .*{origin}"):
        build(source=str(tmp_path / "empty"), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"--source .*nowhere: is not a folder; it must hold {first}"):
        build(source=str(tmp_path / "nowhere"), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_prep" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PAGER": "cat"})


def test_the_command_prints_counts_and_an_example_and_says_what_is_next(gqa_source, tmp_path):
    answer = _run("gqa.py", f"--source={gqa_source}", f"--out={tmp_path / 'out'}", "--limit=3")
    assert answer.returncode == 0, answer.stderr
    for part in ("train 3  validation 3  test 3", "Is the sky 0 dark?", "images/gqa.jsonl", "--recipe vl_t5_base"):
        assert part in answer.stdout


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("gqa", {"train": "some"}, "--train some: must be balanced or all"),
        ("vqa", {"splits": "mine"}, "--splits mine: must be one of karpathy, official"),
        ("vqa", {"limit": -1}, "--limit must be a whole number, at least 0, got -1"),
        ("coco", {"shard_size": 0}, "--shard_size must be a whole number, at least 1, got 0"),
    ],
)
def test_a_bad_flag_is_told_before_anything_is_read(tmp_path, name, flags, message):
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](str(tmp_path / "nowhere"), str(tmp_path / "out"), **flags)


def test_help_names_the_official_files_and_shows_an_example():
    answer = _run("vqa.py", "--help")
    text = answer.stdout + answer.stderr
    assert answer.returncode == 0 and "python data_prep/vqa.py --source" in text
    source = text.split("--source=SOURCE")[1].split("--out=OUT")[0]
    for name in ("v2_OpenEnded_mscoco_{train2014,val2014}_questions.json", "dataset_coco.json", "visualqa.org"):
        assert name in source
