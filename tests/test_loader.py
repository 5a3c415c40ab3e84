"""The stream of a run: the same global batches on any number of ranks, resumable anywhere, exact evaluation."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import ONE, REST, damage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hyperpelt_ds.config import Config, from_dict
from hyperpelt_ds.contracts import Batch, Sample, StreamState
from hyperpelt_ds.data import shards
from hyperpelt_ds.data.check import check_samples
from hyperpelt_ds.data.collate import collator_for
from hyperpelt_ds.data.evaluation import evaluation_batches, read_texts
from hyperpelt_ds.data.loader import TrainStream
from hyperpelt_ds.data.manifest import MANIFEST, FeatureSet, Manifest, write_manifest

COUNTS = {"topic": 50, "vqa": 23, "caption": 1}
TASKS = list(COUNTS)
GLOBAL, MICRO = 12, 3


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(50)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


TOKENIZER = _tokenizer()


def make_samples(task: str, split: str, n: int) -> list[Sample]:
    random = np.random.default_rng(n)
    samples = []
    for i in range(n):
        source = " ".join(f"w{word}" for word in random.integers(0, 50, random.integers(1, 30)))
        image = None if task == "topic" else f"img{i % 5}"
        samples.append(Sample(f"{split}{i}", task, source, f"w{i % 50}", image=image))
    return samples


def save(folder: Path, samples: dict[str, dict[str, list[Sample]]]) -> Manifest:
    tasks = {
        task: {
            split: shards.write_task(folder, task, split, samples[task][split], per_shard=7) for split in samples[task]
        }
        for task in samples
    }
    features = FeatureSet(3, 2, {}, shards.write_features(folder, [(f"img{i}", np.ones((3, 2))) for i in range(5)], 2))
    return Manifest.load(write_manifest(folder, tasks, features, {}))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    samples = {task: {"train": make_samples(task, "train", n)} for task, n in COUNTS.items()}
    samples["topic"]["validation"] = make_samples("topic", "validation", 19)
    samples["vqa"]["validation"] = make_samples("vqa", "validation", 4)
    return save(tmp_path_factory.mktemp("set"), samples)


def config(**sections: dict[str, Any]) -> Config:
    defaults: dict[str, dict[str, Any]] = {
        "vision": {"encoder": "any", "cells": 3, "channels": 2},
        "data": {"temperature": 2.0, "max_source_length": 20},
        "train": {"global_batch": GLOBAL, "micro_batch": MICRO},
    }
    return from_dict({name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {**defaults, **sections}})


def stream(
    manifest: Manifest, rank: int = 0, world: int = 1, workers: int = 0, state: StreamState | None = None, **train: Any
) -> TrainStream:
    settings = config(data={"workers": workers}, train=train)
    return TrainStream(manifest, settings, TASKS, TOKENIZER, rank, world, state)


def names(step: list[Batch]) -> list[list[tuple[str, str]]]:
    return [[(sample.task, sample.key) for sample in batch.samples] for batch in step]


def steps(source: TrainStream, n: int) -> list[list[Batch]]:
    taken = []
    for step in islice(source, n):
        taken.append(step)
        source.commit()
    return taken


def global_batches(manifest: Manifest, world: int, n: int, **options: Any) -> list[Counter[tuple[str, str]]]:
    ranks = [steps(stream(manifest, rank, world, **options), n) for rank in range(world)]
    return [
        Counter(name for step in parts for batch in names(step) for name in batch) for parts in zip(*ranks, strict=True)
    ]


def test_global_batches_are_the_same_for_every_world_size_and_worker_count(manifest):
    expected = global_batches(manifest, 1, 20)
    assert all(sum(batch.values()) == GLOBAL for batch in expected)
    assert len({tuple(sorted(batch)) for batch in expected}) == 20
    assert global_batches(manifest, 2, 20) == expected
    assert global_batches(manifest, 4, 20) == expected
    assert global_batches(manifest, 2, 20, workers=2) == expected
    assert global_batches(manifest, 1, 20, micro_batch=1) == expected
    assert global_batches(manifest, 2, 20, micro_tokens=70) == expected


@pytest.mark.parametrize("world", [1, 4])
def test_every_sample_comes_once_in_each_epoch_of_its_task(manifest, world):
    source = stream(manifest, 0, world)
    total = sum(global_batches(manifest, world, 30), Counter())
    steps(source, 30)
    assert source.state().samples == 30 * GLOBAL == sum(total.values())
    for task, n in COUNTS.items():
        epochs, rest = divmod(sum(source.state().counts[task]), n)
        times = Counter(total[task, f"train{i}"] for i in range(n))
        assert epochs >= 2 and times == Counter({epochs: n - rest, epochs + 1: rest}) - Counter()


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_any_step_in_another_world_continues_exactly(manifest, workers):
    whole = global_batches(manifest, 1, 12)
    for stop, before, after in ((1, 1, 1), (4, 2, 1), (7, 1, 4)):
        part = stream(manifest, 0, before, workers)
        steps(part, stop)
        state = StreamState(**json.loads(json.dumps(dataclasses.asdict(part.state()))))
        assert state.samples == stop * GLOBAL
        assert global_batches(manifest, after, 5, workers=workers, state=state) == whole[stop : stop + 5]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_bitwise_the_same_tensors(manifest, workers):
    whole = steps(stream(manifest, 1, 2), 6)
    part = stream(manifest, 1, 2, workers)
    steps(part, 3)
    rest = steps(stream(manifest, 1, 2, workers, state=part.state()), 3)
    for step, same in zip(whole[3:], rest, strict=True):
        for batch, other in zip(step, same, strict=True):
            assert batch.samples == other.samples
            assert all(torch.equal(a, b) for a, b in zip(batch[:-1], other[:-1], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_state_counts_what_was_committed_and_not_what_was_prefetched(manifest, workers):
    source = stream(manifest, workers=workers)
    iterator = iter(source)
    taken = [next(iterator) for _ in range(3)]
    assert source.state() == StreamState(0, manifest.digests(TASKS), 12, GLOBAL, 0, {task: [0] for task in COUNTS})
    source.commit()
    source.commit()
    assert source.state().samples == 2 * GLOBAL
    drawn = Counter(task for step in taken[:2] for batch in names(step) for task, _ in batch)
    assert source.state().counts == {task: [drawn[task]] for task in COUNTS}
    iterator = iter(source)  # starts after the last commit: the third step comes once more
    assert names(next(iterator)) == names(taken[2])
    next(iterator)
    source.commit()
    source.commit()
    assert source.state().samples == 4 * GLOBAL
    with pytest.raises(AssertionError):
        source.commit()


def test_a_step_cannot_be_committed_before_it_was_given_out(manifest):
    source = stream(manifest, workers=2)
    iterator = iter(source)
    next(iterator)
    source.commit()
    with pytest.raises(AssertionError, match="without a step given out"):
        source.commit()


def test_micro_batches_hold_neighbours_in_length(manifest):
    for step in steps(stream(manifest, 1, 2, global_batch=24), 10):
        spans = [[size(sample) for sample in batch.samples] for batch in step]
        assert [len(step), sum(map(len, spans))] == [4, 12] and all(1 <= len(span) <= 2 * MICRO for span in spans)
        assert all(max(left) <= min(right) for left, right in pairwise(spans))


def size(sample: Sample) -> int:
    return min(20, 1 + len(sample.source.split())) + 1 + len(sample.target.split())


def test_sorting_by_length_keeps_padding_small(manifest):
    batches = [batch for step in steps(stream(manifest, global_batch=48, micro_batch=6), 20) for batch in step]
    real, total = (sum(int(f(batch.attention_mask)) for batch in batches) for f in (torch.sum, torch.numel))
    assert 1 - real / total < 0.15  # 0.31 with the same batches unsorted


def test_a_limit_on_tokens_gives_every_rank_as_many_micro_batches_as_that_takes(manifest):
    limit, parts = 50, []
    both = [steps(stream(manifest, rank, 2, global_batch=24, micro_tokens=limit), 10) for rank in (0, 1)]
    for ranks in zip(*both, strict=True):
        assert len(ranks[0]) == len(ranks[1])
        parts.append(len(ranks[0]))
        for batch in (batch for step in ranks for batch in step):
            places = batch.attention_mask.numel() + batch.labels.numel()
            assert places <= 1.2 * limit or len(batch.samples) == 1  # lengths are estimated from bytes
    assert min(parts) >= 4 and len(set(parts)) > 1


def test_loss_weights_are_the_tasks_own(manifest):
    settings = config(data={"loss_weights": {"vqa": 0.5}})
    batches = chain(*islice(TrainStream(manifest, settings, TASKS, TOKENIZER, 0, 1), 5))
    weights = {
        (s.task, w) for batch in batches for s, w in zip(batch.samples, batch.loss_weights.tolist(), strict=True)
    }
    assert weights == {("vqa", 0.5), ("topic", 1.0), ("caption", 1.0)}


def test_an_interrupt_of_the_process_group_leaves_the_workers_at_work(manifest):
    source = stream(manifest, workers=2)
    iterator = iter(source)
    next(iterator)
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(islice(iterator, 10))) == 10


def test_iterating_leaves_the_generator_of_dropout_alone(manifest):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for workers in (0, 2):
        next(iter(stream(manifest, workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_cut_sources_are_counted_with_any_number_of_workers(manifest, workers):
    source = stream(manifest, workers=workers)
    taken = steps(source, 5)
    texts = [sample.source for step in taken for batch in step for sample in batch.samples]
    assert source.truncated == sum(len(text.split()) > 19 for text in texts) > 0


def weighed(step: list[Batch]) -> list[tuple[Sample, float]]:
    return [pair for b in step for pair in zip(b.samples, b.loss_weights.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("world", "workers", "kind"), [(2, 2, "flipped data byte"), *((1, 0, kind) for kind in ONE | REST)]
)
def test_a_damaged_sample_is_a_hole_and_nothing_else_moves(manifest, tmp_path, world, workers, kind):
    folder = Path(shutil.copytree(manifest.folder.root, tmp_path / "set"))
    hurt_samples = damage(folder, "topic/train-000001.tar", kind, 2)
    hurt_images = {f"img{2 + position}" for position in damage(folder, "features/features-000001.tar", kind, 1)}
    hurt = Manifest.load(folder / MANIFEST)
    wanted = {("topic", f"train{7 + position}") for position in hurt_samples} | {
        (s.task, s.key) for t in TASKS[1:] for s in read_texts(manifest, t, "train") if s.image in hurt_images
    }
    found = []
    for rank in range(world):
        whole, holed = stream(manifest, rank, world), stream(hurt, rank, world, workers)
        for step, other in zip(islice(whole, 15), islice(holed, 15), strict=True):
            drawn = [(s.task, s.key, s) for batch in step for s in batch.samples]
            kept = [(s.task, s.key, s) for s, weight in weighed(other) if weight]
            assert sorted(kept, key=str) == sorted((d for d in drawn if d[:2] not in wanted), key=str)
            assert len(weighed(other)) == len(drawn) and len(other) == len(step)
            whole.commit()
            holes = holed.commit()
            assert {(hole.task, hole.key) for hole in holes} == wanted & {n for b in names(step) for n in b}
            found += holes
        assert whole.state().counts == holed.state().counts
    draws = Counter(name for batch in global_batches(manifest, 1, 15) for name in batch.elements())
    assert Counter((hole.task, hole.key) for hole in found) == {name: draws[name] for name in wanted}
    assert len({hole.position for hole in found}) == len(found)
    assert all(hole.reason and "image" in hole.reason for hole in found if hole.task != "topic")
    assert {hole.shard for hole in found if hole.task == "topic"} == {"topic/train-000001.tar"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_target_that_no_one_looked_at_before_and_is_too_long_is_a_hole(manifest, workers):
    settings = config(data={"workers": workers, "max_target_length": 1})
    source = TrainStream(manifest, settings, TASKS, TOKENIZER, 0, 1)
    [step] = islice(source, 1)
    assert all(not batch.loss_weights.any() for batch in step)
    holes = source.commit()
    assert len(holes) == GLOBAL and holes[0].reason == "its target has 2 tokens, data.max_target_length is 1"


@pytest.mark.parametrize(
    ("train", "world", "reason"),
    [
        ({"micro_batch": 5}, 2, r"not a multiple of train\.micro_batch 5; micro-batches that fit: \[1, 2, 3, 6\]"),
        ({}, 5, r"5 processes cannot share the 12 lanes .*: \[1, 2, 3, 4, 6, 12\]"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused_with_those_that_do(manifest, train, world, reason):
    with pytest.raises(ValueError, match=reason):
        stream(manifest, world=world, **train)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 1}, "has seed 1, this run has 0"),
        ({"data": {"topic": "feed"}}, "was on other shards of caption, topic, vqa than there are now"),
        ({"samples": 13}, "has samples 13, but its counts sum to 12"),
        ({"lanes": 6}, "has lanes 6, this run has 12"),
        ({"global_batch": 24}, "has global_batch 24, this run has 12"),
        ({"counts": {"topic": [12]}}, r"has counts of \{'topic': 1\} \(task: lanes\), not .*'vqa': 1"),
    ],
)
def test_a_state_of_another_run_is_refused_with_the_field_named(manifest, change, reason):
    source = stream(manifest)
    steps(source, 1)
    with pytest.raises(ValueError, match=f"the stream to be continued {reason}"):
        stream(manifest, state=dataclasses.replace(source.state(), **change))


def test_features_tasks_and_weights_that_do_not_fit_are_refused_before_reading(manifest):
    with pytest.raises(
        ValueError, match=r"vision.cells is 4, but the features of .*manifest\.json have 3; set it to that"
    ):
        TrainStream(manifest, config(vision={"cells": 4}), TASKS, TOKENIZER, 0, 1)
    with pytest.raises(ValueError, match=r"task 'mood' is not in .*manifest\.json; it holds topic, vqa, caption"):
        TrainStream(manifest, config(), ["mood"], TOKENIZER, 0, 1)
    with pytest.raises(ValueError, match=r"data\.task_weights names \['topic'\]"):
        TrainStream(manifest, config(data={"task_weights": {"topic": 1.0}}), TASKS, TOKENIZER, 0, 1)


def evaluate(manifest: Manifest, world: int, tasks: list[str], size: int = 4, limit: int = 0) -> list[list[Batch]]:
    collator = collator_for(config(), TASKS, TOKENIZER)
    return [
        list(evaluation_batches(manifest, "validation", tasks, collator, size, rank, world, limit))
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_takes_every_sample_once_in_as_many_batches_on_each_rank(manifest, world):
    ranks = evaluate(manifest, world, ["topic", "vqa"])
    assert len({len(batches) for batches in ranks}) == 1
    counted = Counter(
        (sample.task, sample.key)
        for batches in ranks
        for batch in batches
        for sample, weight in zip(batch.samples, batch.loss_weights.tolist(), strict=True)
        if weight
    )
    assert counted == {("topic", f"validation{i}"): 1 for i in range(19)} | {
        ("vqa", f"validation{i}"): 1 for i in range(4)
    }
    assert all(1 <= len(batch.samples) <= 4 for batches in ranks for batch in batches)


def test_ranks_without_samples_evaluate_one_of_weight_zero(manifest):
    ranks = evaluate(manifest, 8, ["vqa"])
    assert [len(batches) for batches in ranks] == [1] * 8
    assert sorted(batches[0].loss_weights.tolist() for batches in ranks) == [[0.0]] * 4 + [[1.0]] * 4


def test_a_limit_takes_the_same_part_of_each_task_every_time(manifest):
    def taken(world: int, limit: int) -> set[tuple[str, str]]:
        return {
            name
            for batches in evaluate(manifest, world, ["topic", "vqa"], limit=limit)
            for batch in batches
            for name in chain(*names([batch]))
        }

    five = taken(1, 5)
    assert Counter(task for task, _ in five) == {"topic": 5, "vqa": 4}
    assert taken(1, 5) == taken(3, 5) == five
    assert five < taken(2, 8)
    assert {name for name in five if name[0] == "topic"} != {("topic", f"validation{i}") for i in range(5)}


def test_evaluating_a_split_that_a_task_lacks_is_an_error(manifest):
    with pytest.raises(ValueError, match=r"task 'caption' has no samples of split 'validation' in .*manifest\.json"):
        evaluate(manifest, 1, ["caption"])


def test_read_texts_gives_a_whole_split_in_order(manifest):
    assert read_texts(manifest, "vqa", "train") == make_samples("vqa", "train", 23)


def test_samples_that_cannot_be_trained_on_are_found_before_the_first_step(tmp_path, manifest_path, config):
    tokenizer = AutoTokenizer.from_pretrained(config.model.backbone)
    collator = collator_for(config, ["movie_sentiment", "easy_vqa"], tokenizer)
    check_samples(Manifest.load(manifest_path), ["movie_sentiment", "easy_vqa"], collator, 0, 1)

    def manifest(**changes):
        good = Sample("good", "easy_vqa", "what shape", "circle", "i", "image")
        bad = good._replace(**{"key": "bad", **changes})
        folder = tmp_path / next(iter(changes))
        written = {"train": shards.write_task(folder, "easy_vqa", "train", [good, bad])}
        features = shards.write_features(folder, [("image", np.zeros((4, 6)))])
        return Manifest.load(write_manifest(folder, {"easy_vqa": written}, FeatureSet(4, 6, {}, features), {}))

    long = manifest(target="red " * 20)
    with pytest.raises(ValueError, match="'bad' of task 'easy_vqa': its target has 21 tokens"):
        check_samples(long, ["easy_vqa"], collator, 1, 2)
    check_samples(long, ["easy_vqa"], collator, 0, 2)  # the other rank's share is fine
    with pytest.raises(ValueError, match="'easy_vqa', sample 'bad': its target 'purple' is not one of black, blue, "):
        check_samples(manifest(group="colour", target="purple"), ["easy_vqa"], collator, 0, 1)
    check_samples(manifest(image="nowhere"), ["easy_vqa"], collator, 0, 1)  # one of two: a hole when it is drawn


def test_damage_is_only_counted_before_the_first_step_unless_nothing_is_left(tmp_path, manifest_path, config, caplog):
    tokenizer = AutoTokenizer.from_pretrained(config.model.backbone)
    collator = collator_for(config, ["movie_sentiment", "easy_vqa"], tokenizer)
    folder = Path(shutil.copytree(manifest_path.parent, tmp_path / "some"))
    damage(folder, "movie_sentiment/train-000000.tar", "header zeroed", 3)
    damage(folder, "movie_sentiment/train-000001.tar", "cut at a header", 15)
    check_samples(Manifest.load(folder / MANIFEST), ["movie_sentiment"], collator, 0, 1)
    assert "6 of the 48 samples looked at in movie_sentiment/train are damaged" in caplog.text
    for path in (folder / "movie_sentiment").glob("train-*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(
        ValueError, match=r"'movie_sentiment': none of the samples looked at in train can be used: shard"
    ):
        check_samples(Manifest.load(folder / MANIFEST), ["movie_sentiment"], collator, 0, 1)


def test_a_task_whose_images_have_no_features_is_refused(tmp_path, config):
    collator = collator_for(config, ["easy_vqa"], AutoTokenizer.from_pretrained(config.model.backbone))
    samples = [Sample(f"k{i}", "easy_vqa", "what shape", "circle", "i", f"new{i}") for i in range(3)]
    written = {"train": shards.write_task(tmp_path, "easy_vqa", "train", samples)}
    features = shards.write_features(tmp_path, [("old", np.zeros((4, 6)))])
    manifest = Manifest.load(write_manifest(tmp_path, {"easy_vqa": written}, FeatureSet(4, 6, {}, features), {}))
    with pytest.raises(ValueError, match=r"features of none of its images .*'new0'; data_prep/features\.py makes them"):
        check_samples(manifest, ["easy_vqa"], collator, 0, 1)


def test_of_many_ranks_one_may_see_only_images_without_features_or_damaged_samples(tmp_path, config):
    """Features may lack pictures that could not be read: with few samples a rank then looks at nothing else."""
    collator = collator_for(config, ["easy_vqa"], AutoTokenizer.from_pretrained(config.model.backbone))
    samples = [Sample(f"k{i}", "easy_vqa", "what shape", "circle", "i", f"image{i}") for i in range(5)]
    written = {"train": shards.write_task(tmp_path, "easy_vqa", "train", samples)}
    features = shards.write_features(tmp_path, [(f"image{i}", np.zeros((4, 6))) for i in range(4)])
    path = write_manifest(tmp_path, {"easy_vqa": written}, FeatureSet(4, 6, {}, features), {})
    damage(tmp_path, "easy_vqa/train-000000.tar", "flipped data byte", 2)
    for rank in range(8):
        check_samples(Manifest.load(path), ["easy_vqa"], collator, rank, 8)


def test_a_run_goes_on_when_its_data_set_gains_a_task(manifest, tmp_path):
    source = stream(manifest)
    steps(source, 2)
    folder = Path(shutil.copytree(manifest.folder.root, tmp_path / "set"))
    more = {"more": {"train": shards.write_task(folder, "more", "train", [Sample("k", "more", "w1", "w2")])}}
    grown = Manifest.load(write_manifest(folder, {**manifest.tasks, **more}, manifest.features, {}))
    assert names(steps(stream(grown, state=source.state()), 1)[0]) == names(steps(source, 1)[0])
