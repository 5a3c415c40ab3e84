"""The order of a run: exact epochs, a close mix, a small working set, no replay, and never a silent change."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.data import order as module
from hyperpelt_ds.data.order import Counts, Order, lane_count, mixture

SIZES = {"vqa": [30, 20], "topic": [17], "mood": [1]}
COUNTS = {task: sum(sizes) for task, sizes in SIZES.items()}
# more than WINDOW shards a lane, of unequal sizes, one of a single sample: lanes and windows
LARGE = {"web": [int(n) for n in np.random.default_rng(0).integers(20, 60, 40)] + [1], "topic": [17]}
GOLDEN_START = [("vqa", 26), ("vqa", 0), ("topic", 8), ("vqa", 38), ("topic", 6), ("vqa", 21)]
GOLDEN_DIGEST = "b1b9aa3212357afd878950ac7641b525409ca76170c7793297801e55668289dd"
GOLDEN_LANES = "f994994f0e5b7b6b0bbd06312c80d21469e54f37fd6fa7a151a7f2364c44828e"


def order(seed: int = 0, temperature: float = 1.0, sizes: dict[str, list[int]] = SIZES, lanes: int = 4) -> Order:
    counts = {task: sum(own) for task, own in sizes.items()}
    return Order(sizes, seed, mixture(counts, temperature, {}), lanes)


def draw(source: Order, drawn: Counts, n: int) -> tuple[list[tuple[str, int]], Counts]:
    draws, after = source.draw(drawn, n)
    return [(task, source.locate(task, lane, number)) for task, lane, number in draws], after


def totals(drawn: Counts) -> dict[str, int]:
    return {task: sum(lanes) for task, lanes in drawn.items()}


def digest(samples: list[tuple[str, int]]) -> str:
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def test_golden_order_never_changes():
    # a different digest means that every run resumed from an older checkpoint would see other samples
    source = order(seed=7, temperature=2.0)
    samples, drawn = draw(source, source.start(), 200)
    assert totals(drawn) == {"mood": 16, "topic": 68, "vqa": 116}
    assert samples[:6] == GOLDEN_START
    assert digest(samples) == GOLDEN_DIGEST
    source = order(seed=7, sizes=LARGE)
    assert digest(draw(source, source.start(), 4000)[0]) == GOLDEN_LANES


@pytest.mark.parametrize(("sizes", "lanes"), [(SIZES, 4), (LARGE, 1), (LARGE, 4), (LARGE, 8)])
def test_every_sample_of_a_task_comes_once_in_each_epoch_of_the_task(sizes, lanes):
    source = order(temperature=3.0, sizes=sizes, lanes=lanes)
    draws, drawn = source.draw(source.start(), 6 * sum(map(sum, sizes.values())))
    for task, shards in sizes.items():
        n, own = sum(shards), len(drawn[task])
        for lane in range(own):
            size = n * (lane + 1) // own - n * lane // own
            numbers = [number for name, at, number in draws if (name, at) == (task, lane)]
            assert numbers == list(range(drawn[task][lane])) and len(numbers) > size
        epochs = min(drawn[task][lane] // (n * (lane + 1) // own - n * lane // own) for lane in range(own))
        times = Counter(
            source.locate(task, lane, number)
            for name, lane, number in draws
            if name == task and number < epochs * (n * (lane + 1) // own - n * lane // own)
        )
        assert epochs >= 1 and times == dict.fromkeys(range(n), epochs)


def test_a_large_task_reads_few_shards_at_a_time_and_not_the_same_ones_each_epoch():
    sizes = {"web": [100] * 200}
    source = order(sizes=sizes, lanes=4)
    samples, after = draw(source, source.start(), 400)  # a quarter of each lane's first window
    touched = {index // 100 for _, index in samples}
    assert len(touched) <= 4 * (module.WINDOW + 1) and len(after["web"]) == 4
    one_epoch_on = {"web": [5000] * 4}
    again = {index // 100 for _, index in draw(source, one_epoch_on, 400)[0]}
    assert len(again) <= 4 * (module.WINDOW + 1) and again != touched


def test_a_window_mixes_its_shards():
    source = order(sizes={"web": [100] * 200}, lanes=2)
    first = [source.locate("web", 0, number) // 100 for number in range(100)]
    assert len(set(first)) >= module.WINDOW
    assert first != sorted(first)


def test_shards_larger_than_a_piece_are_cut():
    sizes = {"web": [module.PIECE * 40] * 30}  # 4.9 million samples in thirty shards: no epoch is shuffled at once
    source = order(sizes=sizes, lanes=8)
    window = module.WINDOW * module.PIECE
    places = [source.locate("web", 3, number) for number in range(window)]
    shards = {place // (module.PIECE * 40) for place in places}
    assert len(set(places)) == window and len(shards) <= 2


def test_epochs_tasks_and_seeds_are_shuffled_differently():
    a_and_b = Order({"a": [50], "b": [50]}, 0, {"a": 0.5, "b": 0.5}, 4)
    samples, _ = draw(a_and_b, a_and_b.start(), 200)
    a, b = ([index for task, index in samples if task == name] for name in "ab")
    alone = Order({"a": [50]}, 1, {"a": 1.0}, 4)
    other = [index for _, index in draw(alone, alone.start(), 50)[0]]
    orders = [tuple(x) for x in (a[:50], a[50:100], b[:50], other, range(50))]
    assert len(set(orders)) == len(orders)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([SIZES, LARGE]))
def test_drawing_in_parts_from_the_counts_gives_what_drawing_at_once_gives(parts, sizes):
    start = order(sizes=sizes).start()
    whole, end = draw(order(sizes=sizes), start, sum(parts))
    samples, drawn = [], start
    for n in parts:
        drawn = json.loads(json.dumps(drawn))  # as a checkpoint would
        part, drawn = draw(order(sizes=sizes), drawn, n)  # a new object each time: no memory is needed
        samples += part
    assert (samples, drawn) == (whole, end)


def test_continuing_needs_no_replay():
    drawn = {"vqa": [50 * 10**9], "topic": [17 * 10**9], "mood": [10**9]}
    samples, after = draw(order(), drawn, 68)
    assert sum(totals(after).values()) == sum(totals(drawn).values()) + 68
    assert len({index for task, index in samples if task == "vqa"}) >= 48


def test_the_order_of_the_mappings_does_not_matter():
    turned = dict(reversed(SIZES.items()))
    start = order().start()
    assert draw(order(sizes=turned), start, 50) == draw(order(), start, 50)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("n", [1, 10, 100, 1000, 19200])
def test_the_mix_is_within_three_samples_of_the_probabilities_at_any_length(temperature, n):
    probabilities = mixture(COUNTS, temperature, {})
    drawn = Counter(order(temperature=temperature).tasks_at(0, n))
    assert all(abs(drawn[task] - p * n) <= 3 for task, p in probabilities.items())


@settings(deadline=None)
@given(first=st.integers(0, 2**40), seed=st.integers(0, 2**32))
def test_any_batch_holds_about_its_share_of_each_task(first, seed):
    probabilities = {"vqa": 0.5, "topic": 0.3, "mood": 0.2}
    drawn = Counter(Order(SIZES, seed, probabilities, 4).tasks_at(first, 64))
    assert all(abs(drawn[task] - 64 * p) <= 3 for task, p in probabilities.items())


@pytest.mark.parametrize(
    ("batch", "lanes"), [(32, 32), (48, 48), (96, 96), (128, 64), (120, 24), (100, 4), (12, 12), (15, 3), (7, 1)]
)
def test_lane_count_divide_the_batch_and_allow_powers_of_two_and_multiples_of_three(batch, lanes):
    assert lane_count(batch) == lanes and lane_count(batch, 2) == 2 and batch % lanes == 0


def test_mixture_is_n_to_the_inverse_temperature_or_the_given_weights():
    assert mixture({"a": 100, "b": 400}, 2.0, {}) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert mixture({"a": 100, "b": 400}, 1.0, {}) == pytest.approx({"a": 0.2, "b": 0.8})
    assert mixture({"a": 100, "b": 400}, 2.0, {"a": 3, "b": 1}) == pytest.approx({"a": 0.75, "b": 0.25})


@pytest.mark.parametrize("weights", [{"vqa": 1.0}, {**COUNTS, "extra": 1.0}])
def test_weights_must_name_exactly_the_tasks_of_the_run(weights):
    with pytest.raises(
        ValueError, match=r"data\.task_weights names .*the tasks of the run are \['mood', 'topic', 'vqa'\]"
    ):
        mixture(COUNTS, 1.0, weights)


def test_a_task_without_samples_is_refused():
    with pytest.raises(ValueError, match=r"cannot be drawn from: \['b'\]"):
        mixture({"a": 1, "b": 0}, 1.0, {})
    with pytest.raises(ValueError, match="probabilities name"):
        Order(SIZES, 0, {"vqa": 1.0}, 4)
