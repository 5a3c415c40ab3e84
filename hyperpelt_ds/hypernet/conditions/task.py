"""Tasks by id: a trained embedding of each task of the run."""

from __future__ import annotations

from torch import Tensor, nn

from hyperpelt_ds.config import HypernetConfig
from hyperpelt_ds.contracts import Batch, Conditions
from hyperpelt_ds.hypernet.embeddings import RowEmbedding


class TaskCondition(nn.Module):
    """z_tau, the embedding of a task (paper section 4)."""

    def __init__(self, config: HypernetConfig, rows: int, available: Conditions):
        super().__init__()
        self.rows = rows
        self.embedding = RowEmbedding(available.tasks, rows, config.embedding_size, config.rows == "expanded")

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows (C, P, d) of the batch's distinct tasks, and each sample's place among them (B,)."""
        return self.embedding(batch.tasks), batch.task_rows
