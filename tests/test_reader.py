"""Random access gives what a plain webdataset reader gives, and no damage goes unnoticed or unnamed."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import damage
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.index import read_index, refresh_index
from hyperpelt_ds.data.manifest import MANIFEST, FeatureSet, Manifest, write_manifest
from hyperpelt_ds.data.reader import DamagedSample, Reader

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
    return Manifest.load(write_manifest(folder, tasks, features, {}))


def copy(manifest: Manifest, to: Path) -> Path:
    return Path(shutil.copytree(manifest.folder.root, to / "set"))


def foreign(folder: Path, members: dict[str, bytes]) -> Reader:
    """A reader of one sample 'k' of task 'vqa' that our own writer would not have written."""
    tar = folder / "vqa/train-000000.tar"
    tar.parent.mkdir()
    with tar.open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        writer.write({"__key__": "k", **members})
    index, _ = refresh_index(tar)
    shard = shards.list_shard("vqa/train-000000.tar", index)
    return Reader(Manifest.load(write_manifest(folder, {"vqa": {"train": [shard]}}, None, {})))


def read_all(manifest: Manifest, count: int) -> dict[int, Sample | DamagedSample]:
    """Every training sample of 'vqa', or what is wrong with it."""
    reader, found = Reader(manifest), {}
    for i in range(count):
        try:
            found[i] = reader.sample("vqa", "train", i)
        except DamagedSample as error:
            found[i] = error
    return found


def test_random_access_gives_what_webdataset_reads_in_sequence(manifest):
    paths = [f"{manifest.folder.root}/{shard.path}" for shard in manifest.tasks["vqa"]["train"]]
    expected = [
        Sample(key=r["__key__"], **{**r["json"], "references": tuple(r["json"].get("references", ()))})
        for r in webdataset.WebDataset(paths, shardshuffle=False).decode()
    ]
    reader = Reader(manifest)
    for i in (9, 0, 4, 3, 8, 7, 1, 2, 5, 6):
        assert reader.sample("vqa", "train", i) == expected[i] == SAMPLES[i]
        assert reader.place("vqa", "train", i) == (f"vqa/train-{i // 4:06d}.tar", SAMPLES[i].key)
        assert reader.lengths("vqa", "train", i) == (len(SAMPLES[i].source.encode()), len(SAMPLES[i].target))
        assert reader.length("vqa", "train", i) == len((SAMPLES[i].source + SAMPLES[i].target).encode())


def test_images_are_read_by_id_and_once_each(manifest):
    arrays = Reader(manifest).images(SAMPLES)
    assert sorted(arrays) == ["img0", "img1", "img2", "img3", "img4"]
    for image, array in IMAGES:
        assert arrays[image].dtype == np.float16
        np.testing.assert_array_equal(arrays[image], array)
        assert Reader(manifest).has_image(image) and not Reader(manifest).has_image(image + "x")


def test_an_image_is_found_through_its_own_shards_index_alone(manifest, tmp_path):
    folder = copy(manifest, tmp_path)
    for number in (0, 2):
        (folder / f"features/features-{number:06d}.idx").write_bytes(b"")
    reader = Reader(Manifest.load(folder / MANIFEST))
    assert all(reader.has_image(image) for image, _ in IMAGES)
    np.testing.assert_array_equal(reader.image("img3"), dict(IMAGES)["img3"])


def test_a_place_outside_the_split_is_an_error(manifest):
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"sample {index} of task 'vqa', split 'train', which has 10 samples"):
            Reader(manifest).sample("vqa", "train", index)


@settings(deadline=None)
@given(data=st.data())
def test_a_changed_byte_anywhere_in_a_sample_or_its_header_is_found_and_named(tmp_path_factory, manifest, data):
    folder = copy(manifest, tmp_path_factory.mktemp("damaged"))
    path, position, key = data.draw(
        st.sampled_from([("vqa/train-000001.tar", 2, "key6"), ("features/features-000001.tar", 1, "img3")])
    )
    start, size = read_index(folder / path).span(position)
    content = bytearray((folder / path).read_bytes())
    content[start + data.draw(st.integers(0, size - 1))] ^= data.draw(st.integers(1, 255))
    (folder / path).write_bytes(content)
    reader = Reader(Manifest.load(folder / MANIFEST))
    with pytest.raises(DamagedSample, match=rf"shard {path}, key '{key}': crc32 is \w+, expected \w+") as caught:
        reader.sample("vqa", "train", 6) if "vqa" in path else reader.image("img3")
    assert (caught.value.shard, caught.value.key) == (path, key)
    assert reader.sample("vqa", "train", 5) == SAMPLES[5]


@pytest.mark.parametrize("kind", damage.ONE | damage.REST)
@pytest.mark.parametrize("position", [1, 3])
def test_every_kind_of_damage_hurts_its_own_samples_and_no_other(manifest, tmp_path, kind, position):
    folder = copy(manifest, tmp_path)
    hurt = {4 + i for i in damage.damage(folder, "vqa/train-000001.tar", kind, position)}
    found = read_all(Manifest.load(folder / MANIFEST), 10)
    assert {i for i, sample in found.items() if isinstance(sample, DamagedSample)} == hurt
    assert all(found[i] == SAMPLES[i] for i in set(range(10)) - hurt)
    for i in hurt:
        assert (found[i].shard, found[i].key) == ("vqa/train-000001.tar", SAMPLES[i].key)
        if kind.startswith("cut"):
            assert found[i].reason.startswith("cut short: the tar ends at byte ")
        else:
            assert found[i].reason.startswith(("crc32 is ", "cut short: "))


@pytest.mark.parametrize("kind", damage.ONE | damage.REST)
def test_every_kind_of_damage_to_features_is_found(manifest, tmp_path, kind):
    folder = copy(manifest, tmp_path)
    hurt = damage.damage(folder, "features/features-000000.tar", kind, 1)
    reader = Reader(Manifest.load(folder / MANIFEST))
    for i, (image, array) in enumerate(IMAGES):
        if i in hurt:
            with pytest.raises(
                DamagedSample, match=rf"features-000000\.tar, key '{image}': (crc32 is|cut short: the tar)"
            ):
                reader.image(image)
        else:
            np.testing.assert_array_equal(reader.image(image), array)


def test_a_shard_or_an_index_that_cannot_be_read_hurts_only_its_own_samples(manifest, tmp_path):
    data = Manifest.load(copy(manifest, tmp_path) / MANIFEST)
    folder = Path(data.folder.root)
    (folder / "vqa/train-000000.tar").unlink()
    (folder / "vqa/train-000001.idx").unlink()
    (folder / "vqa/train-000002.idx").write_bytes((folder / "vqa/train-000002.idx").read_bytes()[:-1] + b"\xff")
    found = read_all(data, 10)
    for i in range(4):
        assert str(found[i]).startswith(f"shard vqa/train-000000.tar, key 'key{i}': cannot be read: ")
    for i in range(4, 8):
        assert str(found[i]).startswith("shard vqa/train-000001.tar, key '': vqa/train-000001.idx cannot be read: ")
    for i in (8, 9):
        assert "vqa/train-000002.idx cannot be used: " in str(found[i]) and "sha256 is " in str(found[i])
    reader = Reader(data)
    assert reader.place("vqa", "train", 5) == ("vqa/train-000001.tar", "")
    assert reader.lengths("vqa", "train", 5) == (0, 0) and reader.length("vqa", "train", 8) == 0
    lookup = data.features.lookup
    (folder / lookup).unlink()
    with pytest.raises(DamagedSample, match=rf"shard {lookup}, key '': {lookup} cannot be read"):
        reader.image("img0")


def test_a_run_reads_on_with_the_features_of_its_manifest_when_others_are_published(manifest, tmp_path):
    folder = copy(manifest, tmp_path)
    running = Manifest.load(folder / MANIFEST)
    assert running.features is not None
    fewer = dataclasses.replace(running.features, shards=running.features.shards[:1])
    after = Manifest.load(write_manifest(folder, running.tasks, fewer, {}))
    for image, array in IMAGES:
        np.testing.assert_array_equal(Reader(running).image(image), array)
        assert Reader(after).has_image(image) == (image in ("img0", "img1"))


def test_a_manifest_that_does_not_name_its_lookup_is_read_as_before(manifest, tmp_path):
    folder = copy(manifest, tmp_path)
    tree = json.loads((folder / MANIFEST).read_text())
    (folder / tree["features"].pop("lookup")).rename(folder / "features/lookup.idx")
    (folder / MANIFEST).write_text(json.dumps(tree))
    for image, array in IMAGES:
        np.testing.assert_array_equal(Reader(Manifest.load(folder / MANIFEST)).image(image), array)


def test_an_index_of_another_number_of_samples_is_refused(manifest, tmp_path):
    folder = copy(manifest, tmp_path)
    tree = json.loads((folder / MANIFEST).read_text())
    tree["tasks"]["vqa"]["train"][0]["samples"] = 5
    (folder / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(DamagedSample, match=r"train-000000\.idx has 4 samples, the manifest says 5"):
        Reader(Manifest.load(folder / MANIFEST)).sample("vqa", "train", 4)


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
        foreign(tmp_path, {"json": json.dumps(fields).encode()}).sample("vqa", "train", 0)


def test_optional_fields_may_be_missing(tmp_path):
    fields = {"task": "vqa", "source": "x", "target": "y"}
    sample = foreign(tmp_path, {"json": json.dumps(fields).encode(), "txt": b"beside it"}).sample("vqa", "train", 0)
    assert sample == Sample("k", "vqa", "x", "y")


def test_a_sample_without_its_member_is_refused(tmp_path):
    with pytest.raises(DamagedSample, match=r"key 'k': has no \.json member"):
        foreign(tmp_path, {"txt": b"text", "js": b"{}"}).sample("vqa", "train", 0)


@pytest.mark.parametrize("content", [b"{", b"\xff{}", b"", b"[" * 50])
def test_a_sample_that_is_no_json_is_refused_though_its_checksum_is_right(manifest, tmp_path, content):
    folder = copy(manifest, tmp_path)
    damage.rewrite(folder, "vqa/train-000001.tar", 1, content)
    found = read_all(Manifest.load(folder / MANIFEST), 10)
    assert [i for i, sample in found.items() if isinstance(sample, DamagedSample)] == [5]
    assert str(found[5]).startswith("shard vqa/train-000001.tar, key 'key5': not JSON: ")


def test_an_image_without_features_names_image_and_sample(manifest):
    orphan = Sample("key77", "vqa", "x", "y", image="img77")
    reason = "shard features, key 'img77': no features are stored for this image.*sample 'key77' of task 'vqa'"
    with pytest.raises(DamagedSample, match=reason):
        Reader(manifest).images([SAMPLES[1], orphan])
    with pytest.raises(DamagedSample, match=reason):
        Reader(dataclasses.replace(manifest, features=None)).images([orphan])


def test_damage_to_an_image_names_its_shard_and_the_sample_that_needs_it(manifest, tmp_path):
    folder = copy(manifest, tmp_path)
    damage.damage(folder, "features/features-000001.tar", "flipped data byte", 1)
    reason = (
        r"crc32 is \w+, expected \w+ \(image 'img3' in features/features-000001\.tar, of sample 'key3' of task 'vqa'\)"
    )
    with pytest.raises(DamagedSample, match=reason):
        Reader(Manifest.load(folder / MANIFEST)).images(SAMPLES)


def test_features_of_another_shape_name_image_shard_and_both_shapes(manifest):
    assert manifest.features is not None
    other = dataclasses.replace(manifest, features=dataclasses.replace(manifest.features, cells=2, channels=3))
    reason = (
        r"features-000001\.tar, key 'img2': image has float16 features of shape \(3, 2\), expected float16 of \(2, 3\)"
    )
    with pytest.raises(DamagedSample, match=reason):
        Reader(other).image("img2")


@pytest.mark.parametrize("dtype", [np.float32, np.int64, object])
def test_features_stored_by_others_are_read_if_they_are_floats(tmp_path, manifest, dtype):
    folder = copy(manifest, tmp_path)
    path = "features/features-000000.tar"
    arrays = {key: np.random.default_rng(1).normal(size=(3, 2)).astype(dtype) for key in ("img0", "img1")}
    with (folder / path).open("wb") as file, webdataset.TarWriter(file, encoder=False) as writer:
        for key, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            writer.write({"__key__": key, "npy": content.getvalue()})
    refresh_index(folder / path)
    damage.relist(folder, path, read_index(folder / path))
    reader = Reader(Manifest.load(folder / MANIFEST))
    if dtype is np.float32:
        np.testing.assert_array_equal(reader.image("img1"), arrays["img1"])
    else:
        with pytest.raises(
            DamagedSample, match=r"features-000000\.tar, key 'img1': (image has int64|not a \.npy array)"
        ):
            reader.image("img1")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04zip", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f2'"])
def test_features_that_are_no_array_are_refused_though_their_checksum_is_right(manifest, tmp_path, content):
    folder = copy(manifest, tmp_path)
    damage.rewrite(folder, "features/features-000001.tar", 0, content)
    reader = Reader(Manifest.load(folder / MANIFEST))
    with pytest.raises(DamagedSample, match=r"features-000001\.tar, key 'img2': not a \.npy array"):
        reader.image("img2")
    np.testing.assert_array_equal(reader.image("img3"), dict(IMAGES)["img3"])


def test_indexes_last_used_stay_in_memory_up_to_a_limit(manifest, monkeypatch):
    one = Reader(manifest).index(manifest.shards("vqa", "train")[0]).nbytes
    monkeypatch.setattr("hyperpelt_ds.data.reader.INDEX_BYTES", 2 * one)
    reader = Reader(manifest)
    for i in (0, 4, 1, 8):
        assert reader.sample("vqa", "train", i) == SAMPLES[i]
    first, second, third = manifest.shards("vqa", "train")
    kept = reader.index(first), reader.index(third)
    assert reader.index(first) is kept[0] and reader.index(third) is kept[1]
    reader.index(second)
    assert reader.index(third) is kept[1] and reader.index(first) is not kept[0]


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
