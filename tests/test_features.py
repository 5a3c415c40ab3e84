"""Image features of a data set: each image once, whatever happens to the build and whatever the files hold."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hyperpelt_ds.config import VisionConfig
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.manifest import Manifest, write_manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.data.shards import write_task
from hyperpelt_ds.vision import EfficientNetLite0, UnreadableImage, load_encoder

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data_prep"))  # as when a script of that folder is run

import features  # noqa: E402
from parts import encoding, image_lists  # noqa: E402

BROKEN = encoding.Item("broken", ("nowhere.png",))
SIZE, STAGE = 32, "block2"  # 8 x 8 cells of 24 channels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten pictures of noise, p0.png to p9.png, of different sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / f"p{i}.png")
    return folder


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    """Random weights that keep the size of what passes through them, so that features are of a size to compare."""
    torch.manual_seed(0)
    model = EfficientNetLite0()
    for weight in model.parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
    file = tmp_path_factory.mktemp("vision") / "random.pth"
    torch.save(model.state_dict(), file)
    return file


def _data_set(folder: Path, lists: Mapping[str, Mapping[str, Sequence[str]]]) -> Path:
    """A manifest with one sample for each of a task's images, and the lists {task: {image: files}} of a builder."""
    tasks = {}
    for task, images in lists.items():
        samples = [Sample(f"k{i}", task, "what", "red", f"k{i}", image) for i, image in enumerate(images)]
        tasks[task] = {"train": write_task(folder, task, "train", samples)}
        lines = [json.dumps({"image": image, "files": list(files)}) for image, files in images.items()]
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return write_manifest(folder, tasks, None, {"note": "kept"})


def _listed(*numbers: int) -> dict[str, list[str]]:
    return {f"image-{n}": [f"p{n}.png"] for n in numbers}


@pytest.fixture
def build(pictures, encoder_file):
    """Calls the command as its flags would; in this process, unless told otherwise."""

    def call(manifest: Path, **flags: Any) -> None:
        given = {"encoder": "efficientnet_lite0", "weights": str(encoder_file), "images": str(pictures)}
        features.features(
            **{"manifest": str(manifest), "image_size": SIZE, "stage": STAGE, "workers": 0, **given, **flags}
        )

    return call


