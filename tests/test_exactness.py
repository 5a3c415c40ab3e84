"""The whole stream, on shards of unequal sizes: exactly once, for any world size and workers, resumed anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from shard_server import Behaviour, ShardServer
from test_loader import TOKENIZER, config, make_samples, weighed

from hyperpelt_ds.contracts import Batch, StreamState
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.loader import TrainStream
from hyperpelt_ds.data.manifest import Manifest, write_manifest

TASKS = ["web", "topic", "rare"]
LANES = GLOBAL = 24
GOLDEN = "a487f7d68c4167e2f1ac2451fd15af71a04a1fd278ae7a2c537b444d1007492c"
Names = list[tuple[str, str]]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """`web` has over a hundred shards of 1 to 9 samples, `topic` is shuffled as a whole, `rare` is one sample."""
    folder = tmp_path_factory.mktemp("set")
    web = make_samples("web", "train", 550)
    written, first, size = [], 0, 0
    while first < len(web):
        size = size % 9 + 1
        own = [sample._replace(image=None) for sample in web[first : first + size]]
        written += shards.write_task(folder, "web", f"part{first}", own)
        first += size
    tasks = {
        "web": {"train": written},
        "topic": {
            "train": shards.write_task(folder, "topic", "train", make_samples("topic", "train", 60), per_shard=17)
        },
        "rare": {"train": shards.write_task(folder, "rare", "train", [web[0]._replace(task="rare", image=None)])},
    }
    assert len(written) > 4 * LANES and 1 in {shard.samples for shard in written}
    return Manifest.load(write_manifest(folder, tasks, None, {}))


def stream(
    manifest: Manifest, rank: int, world: int, workers: int = 0, state: StreamState | None = None
) -> TrainStream:
    settings = config(
        vision={"encoder": None}, data={"workers": workers, "temperature": 1.5, "lanes": LANES},
        train={"global_batch": GLOBAL, "micro_batch": 1},
    )  # fmt: skip
    return TrainStream(manifest, settings, TASKS, TOKENIZER, rank, world, state)


def global_batches(manifest: Manifest, world: int, n: int, **options: Any) -> list[Names]:
    """What all ranks together draw in each of n steps."""

    def drawn(rank: int) -> Iterator[Names]:
        source = stream(manifest, rank, world, **options)
        for step in islice(source, n):
            source.commit()
            yield names(step)

    ranks = [list(drawn(rank)) for rank in range(world)]
    assert len({len(own) for steps in ranks for own in steps}) == 1, "every rank takes as many samples in every step"
    return [sorted(name for own in parts for name in own) for parts in zip(*ranks, strict=True)]


def names(step: list[Batch]) -> Names:
    return [(sample.task, sample.key) for sample, _ in weighed(step)]


@pytest.fixture(scope="module")
def whole(manifest: Manifest) -> list[Names]:
    return global_batches(manifest, 1, 200)


def test_the_stream_never_changes(whole):
    # a different digest means that every run resumed from an older checkpoint would see other samples
    assert hashlib.sha256(json.dumps(whole).encode()).hexdigest() == GOLDEN


def test_nothing_is_missing_and_nothing_comes_twice_in_an_epoch(manifest, whole):
    source = stream(manifest, 0, 1)
    for _ in islice(source, 200):
        source.commit()
    counts = source.state().counts
    assert {task: len(lanes) for task, lanes in counts.items()} == {"web": LANES, "topic": 1, "rare": 1}
    times = Counter(name for batch in whole for name in batch)
    for task in TASKS:
        size, drawn = manifest.count(task, "train"), sum(counts[task])
        own = [times[name] for name in times if name[0] == task]
        assert len(own) == size and sum(own) == drawn > 2 * size
        # lanes reach the end of an epoch at slightly different times
        assert max(own) - min(own) <= (2 if len(counts[task]) > 1 else 1)


@pytest.mark.parametrize(("world", "workers"), [(2, 3), (3, 1), (8, 0)])
def test_global_batches_are_the_same_for_every_world_size_and_worker_count(manifest, whole, world, workers):
    assert global_batches(manifest, world, 60, workers=workers) == whole[:60]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_global_batches_are_the_same_in_the_whole_matrix(manifest, whole, world, workers):
    assert global_batches(manifest, world, 200, workers=workers) == whole


def epoch_ends(manifest: Manifest) -> int:
    """The step in which the first lane of `web` goes over to its second epoch."""
    source, size = stream(manifest, 0, 1), manifest.count("web", "train") // LANES
    for number, _ in enumerate(source, 1):
        source.commit()
        if max(source.state().counts["web"]) > size:
            return number
    raise AssertionError


@pytest.mark.parametrize("moment", ["first step", "in a window", "last of an epoch", "first of the next", "prefetched"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 8), (3, 2)])
def test_a_stream_resumed_at_any_moment_and_world_size_goes_on_exactly(manifest, whole, moment, before, after):
    end = epoch_ends(manifest)
    stop = {"first step": 1, "in a window": 7, "last of an epoch": end - 1, "first of the next": end, "prefetched": 30}
    states = []
    for rank in range(before):
        source = stream(manifest, rank, before, workers=2 if moment == "prefetched" else 0)
        iterator = iter(source)
        for _ in range(stop[moment]):
            next(iterator)
            source.commit()
        next(iterator)  # given out, not committed: as if the process died in the step
        states.append(json.dumps(dataclasses.asdict(source.state())))
    assert len(set(states)) == 1 and len(states[0]) < 15_000
    state = StreamState(**json.loads(states[0]))
    assert state.samples == stop[moment] * GLOBAL
    assert global_batches(manifest, after, 50, state=state) == whole[stop[moment] : stop[moment] + 50]


def test_ten_resumes_in_a_row_are_as_no_resume(manifest, whole):
    state, drawn, worlds = None, [], [1, 2, 3, 4, 6, 8, 12, 24, 2, 1]
    for steps, world in zip([1, 7, 3, 2, 5, 4, 6, 1, 2, 7], worlds, strict=True):
        drawn += global_batches(manifest, world, steps, state=state)
        source = stream(manifest, world - 1, world, state=state)
        for _ in islice(source, steps):
            source.commit()
        state = source.state()
    assert drawn == whole[: len(drawn)] and len(drawn) == 38


def test_ranks_of_a_large_task_read_shards_of_their_own(manifest):
    """Few shards at a time on each rank, and hardly the same: what a cache of remote shards lives by."""
    read: list[set[str]] = []
    for rank in range(4):
        own = stream(manifest, rank, 4)
        keys = {key for step in islice(own, 5) for task, key in names(step) if task == "web"}
        places = {reader_key: number for number, reader_key in enumerate(all_keys(manifest))}
        read.append({shard_of(manifest, places[key]) for key in keys})
    assert sum(len(a & b) for a in read for b in read if a is not b) / 2 <= 3  # neighbours share a border


def all_keys(manifest: Manifest) -> list[str]:
    return [f"train{number}" for number in range(manifest.count("web", "train"))]


def shard_of(manifest: Manifest, place: int) -> str:
    for shard in manifest.shards("web", "train"):
        if place < shard.samples:
            return shard.path
        place -= shard.samples
    raise AssertionError


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_fails_now_and_then_loses_and_repeats_nothing(manifest, whole, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries, in forked workers too
    faults = Behaviour(errors=0.1, resets=0.05, short=0.05, seed=workers)
    with ShardServer(Path(manifest.folder.root), faults) as server:
        remote = Manifest.load(f"{server.url}/manifest.json", str(tmp_path / "cache"), 10**9)
        assert global_batches(remote, 2, 60, workers=workers) == whole[:60]
        assert server.faults


def test_a_store_that_no_longer_answers_ends_the_stream_and_makes_no_holes(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    with ShardServer(Path(manifest.folder.root)) as server:
        source = stream(Manifest.load(f"{server.url}/manifest.json"), 0, 1)
        iterator = iter(source)
        next(iterator)
        assert source.commit() == []
        server.behaviour = Behaviour(errors=1.0)
        with pytest.raises(ValueError, match=r": given up after 5 tries, the last: .* 503"):
            list(islice(iterator, 20))
    assert source.state().samples == GLOBAL  # and from there it can be resumed


def test_a_state_says_what_does_not_fit(manifest, tmp_path: Path):
    source = stream(manifest, 0, 1)
    next(iter(source))
    other = dataclasses.replace(source.state(), lanes=12)
    with pytest.raises(ValueError, match="the stream to be continued has lanes 12, this run has 24"):
        stream(manifest, 0, 1, state=other)
