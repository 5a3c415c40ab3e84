"""COCO's photos: how they are named here, and Karpathy's split of them, which captions and VQA v2 share.

The split is `dataset_coco.json` of Karpathy and Fei-Fei's caption_datasets.zip: all of COCO's train2014 and val2014.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts import official

SPLIT_FILE = "dataset_coco.json"
ORIGIN = "Karpathy's caption_datasets.zip, cs.stanford.edu/people/karpathy/deepimagesent"
# "restval" is what the official validation set has beyond 5,000 images each for validation and test.
SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Photo:
    """One image of COCO: its number, our name of its split, its file below COCO's root, captions as (id, text)."""

    number: int
    split: str
    file: str
    captions: tuple[tuple[int, str], ...]


def image_id(number: int) -> str:
    """The image's id in all data sets on COCO's photos, so that its features are stored once."""
    return f"coco-{number:012d}"


def image_file(folder: str, number: int) -> str:
    """The file below COCO's root: train2014/COCO_train2014_000000000009.jpg."""
    return f"{folder}/COCO_{folder}_{number:012d}.jpg"


def karpathy(path: Path) -> Iterator[Photo]:
    """The photos of dataset_coco.json."""
    for where, fields in official.objects(official.load(path, dict, _slim), "images", str(path)):
        number = official.get(fields, "cocoid", int, where)
        where = f"{where} (cocoid {number})"
        split = official.get(fields, "split", str, where)
        if split not in SPLITS:
            raise ValueError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}")
        file = "/".join(official.get(fields, name, str, where) for name in ("filepath", "filename"))
        captions = []
        for here, sentence in official.objects(fields, "sentences", where):
            text = " ".join(official.get(sentence, "raw", str, here).split())
            captions.append((official.get(sentence, "sentid", int, here), text))
        yield Photo(number, SPLITS[split], file, tuple(captions))


def _slim(fields: dict[str, Any]) -> dict[str, Any]:
    """Without the captions' tokens, which are half of the file."""
    return {name: value for name, value in fields.items() if name != "tokens"}
