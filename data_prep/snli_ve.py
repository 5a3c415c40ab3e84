"""Builds the task snli_ve from the official JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from parts import building, official
from parts.building import Entry, LeftOut
from parts.command_line import at_least, run

TASK = "snli_ve"
ORIGIN = "github.com/necla-ml/SNLI-VE"
FILES = {"train": "snli_ve_train.jsonl", "validation": "snli_ve_dev.jsonl", "test": "snli_ve_test.jsonl"}
LABELS = ("entailment", "neutral", "contradiction")
UNDECIDED = LeftOut("no label that most people agree on")


def snli_ve(*, source: str, out: str, limit: int = 0, shard_size: int = 4096) -> None:
    """Build SNLI-VE from its official files: 529,527 pairs for training, 17,858 for validation, 17,901 to test on.

    Photos, for features.py: those of Flickr30k; --images is the folder that holds their folder flickr30k-images.

    Examples:
        python data_prep/snli_ve.py --source ~/snli_ve --out data/vl

    Args:
        source: folder with snli_ve_train.jsonl, snli_ve_dev.jsonl and snli_ve_test.jsonl
            (github.com/necla-ml/SNLI-VE)
        out: the data set to write into; its other tasks and features stay
        limit: samples of each split at most, 0 for all
        shard_size: samples a shard
    """
    at_least(0, limit=limit)
    at_least(1, shard_size=shard_size)
    files = official.find(source, dict.fromkeys(FILES.values(), ORIGIN))
    building.build(
        out,
        {TASK: {split: _entries(files[name]) for split, name in FILES.items()}},
        about={"command": "snli_ve", "files": official.sizes(files.values())},
        shard_size=shard_size,
        limit=limit,
    )


def _entries(path: Path) -> Iterator[Entry | LeftOut]:
    for where, fields in official.lines(path):
        pair = official.get(fields, "pairID", str, where)
        where = f"{where} ({pair})"
        label = official.get(fields, "gold_label", str, where)
        if label == "-":
            yield UNDECIDED
            continue
        if label not in LABELS:
            raise ValueError(f"{where}: gold_label {label!r} is not one of {', '.join(LABELS)} or -")
        # Copies of the data are about that spell the field as its generator once did, with the file's ending.
        name = "Flikr30kID" if "Flikr30kID" in fields else "Flickr30K_ID"
        number = official.get(fields, name, str, where).removesuffix(".jpg")
        image = f"flickr30k-{number}"
        yield Entry(
            pair.replace(".jpg#", "-"),
            image,
            {"hypothesis": official.get(fields, "sentence2", str, where).strip(), "label": LABELS.index(label)},
            image,
            files=(f"flickr30k-images/{number}.jpg",),
        )


if __name__ == "__main__":
    run(snli_ve)
