"""Bytes from a real HTTP server on this machine, with and without the node's cache, whatever fails on the way."""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from shard_server import Behaviour, ShardServer
from torch.utils.data import DataLoader

from hyperpelt_ds.data.cache import PIECE, RANGED, Cache
from hyperpelt_ds.data.folder import OPEN_FILES, LocalFolder, open_folder
from hyperpelt_ds.data.manifest import Shard
from hyperpelt_ds.data.remote import RemoteFolder

MIB = 1 << 20
MANY = 1 << 40
fork = multiprocessing.get_context("fork")


def shard_of(root: Path, name: str = "a.tar", size: int = MIB, samples: int = 64) -> Shard:
    """A file of `size` random bytes."""
    content = np.random.default_rng(list(name.encode())).bytes(size)
    (root / name).write_bytes(content)
    return Shard(name, samples, size, hashlib.sha256(content).hexdigest(), "")


def samples_of(shard: Shard) -> list[tuple[int, int]]:
    """(offset, size) of its samples, all of one size."""
    size = shard.bytes // shard.samples
    return [(i * size, size) for i in range(shard.samples)]


def check(folder: RemoteFolder, root: Path, shard: Shard, samples: list[tuple[int, int]] | None = None) -> None:
    content = (root / shard.path).read_bytes()
    for offset, size in samples or samples_of(shard):
        assert folder.part(shard, offset, size) == content[offset : offset + size]


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def in_processes(*works: Callable[[], object]) -> None:
    """Runs each in a forked process of its own, all at once; every one must succeed."""
    processes = [fork.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_parts_of_a_local_folder_are_the_bytes_of_its_files_and_few_files_stay_open(root):
    shards = [shard_of(root, f"{i}.tar", 1000) for i in range(100)]
    folder = pickle.loads(pickle.dumps(open_folder(root)))
    assert isinstance(folder, LocalFolder) and folder.root == str(root)
    before = len(os.listdir("/proc/self/fd"))
    for shard in shards * 2:
        assert folder.part(shard, 10, 20) == (root / shard.path).read_bytes()[10:30]
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES
    assert folder.part(shards[0], 990, 20) == (root / "0.tar").read_bytes()[990:]
    assert (folder.size("0.tar"), folder.size("nothing")) == (1000, None)
    assert folder.read("1.tar", shards[1].sha256) == (root / "1.tar").read_bytes()
    with pytest.raises(ValueError, match=rf"1\.tar: its sha256 is {shards[1].sha256}, expected {shards[2].sha256}"):
        folder.read("1.tar", shards[2].sha256)
    with pytest.raises(FileNotFoundError):
        folder.part(Shard("nothing", 1, 1, "", ""), 0, 1)


def test_parts_over_http_are_the_bytes_of_the_file(root):
    shard = shard_of(root, "a b%.tar")
    content = (root / shard.path).read_bytes()
    with ShardServer(root) as server:
        folder = pickle.loads(pickle.dumps(open_folder(server.url + "/")))
        for offset, size in ((0, 1), (5, 1000), (MIB - 3, 3), (MIB - 3, 10), (MIB, 5), (MIB + 9, 5), (7, 0), (0, MIB)):
            assert folder.part(shard, offset, size) == content[offset : offset + size]
        assert folder.read(shard.path) == content
        assert (folder.size(shard.path), folder.size("nothing")) == (MIB, None)
        with pytest.raises(FileNotFoundError, match=r"/nothing: 404"):
            folder.read("nothing")
        assert server.requests["/nothing"] == 2  # one each: what is not there is not asked for again
        assert folder.traffic.retries == 0


def test_a_connection_that_the_server_closed_while_it_was_idle_costs_no_try(root):
    shard = shard_of(root)
    with ShardServer(root, Behaviour(idle_seconds=0.1)) as server:
        folder = RemoteFolder(server.url)
        check(folder, root, shard, [(3, 5)])
        time.sleep(0.3)
        check(folder, root, shard, [(9, 4)])
        assert folder.traffic.retries == 0


def test_redirects_are_followed_and_a_proxy_of_the_environment_is_used(root, monkeypatch):
    shard = shard_of(root)
    with ShardServer(root) as server:
        check(RemoteFolder(server.url + "/moved"), root, shard, [(3, 5), (9, 4)])
        monkeypatch.setenv("http_proxy", server.url)
        check(RemoteFolder("http://shards.invalid"), root, shard, [(3, 5)])


def test_a_server_that_ignores_range_is_refused(root):
    shard = shard_of(root)
    with ShardServer(root, Behaviour(ignore_range=True)) as server:
        folder = RemoteFolder(server.url)
        with pytest.raises(OSError, match=r"a\.tar: the server ignores Range"):
            folder.part(shard, 0, 10)
        assert server.requests["/a.tar"] == 1
        assert folder.read("a.tar") == (root / "a.tar").read_bytes()


def test_a_shard_comes_into_the_cache_in_the_background_and_then_nothing_more_is_fetched(root, cache):
    shard = shard_of(root)
    with ShardServer(root) as server:
        folder = RemoteFolder(server.url, cache, MANY)
        check(folder, root, shard, [(100, 50)])
        tar = cache / f"{shard.sha256}.tar"
        until(tar.exists)
        assert tar.read_bytes() == (root / "a.tar").read_bytes()
        until(lambda: server.total() == MIB + 50)
        check(folder, root, shard)
        in_processes(lambda: check(RemoteFolder(server.url, cache, MANY), root, shard))
        assert server.total() == MIB + 50
        assert (folder.traffic.parts, folder.traffic.shards) == (50, MIB)


def test_with_no_bytes_for_the_cache_every_sample_is_fetched_by_itself(root, cache):
    shard = shard_of(root)
    with ShardServer(root) as server:
        folder = RemoteFolder(server.url, cache, 0)
        check(folder, root, shard)
        assert (folder.traffic.parts, folder.traffic.shards) == (MIB, 0)
        assert server.requests["/a.tar"] == 64
        assert not cache.exists()


def test_not_more_than_a_twentieth_of_a_shard_is_fetched_in_parts(root, cache):
    shard = shard_of(root, samples=128)
    elsewhere = Cache(cache, MANY)
    with ShardServer(root, Behaviour()) as server:
        folder = RemoteFolder(server.url, cache, MANY)
        with elsewhere._lock(shard.sha256):  # so that the thread leaves it to the one who holds this
            check(folder, root, shard, samples_of(shard)[: 128 // RANGED])
            until(lambda: not folder._waiting)
        assert (folder.traffic.parts, folder.traffic.shards) == (128 // RANGED * MIB // 128, 0)
        check(folder, root, shard, samples_of(shard)[128 // RANGED : 128 // RANGED + 1])
        assert (folder.traffic.parts, folder.traffic.shards) == (128 // RANGED * MIB // 128, MIB)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_read_the_same_shards_at_once_fetch_each_once(processes, root, cache):
    shards = [shard_of(root, f"{i}.tar") for i in range(6)]
    with ShardServer(root, Behaviour(rate=30e6)) as server:

        def work(rank: int) -> None:
            folder = RemoteFolder(server.url, cache, MANY)
            places = [(shard, sample) for shard in shards for sample in samples_of(shard)[rank::processes]]
            random.Random(rank).shuffle(places)
            for shard, sample in places:
                check(folder, root, shard, [sample])

        in_processes(*(lambda rank=rank: work(rank) for rank in range(processes)))
        assert 1.0 <= server.total(".tar") / (6 * MIB) <= 1.1


def test_what_a_killed_process_had_fetched_is_not_fetched_again(root, cache):
    shard = shard_of(root, size=3 * PIECE)
    with ShardServer(root, Behaviour(rate=20e6)) as server:
        folder = RemoteFolder(server.url, cache, MANY)
        process = fork.Process(target=lambda: folder.part(shard, 0, MIB * 2))
        process.start()
        partial = cache / f"{shard.sha256}.{shard.bytes}.partial"
        until(lambda: partial.exists() and partial.stat().st_size >= PIECE)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        had = partial.stat().st_size
        check(folder, root, shard, [(0, MIB * 2), (20 * MIB, MIB)])
        assert PIECE <= had < 3 * PIECE
        assert (folder.traffic.parts, folder.traffic.shards) == (0, 3 * PIECE - had)


def test_a_killed_process_leaves_no_lock_even_if_a_child_of_it_lives_on(root, cache, tmp_path):
    shard = shard_of(root)
    pid_file = tmp_path / "pid"

    def fetch_for_ever(offset: int, size: int) -> bytes:
        child = os.fork()
        if child:
            pid_file.write_text(str(child))
        time.sleep(600)
        return b""

    process = fork.Process(target=lambda: Cache(cache, MANY).fetch(shard, fetch_for_ever, wait=True))
    process.start()
    until(lambda: pid_file.exists() and pid_file.read_text())
    assert not Cache(cache, MANY).fetch(shard, fetch_for_ever, wait=False)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        local = LocalFolder(root)
        until(lambda: Cache(cache, MANY).fetch(shard, lambda offset, size: local.part(shard, offset, size), wait=False))
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_the_cache_is_never_above_its_limit_and_what_was_not_used_for_longest_goes_first(root, cache):
    shards = [shard_of(root, f"{i}.tar", 200_000) for i in range(12)]
    local, limit = LocalFolder(root), 700_000

    def get(shard: Shard) -> Callable[[int, int], bytes]:
        return lambda offset, size: local.part(shard, offset, min(size, 30_000))

    def work(rank: int) -> None:
        mine = Cache(cache, limit, in_use=0.0)
        for shard in random.Random(rank).choices(shards, k=60):
            if mine.part(shard, 0, 10) is None:
                mine.fetch(shard, get(shard), wait=True)
            found = mine.part(shard, 1000, 10)
            assert found is None or found == local.part(shard, 1000, 10)

    watcher = Cache(cache, limit)
    processes = [fork.Process(target=work, args=(rank,)) for rank in range(4)]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes):
        with watcher._lock("folder"):  # else one that is deleted and its successor might both be counted
            seen = max(seen, sum(path.stat().st_size for path in cache.iterdir() if path.is_file()))
    assert [process.exitcode for process in processes] == [0] * 4
    assert 400_000 < seen <= limit

    mine = Cache(cache / "another", limit, in_use=0.0)
    for name in ("of-others.tar", "of-others.partial"):
        (cache / "another" / name).write_bytes(bytes(600_000))
        os.utime(cache / "another" / name, (0, 0))
    for shard in shards[:3]:
        assert mine.fetch(shard, get(shard), wait=True)
    os.utime(cache / "another" / f"{shards[0].sha256}.tar", (time.time() + 1, time.time() + 1))
    assert mine.fetch(shards[3], get(shards[3]), wait=True)
    assert [mine.part(shard, 0, 1) is not None for shard in shards[:4]] == [True, False, True, True]
    assert (cache / "another" / "of-others.tar").exists() and (cache / "another" / "of-others.partial").exists()


def test_shards_in_use_do_not_give_way_and_what_does_not_fit_is_read_in_parts(root, cache, caplog):
    shards = [shard_of(root, f"{i}.tar") for i in range(4)]
    with ShardServer(root) as server:
        folder = RemoteFolder(server.url, cache, 2 * MIB)
        for _ in range(2):
            for shard in shards:
                check(folder, root, shard)
        assert server.total() <= 1.1 * (2 * 1 + 2 * 2) * MIB  # two were cached, two read twice
        assert len(list(cache.glob("*.tar"))) == 2
    assert caplog.text.count("does not hold the shards in use") == 1


def test_what_a_shard_will_need_is_reserved_while_it_is_fetched(root, cache):
    shards = [shard_of(root, f"{i}.tar") for i in range(2)]
    local = LocalFolder(root)

    def get(offset: int, size: int) -> bytes:
        assert not Cache(cache, 2 * MIB - 1, in_use=0.0).fetch(shards[1], get, wait=False)
        return local.part(shards[0], offset, size)

    assert Cache(cache, 2 * MIB - 1, in_use=0.0).fetch(shards[0], get, wait=True)
    assert not Cache(cache, MIB - 1, in_use=0.0).fetch(shards[1], get, wait=True)
    assert [path.suffix for path in cache.iterdir() if path.is_file()] == [".tar"]  # none gave way in vain


def test_a_deleted_shard_is_let_go_and_fetched_again(root, cache, monkeypatch):
    monkeypatch.setattr("hyperpelt_ds.data.cache.TOUCH_SECONDS", 0.0)
    shard = shard_of(root)
    with ShardServer(root) as server:
        folder = RemoteFolder(server.url, cache, MANY)
        check(folder, root, shard)
        (cache / f"{shard.sha256}.tar").unlink()
        check(folder, root, shard)
        assert folder.traffic.shards == 2 * MIB


def test_a_partial_file_with_other_bytes_is_thrown_away_and_fetched_anew(root, cache):
    shard = shard_of(root)
    with ShardServer(root) as server:
        folder = RemoteFolder(server.url, cache, MANY)
        (cache / f"{shard.sha256}.{shard.bytes}.partial").write_bytes(bytes(1000))
        check(folder, root, shard)
        assert folder.traffic.shards == 2 * MIB - 1000


@pytest.mark.parametrize("kept", [MIB - 1000, MIB])
def test_a_shard_that_is_not_what_the_manifest_says_never_gets_into_the_cache(kept, root, cache, caplog):
    shard = shard_of(root)
    content = bytearray((root / "a.tar").read_bytes())
    content[77] ^= 1
    (root / "a.tar").write_bytes(content[:kept])
    with ShardServer(root) as server:
        folder = RemoteFolder(server.url, cache, MANY)
        check(folder, root, shard)
        again = RemoteFolder(server.url, cache, MANY)
        check(again, root, shard)
        assert not list(cache.glob("*.tar")) and not list(cache.glob("*.partial"))
        assert folder.traffic.shards == 2 * kept  # tried twice, and for an hour not again
        assert again.traffic.shards == 0
    assert caplog.text.count("shard a.tar: what is fetched has sha256") == 1


FAULTS = Behaviour(errors=0.10, resets=0.05, stalls=0.01, short=0.05, stall_seconds=3.0)


@pytest.mark.parametrize("cache_bytes", [0, MANY])
def test_nothing_is_lost_where_a_fifth_of_the_requests_fail(cache_bytes, root, cache, monkeypatch):
    monkeypatch.setattr("hyperpelt_ds.data.cache.PIECE", 1 << 15)  # so that a small shard takes many requests
    shards = [shard_of(root, f"{i}.tar", 2 * MIB, 50 if cache_bytes == 0 else 500) for i in range(6)]
    with ShardServer(root, FAULTS) as server:
        folder = RemoteFolder(server.url, cache, cache_bytes, stall=0.25, pause=0.01)
        for shard in shards:
            check(folder, root, shard)
        assert folder.traffic.retries >= 20
        assert set(server.faults) == {"errors", "resets", "stalls", "short"}
        assert server.total() / (6 * 2 * MIB) <= 1.1


def test_giving_up_names_the_address_the_bytes_the_tries_and_the_cause(root):
    shard = shard_of(root)
    with ShardServer(root, Behaviour(errors=1.0)) as server:
        folder = RemoteFolder(server.url, tries=3, pause=0.01)
        with pytest.raises(OSError, match=rf"bytes 5 to 14 of {server.url}/a.tar: given up after 3 tries.* 503"):
            folder.part(shard, 5, 10)
        assert server.requests["/a.tar"] == 3
    with pytest.raises(OSError, match=r"given up after 2 tries.*refused"):
        RemoteFolder(server.url, tries=2, pause=0.01).part(shard, 5, 10)


def test_a_stall_ends_a_try_and_tries_that_bring_bytes_do_not_count(root):
    shard = shard_of(root)
    for behaviour, cause in (
        (Behaviour(stalls=1.0), "timed out"),
        (Behaviour(short=1.0), "the answer ended after 0 of 1 bytes"),
    ):
        with ShardServer(root, behaviour) as server:
            folder = RemoteFolder(server.url, tries=2, stall=0.1, pause=0.001)
            with pytest.raises(OSError, match=cause):
                folder.part(shard, 0, 100)
            assert server.total() == 99  # half of what is missing comes each time, and never the last byte


def test_small_files_are_checked_kept_by_their_sum_and_fetched_again_if_damaged(root, cache):
    shard = shard_of(root, "a.idx", 5000)
    content = (root / "a.idx").read_bytes()
    with ShardServer(root) as server:

        def work() -> None:
            assert RemoteFolder(server.url, cache, MANY).read("a.idx", shard.sha256) == content

        in_processes(work, work, work)
        assert server.requests["/a.idx"] == 1
        (cache / f"{shard.sha256}.file").write_bytes(content[:100])
        work()
        assert server.requests["/a.idx"] == 2
        with pytest.raises(ValueError, match=rf"/a\.idx: its sha256 is {shard.sha256}, expected {'0' * 64}"):
            RemoteFolder(server.url, cache, MANY).read("a.idx", "0" * 64)
        assert len(list(cache.glob("*.file"))) == 1


def test_any_file_system_of_fsspec_serves(root, cache):
    shard = shard_of(root)
    content = (root / "a.tar").read_bytes()
    fsspec.filesystem("memory").pipe_file("/data/set/a.tar", content)
    for folder in (open_folder("memory://data/set"), open_folder("memory://data/set", cache, MANY)):
        check(folder, root, shard)
        assert (folder.size("a.tar"), folder.size("nothing")) == (MIB, None)
        assert folder.read("a.tar", shard.sha256) == content
        with pytest.raises(FileNotFoundError):
            folder.read("nothing")
    assert (cache / f"{shard.sha256}.tar").read_bytes() == content
    with pytest.raises(ValueError, match=r"nosuch://x: .*nosuch"):
        open_folder("nosuch://x")


class _Samples:
    """A data set whose items are parts of shards, each checked where it is read."""

    def __init__(self, folder: RemoteFolder, shards: list[Shard]) -> None:
        self.folder = folder
        self.places = [(shard, offset, size) for shard in shards for offset, size in samples_of(shard)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> bytes:
        return self.folder.part(*self.places[i])


@pytest.mark.parametrize("cache_bytes", [0, MANY])
def test_reading_works_in_the_parent_then_in_worker_processes_then_in_the_parent(cache_bytes, root, cache):
    shards = [shard_of(root, f"{i}.tar", samples=80) for i in range(3)]
    with ShardServer(root) as server:
        samples = _Samples(RemoteFolder(server.url, cache, cache_bytes), shards)
        check(samples.folder, root, shards[0], samples_of(shards[0])[:3])
        loader = DataLoader(samples, batch_size=None, num_workers=2, multiprocessing_context="fork")
        whole = b"".join((root / shard.path).read_bytes()[: 80 * (MIB // 80)] for shard in shards)
        assert b"".join(loader) == whole
        check(samples.folder, root, shards[0])
        check(samples.folder, root, shards[1])


def _limit_files(cache: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))


def _small_disk(cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cache)], capture_output=True)
    if done.returncode:
        os._exit(77)


@pytest.mark.parametrize("fill", [_limit_files, _small_disk])
def test_on_a_full_disk_reading_goes_on_without_the_cache(fill, root, cache, tmp_path):
    shard = shard_of(root, size=3 * MIB)
    log_file = tmp_path / "log"

    def work() -> None:
        logging.basicConfig(filename=log_file, force=True)
        fill(cache)
        folder = RemoteFolder(server.url, cache, MANY)
        check(folder, root, shard)
        assert folder.traffic.shards <= 2 * shard.bytes  # the thread may have tried, and the reader who waited for it
        assert not list(cache.glob("*.partial"))

    with ShardServer(root) as server:
        process = fork.Process(target=work)
        process.start()
        process.join(60)
        subprocess.run(["umount", str(cache)], capture_output=True)
        if process.exitcode == 77:
            pytest.skip("this machine does not let us mount a small disk")
        assert process.exitcode == 0
    warnings = [line for line in log_file.read_text().splitlines() if "from now on every sample" in line]
    assert len(warnings) == 1 and "data.cache" in warnings[0]
    assert f"Errno {errno.EFBIG if fill is _limit_files else errno.ENOSPC}" in warnings[0]


def test_a_cache_folder_that_cannot_be_used_is_an_error_that_names_the_setting(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache .*file/cache: cannot keep shards there"):
        RemoteFolder("http://127.0.0.1:1", tmp_path / "file" / "cache", MANY)


def test_reading_from_the_cache_keeps_neither_memory_nor_files(root, cache):
    shards = [shard_of(root, f"{i}.tar", 20_000) for i in range(OPEN_FILES + 30)]
    with ShardServer(root) as server:
        folder = RemoteFolder(server.url, cache, MANY)
        for shard in shards:
            check(folder, root, shard)
    before = len(os.listdir("/proc/self/fd")), _resident()
    for i in range(50_000):
        folder.part(shards[i * 7919 % len(shards)], i % 10_000, 1000)
    assert len(os.listdir("/proc/self/fd")) <= before[0]
    assert _resident() - before[1] < 8 * MIB  # 1,000 bytes kept of each would be 50


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_the_server_runs_as_a_script_and_tells_its_counts(root):
    shard = shard_of(root)
    script = Path(__file__).parent / "shard_server.py"
    command = [sys.executable, str(script), "--root", str(root), "--port", "0", "--rate", "50e6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            folder = RemoteFolder(f"http://127.0.0.1:{int(process.stdout.readline())}")
            check(folder, root, shard, [(3, 1000)])
            assert b'"bytes": {"/a.tar": 1000}' in folder.read("_counts")
        finally:
            process.terminate()
