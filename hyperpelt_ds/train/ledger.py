"""What of the data could not be used: run_dir/holes/rank_R.jsonl, a line for every time such a sample was drawn.

Lines follow committed steps only, and a run that goes on drops those of steps that it does again, so that nothing is
counted twice. This file must not know how a sample is read.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hyperpelt_ds import dist, lines
from hyperpelt_ds.config import DataConfig
from hyperpelt_ds.contracts import Hole

FOLDER = "holes"

log = dist.logger(__name__)


class Ledger:
    """Appends this rank's holes, counts those of all ranks, and stops the run over the configured limits."""

    def __init__(self, run_dir: Path, step: int, limits: DataConfig):
        """For a run that goes on from `step`; every rank calls it."""
        self._folder, self._limits = run_dir / FOLDER, limits
        self._lines = self._folder / f"rank_{dist.rank()}.jsonl"
        earlier = 0
        if dist.rank() == 0:
            for file in sorted(self._folder.glob("rank_*.jsonl")):
                lines.drop_after(file, step)
                earlier += len(file.read_text().splitlines())
        self._earlier = dist.gather(earlier)[0]
        self._own: list[Hole] = []  # of this process's steps

    def write(self, step: int, holes: Sequence[Hole]) -> None:
        """The holes of a committed step on this rank."""
        if not holes:
            return
        self._own += holes
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lines.open("a") as file:
            file.writelines(json.dumps({"step": step, **dataclasses.asdict(hole)}) + "\n" for hole in holes)

    def count(self, drawn: int) -> int:
        """Holes of the run so far, of `drawn` samples; every rank calls it together.

        New ones are logged. Raises ValueError on every rank if there are too many.
        """
        fresh, self._own = self._own, []
        ranks = dist.gather(fresh)
        holes = [hole for rank in ranks for hole in rank]
        before, self._earlier = self._earlier, self._earlier + len(holes)
        if holes and dist.rank() == 0:
            first = holes[0]
            log.warning(
                "samples that could not be used: %d, for example shard %s, key %r: %s; all are in %s",
                *(len(holes), first.shard, first.key, first.reason, self._folder),
            )
        limits, total = self._limits, before + len(holes)
        if total > limits.max_holes and total > limits.max_hole_share * drawn:
            shards = ", ".join(f"{shard} ({n})" for shard, n in Counter(h.shard for h in holes).most_common(3))
            raise ValueError(
                f"{total} of the {drawn} samples drawn so far could not be used, more than data.max_holes="
                f"{limits.max_holes} and data.max_hole_share={limits.max_hole_share}; most of late in "
                f"{shards or 'none'}. {self._folder} names them with the reasons, data_prep/verify.py finds the rest"
            )
        return total
