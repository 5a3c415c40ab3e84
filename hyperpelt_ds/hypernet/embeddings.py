"""The trained inputs of the hypernetwork: rows of vectors for tasks, layers and blocks, and for images' cells.

A source of conditions turns whatever names a condition into rows (C, P, d). A new source is a module with that
output; nothing downstream asks where rows came from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperpelt_ds.contracts import Site


class RowEmbedding(nn.Module):
    """A table whose every entry is P rows of size d, drawn from N(0, 1) (paper section 4: z, l, b in R^{P x d})."""

    def __init__(self, entries: int, rows: int, size: int):
        super().__init__()
        self.rows, self.size = rows, size
        self.table = nn.Embedding(entries, rows * size)

    def forward(self, index: Tensor) -> Tensor:
        """index (C,) int64 -> (C, P, d)."""
        embedded: Tensor = self.table(index)
        return embedded.view(len(index), self.rows, self.size)


class CellProjection(nn.Module):
    """z_v = W_v v: the cells of an image's feature grid as condition rows (paper section 4)."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.project = nn.Linear(channels, size)

    def forward(self, cells: Tensor) -> Tensor:
        """cells (C, V, F) -> (C, V, d)."""
        projected: Tensor = self.project(cells)
        return projected


class SiteEmbedding(nn.Module):
    """Where a weight will be used: the layer and block rows of every site, in the order of `sites`."""

    def __init__(self, sites: tuple[Site, ...], layers: int, blocks: int, rows: int, size: int):
        super().__init__()
        self.layer = RowEmbedding(layers, rows, size)
        self.block = RowEmbedding(blocks, rows, size)
        self.register_buffer("layers", torch.tensor([site.layer for site in sites]), persistent=False)
        self.register_buffer("blocks", torch.tensor([int(site.block) for site in sites]), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Layer rows and block rows, each (S, P, d)."""
        return self.layer(self.layers), self.block(self.blocks)
