"""Training on what only streams: webdataset's own pipeline over pipes, which promises little and must say so."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from conftest import IMAGE_TASKS, TEXT_TASKS
from damage import damage
from transformers import AutoTokenizer

from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import TRAIN, Batch, Hole, Sample
from hyperpelt_ds.data.loader import TrainStream
from hyperpelt_ds.data.manifest import MANIFEST, Manifest
from hyperpelt_ds.data.plain import PlainStream, train_stream
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.train import loop

TASKS = (*TEXT_TASKS, *IMAGE_TASKS)
GLOBAL = 64


def pipes(folder: str | Path, tasks: Iterable[str] = TASKS) -> dict[str, str]:
    return {task: f"pipe:cat {folder}/{task}/train-{{000000..000002}}.tar" for task in tasks}


def plain(config: Config, shards: dict[str, str], *overrides: str) -> Config:
    batches = [f"train.global_batch={GLOBAL}", "train.micro_batch=8"]
    return config.override([f"data.plain={json.dumps(shards)}", *batches, *overrides])


@pytest.fixture(scope="module")
def tokenizer(config: Config) -> Any:
    return AutoTokenizer.from_pretrained(config.model.backbone)


@pytest.fixture(scope="module")
def manifest(manifest_path: Path) -> Manifest:
    return Manifest.load(manifest_path)


@pytest.fixture
def stream(config: Config, manifest: Manifest, tokenizer: Any):
    """A rank's stream over pipes of the manifest's own shards, or over others of the first text task alone."""

    def make(rank: int = 0, world: int = 1, *overrides: str, shards: str = "") -> PlainStream:
        of, tasks = ({TASKS[0]: shards}, TASKS[:1]) if shards else (pipes(manifest.folder.root), TASKS)
        only = [f"data.train_tasks={','.join(tasks)}"]
        return PlainStream(manifest, plain(config, of, *only, *overrides), TASKS, tokenizer, rank, world)

    return make


def steps(source: PlainStream, n: int) -> tuple[list[list[Batch]], list[Hole]]:
    taken, holes = [], []
    for step in islice(source, n):
        taken.append(step)
        holes += source.commit()
    return taken, holes


def usable(taken: list[list[Batch]]) -> list[Sample]:
    weighed = (zip(b.samples, b.loss_weights.tolist(), strict=True) for step in taken for b in step)
    return [sample for pairs in weighed for sample, weight in pairs if weight]


def stored(manifest: Manifest, task: str) -> list[Sample]:
    reader = Reader(manifest)
    return [reader.sample(task, TRAIN, i) for i in range(manifest.count(task, TRAIN))]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_get_every_sample_in_the_end_with_its_image_and_nothing_else(stream, manifest, workers):
    reader = Reader(manifest)
    ranks = []
    for rank in range(2):
        taken, holes = steps(stream(rank, 2, f"data.workers={workers}"), 40)
        assert not holes
        for step in taken:
            assert len(step) == GLOBAL // 2 // 8 and sum(len(batch.samples) for batch in step) == GLOBAL // 2
        for batch in taken[0]:
            for sample, row in zip(batch.samples, batch.image_rows.tolist(), strict=True):
                assert (row >= 0) == (sample.image is not None)
                if sample.image is not None:
                    np.testing.assert_array_equal(batch.images[row], reader.image(sample.image))
        ranks.append(usable(taken))
    assert set(ranks[0] + ranks[1]) == {sample for task in TASKS for sample in stored(manifest, task)}


def test_every_rank_and_every_worker_draws_for_itself(stream, manifest):
    shards = pipes(manifest.folder.root)[TASKS[0]]
    ranks = [steps(stream(rank, 2, "data.workers=2", shards=shards), 2)[0] for rank in range(2)]
    drawn = [sorted(sample.key for sample in usable([step])) for taken in ranks for step in taken]
    assert len(set(map(tuple, drawn))) == 4  # the second step of each is the second worker's first


def test_the_tasks_of_a_global_batch_are_those_of_the_exact_stream(stream, config, manifest, tokenizer):
    weights = 'data.task_weights={"movie_sentiment":3,"movie_rating":1,"easy_vqa":2,"shape_caption":1}'
    exact = TrainStream(manifest, plain(config, {}, weights), TASKS, tokenizer, 0, 1)
    expected = [Counter(s.task for batch in step for s in batch.samples) for step in islice(exact, 5)]
    sources = [stream(rank, 2, weights) for rank in range(2)]
    ranks = [[*steps(source, 2)[0], *steps(source, 3)[0]] for source in sources]  # a new iterator goes on
    both = [Counter(s.task for batch in [*one, *two] for s in batch.samples) for one, two in zip(*ranks, strict=True)]
    assert both == expected and expected[0]["movie_sentiment"] > 2 * expected[0]["movie_rating"]


def test_without_weights_and_counts_tasks_are_drawn_equally_often(config, manifest, tokenizer):
    held_out = {task: {"validation": splits["validation"]} for task, splits in manifest.tasks.items()}
    held_out["easy_vqa"] = manifest.tasks["easy_vqa"]
    without = dataclasses.replace(manifest, tasks=held_out)
    settings = plain(config, pipes(manifest.folder.root), "data.temperature=1")
    taken, _ = steps(PlainStream(without, settings, TASKS, tokenizer, 0, 1), 10)
    drawn = Counter(sample.task for sample in usable(taken))
    assert all(abs(drawn[task] - 10 * GLOBAL / len(TASKS)) < 4 for task in TASKS)
    assert loop.resolve(settings, without).data.tasks == tuple(held_out)


@pytest.mark.parametrize("workers", [0, 2])
def test_position_and_state_follow_commits_and_say_nothing_else(stream, manifest, workers):
    source = stream(0, 2, f"data.workers={workers}")
    iterator = iter(source)
    for _ in range(3):
        next(iterator)
    assert source.state().samples == 0
    source.commit()
    source.commit()
    state = source.state()
    assert (state.samples, state.counts) == (2 * GLOBAL, {})
    source.commit()
    with pytest.raises(AssertionError, match="without a step given out"):
        source.commit()


def test_a_run_says_what_it_does_not_promise_once_and_refuses_to_be_resumed(
    stream, config, manifest, tokenizer, caplog
):
    with caplog.at_level(logging.WARNING):
        state = stream(0, 2).state()
        stream(1, 2)
    [said] = [record.getMessage() for record in caplog.records if record.name == "hyperpelt_ds.data.plain"]
    assert "may come twice or not at all" in said and "cannot be resumed" in said and "shape_caption" in said
    settings = plain(config, pipes(manifest.folder.root))
    with pytest.raises(ValueError, match=r"data\.plain cannot be resumed: .* --init_from"):
        train_stream(manifest, settings, TASKS, tokenizer, 0, 1, state)
    assert isinstance(train_stream(manifest, settings, TASKS, tokenizer, 0, 1), PlainStream)
    assert isinstance(train_stream(manifest, plain(config, {}), TASKS, tokenizer, 0, 1), TrainStream)


def test_asked_for_samples_it_gives_some_of_the_task_without_the_damaged(stream, manifest):
    found = stream().samples("easy_vqa", 30)
    assert len(found) == 30 and len(set(found)) > 10 and set(found) <= set(stored(manifest, "easy_vqa"))
    rest = [f"pipe:exit {status}" for status in range(1, 13)]
    broken = stream(shards="::".join([pipes(manifest.folder.root)[TASKS[0]], *rest])).samples(TASKS[0], 30)
    assert 0 < len(broken) < 30 and set(broken) <= set(stored(manifest, TASKS[0]))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_break_off_become_holes_and_all_that_can_be_read_still_comes(stream, manifest, tmp_path, workers):
    folder = Path(shutil.copytree(manifest.folder.root, tmp_path / "set"))
    task = TASKS[0]
    lost = damage(folder, f"{task}/train-000001.tar", "cut inside data", 5)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    bad = {
        f"pipe:cat {folder}/{task}/train-000001.tar": "unexpected end of data",
        f"pipe:head -c 3072 {folder}/{task}/train-000000.tar; exit 7": "exit 7",  # where a header would begin
        f"pipe:cat {tmp_path}/empty.tar": "holds no samples",
        f"pipe:cat {tmp_path}/missing.tar 2> {tmp_path}/said": "exit 1",
    }
    good = [f"pipe:cat {folder}/{task}/train-{number}.tar" for number in ("000000", "000002")]
    source = stream(1, 2, f"data.workers={workers}", shards="::".join([*good, *bad]))
    taken, holes = steps(source, 20)
    assert set(usable(taken)) == {s for i, s in enumerate(stored(manifest, task)) if i not in {20 + at for at in lost}}
    assert len(usable(taken)) + len(holes) == 20 * GLOBAL // 2
    assert {(hole.task, hole.split, hole.index, hole.key) for hole in holes} == {(task, TRAIN, -1, "")}
    assert {hole.shard for hole in holes} == set(bad)
    assert {(hole.shard, hole.reason) for hole in holes if bad[hole.shard] not in hole.reason} == set()
    positions = [hole.position for hole in holes]
    assert len(set(positions)) == len(positions) and max(positions) < 20 * GLOBAL


def test_a_sample_that_cannot_be_used_is_a_hole_with_the_readers_reason(stream, manifest, tmp_path):
    good = {"task": TASKS[0], "source": "a film", "target": "positive"}
    members: dict[str, tuple[str, str | bytes]] = {
        "good": ("json", json.dumps(good)),
        "cut": ("json", '{"task": "movie'),
        "bytes": ("json", b'"\xff"'),
        "none": ("json", "null"),
        "less": ("json", json.dumps({"task": TASKS[0], "source": "a"})),
        "other": ("json", json.dumps({**good, "task": "easy_vqa"})),
        "text": ("txt", "a film"),
        "label": ("json", json.dumps({**good, "target": "green"})),
        "long": ("json", json.dumps({**good, "source": "a", "target": "positive " * 9})),
        "blind": ("json", json.dumps({**good, "image": "nowhere"})),
    }
    expected = {
        "cut": "not JSON",
        "bytes": "not JSON",
        "none": "expected an object with fields task, source, target",
        "less": "field 'target' is missing",
        "other": "is of task 'easy_vqa', but the manifest lists it under 'movie_sentiment'",
        "text": "has no .json member",
        "label": "'green' is not one of",
        "long": "is not one of",
        "blind": "no features are stored for this image",
    }
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for key, (suffix, content) in members.items():
            writer.write({"__key__": key, suffix: content if isinstance(content, bytes) else content.encode()})
    taken, holes = steps(stream(shards=f"pipe:cat {tmp_path}/a.tar"), 3)
    assert {sample.key for sample in usable(taken)} == {"good"}
    assert {hole.key for hole in holes} == set(expected)
    for hole in holes:
        assert hole.shard == f"pipe:cat {tmp_path}/a.tar" and expected[hole.key] in hole.reason


def test_references_come_as_the_reader_gives_them(stream, tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        fields = {"task": TASKS[0], "source": "a film", "target": "positive", "references": ["positive", "good"]}
        writer.write({"__key__": "one", "json": fields})
    [sample] = stream(shards=str(tmp_path / "a.tar")).samples(TASKS[0], 1)
    assert sample == Sample("one", TASKS[0], "a film", "positive", references=("positive", "good"))


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        ("pipe:exit 3", "exit 3"),
        ("{folder}/nothing.tar", "No such file or directory"),
        ("pipe:cat {folder}/features/features-000000.tar", r"has no \.json member"),
        ("s3://bucket/a.tar", "no gopen handler defined"),
    ],
)
def test_a_source_of_which_nothing_can_be_used_is_an_error_before_the_first_step(stream, manifest, shards, reason):
    with pytest.raises(ValueError, match=f"data.plain: none of the first 4 samples of task '{TASKS[0]}' .*{reason}"):
        stream(shards=shards.format(folder=manifest.folder.root))


def test_batch_sizes_and_features_that_do_not_fit_are_refused_as_by_the_exact_stream(stream):
    with pytest.raises(ValueError, match="5 processes cannot share the 64 lanes"):
        stream(0, 5)
    with pytest.raises(ValueError, match=r"vision\.cells is 5, but the features of"):
        stream(0, 1, "vision.cells=5")


@pytest.mark.parametrize(
    ("shards", "override", "reason"),
    [
        ({"a": ""}, "train.steps=1", "data.plain: no shards are named for task 'a'"),
        ({"a": 3}, "train.steps=1", "data.plain.a: expected str, got 3"),
        ({"a": "x.tar"}, "data.shots=5", "data.shots: with data.plain nothing is known of a sample"),
        ({"a": "x.tar"}, "train.micro_tokens=99", "train.micro_tokens: with data.plain nothing is known"),
    ],
)
def test_a_configuration_that_such_a_source_cannot_meet_is_refused(shards, override, reason):
    with pytest.raises(ValueError, match=reason):
        Config().override([f"data.plain={json.dumps(shards)}", override])


def test_either_all_trained_tasks_are_named_or_none(config, manifest):
    some = plain(config, pipes(manifest.folder.root, TEXT_TASKS))
    with pytest.raises(ValueError, match=r"data\.plain names movie_sentiment, movie_rating, but the tasks"):
        loop.resolve(some, manifest)
    alone = some.override([f"data.train_tasks={','.join(TEXT_TASKS)}"])
    assert loop.resolve(alone, manifest).data.plain == some.data.plain
    assert loop.resolve(plain(config, {}), manifest).data.tasks == TASKS


@pytest.mark.slow
def test_two_ranks_train_on_pipes_count_holes_and_refuse_to_resume(train_on_two_ranks, config, manifest, tmp_path):
    folder = Path(shutil.copytree(manifest.folder.root, tmp_path / "data"))
    damage(folder, "movie_rating/train-000001.tar", "cut inside data", 5)
    settings = config.override(
        [f"data.manifest={folder / MANIFEST}", f"data.plain={json.dumps(pipes(folder))}", "data.workers=1"]
    )
    run = tmp_path / "run"
    train_on_two_ranks(settings, 2, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(losses) == list(range(1, 10)) and losses[9] < 0.9 * losses[1]
    assert any("eval/mean" in line for line in lines)
    found = [json.loads(text) for file in (run / "holes").glob("*") for text in file.read_text().splitlines()]
    assert {hole["shard"] for hole in found} <= {f"pipe:cat {folder}/movie_rating/train-000001.tar"}
    with pytest.raises(AssertionError, match=r"data\.plain cannot be resumed"):
        train_on_two_ranks(settings, 2, run, "--resume", "train.steps=9")
