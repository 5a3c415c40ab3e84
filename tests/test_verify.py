"""Verifying a data set finds all that reading it would stumble over, and more, and never stops at the first."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import damage
import numpy as np
import pytest
import webdataset

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.index import read_index, refresh_index
from hyperpelt_ds.data.lookup import Lookup
from hyperpelt_ds.data.manifest import MANIFEST, FeatureSet, Manifest, write_manifest
from hyperpelt_ds.data.reader import DamagedSample, Reader
from hyperpelt_ds.data.verify import Fault, faults
from hyperpelt_ds.tasks import TASKS

sys.path.insert(0, str(Path(__file__).parents[1] / "data_prep"))  # as when a script of that folder is run

import verify as command

IMAGES = [(f"img{i}", np.random.default_rng(i).normal(size=(3, 2)).astype(np.float16)) for i in range(12)]
SAMPLES = {
    (task, split): [
        Sample(f"{split}{i}", task, f"what is {i}?", "red" * (i % 4), image=f"img{i % 12}" if i % 2 else None)
        for i in range(count)
    ]
    for task, split, count in (("vqa", "train", 40), ("vqa", "test", 5), ("caption", "train", 9))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    tasks: dict[str, dict[str, list[shards.Shard]]] = {"vqa": {}, "caption": {}}
    for (task, split), samples in SAMPLES.items():
        tasks[task][split] = shards.write_task(folder, task, split, samples, per_shard=8)
    write_manifest(folder, tasks, FeatureSet(3, 2, {}, shards.write_features(folder, IMAGES, per_shard=5)), {})
    return folder


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "set"))


def found(folder: Path) -> list[Fault]:
    return list(faults(Manifest.load(folder / MANIFEST, check_files=False)))


def lookup_of(folder: Path) -> str:
    """The path of its features' lookup in a data set."""
    path: str = json.loads((folder / MANIFEST).read_text())["features"]["lookup"]
    return path


def holes(folder: Path) -> set[Fault]:
    """What reading every sample and every image stumbles over."""
    manifest = Manifest.load(folder / MANIFEST)
    reader, holes = Reader(manifest), set()
    for (task, split), samples in SAMPLES.items():
        for i, sample in enumerate(samples):
            try:
                assert reader.sample(task, split, i) == sample
            except DamagedSample as error:
                holes.add(Fault(error.shard, error.key, error.reason))
    for image, array in IMAGES:
        try:
            np.testing.assert_array_equal(reader.image(image), array)
        except DamagedSample as error:
            holes.add(Fault(error.shard, error.key, error.reason))
    return holes


def test_a_data_set_as_it_was_written_has_no_faults(folder):
    assert found(folder) == []


def test_plain_webdataset_and_tar_give_what_the_reader_gives(folder):
    manifest = Manifest.load(folder / MANIFEST)
    reader = Reader(manifest)
    for (task, split), samples in SAMPLES.items():
        tars = [str(folder / shard.path) for shard in manifest.shards(task, split)]
        records = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
        assert [Sample(record["__key__"], **record["json"]) for record in records] == samples
        assert [reader.sample(task, split, i) for i in range(len(samples))] == samples
        listed = [name for tar in tars for name in subprocess.check_output(["tar", "tf", tar], text=True).split()]
        assert listed == [f"{reader.place(task, split, i)[1]}.json" for i in range(len(samples))]
    assert manifest.features is not None
    tars = [str(folder / shard.path) for shard in manifest.features.shards]
    for record in webdataset.WebDataset(tars, shardshuffle=False).decode():
        np.testing.assert_array_equal(reader.image(record["__key__"]), record["npy"])


@pytest.mark.parametrize("kind", damage.ONE | damage.REST)
def test_every_kind_of_damage_is_found_with_the_readers_own_reasons(broken, kind):
    injected = set()
    for path, position in (
        ("vqa/train-000002.tar", 3),
        ("vqa/test-000000.tar", 4),
        ("caption/train-000000.tar", 1),
        ("features/features-000001.tar", 2),
    ):
        index = read_index(broken / path)
        injected |= {(path, index.key(i)) for i in damage.damage(broken, path, kind, position)}
    every = found(broken)
    of_samples = {fault for fault in every if fault.key}
    assert {(fault.shard, fault.key) for fault in of_samples} == injected
    assert of_samples == holes(broken) and len(of_samples) == len(injected)
    of_files = {fault.shard: fault.reason for fault in every if not fault.key}
    assert set(of_files) == {path for path, _ in injected}
    what = (
        "size differs from the manifest: " if kind in damage.REST else "content differs from the manifest: sha256 is "
    )
    assert all(reason.startswith(what) for reason in of_files.values())
    if "header" in kind:
        assert all("; damaged or cut" in reason for reason in of_files.values())


