"""Trained embeddings of which every entry is rows of vectors: of tasks, layers and blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperpelt_ds.contracts import Site


class RowEmbedding(nn.Module):
    """A table whose every entry is P rows of size d, drawn from N(0, 1) (paper section 4: z, l, b in R^{P x d}).

    Expanded, each entry has P vectors of its own; else it has one, to which a common table of P row vectors is added.
    """

    def __init__(self, entries: int, rows: int, size: int, expanded: bool = True):
        super().__init__()
        self.rows, self.size = rows, size
        self.table = nn.Embedding(entries, rows * size if expanded else size)
        self.places = None if expanded else nn.Embedding(rows, size)
        self.register_buffer("every_place", torch.arange(rows), persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """index (C,) int64 -> (C, P, d)."""
        embedded: Tensor = self.table(index)
        if self.places is None:
            return embedded.view(len(index), self.rows, self.size)
        return embedded.unsqueeze(1) + self.places(self.every_place)


class SiteEmbedding(nn.Module):
    """Where a weight will be used: the layer and block rows of every site, in the order of `sites`.

    Not expanded, a site has one row, for all of a condition's rows alike.
    """

    layers: Tensor
    blocks: Tensor

    def __init__(self, sites: tuple[Site, ...], rows: int, size: int, expanded: bool = True):
        super().__init__()
        blocks = sorted({site.block for site in sites})
        self.sites = sites
        self.layer = RowEmbedding(1 + max(site.layer for site in sites), rows if expanded else 1, size)
        self.block = RowEmbedding(len(blocks), rows if expanded else 1, size)
        self.register_buffer("layers", torch.tensor([site.layer for site in sites]), persistent=False)
        self.register_buffer("blocks", torch.tensor([blocks.index(site.block) for site in sites]), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Layer rows and block rows, each (S, P, d)."""
        return self.layer(self.layers), self.block(self.blocks)

    def shift_layers(self, by: int) -> None:
        """Gives every site the embedding of the layer `by` further on among its block's layers, around the end.

        A control: what is made for a layer then goes to another one. Shifting back by -`by` undoes it.
        """
        layers = self.layers.tolist()
        for block in {site.block for site in self.sites}:
            own = [i for i, site in enumerate(self.sites) if site.block == block]
            shifted = [layers[own[(n + by) % len(own)]] for n in range(len(own))]
            for place, layer in zip(own, shifted, strict=True):
                self.layers[place] = layer
