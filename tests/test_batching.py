"""Dealing and cutting a global batch: nothing lost, little padding, limits kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperpelt_ds.data.batching import accumulation, cut, needed, share

COSTS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=24)


def price(costs: list[tuple[int, int]], group: list[int]) -> int:
    """What a padded micro-batch holds: every sample as long as the longest source and the longest target."""
    return len(group) * (max(costs[i][0] for i in group) + max(costs[i][1] for i in group))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 24])
def test_shares_hold_every_position_once_and_all_ranks_have_as_many(world):
    shares = [share(48, 24, rank, world) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == list(range(48))
    assert {len(own) for own in shares} == {48 // world}
    assert all({place % 24 for place in own} == {place % 24 for place in own[: 24 // world]} for own in shares)


@settings(deadline=None)
@given(COSTS, st.data())
def test_a_cut_takes_every_sample_once_into_the_number_of_parts_asked_for(costs, data):
    parts = data.draw(st.integers(1, len(costs)))
    groups = cut(costs, parts)
    assert sorted(itertools.chain(*groups)) == list(range(len(costs)))
    assert len(groups) == parts and all(1 <= len(group) <= 2 * -(-len(costs) // parts) for group in groups)
    lengths = [[sum(costs[i]) for i in group] for group in groups]
    assert all(max(left) <= min(right) for left, right in itertools.pairwise(lengths))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=4, max_size=9), st.integers(1, 4))
def test_no_other_cut_of_the_sorted_samples_has_less_padding(costs, parts):
    order = sorted(range(len(costs)), key=lambda i: sum(costs[i]))
    best = min(
        sum(price(costs, order[low:high]) for low, high in itertools.pairwise([0, *edges, len(costs)]))
        for edges in itertools.combinations(range(1, len(costs)), parts - 1)
        if max(np.diff([0, *edges, len(costs)])) <= 2 * -(-len(costs) // parts)
    )
    assert sum(price(costs, group) for group in cut(costs, parts)) == best


@settings(deadline=None)
@given(COSTS, st.integers(30, 400))
def test_needed_is_the_fewest_parts_of_the_sorted_samples_that_keep_a_budget(costs, budget):
    order = sorted(range(len(costs)), key=lambda i: sum(costs[i]))
    fewest = [0]  # for the first n samples
    for end in range(1, len(order) + 1):
        fits = [begin for begin in range(end) if end - begin == 1 or price(costs, order[begin:end]) <= budget]
        fewest.append(1 + min(fewest[begin] for begin in fits))
    assert needed(costs, budget) == fewest[-1]
    groups = cut(costs, fewest[-1], budget)
    assert len(groups) == fewest[-1]
    assert all(len(group) == 1 or price(costs, group) <= budget for group in groups)


def test_accumulation_follows_from_batch_micro_batch_and_world_size():
    assert [accumulation(48, 2, 48, world) for world in (1, 2, 3, 4, 6, 8)] == [24, 12, 8, 6, 4, 3]
    # on many ranks a share of the global batch is less than a micro-batch may be
    assert [accumulation(48, 8, 48, world) for world in (1, 6, 8, 48)] == [6, 1, 1, 1]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        (
            (12, 3, 12, 5),
            r"5 processes cannot share the 12 lanes .* these numbers of processes can: \[1, 2, 3, 4, 6, 12\]",
        ),
        ((12, 5, 12, 2), r"12 over 2 processes is 6 samples .* train\.micro_batch 5; .* that fit: \[1, 2, 3, 6\]"),
        ((12, 3, 8, 2), r"data\.lanes 8 does not divide train\.global_batch 12; these do: \[1, 2, 3, 4, 6, 12\]"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_those_that_do(numbers, reason):
    with pytest.raises(ValueError, match=reason):
        accumulation(*numbers)
