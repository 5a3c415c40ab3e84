"""Random access gives what a plain webdataset reader gives, and no damage goes unnoticed or unnamed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.data.shards import FeatureSet, Manifest, Shard

IMAGES = [(f"img{i}", np.random.default_rng(i).normal(size=(3, 2)).astype(np.float16)) for i in range(5)]
SAMPLES = [
    Sample(
        key=f"key{i}",
        task="vqa",
        source=f"what número {i}?",
        target="red" * (i % 3),
        item=f"item{i}",
        image=f"img{i % 5}" if i % 2 else None,
        group="color",
        references=("red", "red", f"né {i}") if i % 4 else (),
    )
    for i in range(10)
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("set")
    tasks = {"vqa": {"train": shards.write_task(folder, "vqa", "train", SAMPLES, per_shard=4)}}
    features = FeatureSet(3, 2, {}, shards.write_features(folder, IMAGES, per_shard=2))
    return Manifest.load(shards.write_manifest(folder, tasks, features, {}))


def foreign(folder: Path, fields: Any, suffix: str = "json") -> Reader:
    """A reader of one sample 'k' of task 'vqa' that our own writer would not have written."""
    tar = folder / "vqa/train-000000.tar"
    tar.parent.mkdir()
    with tar.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        writer.write({"__key__": "k", suffix: json.dumps(fields).encode()})
    index = shards.index_shard(tar)
    shards.index_path(tar).write_text(json.dumps(dataclasses.asdict(index)))
    shard = Shard("vqa/train-000000.tar", 1, index.bytes, index.sha256, "")
    return Reader(Manifest(folder, {"vqa": {"train": [shard]}}, None, {}, ""))


def test_random_access_gives_what_webdataset_reads_in_sequence(manifest):
    paths = [str(manifest.folder / shard.path) for shard in manifest.tasks["vqa"]["train"]]
    expected = [
        Sample(key=r["__key__"], **{**r["json"], "references": tuple(r["json"].get("references", ()))})
        for r in webdataset.WebDataset(paths, shardshuffle=False).decode()
    ]
    reader = Reader(manifest)
    for i in (9, 0, 4, 3, 8, 7, 1, 2, 5, 6):
        assert reader.sample("vqa", "train", i) == expected[i] == SAMPLES[i]
        assert reader.key("vqa", "train", i) == SAMPLES[i].key
        assert reader.length("vqa", "train", i) == len((SAMPLES[i].source + SAMPLES[i].target).encode())


def test_images_are_read_by_id_and_once_each(manifest):
    arrays = Reader(manifest).images(SAMPLES)
    assert sorted(arrays) == ["img0", "img1", "img2", "img3", "img4"]
    for image, array in IMAGES:
        assert arrays[image].dtype == np.float16
        np.testing.assert_array_equal(arrays[image], array)


def test_a_place_outside_the_split_is_an_error(manifest):
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"sample {index} of task 'vqa', split 'train', which has 10 samples"):
            Reader(manifest).sample("vqa", "train", index)


@settings(deadline=None)
@given(data=st.data())
def test_a_changed_byte_anywhere_in_a_sample_is_found_and_named(tmp_path_factory, manifest, data):
    folder = Path(shutil.copytree(manifest.folder, tmp_path_factory.mktemp("damaged") / "set"))
    path, position, key = data.draw(
        st.sampled_from([("vqa/train-000001.tar", 2, "key6"), ("features/features-000001.tar", 1, "img3")])
    )
    [[_, offset, size]] = shards.read_index(folder / path).members[position]
    content = bytearray((folder / path).read_bytes())
    content[offset + data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    (folder / path).write_bytes(content)
    reader = Reader(Manifest.load(folder / shards.MANIFEST))
    with pytest.raises(DamagedSample, match=rf"shard {path}, key '{key}': crc32 is \w+, expected \w+") as caught:
        reader.sample("vqa", "train", 6) if "vqa" in path else reader.image("img3")
    assert (caught.value.shard, caught.value.key) == (path, key)
    assert reader.sample("vqa", "train", 5) == SAMPLES[5]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"task": "vqa", "source": "x"}, "field 'target' is missing"),
        (
            {"task": "vqa", "source": "x", "target": "y", "label": 1},
            "unknown field 'label'; the fields are task, source",
        ),
        ({"task": "vqa", "source": "x", "target": 3}, "field 'target' is of type int"),
        ({"task": "vqa", "source": "x", "target": "y", "image": 3}, "field 'image' is of type int"),
        ({"task": "vqa", "source": "x", "target": "y", "references": "y"}, "field 'references' is of type str"),
        ({"task": "vqa", "source": "x", "target": "y", "references": ["y", 3]}, "field 'references' holds 3, expected"),
        ({"task": "mood", "source": "x", "target": "y"}, "is of task 'mood', but the manifest lists it under 'vqa'"),
        (["vqa", "x", "y"], "expected an object with fields task, source, target, item, image, group, references"),
    ],
)
def test_a_sample_with_other_fields_is_refused_by_name(tmp_path, fields, reason):
    with pytest.raises(DamagedSample, match=rf"shard vqa/train-000000\.tar, key 'k': {reason}"):
        foreign(tmp_path, fields).sample("vqa", "train", 0)


def test_optional_fields_may_be_missing(tmp_path):
    sample = foreign(tmp_path, {"task": "vqa", "source": "x", "target": "y"}).sample("vqa", "train", 0)
    assert sample == Sample("k", "vqa", "x", "y")


def test_a_sample_without_its_member_is_refused(tmp_path):
    with pytest.raises(DamagedSample, match=r"key 'k': has no \.json member"):
        foreign(tmp_path, "text", suffix="txt").sample("vqa", "train", 0)


def test_an_image_without_features_names_image_and_sample(manifest):
    orphan = Sample("key77", "vqa", "x", "y", image="img77")
    reason = "key 'img77': no features are stored for this image.*sample 'key77' of task 'vqa'"
    with pytest.raises(DamagedSample, match=reason):
        Reader(manifest).images([SAMPLES[1], orphan])
    with pytest.raises(DamagedSample, match=reason):
        Reader(dataclasses.replace(manifest, features=None)).images([orphan])


def test_features_of_another_shape_name_image_shard_and_both_shapes(manifest):
    assert manifest.features is not None
    other = dataclasses.replace(manifest, features=dataclasses.replace(manifest.features, cells=2, channels=3))
    reason = r"features-000001\.tar, key 'img2': image features of shape \(3, 2\), expected \(2, 3\)"
    with pytest.raises(DamagedSample, match=reason):
        Reader(other).image("img2")


def test_features_stored_by_others_in_float32_are_read_as_well(tmp_path, manifest):
    folder = Path(shutil.copytree(manifest.folder, tmp_path / "set"))
    tar = folder / "features/features-000000.tar"
    arrays = {key: np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32) for key in ("img0", "img1")}
    with tar.open("wb") as file, webdataset.TarWriter(file) as writer:
        for key, array in arrays.items():
            writer.write({"__key__": key, "npy": array})
    shards.index_path(tar).write_text(json.dumps(dataclasses.asdict(shards.index_shard(tar))))
    np.testing.assert_array_equal(Reader(dataclasses.replace(manifest, folder=folder)).image("img1"), arrays["img1"])


def test_damage_survives_pickling():
    error = pickle.loads(pickle.dumps(DamagedSample("a.tar", "k", "why")))
    assert (error.shard, error.key, error.reason) == ("a.tar", "k", "why") and str(error) == "shard a.tar, key 'k': why"


def test_a_pickled_reader_opens_its_own_files(manifest):
    reader = Reader(manifest)
    reader.sample("vqa", "train", 0)
    assert pickle.loads(pickle.dumps(reader)).sample("vqa", "train", 1) == SAMPLES[1]


def _read_all(reader: Reader) -> list[Sample]:
    return [reader.sample("vqa", "train", i) for _ in range(50) for i in range(10)]


def test_forked_processes_share_open_files_without_disturbing_each_other(manifest):
    reader = Reader(manifest)
    expected = _read_all(reader)  # opens the files that the children inherit
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=lambda: results.put(_read_all(reader) == expected)) for _ in range(3)]
    for child in children:
        child.start()
    assert _read_all(reader) == expected
    assert all(results.get() for _ in children)
    for child in children:
        child.join()
