"""Builds the task gqa from the official question files, or from the hub's `lmms-lab/GQA`, which holds the same."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from parts import building, coco_files, official
from parts.building import Entry, LeftOut, share
from parts.command_line import at_least, run
from parts.hub import Repository, Rows

TASK = "gqa"
ORIGIN = "questions1.2.zip, cs.stanford.edu/people/dorarad/gqa/download.html"
OFFICIAL = "{}_balanced_questions.json"  # train, val, testdev
HUB, CONFIG = "lmms-lab/GQA", "{}_balanced_instructions"
ALL = "train_all_questions"
VALIDATION = 0.1  # of the images of the official val: about 1,000, with 13,000 questions
PHOTOS, PHOTOS_ORIGIN = "image_data.json", "Visual Genome, homes.cs.washington.edu/~ranjay/visualgenome/api.html"
TESTED_ON = LeftOut("on photos that COCO captions and VQA v2 are tested on")

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FIELDS = ("question", "answer", "imageId", "types")
Questions = Iterator[tuple[str, str, Mapping[str, Any]]]
"""(where, question id, fields) of each question."""


def gqa(
    *,
    source: str,
    out: str,
    revision: str = "",
    train: str = "balanced",
    coco: str = "",
    limit: int = 0,
    shard_size: int = 4096,
) -> None:
    """Build GQA: train and val for training, test-dev to test on.

    A tenth of val, chosen by image, is the validation split. About half of the photos are also COCO's, under other ids:
    with --coco, no question of the training split is on one that VQA v2 and COCO captions are tested on. Takes about
    2 GB of memory, with --train all an estimated 3 GB.

    Photos, for features.py: images.zip of GQA's page; --images is the folder in which it was unpacked.

    Examples:
        python data_prep/gqa.py --source ~/gqa/questions1.2 --out data/vl
        python data_prep/gqa.py --source ~/gqa/questions1.2 --out data/vl --coco ~/coco
        python data_prep/gqa.py --source lmms-lab/GQA --out data/vl

    Args:
        source: folder with train_balanced_questions.json, val_balanced_questions.json and
            testdev_balanced_questions.json (questions1.2.zip of cs.stanford.edu/people/dorarad/gqa/download.html), or
            lmms-lab/GQA on the hub, or a folder with its parquet files
        out: the data set to write into; its other tasks and features stay
        revision: branch, tag or commit of the hub's data set
        train: balanced, for 943,000 questions, or all, for the 14 million of the official folder train_all_questions
        coco: folder with Karpathy's dataset_coco.json (caption_datasets.zip of
            cs.stanford.edu/people/karpathy/deepimagesent) and Visual Genome's image_data.json
        limit: samples of each split at most, 0 for all
        shard_size: samples a shard
    """
    at_least(0, limit=limit)
    at_least(1, shard_size=shard_size)
    if train not in ("balanced", "all"):
        raise ValueError(f"--train {train}: must be balanced or all")
    folder = Path(source).expanduser()
    made_from: dict[str, Any] = {"source": source, "revision": revision}
    if (folder / CONFIG.format("val")).is_dir() or (_HUB_NAME.fullmatch(source) and not folder.is_dir()):
        if train == "all":
            raise ValueError(f"--train all: needs the official files, {source} holds the balanced questions")
        read = partial(_hub_rows, source, revision)
    else:
        files = _files(source, train)
        read = partial(_official_rows, files)
        made_from = {"files": official.sizes(itertools.chain(*files.values()))}
    taken = _tested_on(coco) if coco else frozenset()
    splits = {
        "train": itertools.chain(
            _entries(read("train"), lambda image: True, taken),
            _entries(read("val"), lambda image: not _is_validation(image), taken),
        ),
        "validation": _entries(read("val"), _is_validation),
        "test": _entries(read("testdev"), lambda image: True),
    }
    building.build(
        out,
        {TASK: splits},
        about={"command": "gqa", **made_from, "train": train, "without_photos_held_out_of_coco": bool(coco)},
        shard_size=shard_size,
        limit=limit,
        following=official.MULTI_TASK,
    )


def _files(source: str, train: str) -> dict[str, list[Path]]:
    """The official files of train, val and testdev."""
    names = {part: OFFICIAL.format(part) for part in ("train", "val", "testdev")}
    if train == "all":
        names["train"] = ALL
    found = official.find(source, dict.fromkeys(names.values(), ORIGIN))
    files = {part: [found[name]] for part, name in names.items()}
    if train == "all":
        files["train"] = sorted(found[ALL].glob(f"{ALL}_*.json"))
        if not files["train"]:
            raise ValueError(f"--source {source}: {ALL} holds no {ALL}_0.json, ... (from {ORIGIN})")
    return files


def _official_rows(files: Mapping[str, list[Path]], part: str) -> Questions:
    """The questions of one file after the other, each file read when its turn comes."""
    for path in files[part]:
        for number, fields in official.load(path, dict, _slim).items():
            where = f"{path}, question {number}"
            if not isinstance(fields, dict):
                raise ValueError(f"{where}: expected an object, got {fields!r}")
            yield where, number, fields


def _hub_rows(source: str, revision: str, part: str) -> Questions:
    config = CONFIG.format(part)
    rows = Repository(HUB, config, ("id", *_FIELDS)).split(part, source, revision, (config,))
    for number, fields in Rows(rows.where, rows.table.select_columns(["id", *_FIELDS])):
        yield f"{rows.where}, row {number}, question {fields['id']}", fields["id"], fields


def _entries(
    questions: Questions, wanted: Callable[[str], bool], taken: frozenset[str] = frozenset()
) -> Iterator[Entry | LeftOut]:
    """The questions on `wanted` images; those on `taken` ones are left out."""
    for where, number, fields in questions:
        name = official.get(fields, "imageId", str, where)
        image = f"gqa-{name}"
        if not wanted(image):
            continue
        if name in taken:
            yield TESTED_ON
            continue
        kind = official.get(official.get(fields, "types", dict, where), "structural", str, where)
        example = {field: official.get(fields, field, str, where).strip() for field in ("question", "answer")}
        yield Entry(number, image, example, image, kind, files=(f"images/{name}.jpg",))


def _is_validation(image: str) -> bool:
    return share(image) < VALIDATION


def _tested_on(source: str) -> frozenset[str]:
    """GQA's ids of the photos that Karpathy's split holds out."""
    files = official.find(source, {coco_files.SPLIT_FILE: coco_files.ORIGIN, PHOTOS: PHOTOS_ORIGIN}, "coco")
    held_out = {photo.number for photo in coco_files.karpathy(files[coco_files.SPLIT_FILE]) if photo.split != "train"}
    rows = official.objects({"photos": official.load(files[PHOTOS], list)}, "photos", str(files[PHOTOS]))
    return frozenset(
        str(official.get(fields, "image_id", int, where)) for where, fields in rows if fields.get("coco_id") in held_out
    )


def _slim(fields: dict[str, Any]) -> Any:
    """Of a question, what is used here; most of a file are programs and scene graph references."""
    return {name: fields[name] for name in _FIELDS if name in fields} if "imageId" in fields else fields


if __name__ == "__main__":
    run(gqa)
