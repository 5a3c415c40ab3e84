"""Images by the cells of a frozen encoder's feature grid: one row for each cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperpelt_ds.config import HypernetConfig
from hyperpelt_ds.contracts import Batch, Conditions


class ImageCondition(nn.Module):
    """z_v = W_v v for every cell v of an image (paper section 4)."""

    def __init__(self, config: HypernetConfig, rows: int, available: Conditions):
        super().__init__()
        assert available.cells is not None and available.channels is not None
        self.rows = available.cells
        self.project = nn.Linear(available.channels, config.embedding_size)
        # without expanded layer and block embeddings, only this tells one cell's place from another's
        self.places = nn.Embedding(self.rows, config.embedding_size) if config.rows == "table" else None
        self.register_buffer("every_place", torch.arange(self.rows), persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows (C, V, d) of the batch's distinct images, and each sample's place among them (B,), or -1."""
        assert batch.images is not None and batch.image_rows is not None
        cells: Tensor = self.project(batch.images.to(self.project.weight.dtype))
        if self.places is not None:
            cells = cells + self.places(self.every_place)
        return cells, batch.image_rows