def _bytes(folder: Path) -> dict[str, bytes]:
    files = [folder / "manifest.json", *(folder / "features").iterdir()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _config(encoder_file: Path) -> VisionConfig:
    return VisionConfig("efficientnet_lite0", str(encoder_file), SIZE, STAGE)


def test_every_image_is_stored_once_and_the_manifest_keeps_the_rest(tmp_path, build, pictures, encoder_file, capsys):
    manifest = _data_set(tmp_path, {"easy_vqa": _listed(3, 1, 2), "shape_caption": _listed(2, 4)})
    before = Manifest.load(manifest)
    build(manifest, batch_size=3, shard_size=3)
    after, encoder = Manifest.load(manifest), load_encoder(_config(encoder_file))
    assert (after.tasks, after.about) == (before.tasks, before.about)
    assert (after.features.cells, after.features.channels) == (64, 24)
    assert after.features.encoder == encoder.describe()
    assert [shard.samples for shard in after.features.shards] == [3, 1]
    reader = Reader(after)
    for number in (1, 2, 3, 4):
        expected = encoder.encode([pictures / f"p{number}.png"])[0].half().numpy()
        assert np.allclose(reader.image(f"image-{number}"), expected, atol=1e-2) and expected.std() > 0.5
    assert not reader.has_image("image-0") and not (tmp_path / "features.partial").exists()
    said = capsys.readouterr().out
    for part in (
        "features of 4 images in 2 shards",
        "64 cells x 24 channels",
        "example image-3 (p3.png)",
        f"data.manifest={manifest} vision.encoder=efficientnet_lite0 vision.image_size=32 vision.stage=block2",
        f"vision.weights={encoder_file} vision.cells=64 vision.channels=24",
        f"next: python data_prep/verify.py {manifest}",
    ):
        assert part in said


def test_two_pictures_of_one_image_are_stored_one_after_the_other(tmp_path, build, pictures, encoder_file):
    build(_data_set(tmp_path, {"easy_vqa": {"left-right": ["p0.png", "p1.png"], "right-left": ["p1.png", "p0.png"]}}))
    reader = Reader(Manifest.load(tmp_path / "manifest.json"))
    first, second = reader.image("left-right"), reader.image("right-left")
    assert first.shape == (128, 24)
    assert np.array_equal(first[:64], second[64:]) and np.array_equal(first[64:], second[:64])
    alone = load_encoder(_config(encoder_file)).encode([pictures / "p0.png"])[0].half().numpy()
    assert np.allclose(first[:64], alone, atol=1e-2) and abs(first[:64] - first[64:]).mean() > 0.1


def test_a_killed_build_goes_on_to_the_bytes_of_an_undisturbed_one(tmp_path, build, pictures, encoder_file):
    """The fifth of ten pictures is a pipe that nobody writes to: the build waits there until it is killed."""
    images, whole, killed = tmp_path / "pictures", tmp_path / "whole", tmp_path / "killed"
    for folder in (images, whole, killed):
        folder.mkdir()
    for i in range(10):
        (images / f"p{i}.png").write_bytes((pictures / f"p{i}.png").read_bytes())
    (images / "p1.png").write_bytes(b"not a picture")
    flags = {"images": str(images), "shard_size": 2, "batch_size": 32, "max_failed": 0.5}
    build(_data_set(whole, {"easy_vqa": _listed(*range(10))}), **flags)

    manifest = _data_set(killed, {"easy_vqa": _listed(*range(10))})
    (images / "p5.png").unlink()
    os.mkfifo(images / "p5.png")
    given = {"manifest": manifest, "encoder": "efficientnet_lite0", "weights": encoder_file, "image_size": SIZE}
    words = [f"--{name}={value}" for name, value in {**given, "stage": STAGE, "workers": 1, **flags}.items()]
    process = subprocess.Popen([sys.executable, str(ROOT / "data_prep" / "features.py"), *words])
    try:
        while len(list((killed / "features.partial").glob("[0-9]*.json"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Manifest.load(manifest).features is None
    finished = {path: path.stat().st_mtime_ns for path in (killed / "features").iterdir()}
    assert {path.name for path in finished} == {f"features-00000{n}.{kind}" for n in (0, 1) for kind in ("tar", "idx")}
    for child in children:  # a worker notices that its parent is gone
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while "features.py" in Path(f"/proc/{child}/cmdline").read_text():
                time.sleep(0.05)

    (images / "p5.png").unlink()
    (images / "p5.png").write_bytes((pictures / "p5.png").read_bytes())
    build(manifest, **flags)
    assert _bytes(killed) == _bytes(whole)
    assert all(path.stat().st_mtime_ns == changed for path, changed in finished.items()), "finished shards are kept"


def test_unreadable_pictures_are_reported_and_become_missing_features(tmp_path, build, pictures, capsys):
    files = {"good": ["p0.png"], "broken": [str(tmp_path / "broken.png")], "gone": ["gone.png"], "better": ["p1.png"]}
    (tmp_path / "broken.png").write_bytes((pictures / "p2.png").read_bytes()[:500])
    manifest = _data_set(tmp_path, {"easy_vqa": files})
    before = manifest.read_bytes()
    with pytest.raises(SystemExit) as caught:
        build(manifest)
    assert caught.value.code == 1 and manifest.read_bytes() == before
    said = capsys.readouterr()
    assert "2 of 4 images cannot be read" in said.err and "--max_failed 0.01" in said.err
    assert "2 pictures cannot be read" in said.out and str(tmp_path / "features" / "failed.jsonl") in said.out

    build(manifest, max_failed=0.5)
    reader = Reader(Manifest.load(manifest))
    assert [reader.has_image(image) for image in files] == [True, False, False, True]
    failed = [json.loads(line) for line in (tmp_path / "features" / "failed.jsonl").read_text().splitlines()]
    assert [(f["image"], f["file"]) for f in failed] == [
        ("broken", str(tmp_path / "broken.png")),
        ("gone", str(pictures / "gone.png")),
    ]
    assert "truncated" in failed[0]["reason"] and failed[1]["reason"] == "No such file or directory"

    (tmp_path / "broken.png").write_bytes((pictures / "p2.png").read_bytes())
    kept = Manifest.load(manifest).features.shards
    build(manifest, max_failed=0.25)
    shards = Manifest.load(manifest).features.shards
    assert shards[:1] == kept and [shard.samples for shard in shards] == [2, 1], "only the mended picture is encoded"
    assert Reader(Manifest.load(manifest)).has_image("broken")


def test_a_kill_between_the_manifest_and_the_end_changes_nothing(tmp_path, build):
    manifest = _data_set(tmp_path, {"easy_vqa": {**_listed(0, 1), "gone": ["gone.png"]}})
    with pytest.raises(SystemExit):
        build(manifest)
    shutil.copytree(tmp_path / "features.partial", tmp_path / "copy")
    build(manifest, max_failed=0.5)
    before = _bytes(tmp_path)
    (tmp_path / "copy").rename(tmp_path / "features.partial")
    build(manifest, max_failed=0.5)
    assert _bytes(tmp_path) == before and not (tmp_path / "features.partial").exists()


def test_without_a_single_readable_picture_there_are_no_features(tmp_path, build):
    (tmp_path / "broken.png").write_bytes(b"x")
    manifest = _data_set(tmp_path, {"easy_vqa": {"broken": [str(tmp_path / "broken.png")]}})
    with pytest.raises(SystemExit):
        build(manifest, max_failed=1.0)
    assert Manifest.load(manifest).features is None


def test_when_a_task_is_added_only_its_new_images_are_encoded(tmp_path, build):
    build(_data_set(tmp_path, {"easy_vqa": _listed(0, 1)}))
    kept = Manifest.load(tmp_path / "manifest.json").features
    manifest = _data_set(tmp_path, {"easy_vqa": _listed(0, 1), "shape_caption": _listed(1, 2)})
    write_manifest(tmp_path, Manifest.load(manifest).tasks, kept, {})  # as builders leave it
    build(manifest)
    shards = Manifest.load(manifest).features.shards
    assert shards[:1] == kept.shards and [shard.samples for shard in shards] == [2, 1]
    before = _bytes(tmp_path)
    build(manifest)
    assert _bytes(tmp_path) == before


def test_a_run_goes_on_while_features_are_added_and_only_fresh_deletes_its_lookup(tmp_path, build):
    build(_data_set(tmp_path, {"easy_vqa": _listed(0, 1)}))
    running, kept = Manifest.load(tmp_path / "manifest.json"), _bytes(tmp_path)
    manifest = _data_set(tmp_path, {"easy_vqa": _listed(0, 1, 2)})
    write_manifest(tmp_path, Manifest.load(manifest).tasks, running.features, {})
    build(manifest)
    assert Reader(running).has_image("image-1") and not Reader(running).has_image("image-2")
    assert Reader(Manifest.load(manifest)).has_image("image-2")
    (tmp_path / "manifest.json").write_bytes(kept["manifest.json"])  # as after a kill before it was replaced
    assert Reader(Manifest.load(manifest)).image("image-1").shape == (64, 24)
    assert len(list((tmp_path / "features").glob("lookup-*.idx"))) == 2
    build(manifest, fresh=True)
    [lookup] = (tmp_path / "features").glob("lookup*")
    assert str(lookup.relative_to(tmp_path)) == Manifest.load(manifest).features.lookup


def test_features_of_another_encoder_are_not_mixed_in(tmp_path, build):
    manifest = _data_set(tmp_path, {"easy_vqa": _listed(0, 1)})
    build(manifest)
    before = _bytes(tmp_path)
    with pytest.raises(ValueError, match=r"features holds features made with .*'image_size': 32.*64.*--fresh"):
        build(manifest, image_size=64)
    assert _bytes(tmp_path) == before
    with pytest.raises(ValueError, match="none of the first 2 files"):
        build(manifest, images=str(tmp_path), fresh=True)
    assert _bytes(tmp_path) == before, "nothing is deleted before the pictures are found"
    build(manifest, stage="block1", fresh=True)
    assert Manifest.load(manifest).features.channels == 16
    assert Reader(Manifest.load(manifest)).image("image-1").shape == (256, 16)


def test_what_a_killed_build_left_is_not_mixed_with_another_encoder(tmp_path, build):
    manifest = _data_set(tmp_path, {"easy_vqa": {**_listed(0), "gone": ["gone.png"]}})
    with pytest.raises(SystemExit):
        build(manifest)
    with pytest.raises(ValueError, match=r"features\.partial holds features made with .*'image_size': 32"):
        build(manifest, image_size=64)


def test_tasks_take_turns_and_the_neighbours_in_a_task_remain_neighbours(tmp_path):
    lists = {"easy_vqa": _listed(0, 1, 2, 3, 4), "shape_caption": _listed(7, 1, 8, 9, 5)}
    _data_set(tmp_path, lists)
    wanted = image_lists.wanted_images(tmp_path, [*lists, "movie_rating"], shard_size=2, limit=0)
    assert list(wanted) == [f"image-{n}" for n in (0, 1, 7, 8, 2, 3, 9, 5, 4)]
    few = image_lists.wanted_images(tmp_path, lists, shard_size=1024, limit=4)
    assert list(few) == [f"image-{n}" for n in (0, 1, 7, 8)], "a few of every task"


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            {"easy_vqa": {"a": ["p0.png"]}, "shape_caption": {"a": ["p1.png"]}},
            r"shape_caption.jsonl, line 1: image 'a'",
        ),
        ({"easy_vqa": {"a": ["p0.png"], "b": ["p0.png", "p1.png"]}}, r"same number of files \('a' has 1, 'b' has 2\)"),
        ({"easy_vqa": {"a": []}}, r"easy_vqa.jsonl, line 1: field 'files' must list one path or several"),
        ({"easy_vqa": {"a": ["x.png"], "b": ["y.png"]}}, r"--images .*: none of the first 2 files .* example x.png"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(tmp_path, build, lists, message):
    with pytest.raises(ValueError, match=message):
        build(_data_set(tmp_path, lists))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"images": "/no/such"}, "--images: /no/such is not a folder"),
        ({"images": ""}, "--images: names no folder"),
        ({"device": "gpu"}, "--device must be one of auto, cpu, cuda, got 'gpu'"),
        ({"workers": -1}, "--workers must be a whole number, at least 0, got -1"),
        ({"max_failed": 2}, "--max_failed must be a share, from 0 to 1, got 2"),
        ({"encoder": "resnet1"}, "unknown encoder 'resnet1'"),
    ],
)
def test_bad_flags_are_named(tmp_path, build, flags, message):
    with pytest.raises(ValueError, match=message):
        build(_data_set(tmp_path, {"easy_vqa": _listed(0)}), **flags)


