"""Builds the task coco_caption: captions of COCO's photos, in Karpathy's split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parts import building, coco_files, official
from parts.building import NO_LABEL, Entry, LeftOut
from parts.coco_files import Photo
from parts.command_line import at_least, run

TASK = "coco_caption"


def coco(*, source: str, out: str, limit: int = 0, shard_size: int = 4096) -> None:
    """Build COCO captions: one sample a caption in training, one a photo with all its captions in held-out splits.

    113,287 photos for training (Karpathy's train and restval), 5,000 each for validation and test.

    Photos, for features.py: train2014.zip and val2014.zip of cocodataset.org; --images is the folder in which they were
    unpacked.

    Examples:
        python data_prep/coco.py --source ~/coco --out data/vl
        python data_prep/coco.py --source ~/coco --out data/try --limit 200

    Args:
        source: folder with dataset_coco.json, from Karpathy's caption_datasets.zip
            (cs.stanford.edu/people/karpathy/deepimagesent)
        out: the data set to write into; its other tasks and features stay
        limit: samples of each split at most, 0 for all
        shard_size: samples a shard
    """
    at_least(0, limit=limit)
    at_least(1, shard_size=shard_size)
    files = official.find(source, {coco_files.SPLIT_FILE: coco_files.ORIGIN})
    photos = list(coco_files.karpathy(files[coco_files.SPLIT_FILE]))
    held_out = {split: _held_out(photos, split) for split in ("validation", "test")}
    building.build(
        out,
        {TASK: {"train": _training(photos), **held_out}},
        about={"command": "coco", "files": official.sizes(files.values())},
        shard_size=shard_size,
        limit=limit,
        following=official.MULTI_TASK,
    )


def _training(photos: Sequence[Photo]) -> Iterator[Entry | LeftOut]:
    for photo in photos:
        if photo.split == "train":
            for number, text in photo.captions:
                yield _entry(f"{photo.number:012d}-{number}", photo, text) if text else NO_LABEL


def _held_out(photos: Sequence[Photo], split: str) -> Iterator[Entry | LeftOut]:
    for photo in photos:
        if photo.split == split:
            texts = tuple(text for _, text in photo.captions if text)
            yield _entry(f"{photo.number:012d}", photo, texts[0], texts) if texts else NO_LABEL


def _entry(key: str, photo: Photo, text: str, references: tuple[str, ...] = ()) -> Entry:
    image = coco_files.image_id(photo.number)
    return Entry(key, image, {"caption": text}, image, references=references, files=(photo.file,))


if __name__ == "__main__":
    run(coco)
