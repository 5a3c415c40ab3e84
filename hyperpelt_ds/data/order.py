"""Which sample comes n-th: a pure function of (seed, shard sizes, probabilities, draws so far), in integers.

The run's positions 0, 1, 2, ... are dealt to `lanes` in turn, as cards are. Which task a position draws from is a
low-discrepancy sequence. In each epoch a task's shards are shuffled and laid end to end, every lane owns a stretch of
that line, and within a stretch the samples of `WINDOW` neighbouring pieces of shards are shuffled: a shuffle buffer
with nothing in it to save, whose working set is a few shards a lane however large the data is. A small task is one lane
and one window: its epoch is a plain permutation.

This file must not know files, ranks, batches or lengths. Everything is computed from stable parts only (Philox raw
words, a stable argsort, fixed-point thresholds), because NumPy keeps bit generators the same between versions but
not the methods of Generator.
"""

from __future__ import annotations

import itertools
import math
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 4
"""Pieces of shards that are shuffled together within a lane."""
PIECE = 4096
"""Samples of a piece at most: larger shards are cut, so that a window of any shards is shuffled in a millisecond."""
SMALL = 2**18
"""A task of at most so many samples, in at most WINDOW shards a lane, is shuffled as a whole."""
_GOLDEN = np.uint64(11400714819323198485)  # 2^64 / golden ratio: the multiples mod 2^64 fill the circle evenly
_MIX, _EPOCH, _SHARDS, _WINDOW = 1, 2, 3, 4  # what a random stream is for

Counts = dict[str, list[int]]
"""Draws so far: task -> one number for each of its lanes."""


def mixture(counts: Mapping[str, int], temperature: float, weights: Mapping[str, float]) -> dict[str, float]:
    """Sampling probabilities of the tasks: p ~ n^(1/temperature), or the explicit weights where any are given.

    Temperature 1 is proportional to size, a large one is uniform. Raises ValueError if the weights do not name
    exactly the tasks of `counts`, or if a task has no samples.
    """
    empty = [task for task, n in counts.items() if n < 1]
    if empty or not counts:
        raise ValueError(f"tasks without samples cannot be drawn from: {empty}")
    if weights and set(weights) != set(counts):
        raise ValueError(
            f"data.task_weights names {sorted(weights)}, but the tasks of the run are {sorted(counts)}; "
            f"give each of these a weight"
        )
    shares = dict(weights) if weights else {task: n ** (1 / temperature) for task, n in counts.items()}
    total = sum(shares.values())
    return {task: shares[task] / total for task in counts}


def lane_count(global_batch: int, wanted: int = 0) -> int:
    """`wanted` (data.lanes), or for 0 the common part of the global batch and 192 = 64 x 3: powers of two are
    admissible world sizes, and 3, 6, 12, ... where the batch is a multiple of 3."""
    return wanted or math.gcd(global_batch, 192)


class Order:
    """The endless order of a run over `sizes` (task -> samples of each shard), drawn with `probabilities` (task -> p).

    The order of the mappings does not matter. Every sample of a task comes exactly once in each epoch of that task.
    """

    def __init__(
        self, sizes: Mapping[str, Sequence[int]], seed: int, probabilities: Mapping[str, float], lanes: int
    ) -> None:
        if set(sizes) != set(probabilities):
            raise ValueError(f"probabilities name {sorted(probabilities)}, the tasks are {sorted(sizes)}")
        self.seed, self.lanes, self.probabilities = seed, lanes, dict(probabilities)
        self._lines = {task: _Line(task, tuple(sizes[task]), seed, lanes) for task in sorted(sizes)}
        shares = [max(1, round(probabilities[task] * 2**31)) for task in self._lines]
        self._edges = np.cumsum(np.array(shares, dtype=np.uint64))
        self._start = _words(1, seed, _MIX)[0]

    def start(self) -> Counts:
        """The draws at the start of a run: none."""
        return {task: [0] * line.lanes for task, line in self._lines.items()}

    def draw(self, drawn: Mapping[str, Sequence[int]], n: int) -> tuple[list[tuple[str, int, int]], Counts]:
        """The next `n` positions as (task, lane, draw) after `drawn` were taken, and the draws that follow.

        `lane` counts within the task and `draw` within that lane; `locate` says which sample it is. Nothing is
        replayed, and one call for n + m gives what two calls for n and m give.
        """
        after = {task: list(drawn[task]) for task in self._lines}
        first = sum(map(sum, after.values()))
        draws = []
        for place, task in enumerate(self.tasks_at(first, n), first):
            counts = after[task]
            lane = place % self.lanes if len(counts) > 1 else 0
            draws.append((task, lane, counts[lane]))
            counts[lane] += 1
        return draws, after

    def locate(self, task: str, lane: int, draw: int) -> int:
        """The sample that a draw takes, counted over the task's shards in their own order."""
        return self._lines[task].locate(lane, draw)

    def tasks_at(self, first: int, n: int) -> list[str]:
        """The tasks of positions first .. first + n - 1 of the run: a low-discrepancy sequence over the shares.

        At any position each task's draws are within a few samples of its probability times the position.
        """
        point = self._start + np.arange(first, first + n, dtype=np.uint64) * _GOLDEN  # a circle of 2^64: it wraps
        scaled = (point >> np.uint64(32)) * self._edges[-1] >> np.uint64(32)  # both factors stay below 2^32
        names = list(self._lines)
        return [names[i] for i in np.searchsorted(self._edges, scaled, side="right")]