def test_a_data_set_without_lists_of_images_is_refused(tmp_path, build):
    manifest = _data_set(tmp_path, {"easy_vqa": _listed(0)})
    (tmp_path / "images" / "easy_vqa.jsonl").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match="no list of images for any of easy_vqa"):
            build(manifest)
        (tmp_path / "images" / "easy_vqa.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"--manifest .*: is not the manifest\.json"):
        build(tmp_path)


def test_features_come_in_order_from_several_processes(pictures, encoder_file):
    config, items = _config(encoder_file), _items(pictures)
    found = [pair for batch in encoding.encode(encoding.cut(items, 2), config, workers=2) for pair in batch]
    assert [image for image, _ in found] == [item.image for item in items]
    expected = load_encoder(config).encode([picture for item in items for picture in item.pictures])
    for (_, cells), wanted in zip(found, expected, strict=True):
        assert cells.dtype == np.float16 and np.allclose(cells, wanted.numpy(), atol=1e-2)


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_where_one_process_encodes_for_all_the_features_are_the_same(pictures, encoder_file, device):
    config, batches = _config(encoder_file), list(encoding.cut([*_items(pictures), BROKEN], 2))
    several, one = (
        [pair for batch in encoding.encode(batches, config, workers=0, device=where) for pair in batch]
        for where in ("cpu", device)
    )
    assert [image for image, _ in one] == [image for image, _ in several] and len(one) == 6
    for (_, cells), (_, wanted) in zip(one[:5], several[:5], strict=True):
        assert np.allclose(cells, wanted, atol=0 if device == "cpu:0" else 1e-2)
    assert isinstance(one[5][1], UnreadableImage) and str(one[5][1]) == str(several[5][1])


def _items(pictures: Path) -> list[encoding.Item]:
    return [encoding.Item(f"i{n}", (Image.open(pictures / f"p{n}.png"),)) for n in (3, 0, 2, 1, 4)]


def test_features_that_float16_cannot_hold_are_reported_like_unreadable_pictures(tmp_path, pictures):
    model = EfficientNetLite0()
    torch.nn.init.constant_(model.blocks[0]._project_conv.weight, 1e9)
    torch.save(model.state_dict(), tmp_path / "large.pth")
    config = VisionConfig("efficientnet_lite0", str(tmp_path / "large.pth"), SIZE, "block1")
    items = [encoding.Item("large", (pictures / "p0.png",))]
    [[(image, reason)]] = encoding.encode([items], config, workers=0)
    assert image == "large" and isinstance(reason, UnreadableImage) and "not finite in float16" in str(reason)
    with pytest.raises(UnreadableImage, match=r"p0\.png"):
        list(encoding.encode_readable(items, config, workers=0))
