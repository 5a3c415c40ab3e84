"""Encodes the images of a data set that the builders listed, and puts the features into its manifest.

What is there is kept and what is missing is encoded: after a kill, after another task was added, after unreadable
pictures were mended. Shards that are finished before the manifest names them are noted in `features.partial`, beside a
stamp of the encoder that made them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from parts import building
from parts.command_line import at_least, run
from parts.image_lists import Files, wanted_images

from hyperpelt_ds.config import VisionConfig
from hyperpelt_ds.data.index import index_path, replace
from hyperpelt_ds.data.manifest import FEATURES, MANIFEST, FeatureSet, Manifest, Shard, write_manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.data.shards import write_features
from hyperpelt_ds.terminal import progress

if TYPE_CHECKING:  # torch and torchvision, which they need, take seconds to import, and --help should not
    from parts.encoding import Result

WORK, STAMP, FAILED = f"{FEATURES}.partial", "stamp.json", f"{FEATURES}/failed.jsonl"
FIRST = 100  # files that are looked for before an encoder runs for hours
DEVICES = ("auto", "cpu", "cuda")


def features(
    *,
    manifest: str,
    encoder: str,
    weights: str = "",
    images: str = ".",
    image_size: int = 224,
    stage: str = "",
    device: str = "auto",
    workers: int = 2,
    batch_size: int = 32,
    shard_size: int = 1024,
    limit: int = 0,
    max_failed: float = 0.01,
    fresh: bool = False,
) -> None:
    """Encode every image of a data set once, from the lists that its builders left in images/, and store the features.

    Run it again after a kill or when a task was added: only what is missing is encoded. Pictures that cannot be read
    are listed in features/failed.jsonl; their samples are left out in training.

    Examples:
        python data_prep/features.py --manifest data/vl/manifest.json --images ~/coco,~/gqa/images --encoder clip
            --weights openai/clip-vit-base-patch32 --workers 8
        python data_prep/features.py --manifest data/vl/manifest.json --images ~/coco --encoder resnet101
            --weights default --device cuda --workers 16

    Args:
        manifest: manifest.json of the data set
        encoder: clip, efficientnet_lite0, or the name of a torchvision model, for example resnet101
        weights: clip: hub id or folder; others: a file; torchvision's: also "default", to download
        images: folders, separated by commas, that the files named in the lists lie in; a table's pictures are listed
            with their folder
        image_size: side in pixels of the square that a picture is resized to
        stage: the layer whose feature map is taken; the encoder's last if not given
        device: auto, cpu or cuda; auto takes a GPU if there is one
        workers: processes that encode (CPU, about 1 GB each) or open pictures (GPU); 0 for none
        batch_size: pictures that are encoded together
        shard_size: images a shard
        limit: images at most, 0 for all
        max_failed: with a larger share of unreadable pictures the features are not put into the manifest (exit code 1)
        fresh: delete the features that are there and make all anew
    """
    at_least(0, workers=workers, limit=limit)
    at_least(1, image_size=image_size, batch_size=batch_size, shard_size=shard_size)
    if isinstance(max_failed, bool) or not isinstance(max_failed, int | float) or not 0 <= max_failed <= 1:
        raise ValueError(f"--max_failed must be a share, from 0 to 1, got {max_failed!r}")
    if Path(manifest).name != MANIFEST or not Path(manifest).is_file():
        raise ValueError(
            f"--manifest {manifest}: is not the {MANIFEST} of a data set on this machine; a builder of "
            f"data_prep/ makes one"
        )
    folders = [Path(name.strip()).expanduser() for name in images.split(",") if name.strip()]
    if not folders:
        raise ValueError("--images: names no folder; leave it out for the folder at hand")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--images: {folder} is not a folder; give those that the pictures were unpacked into")
    config = VisionConfig(encoder, weights or None, image_size, stage or None)
    folder, start = Path(manifest).parent, time.monotonic()
    with building.locked(folder):
        wanted = wanted_images(folder, Manifest.load(manifest).tasks, shard_size, limit)
        if fresh:
            _check_folders(wanted, folders)  # before anything is deleted
        state = _begin(folder, config, _device(device), len(next(iter(wanted.values()))), fresh)
        todo = {image: wanted[image] for image in state.missing(wanted)}
        if len(todo) == len(wanted):
            _check_folders(todo, folders)
        encoded = _encode(state, todo, folders, workers, batch_size, shard_size)
        failed = [failure for part in encoded for failure in part.failed]
        _report(folder, failed)
        if not state.shards or len(failed) > max_failed * len(wanted):
            print(
                f"error: {len(failed):,} of {len(wanted):,} images cannot be read, more than --max_failed "
                f"{max_failed}: {manifest} is not given the features. Mend the pictures or allow more, and run this "
                "again: what is encoded is kept",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(1)
        state.publish()
    _summarise(state, wanted, encoded, time.monotonic() - start)


@dataclass(frozen=True)
class Part:
    """What became of one shard's images: the shard (None if none could be read), those in it, and the others."""

    shard: Shard | None
    images: list[str]
    failed: list[dict[str, str]]


