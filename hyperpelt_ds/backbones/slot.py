"""The one piece of mutable state: the weights that the frozen model's hooks read.

They are set by a forward pass and stay until the next one, because activation checkpointing runs blocks again in the
backward pass. (Clearing them after the forward pass costs the gradient, and with reentrant checkpointing without any
error.)
"""

from __future__ import annotations

from torch import Tensor

from hyperpelt_ds.contracts import Branch
from hyperpelt_ds.kernels.adapter import SiteAdapter
from hyperpelt_ds.kernels.prefix_attention import SitePrefix


class Slot:
    """The branches of the current forward pass, site by site."""

    def __init__(self) -> None:
        self._branches: tuple[Branch, ...] = ()
        self._rows: dict[tuple[int, int], Tensor] = {}

    def set(self, branches: tuple[Branch, ...]) -> None:
        self._branches = branches
        self._rows = {}

    def prefixes(self, site: int, batch: int) -> list[SitePrefix]:
        """The prefixes of attention site `site` for `batch` rows."""
        return [
            SitePrefix(branch.prefix.keys[site], branch.prefix.values[site], self._rows_for(number, batch))
            for number, branch in enumerate(self._branches)
            if branch.prefix is not None
        ]

    def adapters(self, site: int, batch: int) -> list[SiteAdapter]:
        """The adapters of feed-forward site `site` for `batch` rows."""
        return [
            SiteAdapter._make([*(tensor[site] for tensor in branch.adapter), self._rows_for(number, batch)])
            for number, branch in enumerate(self._branches)
            if branch.adapter is not None
        ]

    def _rows_for(self, number: int, batch: int) -> Tensor:
        """Beam search calls with samples x beams rows, beams of a sample side by side: rows repeat, weights do not."""
        if (number, batch) not in self._rows:
            rows = self._branches[number].rows
            beams, rest = divmod(batch, len(rows))
            assert rest == 0, f"{batch} rows do not divide into {len(rows)} samples"
            self._rows[number, batch] = rows if beams == 1 else rows.repeat_interleave(beams)
        return self._rows[number, batch]
