"""The order of a run: exact epochs, a close mix, no replay, and never a silent change."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.data.order import Order, mixture

COUNTS = {"vqa": 50, "topic": 17, "mood": 1}
NONE = dict.fromkeys(COUNTS, 0)
GOLDEN_START = [("vqa", 26), ("vqa", 0), ("topic", 8), ("vqa", 38), ("topic", 6), ("vqa", 21)]
GOLDEN_DIGEST = "b1b9aa3212357afd878950ac7641b525409ca76170c7793297801e55668289dd"


def order(seed: int = 0, temperature: float = 1.0) -> Order:
    return Order(COUNTS, seed, mixture(COUNTS, temperature, {}))


def test_golden_order_never_changes():
    # a different digest means that every run resumed from an older checkpoint would see other samples
    samples, drawn = order(seed=7, temperature=2.0).draw(NONE, 200)
    digest = hashlib.sha256(json.dumps(samples).encode()).hexdigest()
    assert drawn == {"mood": 16, "topic": 68, "vqa": 116}
    assert samples[:6] == GOLDEN_START
    assert digest == GOLDEN_DIGEST


def test_every_sample_of_a_task_comes_once_in_each_epoch_of_the_task():
    samples, drawn = order(temperature=3.0).draw(NONE, 1000)
    for task, n in COUNTS.items():
        indices = [index for name, index in samples if name == task]
        assert len(indices) == drawn[task] > n
        for start in range(0, len(indices), n):
            epoch = indices[start : start + n]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(n))


def test_epochs_tasks_and_seeds_are_shuffled_differently():
    samples, _ = Order({"a": 50, "b": 50}, 0, {"a": 0.5, "b": 0.5}).draw({"a": 0, "b": 0}, 200)
    a, b = ([index for task, index in samples if task == name] for name in "ab")
    other = [index for task, index in Order({"a": 50}, 1, {"a": 1.0}).draw({"a": 0}, 50)[0]]
    orders = [tuple(x) for x in (a[:50], a[50:100], b[:50], other, range(50))]
    assert len(set(orders)) == len(orders)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_drawing_in_parts_from_the_counts_gives_what_drawing_at_once_gives(parts):
    whole, end = order().draw(NONE, sum(parts))
    samples, drawn = [], NONE
    for n in parts:
        drawn = json.loads(json.dumps(drawn))  # as a checkpoint would
        part, drawn = order().draw(drawn, n)  # a new object each time: no memory is needed
        samples += part
    assert (samples, drawn) == (whole, end)


def test_continuing_needs_no_replay():
    drawn = {"vqa": 50 * 10**9, "topic": 17 * 10**9, "mood": 10**9}
    samples, after = order().draw(drawn, 68)
    assert sum(after.values()) == sum(drawn.values()) + 68
    assert len({index for task, index in samples if task == "vqa"}) >= 48


def test_the_order_of_the_mappings_does_not_matter():
    turned = dict(reversed(COUNTS.items()))
    assert Order(turned, 0, mixture(turned, 1.0, {})).draw(turned, 50) == order().draw(COUNTS, 50)


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
    drawn = Counter(Order(COUNTS, seed, probabilities).tasks_at(first, 64))
    assert all(abs(drawn[task] - 64 * p) <= 3 for task, p in probabilities.items())


def test_mixture_is_n_to_the_inverse_temperature_or_the_given_weights():
    assert mixture({"a": 100, "b": 400}, 2.0, {}) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert mixture({"a": 100, "b": 400}, 1.0, {}) == pytest.approx({"a": 0.2, "b": 0.8})
    assert mixture({"a": 100, "b": 400}, 2.0, {"a": 3, "b": 1}) == pytest.approx({"a": 0.75, "b": 0.25})


@pytest.mark.parametrize("weights", [{"vqa": 1.0}, {**NONE, "extra": 1.0}])
def test_weights_must_name_exactly_the_tasks_of_the_run(weights):
    with pytest.raises(
        ValueError, match=r"data\.task_weights names .*the tasks of the run are \['mood', 'topic', 'vqa'\]"
    ):
        mixture(COUNTS, 1.0, weights)


def test_a_task_without_samples_is_refused():
    with pytest.raises(ValueError, match=r"cannot be drawn from: \['b'\]"):
        mixture({"a": 1, "b": 0}, 1.0, {})
    with pytest.raises(ValueError, match="probabilities name"):
        Order(COUNTS, 0, {"vqa": 1.0})
