"""What is on disk: plain webdataset shards, an index that tells the truth, a manifest that notices any change."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards

SAMPLES = [Sample(f"key{i}", "topic", f"text número {i}", "art" * (i % 3), f"item{i}", None, None) for i in range(10)]
IMAGES = [(f"img{i}", np.full((3, 2), i, dtype=np.float32)) for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    save(folder)
    return folder


def save(folder: Path) -> Path:
    tasks = {"topic": {"train": shards.write_task(folder, "topic", "train", SAMPLES, per_shard=4)}}
    features = shards.FeatureSet(3, 2, {"name": "none"}, shards.write_features(folder, IMAGES, per_shard=4))
    return shards.write_manifest(folder, tasks, features, {"made": "by a test"})


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_webdataset_reads_from_the_shards_exactly_what_was_written(folder):
    paths = [str(folder / f"topic/train-{i:06d}.tar") for i in range(3)]
    records = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [Sample(key=record["__key__"], **record["json"]) for record in records] == SAMPLES
    paths = [str(folder / f"features/features-{i:06d}.tar") for i in range(2)]
    records = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [record["__key__"] for record in records] == [image for image, _ in IMAGES]
    for record, (_, array) in zip(records, IMAGES, strict=True):
        assert record["npy"].dtype == np.float16
        np.testing.assert_array_equal(record["npy"], array)


def test_references_are_stored_where_there_are_any_and_change_no_other_bytes(tmp_path):
    plain, several = Sample("a", "vqa", "x", "y"), Sample("b", "vqa", "x", "y", references=("y", "y", "né"))
    [shard] = shards.write_task(tmp_path, "vqa", "train", [plain, several])
    records = list(webdataset.WebDataset(str(tmp_path / shard.path), shardshuffle=False).decode())
    assert records[0]["json"] == {"task": "vqa", "source": "x", "target": "y", "item": "", "image": None, "group": None}
    assert records[1]["json"] == {**records[0]["json"], "references": ["y", "y", "né"]}
    assert shards.read_index(tmp_path / shard.path).lengths == [2, 2]


def test_index_says_where_each_member_lies_and_how_long_its_text_is(folder):
    tar = folder / "topic/train-000000.tar"
    index, content = shards.read_index(tar), tar.read_bytes()
    assert index.keys == [sample.key for sample in SAMPLES[:4]]
    assert index.lengths == [len((sample.source + sample.target).encode()) for sample in SAMPLES[:4]]
    assert index.bytes == len(content)
    for sample, [(suffix, offset, size)] in zip(SAMPLES, index.members, strict=False):
        assert suffix == "json"
        assert json.loads(content[offset : offset + size])["source"] == sample.source


def test_the_same_samples_give_the_same_bytes(folder, tmp_path):
    save(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert len(files) == 2 * (3 + 2) + 1 and not any("partial" in path.name for path in files)
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)


def test_index_of_a_foreign_shard_with_several_members_a_sample(tmp_path):
    members = [("dir/a.cls", b"3"), ("dir/a.jpg", b"xyz"), ("README", b"no suffix"), ("b.cls", b"1")]
    index = shards.index_shard(make_tar(tmp_path / "foreign.tar", members))
    assert index.keys == ["dir/a", "b"]
    assert [[(suffix, size) for suffix, _, size in entry] for entry in index.members] == [
        [("cls", 1), ("jpg", 3)],
        [("cls", 1)],
    ]
    assert index.lengths == [0, 0]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.json", b"{}"), ("a.json", b"{}")], "'a' comes twice"),
        ([("a.json", b"{}"), ("b.json", b"{}"), ("a.jpg", b"")], "'a' comes twice, or its members are not adjacent"),
        ([], "holds no samples"),
        ([("a.json", b"{")], "sample 'a' is not JSON"),
    ],
)
def test_a_shard_that_no_reader_could_split_into_samples_is_refused(tmp_path, members, reason):
    with pytest.raises(ValueError, match=rf"bad\.tar.*{reason}"):
        shards.index_shard(make_tar(tmp_path / "bad.tar", members))


@settings(deadline=None)
@given(cut=st.integers(min_value=0, max_value=4 * 1024 - 1))
def test_a_tar_cut_anywhere_before_its_end_mark_is_refused(tmp_path_factory, cut):
    # four samples of a header and a content block each; Python's tar reader alone accepts a cut at every header
    folder = tmp_path_factory.mktemp("cut")
    tar = make_tar(folder / "cut.tar", [(f"{i}.json", b"{}") for i in range(4)])
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cut\.tar: (damaged|holds no samples)"):
        shards.index_shard(tar)


@pytest.mark.parametrize("damage", [b"\0" * 512, b"\xff" * 512])
def test_a_tar_with_a_damaged_header_is_refused(tmp_path, damage):
    tar = make_tar(tmp_path / "damaged.tar", [(f"{i}.json", b"{}") for i in range(4)])
    content = bytearray(tar.read_bytes())
    content[2048:2560] = damage
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.tar: damaged or cut: no proper end after byte 2048"):
        shards.index_shard(tar)


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "line\nbreak", pytest.param("é" * 46, id="long")])
def test_keys_and_image_ids_that_webdataset_would_split_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="must have 1 to 90 bytes and no"):
        shards.write_task(tmp_path, "topic", "train", [Sample(key, "topic", "x", "y")])
    with pytest.raises(ValueError, match="image id of sample 'k' of task 'topic'"):
        shards.write_task(tmp_path, "topic", "train", [Sample("k", "topic", "x", "y", image=key)])
    with pytest.raises(ValueError, match="must have 1 to 90 bytes and no"):
        shards.write_features(tmp_path, [(key, IMAGES[0][1])])


def test_samples_that_do_not_belong_are_refused_by_name(tmp_path):
    sample = SAMPLES[0]
    with pytest.raises(ValueError, match="'key0' is of task 'other'"):
        shards.write_task(tmp_path, "topic", "train", [dataclasses.replace(sample, task="other")])
    with pytest.raises(ValueError, match="key 'key0' comes twice in topic/train"):
        shards.write_task(tmp_path, "topic", "train", [*SAMPLES, sample], per_shard=4)
    with pytest.raises(ValueError, match="topic/train: no samples"):
        shards.write_task(tmp_path, "topic", "train", [])
    with pytest.raises(ValueError, match="task 'features'"):
        shards.write_task(tmp_path, "features", "train", [])
    with pytest.raises(ValueError, match=r"split '\.\./up'"):
        shards.write_task(tmp_path, "topic", "../up", [])
    with pytest.raises(ValueError, match="'key0' of task 'topic': text that is not Unicode"):
        shards.write_task(tmp_path, "topic", "train", [dataclasses.replace(sample, source="\ud83d")])


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (("b", np.zeros((3, 3))), r"image 'b': features of shape \(3, 3\), expected \(cells, channels\) = \(3, 2\)"),
        (("b", np.full((3, 2), 1e6)), "image 'b': .*not finite in float16"),
        (("b", np.full((3, 2), np.nan)), "image 'b': .*not finite in float16"),
        (("a", np.zeros((3, 2))), "key 'a' comes twice"),
    ],
)
def test_features_that_cannot_be_used_are_refused_by_image(tmp_path, second, reason):
    with pytest.raises(ValueError, match=reason):
        shards.write_features(tmp_path, [("a", np.zeros((3, 2))), second])


def test_manifest_reads_back_what_was_written(folder):
    manifest = shards.Manifest.load(folder / shards.MANIFEST)
    assert manifest.folder == folder and manifest.about == {"made": "by a test"}
    assert [shard.samples for shard in manifest.tasks["topic"]["train"]] == [4, 4, 2]
    assert manifest.count("topic", "train") == 10 and manifest.count("topic", "test") == 0
    assert manifest.features is not None and (manifest.features.cells, manifest.features.channels) == (3, 2)
    assert manifest.features.encoder == {"name": "none"}
    with pytest.raises(ValueError, match=r"task 'mood' is not in .*manifest\.json; it holds topic"):
        manifest.count("mood", "train")
    manifest.verify()


def test_digest_names_the_content_and_not_the_place(folder, tmp_path):
    digest = shards.Manifest.load(folder / shards.MANIFEST).digest
    moved = copy(folder, tmp_path)
    assert shards.Manifest.load(moved / shards.MANIFEST).digest == digest
    changed = [dataclasses.replace(SAMPLES[0], target="other"), *SAMPLES[1:]]
    tasks = {"topic": {"train": shards.write_task(moved, "topic", "train", changed, per_shard=4)}}
    assert shards.Manifest.load(shards.write_manifest(moved, tasks, None, {})).digest != digest


@pytest.mark.parametrize("shard", ["topic/train-000001", "features/features-000001"])
def test_loading_names_the_shard_and_what_differs(folder, tmp_path, shard):
    def damaged(name: str) -> tuple[Path, Path]:
        moved = copy(folder, tmp_path / name)
        return moved / shards.MANIFEST, moved / shard

    manifest, path = damaged("tar")
    path.with_suffix(".tar").unlink()
    with pytest.raises(ValueError, match=rf"{shard}\.tar: missing: .*{shard}\.tar does not exist"):
        shards.Manifest.load(manifest)
    manifest, path = damaged("idx")
    path.with_suffix(".idx.json").unlink()
    with pytest.raises(ValueError, match=rf"{shard}\.tar: missing: .*\.idx\.json does not exist"):
        shards.Manifest.load(manifest)
    manifest, path = damaged("size")
    path.with_suffix(".tar").write_bytes(path.with_suffix(".tar").read_bytes()[:-512])
    with pytest.raises(ValueError, match=rf"{shard}\.tar: size differs from the manifest: \d+ bytes, expected \d+"):
        shards.Manifest.load(manifest)
    manifest, path = damaged("index")
    path.with_suffix(".idx.json").write_bytes(path.with_suffix(".idx.json").read_bytes() + b" ")
    with pytest.raises(ValueError, match=rf"{shard}\.tar: index differs from the manifest"):
        shards.Manifest.load(manifest)


def test_verify_finds_a_flipped_bit_that_loading_does_not_look_for(folder, tmp_path):
    moved = copy(folder, tmp_path)
    tar = moved / "topic/train-000002.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    manifest = shards.Manifest.load(moved / shards.MANIFEST)
    with pytest.raises(ValueError, match=r"topic/train-000002\.tar: content differs from the manifest"):
        manifest.verify()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 1, "tasks": {"a": 3}, "features": null, "about": {}}']
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.json"
    with pytest.raises(ValueError, match="no such file"):
        shards.Manifest.load(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest"):
        shards.Manifest.load(path)


def test_other_versions_are_refused(folder, tmp_path):
    moved = copy(folder, tmp_path)
    index = moved / "topic/train-000000.idx.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "version": 2}))
    with pytest.raises(ValueError, match="its index has version 2, this program reads version 1"):
        shards.read_index(moved / "topic/train-000000.tar")
    manifest = moved / shards.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 2}))
    with pytest.raises(ValueError, match="version 2, this program reads version 1"):
        shards.Manifest.load(manifest)
