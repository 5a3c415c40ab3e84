"""Builds the task vqa_v2 from the official questions and annotations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from parts import building, coco_files, official, vqa_files
from parts.building import Entry, LeftOut
from parts.command_line import at_least, run
from parts.vqa_files import Question

TASK = "vqa_v2"
ORIGIN = "visualqa.org/download.html"
QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"
PARTS = ("train2014", "val2014")
UNANSWERED = "test2015"
OFFICIAL = {"train2014": "train", "val2014": "validation"}
SPLITS = {"karpathy": ("train", "validation", "test"), "official": ("train", "validation")}


def vqa(
    *,
    source: str,
    out: str,
    splits: str = "karpathy",
    official_test: bool = False,
    seed: int = 0,
    limit: int = 0,
    shard_size: int = 4096,
) -> None:
    """Build VQA v2 from its official files.

    The splits are Karpathy's of the photos, as for COCO captions (coco.py), so that no task is trained on a photo that
    the other is tested on. In training the target is one of the ten answers, drawn in proportion to its soft score; in
    held-out splits it is the commonest, and all ten are kept to score with. Takes about 1.1 GB of memory.

    Photos, for features.py: train2014.zip, val2014.zip and, for the official test, test2015.zip of cocodataset.org;
    --images is the folder in which they were unpacked.

    Examples:
        python data_prep/vqa.py --source ~/vqa --out data/vl
        python data_prep/vqa.py --source ~/vqa --out data/vqa_official --splits official

    Args:
        source: folder with v2_OpenEnded_mscoco_{train2014,val2014}_questions.json and
            v2_mscoco_{train2014,val2014}_annotations.json (visualqa.org/download.html), and Karpathy's
            dataset_coco.json (caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent)
        out: the data set to write into; its other tasks and features stay
        splits: karpathy, or official, which trains on train2014 and validates on val2014 and has no test
        official_test: also write v2_OpenEnded_mscoco_test2015_questions.json, which has no answers, as split
            official_test, for launch/predict.py --format vqa; it holds the questions of test-dev as well
        seed: of the answers drawn
        limit: samples of each split at most, 0 for all
        shard_size: samples a shard
    """
    at_least(0, seed=seed, limit=limit)
    at_least(1, shard_size=shard_size)
    if splits not in SPLITS:
        raise ValueError(f"--splits {splits}: must be one of {', '.join(SPLITS)}")
    names = {form.format(part): ORIGIN for part in PARTS for form in (QUESTIONS, ANNOTATIONS)}
    if splits == "karpathy":
        names[coco_files.SPLIT_FILE] = f"{coco_files.ORIGIN}; or give --splits official"
    if official_test:
        names[QUESTIONS.format(UNANSWERED)] = ORIGIN
    files = official.find(source, names)
    if splits == "karpathy":
        placed = {photo.number: photo.split for photo in coco_files.karpathy(files[coco_files.SPLIT_FILE])}
    else:
        print("official splits: do not put COCO captions, which have Karpathy's, into the same data set")
        placed = None
    questions: dict[str, list[Question]] = {split: [] for split in SPLITS[splits]}
    for part in PARTS:
        for question in vqa_files.read(files[QUESTIONS.format(part)], files[ANNOTATIONS.format(part)], part):
            questions[_split(question, placed)].append(question)
    entries = {split: _entries(own, seed if split == "train" else None) for split, own in questions.items()}
    if official_test:
        unanswered = vqa_files.read(files[QUESTIONS.format(UNANSWERED)], None, UNANSWERED)
        entries["official_test"] = _entries(unanswered, None)
    building.build(
        out,
        {TASK: entries},
        about={"command": "vqa", "files": official.sizes(files.values()), "splits": splits, "seed": seed},
        shard_size=shard_size,
        limit=limit,
        following=official.MULTI_TASK,
    )


def _split(question: Question, placed: Mapping[int, str] | None) -> str:
    if placed is None:
        return OFFICIAL[question.folder]
    if question.image not in placed:
        raise ValueError(
            f"{coco_files.SPLIT_FILE}: lacks photo {question.image} of {TASK}'s question {question.number}"
        )
    return placed[question.image]


def _entries(questions: Iterable[Question], seed: int | None) -> Iterator[Entry | LeftOut]:
    for question in questions:
        kind = question.annotation.answer_type if question.annotation else None
        yield vqa_files.entry(question, seed, kind)


if __name__ == "__main__":
    run(vqa)