@dataclass(frozen=True)
class State:
    """The features in a folder, all of one encoder: those that the manifest names, and the parts finished since, by
    number. `made` has the fields of their FeatureSet: cells, channels, encoder."""

    folder: Path
    config: VisionConfig
    device: str
    made: dict[str, Any]
    manifest: Manifest
    parts: dict[int, Part]

    @property
    def shards(self) -> list[Shard]:
        stored = self.manifest.features.shards if self.manifest.features else []
        new = [part.shard for _, part in sorted(self.parts.items()) if part.shard]
        return [*stored, *(shard for shard in new if shard not in stored)]  # a kill may have come after the manifest

    @property
    def next_number(self) -> int:
        return 1 + max([*(int(Path(shard.path).stem[-6:]) for shard in self.shards), *self.parts], default=-1)

    def missing(self, wanted: Iterable[str]) -> list[str]:
        """The images without features; last those that failed, so that the shards before are cut as they would be."""
        reader = Reader(self.manifest)
        done = {image for part in self.parts.values() for image in part.images}
        failed = {failure["image"] for part in self.parts.values() for failure in part.failed}
        missing = [image for image in wanted if image not in done and not reader.has_image(image)]
        return sorted(missing, key=failed.__contains__)

    def add(self, number: int, part: Part) -> None:
        content = json.dumps(dataclasses.asdict(part), ensure_ascii=False)
        replace(self.folder / WORK / f"{number:06d}.json", content.encode())
        self.parts[number] = part

    def publish(self) -> None:
        """Puts all into the manifest, whose tasks and notes stay as they are."""
        if self.parts:
            made = FeatureSet(**self.made, shards=self.shards)
            write_manifest(self.folder, self.manifest.tasks, made, self.manifest.about)
        shutil.rmtree(self.folder / WORK)


def _device(name: str) -> str:
    import torch

    if name not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; take auto or cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def _begin(folder: Path, config: VisionConfig, device: str, pictures: int, fresh: bool) -> State:
    """What is there already; ValueError if it was made by another encoder."""
    from parts.encoding import encoder_of

    encoder = encoder_of(config, device)
    made = {"cells": pictures * encoder.cells, "channels": encoder.channels, "encoder": encoder.describe()}
    manifest, work = Manifest.load(folder / MANIFEST), folder / WORK
    if fresh:
        write_manifest(folder, manifest.tasks, None, manifest.about)  # first: it may name nothing that is not there
        manifest = dataclasses.replace(manifest, features=None)
        for path in (work, folder / FEATURES):
            shutil.rmtree(path, ignore_errors=True)
    stored = manifest.features and {name: getattr(manifest.features, name) for name in made}
    stamp = json.loads((work / STAMP).read_text()) if (work / STAMP).is_file() else None
    for found, where in ((stored, folder / FEATURES), (stamp, work)):
        if found not in (None, made):
            raise ValueError(
                f"{where} holds features made with {found}, but these flags make {made}. Take the same flags as "
                "before, or --fresh, which deletes what is there and makes all anew"
            )
    for path in (work, folder / FEATURES):
        path.mkdir(exist_ok=True)
    replace(work / STAMP, json.dumps(made).encode())
    parts = {}
    for path in work.glob("[0-9]*.json"):
        part = json.loads(path.read_text())
        shard = part["shard"] and Shard(**part["shard"])
        if shard is None or _size(folder / shard.path) == shard.bytes:
            parts[int(path.stem)] = Part(shard, part["images"], part["failed"])
    return State(folder, config, device, made, manifest, parts)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_folders(todo: Mapping[str, Files], folders: Sequence[Path]) -> None:
    """Raises ValueError if none of the first pictures is there: a wrong folder is better known now than in hours."""
    files = [file for files in itertools.islice(todo.values(), FIRST) for file in files]
    if not any(_find(file, folders).is_file() for file in files):
        raise ValueError(
            f"--images {','.join(map(str, folders))}: none of the first {len(files)} files of the lists is there, for "
            f"example {files[0]}"
            + ("; table.py noted where it saw them: if they moved, give it again" if os.path.isabs(files[0]) else "")
        )