def test_all_faults_are_found_in_one_go(broken):
    (broken / "vqa/train-000000.tar").write_bytes((broken / "vqa/train-000000.tar").read_bytes()[:550])
    (broken / "vqa/train-000001.idx").write_bytes(b"nonsense")
    (broken / "vqa/train-000003.idx").write_bytes((broken / "vqa/train-000004.idx").read_bytes())
    damage.damage(broken, "vqa/train-000004.tar", "header zeroed", 0)
    lookup = lookup_of(broken)
    (broken / "caption/train-000000.tar").unlink()
    (broken / "features/features-000000.idx").unlink()
    (broken / lookup).write_bytes(b"")
    reasons = {(fault.shard, fault.key): fault.reason for fault in found(broken)}
    assert "none of its 8 samples can be read" in reasons["caption/train-000000.tar", ""]
    assert "missing; " in reasons["caption/train-000000.tar", ""]
    assert "vqa/train-000001.idx cannot be used: " in reasons["vqa/train-000001.tar", ""]
    assert "vqa/train-000003.idx cannot be used: " in reasons["vqa/train-000003.tar", ""]
    assert "features/features-000000.idx cannot be read: " in reasons["features/features-000000.tar", ""]
    assert "no image can be found without it" in reasons[lookup, ""]
    cut = {key for shard, key in reasons if shard == "vqa/train-000000.tar"}
    assert cut == {"", *(f"train{i}" for i in range(8))}
    assert reasons["vqa/train-000004.tar", "train32"].startswith("crc32 is ")
    assert len(reasons) == 5 + 9 + 1 + 1


def test_an_index_that_is_not_of_its_tar_is_found_though_all_sums_are_right(broken):
    path = "vqa/test-000000.tar"
    index = read_index(broken / path)
    damage.relist(broken, path, dataclasses.replace(index, keys=index.keys.replace(b"test1", b"best1")))
    reason = "its index is not of what it holds, from key 'test1' on"
    assert found(broken) == [Fault(path, "", reason)]
    damage.relist(broken, path, dataclasses.replace(index, lengths=index.lengths + np.uint32(1)))
    assert found(broken) == [Fault(path, "", "its index is not of what it holds")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON: "),
        (b'{"task": "vqa", "source": "x"}', "field 'target' is missing"),
        (b'{"task": "vqa", "source": "x", "target": 3}', "field 'target' is of type int"),
        (b'{"task": "mood", "source": "x", "target": "y"}', "is of task 'mood', but the manifest lists it under 'vqa'"),
    ],
)
def test_samples_that_were_built_wrong_are_found(broken, content, reason):
    damage.rewrite(broken, "vqa/train-000001.tar", 4, content)
    of_samples = [fault for fault in found(broken) if fault.key]
    assert [(fault.shard, fault.key) for fault in of_samples] == [("vqa/train-000001.tar", "train12")]
    assert of_samples[0].reason.startswith(reason) and set(of_samples) == holes(broken)


def foreign(folder: Path, path: str, members: list[dict[str, object]]) -> None:
    """Puts a tar of others in the place of a shard, with an index that is right."""
    with (folder / path).open("wb") as file, webdataset.TarWriter(file) as writer:
        for member in members:
            writer.write(member)
    refresh_index(folder / path)
    damage.relist(folder, path, read_index(folder / path))


def test_a_sample_without_its_member_is_found(broken):
    fields = {"task": "caption", "source": "x", "target": "y"}
    foreign(broken, "caption/train-000001.tar", [{"__key__": "a", "txt": "text"}, {"__key__": "b", "json": fields}])
    assert found(broken) == [Fault("caption/train-000001.tar", "a", "has no .json member")]


def test_keys_that_come_twice_in_a_split_are_found_and_those_of_other_splits_may_be_the_same(broken):
    fields = {"task": "caption", "source": "x", "target": "y"}
    keys = ["train3", "train5", "new"]
    foreign(broken, "caption/train-000001.tar", [{"__key__": key, "json": fields} for key in keys])
    reason = "its key comes twice, in caption/train-000000.tar as well"
    assert set(found(broken)) == {Fault("caption/train-000001.tar", key, reason) for key in keys[:2]}


def test_images_without_features_are_found(broken):
    fields = {"task": "caption", "source": "x", "target": "y"}
    records = [{"__key__": key, "json": {**fields, "image": image}} for key, image in (("a", "img3"), ("b", "img99"))]
    foreign(broken, "caption/train-000001.tar", records)
    reason = "no features are stored for its image 'img99'"
    assert found(broken) == [Fault("caption/train-000001.tar", "b", reason)]


def test_a_data_set_whose_features_are_not_made_yet_says_so_once_a_shard(broken):
    manifest = Manifest.load(broken / MANIFEST)
    write_manifest(broken, {"vqa": {"test": manifest.shards("vqa", "test")}}, None, {})
    reason = "2 samples name images, but the data set holds no image features (data_prep/features.py)"
    assert found(broken) == [Fault("vqa/test-000000.tar", "", reason)]