@dataclass(frozen=True)
class _Window:
    """A shuffled stretch of an epoch's line: its first position and the order of what follows."""

    epoch: int
    start: int
    order: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    """An epoch's shards end to end: which comes when, and where on the line each begins (one edge more than shards)."""

    number: int
    shards: np.ndarray
    edges: list[int]


class _Line:
    """The epochs of one task. What it remembers only saves time: each lane's current window, the two last epochs."""

    def __init__(self, task: str, sizes: tuple[int, ...], seed: int, lanes: int) -> None:
        self.samples = sum(sizes)
        self.whole = self.samples <= SMALL and len(sizes) <= WINDOW * lanes
        self.lanes = 1 if self.whole else lanes
        self._sizes = np.array(sizes)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)]).tolist()
        self._lane_edges = [self.samples * edge // self.lanes for edge in range(self.lanes + 1)]
        self._stream = seed, zlib.crc32(task.encode())
        self._windows: dict[int, _Window] = {}
        self._epochs: dict[int, _Epoch] = {}

    def locate(self, lane: int, draw: int) -> int:
        begin, end = self._lane_edges[lane], self._lane_edges[lane + 1]
        epoch, offset = divmod(draw, end - begin)
        place = begin + offset
        window = self._windows.get(lane)
        if window is None or window.epoch != epoch or not window.start <= place < window.start + len(window.order):
            window = self._windows[lane] = self._window(epoch, lane, begin, end, place)
        position = window.start + window.order.item(place - window.start)
        if self.whole:
            return position
        line = self._epoch(epoch)
        shard = bisect_right(line.edges, position) - 1
        return self._starts[line.shards.item(shard)] + position - line.edges[shard]

    def _window(self, epoch: int, lane: int, begin: int, end: int, place: int) -> _Window:
        """The window around `place` of a lane that owns begin .. end of the line."""
        seed, task = self._stream
        if self.whole:
            return _Window(epoch, 0, _permutation(self.samples, seed, _EPOCH, task, epoch))
        edges = self._epoch(epoch).edges
        cuts = [begin, *edges[bisect_right(edges, begin) : bisect_right(edges, end - 1)], end]
        pieces = [at for low, high in itertools.pairwise(cuts) for at in range(low, high, PIECE)]
        number = (bisect_right(pieces, place) - 1) // WINDOW
        low, high = pieces[number * WINDOW], [*pieces, *[end] * WINDOW][(number + 1) * WINDOW]
        return _Window(epoch, low, _permutation(high - low, seed, _WINDOW, task, epoch, lane, number))

    def _epoch(self, number: int) -> _Epoch:
        """Lanes reach an epoch's end at slightly different times: two epochs are remembered."""
        if number not in self._epochs:
            seed, task = self._stream
            shards = _permutation(len(self._sizes), seed, _SHARDS, task, number)
            edges = np.concatenate([[0], np.cumsum(self._sizes[shards])]).tolist()
            for old in sorted(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[number] = _Epoch(number, shards, edges)
        return self._epochs[number]


def _permutation(n: int, *stream: int) -> np.ndarray:
    """A shuffled 0 .. n - 1, in the smallest type that holds it."""
    return np.argsort(_words(n, *stream), kind="stable").astype(np.min_scalar_type(n))


def _words(n: int, *stream: int) -> np.ndarray:
    """n raw 64-bit words of the random stream named by `stream`."""
    return np.random.Philox(np.random.SeedSequence(stream)).random_raw(n)