def _find(file: str, folders: Sequence[Path]) -> Path:
    """Where a listed file is; if it is nowhere, where it would be in the first folder."""
    paths = [folder / file for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def _encode(
    state: State, todo: Mapping[str, Files], folders: Sequence[Path], workers: int, batch_size: int, shard_size: int
) -> list[Part]:
    """Encodes images and finishes a shard after the other. Batches end with their shard, so that an image has the same
    neighbours in its batch, and the same last bit, when a killed build goes on."""
    from parts.encoding import Item, begun, cut, encode

    lists = list(cut(todo, shard_size))
    items = ([Item(image, tuple(_find(file, folders) for file in todo[image])) for image in part] for part in lists)
    batches = itertools.chain.from_iterable(cut(part, batch_size) for part in items)
    encoded = itertools.chain.from_iterable(encode(batches, state.config, workers, state.device))
    results = progress(begun(encoded), "images", len(todo))
    parts = []
    for number, part in enumerate(lists, state.next_number):
        parts.append(_write(state.folder, number, itertools.islice(results, len(part))))
        state.add(number, parts[-1])
    next(results, None)  # none is left; the processes end
    return parts


def _write(folder: Path, number: int, results: Iterator[Result]) -> Part:
    """One shard of the results that are features; it has its place and its index before anything speaks of it."""
    from hyperpelt_ds.vision import UnreadableImage

    images, failed = [], []

    def good() -> Iterator[tuple[str, np.ndarray]]:
        for image, cells in results:
            if isinstance(cells, UnreadableImage):
                failed.append({"image": image, "file": cells.name, "reason": cells.reason})
            else:
                images.append(image)
                yield image, cells

    pairs = good()
    first = next(pairs, None)
    if first is None:
        return Part(None, images, failed)
    [shard] = write_features(folder / WORK, itertools.chain([first], pairs), per_shard=1 << 31)
    made, path = folder / WORK / shard.path, f"{FEATURES}/{FEATURES}-{number:06d}.tar"
    os.replace(index_path(made), index_path(folder / path))
    os.replace(made, folder / path)
    return Part(dataclasses.replace(shard, path=path), images, failed)


def _report(folder: Path, failed: list[dict[str, str]]) -> None:
    """Says loudly what could not be read, and lists it all in a file, which is there only if there is anything."""
    path = folder / FAILED
    path.unlink(missing_ok=True)
    if failed:
        replace(path, "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failed).encode())
        print(f"\nWARNING: {len(failed):,} pictures cannot be read; they are listed in {path}", flush=True)
        kinds: dict[str, list[str]] = {}
        for failure in failed:
            kinds.setdefault(re.sub(r"\d+", "#", failure["reason"]), []).append(failure["file"])
        for reason, files in sorted(kinds.items(), key=lambda pair: -len(pair[1]))[:8]:
            print(f"  {len(files):>8,}  {reason}, for example {files[0]}")


def _summarise(state: State, wanted: Mapping[str, Files], encoded: Sequence[Part], seconds: float) -> None:
    """One screen: what there is, one example, what a run has to say of it, and what to do next."""
    manifest = Manifest.load(state.folder / MANIFEST)
    assert manifest.features is not None  # just published
    made, reader = manifest.features, Reader(manifest)
    new, size = sum(len(part.images) for part in encoded), sum(shard.bytes for shard in made.shards)
    images, rate = sum(shard.samples for shard in made.shards), f", {new / seconds:,.1f} a second" if new else ""
    print(f"\n{manifest.path}: features of {images:,} images in {len(made.shards)} shards, {size / 1e6:,.1f} MB")
    print(f"  {made.cells} cells x {made.channels} channels of {json.dumps(made.encoder)}")
    print(f"  {new:,} encoded now, in {seconds:.0f} s{rate}; {images - new:,} were there")
    image = next(image for image in wanted if reader.has_image(image))
    cells = reader.image(image).astype(np.float32)
    print(f"example {image} ({', '.join(wanted[image])})")
    print(f"  {cells.shape[0]} x {cells.shape[1]} float16, mean {cells.mean():.3f}, deviation {cells.std():.3f}")
    about = {**made.encoder, "weights": state.config.weights, "cells": made.cells, "channels": made.channels}
    settings = (f"vision.{name}={value}" for name, value in about.items() if name != "sha256")
    print(f"a run on these features needs: data.manifest={manifest.path} {' '.join(settings)}")
    print(f"next: python data_prep/verify.py {manifest.path}")


if __name__ == "__main__":
    run(features)
