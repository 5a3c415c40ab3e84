"""An index tells of any webdataset tar where its samples lie, and refuses what no reader could split into samples."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data import index as indexing
from hyperpelt_ds.data.index import Index, find_shards, index_path, index_shard, read_index, refresh_index
from hyperpelt_ds.data.lookup import Lookup
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import Reader

sys.path.insert(0, str(Path(__file__).parents[1] / "data_prep"))  # as when a script of that folder is run

import index as command

Members = list[tuple[str, bytes]]


def make_tar(path: Path, members: Members, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def spans(tar: Path, index: Index) -> list[bytes]:
    content = tar.read_bytes()
    return [content[start : start + size] for start, size in map(index.span, range(len(index)))]


def contents(tar: Path, index: Index) -> list[dict[str, bytes]]:
    content = tar.read_bytes()
    return [{s: content[at : at + size] for s, at, size in index.members(i)} for i in range(len(index))]


FOREIGN = [
    ("some/dir/a.json", json.dumps({"source": "né?", "target": "ja"}).encode()),
    ("some/dir/a.JPG", b"x" * 700),
    ("some/dir/a.seg.png", b""),
    ("README", b"no suffix"),
    ("__meta__/info.json", b"{"),
    ("b.txt", b"text"),
    ("c" * 300 + ".json", b"[1]"),
    ("c" * 300 + ".cls", b"7"),
    ("d.json", b'{"source": 3, "target": "no"}'),
]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_foreign_shard_is_indexed_as_webdataset_reads_it(tmp_path, format):
    tar = make_tar(tmp_path / "foreign.tar", FOREIGN, format=format)
    index = index_shard(tar)
    records = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert [index.key(i) for i in range(4)] == [record["__key__"] for record in records]
    assert [index.key(0), index.key(1)] == ["some/dir/a", "b"]
    read = [{name: value for name, value in record.items() if not name.startswith("__")} for record in records]
    assert contents(tar, index) == read
    assert index.lengths.tolist() == [len("né?ja".encode()), 0, 0, 2]
    assert index.target_lengths.tolist() == [2, 0, 0, 2]
    assert (
        index.member(0, "seg.png") == (index.members(0)[2][1] - index.span(0)[0], 0) and index.member(1, "jpg") is None
    )


def test_a_span_holds_a_sample_from_its_first_header_to_its_last_byte(tmp_path):
    tar = make_tar(tmp_path / "foreign.tar", FOREIGN, format=tarfile.GNU_FORMAT)
    index = index_shard(tar)
    for i, span in enumerate(spans(tar, index)):
        assert zlib.crc32(span) == index.crc32[i]
        with tarfile.open(fileobj=io.BytesIO(span + b"\0" * (-len(span) % 512 + 1024))) as archive:
            assert [member.name for member in archive] == [name for name, _ in FOREIGN if name.startswith(index.key(i))]
    assert index.tar_bytes == tar.stat().st_size
    assert index.tar_sha256 == hashlib.sha256(tar.read_bytes()).hexdigest()


def test_an_index_file_is_small_and_gives_the_index_back(tmp_path):
    samples = [(f"key{i:06d}.json", b'{"source": "a", "target": "b"}') for i in range(1000)]
    index = index_shard(make_tar(tmp_path / "many.tar", samples))
    content = index.encode()
    assert len(content) < 60 * 1000 and index.nbytes < 60 * 1000
    back = Index.decode(content)
    assert back.encode() == content
    assert [back.key(i) for i in (0, 999)] == ["key000000", "key000999"] and back.members(999) == index.members(999)


def test_folders_in_a_tar_are_no_samples_and_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "tree.tar", "w") as archive:
        folder = tarfile.TarInfo("dir.with.dots")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("dir.with.dots/a.txt"), io.BytesIO())
    index = index_shard(tmp_path / "tree.tar")
    assert [index.key(i) for i in range(len(index))] == ["dir.with.dots/a"]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):  # as tar stores the second of two files that are one
        with tarfile.open(tmp_path / "tree.tar", "a") as archive:
            link = tarfile.TarInfo("dir.with.dots/x.json")
            link.type, link.linkname = kind, "elsewhere"
            archive.addfile(link)
        with pytest.raises(ValueError, match=r"tree.tar: member dir.with.dots/x.json is a link to elsewhere"):
            index_shard(tmp_path / "tree.tar")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.json", b"{}"), ("a.json", b"{}")], "key 'a' comes twice"),
        ([("a.json", b"{}"), ("b.json", b"{}"), ("a.jpg", b"")], "'a' comes twice, or its members are not adjacent"),
        ([], "holds no samples"),
        ([("README", b""), ("__meta__/a.json", b"{}")], "holds no samples"),
        ([("a.jpg", b""), ("a.JPG", b"")], "key 'a' comes twice"),
        ([("a.json", b"{")], "sample 'a' is not JSON"),
        ([("a.json", b"[" * 100_000)], "sample 'a' is not JSON"),
        ([("a.json", b'"\xff"')], "sample 'a' is not JSON in UTF-8"),
        ([("a.json", b'{"source": "\\ud83d"}')], "sample 'a' is not JSON in UTF-8"),
        ([("a\udcff.json", b"{}")], "is not UTF-8"),
    ],
)
def test_a_shard_that_no_reader_could_split_into_samples_is_refused(tmp_path, members, reason):
    with pytest.raises(ValueError, match=rf"bad\.tar.*{reason}"):
        index_shard(make_tar(tmp_path / "bad.tar", members, format=tarfile.GNU_FORMAT))


def test_what_cannot_be_read_at_random_is_refused(tmp_path):
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(ValueError, match=r"small\.tar\.gz: damaged or cut, or not an uncompressed tar"):
        index_shard(tmp_path / "small.tar.gz")
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"end")
    subprocess.run(["tar", "--sparse", "-cf", "sparse.tar", "a.bin"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match=r"sparse\.tar: 'a\.bin' is stored as a sparse file"):
        index_shard(tmp_path / "sparse.tar")


@settings(deadline=None)
@given(cut=st.integers(min_value=0, max_value=4 * 1024 - 1))
def test_a_tar_cut_anywhere_before_its_end_mark_is_refused(tmp_path_factory, cut):
    # four samples of a header and a content block each; Python's tar reader alone accepts a cut at every header
    folder = tmp_path_factory.mktemp("cut")
    tar = make_tar(folder / "cut.tar", [(f"{i}.json", b"{}") for i in range(4)])
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cut\.tar: (damaged|cut short|holds no samples)"):
        index_shard(tar)


@pytest.mark.parametrize("damage", [b"\0" * 512, b"\xff" * 512])
def test_a_tar_with_a_damaged_header_is_refused(tmp_path, damage):
    tar = make_tar(tmp_path / "damaged.tar", [(f"{i}.json", b"{}") for i in range(4)])
    content = bytearray(tar.read_bytes())
    content[2048:2560] = damage
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.tar: damaged or cut: no proper end after byte 2048"):
        index_shard(tar)


def test_a_sample_that_no_single_read_gives_is_refused(tmp_path, monkeypatch):
    assert indexing.SAMPLE_BYTES == 0x7FFFF000  # read(2): what Linux transfers at most at once
    members = [("a.json", b"{}"), ("b.json", b"{}"), ("b.bin", b"x" * 4000)]
    tar = make_tar(tmp_path / "large.tar", members)
    size = index_shard(tar).span(1)[1]
    monkeypatch.setattr(indexing, "SAMPLE_BYTES", size + 1)
    assert len(index_shard(tar)) == 2
    monkeypatch.setattr(indexing, "SAMPLE_BYTES", size)
    with pytest.raises(ValueError, match=rf"large\.tar: sample 'b' has {size} bytes or more, fewer than {size} can"):
        index_shard(tar)


def test_what_is_no_index_is_refused(tmp_path):
    tar = make_tar(tmp_path / "a.tar", [("a.json", b"{}")])
    with pytest.raises(FileNotFoundError):
        read_index(tar)
    other = index_shard(tar).encode().replace(b'"version": 2', b'"version": 9')
    for content in (b"", b"{}", other[:100], Lookup.build([index_shard(tar)]).encode()):
        index_path(tar).write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.tar: its index a\.idx cannot be read: not an index"):
            read_index(tar)
    index_path(tar).write_bytes(other)
    with pytest.raises(ValueError, match="it has version 9, this program reads version 2"):
        read_index(tar)


def test_an_index_is_made_anew_only_when_it_is_not_of_the_tar(tmp_path):
    tar = make_tar(tmp_path / "a.tar", [("a.json", b"{}"), ("b.json", b"{}")])
    assert refresh_index(tar)[1] and not refresh_index(tar)[1]
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"{}", b"[]"))  # the same size
    index, written = refresh_index(tar)
    assert written and index.encode() == read_index(tar).encode() == index_shard(tar).encode()
    index_path(tar).write_bytes(index.encode().replace(b'"version": 2', b'"version": 1'))
    assert refresh_index(tar)[1] and not refresh_index(tar)[1]
    index_path(tar).write_text("v1.2 1\njson 512 2 a.json\n")  # what another tool keeps under this name
    with pytest.raises(ValueError, match=r"a\.idx beside it is of another program; move it away"):
        refresh_index(tar)


def test_shards_are_named_by_braces_globs_and_several_in_a_row(tmp_path):
    tars = [make_tar(tmp_path / f"s-{i:02d}.tar", [("a.txt", b"")]) for i in range(12)]
    assert find_shards(f"{tmp_path}/s-{{00..11}}.tar") == find_shards(f"{tmp_path}/s-*.tar") == tars
    assert find_shards(f"{tars[3]}::{tmp_path}/s-0[2-4].tar") == [tars[3], tars[2], tars[4]]
    assert find_shards(f"{tmp_path}/t-{{0..1}}.tar") == [tmp_path / "t-0.tar", tmp_path / "t-1.tar"]
    with pytest.raises(ValueError, match=r"none\*\.tar': no file fits"):
        find_shards(f"{tmp_path}/none*.tar")
    for name in ("https://example.org/s-{0..1}.tar", "pipe:cat s.tar"):
        with pytest.raises(ValueError, match="only files of this machine can be indexed"):
            find_shards(name)


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_a_lookup_finds_every_key_and_no_other(counts):
    indexes, empty = [], np.zeros(0, np.uint32)
    for shard, count in enumerate(counts):
        keys = [f"shard{shard}-{i}" for i in range(count)]
        edges = np.cumsum([0, *map(len, keys)]).astype(np.uint32)
        starts = np.arange(count, dtype=np.uint64)
        indexes.append(Index(0, "", (), "".join(keys).encode(), edges, starts, *[empty] * 8))
    lookup = Lookup.decode(Lookup.build(indexes).encode())
    for shard, index in enumerate(indexes):
        assert [lookup.find(index.key(i)) for i in range(len(index))] == [(shard, i) for i in range(len(index))]
    assert lookup.find("another") is None and lookup.find("shard9-0") is None
    assert not list(lookup.repeated())
    assert [pair for pair in Lookup.build([*indexes, indexes[0]]).repeated() if pair[0] == (0, 0)] == [
        ((0, 0), (len(counts), 0))
    ]


def json_members(keys: range, **changes: object) -> Members:
    fields = {"task": "summary", "source": "x", "target": "y", **changes}
    return [(f"k{i}.{suffix}", json.dumps(fields).encode()) for i in keys for suffix in ("json", "txt")]


def test_the_command_indexes_what_it_can_and_goes_on_when_it_is_given_again(tmp_path, run_python, capsys):
    for shard in range(4):
        make_tar(tmp_path / f"deep/s-{shard}.tar", json_members(range(5 * shard, 5 * shard + 5)))
    bad = tmp_path / "deep/s-2.tar"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:4620])
    names, out = f"{tmp_path}/deep/s-{{0..3}}.tar", tmp_path / "manifest.json"
    arguments = ("python", "data_prep/index.py", names, "--task", "summary", "--out", out)
    first = run_python(*arguments)
    assert first.returncode == 1, first.stderr
    assert "refused: cut short: ends at byte 4620" in first.stdout and "deep/s-2.tar" in first.stdout
    assert "4 shards: 3 indexed, 0 up to date, 1 refused; 15 samples" in first.stdout and not out.exists()
    bad.write_bytes(whole)
    command.index(shards=names, task="summary", out=str(out), workers=1)
    shown = capsys.readouterr().out
    assert "4 shards: 1 indexed, 3 up to date, 0 refused; 20 samples" in shown
    assert f"next: python data_prep/verify.py {out}" in shown
    reader = Reader(Manifest.load(out))
    assert [reader.sample("summary", "train", i) for i in range(20)] == [
        Sample(f"k{i}", "summary", "x", "y") for i in range(20)
    ]
    assert reader.manifest.shards("summary", "train")[3].path == "deep/s-3.tar"


def test_files_that_would_share_an_index_are_refused(tmp_path, capsys):
    for name in ("a.tar", "a.tar2", "a", "a.TAR"):
        make_tar(tmp_path / name, json_members(range(2)))
    with pytest.raises(SystemExit) as stopped:
        command.index(shards=f"{tmp_path}/a*", workers=1)
    shown = capsys.readouterr().out
    assert stopped.value.code == 1 and "4 shards: 1 indexed, 0 up to date, 3 refused" in shown
    for name in ("a.tar2", "a", "a.TAR"):
        assert f"refused: its name must end with .tar ({tmp_path}/{name})\n" in shown
    assert read_index(tmp_path / "a.tar").encode() == index_shard(tmp_path / "a.tar").encode()


def test_the_command_ends_when_a_worker_is_killed(tmp_path):
    """The second shard is a pipe that nobody writes to: the worker waits there until it is killed."""
    make_tar(tmp_path / "s-0.tar", json_members(range(2)))
    os.mkfifo(tmp_path / "s-1.tar")
    words = [sys.executable, str(Path(command.__file__)), f"{tmp_path}/s-*.tar", "--workers=1"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not index_path(tmp_path / "s-0.tar").exists():
            assert process.poll() is None
            time.sleep(0.05)
        [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
        _, said = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 2 and "error: a worker process was killed (out of memory?)" in said


def test_the_command_extends_a_manifest(tmp_path):
    for shard in range(3):
        make_tar(tmp_path / f"s-{shard}.tar", json_members(range(2 * shard, 2 * shard + 2)))
    make_tar(tmp_path / "v.tar", json_members(range(3)))
    out = str(tmp_path / "manifest.json")
    add = {"task": "summary", "out": out, "workers": 1}
    command.index(shards=f"{tmp_path}/s-0.tar", **add)
    command.index(shards=f"{tmp_path}/s-{{0,1,2}}.tar", **add)
    command.index(shards=f"{tmp_path}/v.tar", split="validation", **add)
    manifest = Manifest.load(out)
    assert [shard.path for shard in manifest.shards("summary", "train")] == ["s-0.tar", "s-1.tar", "s-2.tar"]
    assert manifest.count("summary", "train") == 6 and manifest.count("summary", "validation") == 3
    assert manifest.shards("summary", "train")[0].longest_target == 1


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (json_members(range(9, 11), label=1), r"shard new\.tar, key 'k9': unknown field 'label'"),
        (json_members(range(9, 11), task="qa"), r"shard new\.tar, key 'k9': is of task 'qa'"),
        ([("k9.txt", b"")], r"shard new\.tar, key 'k9': has no \.json member"),
        (json_members(range(1, 11)), r"shard new\.tar, key 'k1': its key comes twice, in old\.tar as well"),
    ],
)
def test_the_command_leaves_a_manifest_alone_when_samples_do_not_fit(tmp_path, capsys, members, reason):
    make_tar(tmp_path / "old.tar", json_members(range(2)))
    make_tar(tmp_path / "new.tar", members)
    out = tmp_path / "manifest.json"
    command.index(shards=f"{tmp_path}/old.tar", task="summary", out=str(out), workers=1)
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        command.index(shards=f"{tmp_path}/new.tar", task="summary", out=str(out), workers=1)
    assert stopped.value.code == 1 and out.read_bytes() == before
    capsys.readouterr()
    command.index(shards=f"{tmp_path}/new.tar", workers=1)  # its index alone may stay
    assert "1 up to date" in capsys.readouterr().out


def test_the_command_says_what_is_unusable(tmp_path, capsys):
    make_tar(tmp_path / "new.tar", json_members(range(3), target=7))
    with pytest.raises(SystemExit):
        command.index(shards=f"{tmp_path}/new.tar", task="summary", out=f"{tmp_path}/manifest.json", workers=1)
    shown = capsys.readouterr().out
    assert shown.count("unusable: shard new.tar, key 'k0': field 'target' is of type int") == 1 and "'k1'" not in shown


def test_a_shard_cannot_be_in_two_splits_or_tasks(tmp_path):
    make_tar(tmp_path / "a.tar", json_members(range(2)))
    out = tmp_path / "manifest.json"
    command.index(shards=f"{tmp_path}/a.tar", task="summary", out=str(out), workers=1)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"shard a\.tar is listed for task 'summary', split train already"):
        command.index(shards=f"{tmp_path}/a.tar", task="summary", split="test", out=str(out), workers=1)
    assert out.read_bytes() == before


def test_the_command_refuses_what_cannot_become_a_manifest(tmp_path):
    tar = str(make_tar(tmp_path / "data/a.tar", json_members(range(1))))
    for arguments, reason in (
        ({"task": "t"}, "--out is missing"),
        ({"out": "manifest.json"}, "--task is missing"),
        ({"task": "t", "out": f"{tmp_path}/data/list.json"}, "a manifest is a file of the name manifest.json"),
        ({"task": "t", "out": f"{tmp_path}/other/manifest.json"}, "a.tar does not lie under its folder"),
        ({"task": "features", "out": f"{tmp_path}/manifest.json"}, "task 'features': must be"),
        ({"workers": 0}, "--workers must be a whole number, at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            command.index(shards=tar, **arguments)
    assert not list(tmp_path.rglob("*.idx"))
