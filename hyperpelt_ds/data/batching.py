"""How a global batch is dealt to ranks and cut into micro-batches: plain functions of numbers.

Which samples are in a global batch is the order's business and is the same for every world size; this file only decides
who computes which of them together. It must not know files, tasks or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_OVER = 2**40  # what a micro-batch over the budget costs: more than any padding

Cost = tuple[int, int]
"""Of one sample, about how many source and target tokens it has."""


def accumulation(global_batch: int, micro_batch: int, lanes: int, world_size: int) -> int:
    """Micro-batches of a step on each rank; ValueError that lists what fits if the numbers do not."""
    if lanes < 1 or global_batch % lanes:
        fitting = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        raise ValueError(f"data.lanes {lanes} does not divide train.global_batch {global_batch}; these do: {fitting}")
    worlds = [w for w in range(1, lanes + 1) if lanes % w == 0]
    if world_size not in worlds:
        raise ValueError(
            f"{world_size} processes cannot share the {lanes} lanes of train.global_batch {global_batch} evenly; "
            f"these numbers of processes can: {worlds} (data.lanes may be any divisor of the global batch)"
        )
    share = global_batch // world_size
    if share % min(share, micro_batch):
        fitting = [m for m in range(1, share + 1) if share % m == 0]
        raise ValueError(
            f"train.global_batch {global_batch} over {world_size} processes is {share} samples each, not a multiple of "
            f"train.micro_batch {micro_batch}; micro-batches that fit: {fitting}"
        )
    return share // min(share, micro_batch)


def share(positions: int, lanes: int, rank: int, world_size: int) -> list[int]:
    """The places in a global batch of `positions` that a rank computes: those of its block of neighbouring lanes, so
    that a shard is read by few ranks."""
    return [place for place in range(positions) if place % lanes * world_size // lanes == rank]


def needed(costs: Sequence[Cost], budget: int) -> int:
    """The least number of micro-batches of neighbours in length with at most `budget` tokens, padding included, in any.

    A sample that alone has more is a micro-batch of its own.
    """
    parts, size, source, target = 1, 0, 0, 0
    for own in sorted(costs, key=sum):
        size, source, target = size + 1, max(source, own[0]), max(target, own[1])
        if size > 1 and size * (source + target) > budget:
            parts, size, (source, target) = parts + 1, 1, own
    return parts


def cut(costs: Sequence[Cost], parts: int, budget: int = 0) -> list[list[int]]:
    """The places of `costs` as `parts` micro-batches of neighbours in length, with as little padding as can be.

    Without a `budget` a micro-batch holds at most twice the mean number of samples, so that many short ones can go
    together while few long ones do. With one, as few micro-batches as can be have more tokens than it. The best cut of
    the sorted samples is found by dynamic programming over where the last part begins. There must be as many samples as
    parts.
    """
    order = sorted(range(len(costs)), key=lambda i: sum(costs[i]))
    n = len(order)
    widest = 2 * -(-n // parts)
    if budget:  # a part of `size` samples that ends with number `end` has at least size * length[end] tokens
        widest = max(widest, *(min(end + 1, budget // sum(costs[i])) for end, i in enumerate(order)))
    sizes = np.arange(1, min(widest, n) + 1)
    none = np.iinfo(np.int64).max // 4
    # price[end, size - 1] of a part of so many samples that ends with number `end`: every sample costs as the longest
    begins = np.arange(n)[:, None] - sizes + 1
    members = np.array([costs[i] for i in order], dtype=np.int64)[np.maximum(begins, 0)]
    price = np.where(begins < 0, none, sizes * np.maximum.accumulate(members, 1).sum(2))
    if budget:
        price = np.where((price > budget) & (price < none) & (sizes > 1), price + _OVER, price)
    begins = np.maximum(begins, 0)
    best = np.full(n + 1, none)  # of the first samples, cut into the parts so far
    best[0] = 0
    choices = []
    for _ in range(parts):
        totals = np.minimum(best[begins] + price, none)
        choice = totals.argmin(1)
        best = np.concatenate([[none], totals[np.arange(n), choice]])
        choices.append(choice)
    assert best[n] < none, f"{n} samples cannot be cut into {parts} parts"
    groups: list[list[int]] = []
    end = n
    for choice in reversed(choices):
        size = int(choice[end - 1]) + 1
        groups.append(order[end - size : end])
        end -= size
    return groups[::-1]
