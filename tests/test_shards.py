"""What is on disk: plain webdataset shards, each with its index, and a manifest that notices what is missing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.index import read_index
from hyperpelt_ds.data.manifest import MANIFEST, FeatureSet, Manifest, write_manifest

SAMPLES = [Sample(f"key{i}", "topic", f"text número {i}", "art" * (i % 3), f"item{i}", None, None) for i in range(10)]
IMAGES = [(f"img{i}", np.full((3, 2), i, dtype=np.float32)) for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    save(folder)
    return folder


def save(folder: Path) -> Path:
    tasks = {"topic": {"train": shards.write_task(folder, "topic", "train", SAMPLES, per_shard=4)}}
    features = FeatureSet(3, 2, {"name": "none"}, shards.write_features(folder, IMAGES, per_shard=4))
    return write_manifest(folder, tasks, features, {"made": "by a test"})


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


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
    assert read_index(tmp_path / shard.path).lengths.tolist() == [2, 2] and shard.longest_target == 1


def test_index_says_where_each_member_lies_and_how_long_its_text_is(folder):
    tar = folder / "topic/train-000000.tar"
    index, content = read_index(tar), tar.read_bytes()
    assert [index.key(i) for i in range(len(index))] == [sample.key for sample in SAMPLES[:4]]
    assert index.lengths.tolist() == [len((sample.source + sample.target).encode()) for sample in SAMPLES[:4]]
    assert index.target_lengths.tolist() == [len(sample.target) for sample in SAMPLES[:4]]
    assert index.tar_bytes == len(content)
    for i, sample in enumerate(SAMPLES[:4]):
        [(suffix, offset, size)] = index.members(i)
        assert suffix == "json"
        assert json.loads(content[offset : offset + size])["source"] == sample.source


def test_plain_tar_lists_the_samples(folder):
    done = subprocess.run(
        ["tar", "tf", "topic/train-000002.tar"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["key8.json", "key9.json"]


def test_the_same_samples_give_the_same_bytes(folder, tmp_path):
    save(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert len(files) == 2 * (3 + 2) + 2 and not any("partial" in path.name for path in files)
    assert all((folder / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)


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
        shards.write_task(tmp_path, "topic", "train", [sample._replace(task="other")])
    with pytest.raises(ValueError, match="key 'key0' comes twice in topic/train"):
        shards.write_task(tmp_path, "topic", "train", [*SAMPLES, sample], per_shard=4)
    with pytest.raises(ValueError, match="topic/train: no samples"):
        shards.write_task(tmp_path, "topic", "train", [])
    with pytest.raises(ValueError, match="task 'features'"):
        shards.write_task(tmp_path, "features", "train", [])
    with pytest.raises(ValueError, match=r"split '\.\./up'"):
        shards.write_task(tmp_path, "topic", "../up", [])
    with pytest.raises(ValueError, match="'key0' of task 'topic': text that is not Unicode"):
        shards.write_task(tmp_path, "topic", "train", [sample._replace(source="\ud83d")])


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
    manifest = Manifest.load(folder / MANIFEST)
    assert manifest.path == str(folder / MANIFEST) and manifest.folder.root == str(folder)
    assert manifest.about == {"made": "by a test"}
    assert [shard.samples for shard in manifest.tasks["topic"]["train"]] == [4, 4, 2]
    assert [shard.longest_target for shard in manifest.tasks["topic"]["train"]] == [6, 6, 6]
    assert manifest.count("topic", "train") == 10 and manifest.count("topic", "test") == 0
    assert manifest.features is not None and (manifest.features.cells, manifest.features.channels) == (3, 2)
    assert manifest.features.encoder == {"name": "none"}
    with pytest.raises(ValueError, match=r"task 'mood' is not in .*manifest\.json; it holds topic"):
        manifest.count("mood", "train")


def test_digest_names_the_content_and_not_the_place(folder, tmp_path):
    digest = Manifest.load(folder / MANIFEST).digest
    moved = copy(folder, tmp_path)
    assert Manifest.load(moved / MANIFEST).digest == digest
    changed = [SAMPLES[0]._replace(target="other"), *SAMPLES[1:]]
    tasks = {"topic": {"train": shards.write_task(moved, "topic", "train", changed, per_shard=4)}}
    assert Manifest.load(write_manifest(moved, tasks, None, {})).digest != digest


@pytest.mark.parametrize("shard", ["topic/train-000001", "features/features-000001"])
def test_loading_names_a_shard_that_is_missing_and_reads_no_other_file(folder, tmp_path, shard):
    for suffix in (".tar", ".idx"):
        moved = copy(folder, tmp_path / suffix)
        (moved / shard).with_suffix(suffix).unlink()
        with pytest.raises(ValueError, match=rf"shard {shard}\.tar: missing: .*{shard}\{suffix} does not exist; copy"):
            Manifest.load(moved / MANIFEST)
    moved = copy(folder, tmp_path / "unread")
    for file in moved.rglob("*-0*"):
        file.write_bytes(b"x" * file.stat().st_size)
    assert Manifest.load(moved / MANIFEST).digest == Manifest.load(folder / MANIFEST).digest


def test_loading_warns_of_tars_of_another_size_since_what_is_damaged_will_be_left_out(folder, tmp_path, caplog):
    moved = copy(folder, tmp_path)
    for name in ("topic/train-000001.tar", "features/features-000000.tar"):
        (moved / name).write_bytes((moved / name).read_bytes()[:-512])
    Manifest.load(moved / MANIFEST)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "topic/train-000001.tar: size differs from the manifest: 9728 bytes, not 10240" in record.message
    assert ", and 1 more shards. What is damaged in them is left out" in record.message
    assert f"`python data_prep/verify.py {moved / MANIFEST}`" in record.message


def test_features_that_are_stored_twice_are_refused_when_the_manifest_is_written(tmp_path):
    once = shards.write_features(tmp_path / "a", IMAGES)
    again = shards.write_features(tmp_path / "b", IMAGES[3:])
    for name in ("a", "b"):
        (tmp_path / name / "features").rename(tmp_path / f"features-{name}")
    listed = [
        dataclasses.replace(shard, path=f"features-{name}/features-000000.tar")
        for name, [shard] in (("a", once), ("b", again))
    ]
    with pytest.raises(ValueError, match=r"image 'img[34]' are stored twice, in features-a/.*tar and features-b/.*tar"):
        write_manifest(tmp_path, {}, FeatureSet(3, 2, {}, listed), {})
    assert not (tmp_path / MANIFEST).exists() and not list(tmp_path.rglob("lookup*"))


def test_a_lookup_is_named_by_its_content_and_leaves_others_alone(folder, tmp_path):
    moved = copy(folder, tmp_path)
    first = Manifest.load(moved / MANIFEST)
    content = (moved / first.features.lookup).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert first.features.lookup == f"features/lookup-{sha256[:12]}.idx" and first.features.lookup_sha256 == sha256
    fewer = dataclasses.replace(first.features, shards=first.features.shards[:1])
    second = Manifest.load(write_manifest(moved, first.tasks, fewer, {}))
    assert (moved / first.features.lookup).read_bytes() == content
    assert second.features.lookup != first.features.lookup and (moved / second.features.lookup).is_file()


def test_loading_names_a_lookup_that_is_missing_unless_it_is_told_to_look_at_no_files(folder, tmp_path):
    moved = copy(folder, tmp_path)
    lookup = Manifest.load(moved / MANIFEST).features.lookup
    for path in moved.rglob("lookup-*.idx"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"manifest\.json: missing: .*{lookup} does not exist; copy"):
        Manifest.load(moved / MANIFEST)
    (moved / "topic/train-000000.tar").unlink()
    assert Manifest.load(moved / MANIFEST, check_files=False).digest == Manifest.load(folder / MANIFEST).digest


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 2, "tasks": {"a": 3}, "features": null, "about": {}}', "\ud83d"]
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.json"
    with pytest.raises(ValueError, match=r"manifest\.json: no such file"):
        Manifest.load(path)
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest"):
        Manifest.load(path)
    with pytest.raises(ValueError, match=rf"manifest {tmp_path}: cannot be read: .*directory"):
        Manifest.load(tmp_path)


def test_a_manifest_of_an_older_version_is_refused_and_says_what_to_do(folder, tmp_path):
    manifest = copy(folder, tmp_path) / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 1}))
    with pytest.raises(ValueError, match="version 1, this program reads version 2; build the data again with the comm"):
        Manifest.load(manifest)


def test_a_killed_write_leaves_nothing_under_the_final_names(tmp_path):
    def samples() -> Iterator[Sample]:
        yield from SAMPLES[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_task(tmp_path, "topic", "train", samples(), per_shard=4)
    found = sorted(path.name for path in (tmp_path / "topic").iterdir() if not path.name.endswith(".partial"))
    assert found == ["train-000000.idx", "train-000000.tar"]
    assert read_index(tmp_path / "topic/train-000000.tar").key(3) == "key3"