def test_features_that_are_not_finite_or_of_another_shape_are_found(broken):
    arrays = [np.full((3, 2), np.inf, np.float16), np.zeros((2, 3), np.float16)]
    path = "features/features-000002.tar"
    foreign(broken, path, [{"__key__": f"img{10 + i}", "npy": array} for i, array in enumerate(arrays)])
    assert found(broken) == [
        Fault(path, "img10", "features hold values that are not finite"),
        Fault(path, "img11", "image has float16 features of shape (2, 3), expected float16 of (3, 2)"),
    ]


def test_a_lookup_that_does_not_fit_the_features_is_found(broken):
    manifest = Manifest.load(broken / MANIFEST)
    assert manifest.features is not None
    part = Lookup.build(read_index(broken / shard.path) for shard in manifest.features.shards[:2])
    (broken / manifest.features.lookup).write_bytes(part.encode())
    changed = dataclasses.replace(manifest.features, lookup_sha256=damage.sha256(part.encode()))
    every = list(faults(dataclasses.replace(manifest, features=changed)))
    assert every[-1] == Fault(manifest.features.lookup, "", "it is not of what the feature shards hold")


def test_the_command_lists_damage_and_says_so_in_its_exit_code(broken, run_python):
    manifest = broken / MANIFEST
    damage.damage(broken, "vqa/train-000002.tar", "flipped data byte", 3)
    done = run_python("python", "data_prep/verify.py", manifest)
    assert done.returncode == 1, done.stderr
    assert "shard vqa/train-000002.tar, key 'train19': crc32 is " in done.stdout
    assert f"{manifest}: 11 shards, 54 samples and 12 images" in done.stdout and "2 faults in 1 files" in done.stdout
    assert "next: build these shards again" in done.stdout


def test_the_command_lists_every_file_that_is_missing(broken, capsys):
    lookup = lookup_of(broken)
    gone = ("vqa/train-000001.tar", "vqa/train-000003.tar", "caption/train-000000.idx", "features/features-000001.tar")
    for name in (*gone, lookup):
        (broken / name).unlink()
    with pytest.raises(SystemExit) as stopped:
        command.verify(manifest=str(broken / MANIFEST))
    shown = capsys.readouterr().out
    assert stopped.value.code == 1 and "5 faults in 5 files" in shown
    for name in gone:
        reason = "missing" if name.endswith(".tar") else f"{name} cannot be read: "
        assert f"shard {Path(name).with_suffix('.tar')}: {reason}" in shown
    assert f"shard {lookup}: cannot be read: " in shown


def test_the_command_finds_targets_outside_the_labels_that_a_task_has(tmp_path, capsys):
    wrong = {"glue_rte": "7", "tickets": "green"}
    tasks = {}
    for task, target in wrong.items():
        targets = ["red" if task == "tickets" else "1", target, ""]
        samples = [Sample(f"k{i}", task, "x", target) for i, target in enumerate(targets)]
        tasks[task] = {"train": shards.write_task(tmp_path, task, "train", samples[:2])}
        tasks[task]["official_test"] = shards.write_task(tmp_path, task, "official_test", samples[2:])
    records = {"tickets": {"metrics": ["accuracy"], "labels": ["red", "blue"], "description": "", "has_images": False}}
    write_manifest(tmp_path, tasks, None, {"records": records})
    try:
        with pytest.raises(SystemExit) as stopped:
            command.verify(manifest=str(tmp_path / MANIFEST))
    finally:
        TASKS.pop("tickets", None)
    shown = capsys.readouterr().out
    assert stopped.value.code == 1 and "2 faults in 2 files" in shown
    for task, target in wrong.items():
        assert f"shard {task}/train-000000.tar, key 'k1': task {task!r}, sample 'k1': its target {target!r}" in shown


def test_the_command_shows_the_first_faults_and_then_counts_unless_told_otherwise(broken, capsys, monkeypatch):
    monkeypatch.setattr(command, "SHOWN", 5)
    monkeypatch.setattr(command, "SHARDS_SHOWN", 2)
    manifest = str(broken / MANIFEST)
    command.verify(manifest=manifest)
    assert "no damage found\nnext: train on it" in capsys.readouterr().out
    for path in ("vqa/train-000000.tar", "vqa/train-000001.tar", "vqa/train-000002.tar"):
        damage.damage(broken, path, "cut at a header", 2)
    with pytest.raises(SystemExit) as stopped:
        command.verify(manifest=manifest)
    shown = capsys.readouterr().out
    assert stopped.value.code == 1 and shown.count("\nshard ") + shown.startswith("shard ") == 5
    assert "21 faults in 3 files" in shown and "        7  vqa/train-000001.tar" in shown
    assert "and 1 more files; --all shows every fault" in shown
    with pytest.raises(SystemExit):
        command.verify(manifest=manifest, all=True)
    shown = capsys.readouterr().out
    assert shown.count("shard vqa/") == 21 and "more files" not in shown


def test_the_command_names_a_manifest_that_is_none(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"version": 1}))
    with pytest.raises(ValueError, match="version 1, this program reads version 2; build the data again"):
        command.verify(manifest=str(tmp_path / MANIFEST))
