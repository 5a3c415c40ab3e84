"""Which sample comes n-th: a pure function of (seed, sample counts, probabilities, draws so far), in integers.

This file must not know files, ranks, batches or lengths. Everything is computed from stable parts only (Philox raw
words, a stable argsort, fixed-point thresholds), because NumPy keeps bit generators the same between versions but
not the methods of Generator.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

_GOLDEN = np.uint64(11400714819323198485)  # 2^64 / golden ratio: the multiples mod 2^64 fill the circle evenly
_MIX, _EPOCH = 1, 2  # what a random stream is for


def mixture(counts: Mapping[str, int], temperature: float, weights: Mapping[str, float]) -> dict[str, float]:
    """Sampling probabilities of the tasks: p ~ n^(1/temperature), or the explicit weights where any are given.

    Temperature 1 is proportional to size, a large one is uniform. Raises ValueError if the weights do not name
    exactly the tasks of `counts`, or if a task has no samples.
    """
    empty = [task for task, n in counts.items() if n < 1]
    if empty or not counts:
        raise ValueError(f"tasks without samples cannot be drawn from: {empty}")
    if weights and set(weights) != set(counts):
        raise ValueError(f"data.task_weights names {sorted(weights)}, but the tasks of the run are {sorted(counts)}")
    shares = dict(weights) if weights else {task: n ** (1 / temperature) for task, n in counts.items()}
    total = sum(shares.values())
    return {task: shares[task] / total for task in counts}


class Order:
    """The endless order of a run over `counts` (task -> samples), drawn with `probabilities` (task -> p).

    The order of the mappings does not matter. Every sample of a task comes exactly once in each epoch of that task.
    """

    def __init__(self, counts: Mapping[str, int], seed: int, probabilities: Mapping[str, float]) -> None:
        if set(counts) != set(probabilities):
            raise ValueError(f"probabilities name {sorted(probabilities)}, the tasks are {sorted(counts)}")
        self.counts = {task: counts[task] for task in sorted(counts)}
        self.seed = seed
        shares = [max(1, round(probabilities[task] * 2**31)) for task in self.counts]
        self._edges = np.cumsum(np.array(shares, dtype=np.uint64))
        self._start = _words(1, seed, _MIX)[0]
        self._epochs: dict[str, tuple[int, np.ndarray]] = {}  # task -> its newest (epoch, permutation)

    def draw(self, drawn: Mapping[str, int], n: int) -> tuple[list[tuple[str, int]], dict[str, int]]:
        """The next `n` samples as (task, index within the task), after `drawn` (task -> draws so far) were taken.

        Returns them and the draws so far that follow; nothing is replayed, and one call for n + m samples gives what
        two calls for n and m give. Lanes and windows (a working set of few shards in very large sets) belong behind
        `tasks_at` and `_locate`, and nowhere else.
        """
        drawn = {task: drawn[task] for task in self.counts}
        samples = []
        for task in self.tasks_at(sum(drawn.values()), n):
            samples.append((task, self._locate(task, drawn[task])))
            drawn[task] += 1
        return samples, drawn

    def tasks_at(self, first: int, n: int) -> list[str]:
        """The tasks of positions first .. first + n - 1 of the run: a low-discrepancy sequence over the shares.

        At any position each task's draws are within a few samples of its probability times the position.
        """
        point = self._start + np.arange(first, first + n, dtype=np.uint64) * _GOLDEN  # a circle of 2^64: it wraps
        scaled = (point >> np.uint64(32)) * self._edges[-1] >> np.uint64(32)  # both factors stay below 2^32
        names = list(self.counts)
        return [names[i] for i in np.searchsorted(self._edges, scaled, side="right")]

    def _locate(self, task: str, draw: int) -> int:
        """The sample of `task` that its draw number `draw` takes."""
        epoch, position = divmod(draw, self.counts[task])
        if task not in self._epochs or self._epochs[task][0] != epoch:
            words = _words(self.counts[task], self.seed, _EPOCH, zlib.crc32(task.encode()), epoch)
            self._epochs[task] = epoch, np.argsort(words, kind="stable")
        return int(self._epochs[task][1][position])


def _words(n: int, *stream: int) -> np.ndarray:
    """n raw 64-bit words of the random stream named by `stream`."""
    return np.random.Philox(np.random.SeedSequence(stream)).random_raw(n)
