"""Builds the task okvqa from the official questions and annotations."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator

from parts import building, official, vqa_files
from parts.building import Entry, LeftOut, share
from parts.coco_files import image_id
from parts.command_line import at_least, run
from parts.vqa_files import Question

TASK = "okvqa"
ORIGIN = "okvqa.allenai.org/download.html"
QUESTIONS, ANNOTATIONS = "OpenEnded_mscoco_{}_questions.json", "mscoco_{}_annotations.json"
PARTS = ("train2014", "val2014")
VALIDATION = 0.1  # of the training images: about 900 questions
# What the annotations call "one" to "ten"; scores are also shown by topic.
TOPICS = {
    "one": "vehicles",
    "two": "brands",
    "three": "objects",
    "four": "sports",
    "five": "food",
    "six": "geography and history",
    "seven": "people",
    "eight": "plants and animals",
    "nine": "science",
    "ten": "weather",
}


def okvqa(*, source: str, out: str, seed: int = 0, limit: int = 0, shard_size: int = 4096) -> None:
    """Build OK-VQA from its official files: 9,009 questions for training, 5,046 to test on.

    The test split is the official val2014, on which the paper reports; a tenth of train2014, chosen by image, is the
    validation split. Answers as for VQA v2 (vqa.py). Mind that most photos of val2014 are training photos of VQA v2
    and COCO captions in Karpathy's split: a model that was trained on these has seen them, with other questions.

    Photos, for features.py: train2014.zip and val2014.zip of cocodataset.org; --images is the folder in which they were
    unpacked.

    Examples:
        python data_prep/okvqa.py --source ~/okvqa --out data/vl

    Args:
        source: folder with OpenEnded_mscoco_{train2014,val2014}_questions.json and
            mscoco_{train2014,val2014}_annotations.json (okvqa.allenai.org/download.html)
        out: the data set to write into; its other tasks and features stay
        seed: of the answers drawn in training
        limit: samples of each split at most, 0 for all
        shard_size: samples a shard
    """
    at_least(0, seed=seed, limit=limit)
    at_least(1, shard_size=shard_size)
    files = official.find(source, {form.format(part): ORIGIN for part in PARTS for form in (QUESTIONS, ANNOTATIONS)})
    trained, tested = (
        list(vqa_files.read(files[QUESTIONS.format(part)], files[ANNOTATIONS.format(part)], part)) for part in PARTS
    )
    held_out = [share(image_id(question.image)) < VALIDATION for question in trained]
    entries = {
        "train": _entries(itertools.compress(trained, map(operator.not_, held_out)), seed),
        "validation": _entries(itertools.compress(trained, held_out), None),
        "test": _entries(tested, None),
    }
    building.build(
        out,
        {TASK: entries},
        about={"command": "okvqa", "files": official.sizes(files.values()), "seed": seed},
        shard_size=shard_size,
        limit=limit,
    )


def _entries(questions: Iterable[Question], seed: int | None) -> Iterator[Entry | LeftOut]:
    for question in questions:
        assert question.annotation is not None
        kind = question.annotation.question_type
        yield vqa_files.entry(question, seed, TOPICS.get(kind, kind))


if __name__ == "__main__":
    run(okvqa)
