"""Tasks by what is said about them: the frozen vector of a sentence, so that a task never trained can be described."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperpelt_ds.config import HypernetConfig
from hyperpelt_ds.contracts import Batch, Conditions


class DescriptionCondition(nn.Module):
    """A projection of the description's vector, to which a vector for each prefix row is added.

    Not in the paper; the idea is Text-to-LoRA's (Charakorn et al. 2025). The vectors are no trainables and in no
    checkpoint: `describe` sets them anew, and may bring more of them than the run was trained with.
    """

    vectors: Tensor

    def __init__(self, config: HypernetConfig, rows: int, available: Conditions):
        super().__init__()
        assert available.descriptions is not None
        self.rows = rows
        self.project = nn.Linear(available.descriptions.shape[1], config.embedding_size)
        self.places = nn.Embedding(rows, config.embedding_size)
        self.register_buffer("every_place", torch.arange(rows), persistent=False)
        self.register_buffer("vectors", torch.empty(0), persistent=False)
        self.describe(available.descriptions)

    def describe(self, vectors: Tensor) -> None:
        """Replaces the vectors of all tasks, (tasks, F'), each scaled to entries of mean square 1."""
        self.vectors = _scaled(vectors.to(self.vectors))

    def extend(self, vectors: Tensor) -> None:
        """Appends the vectors of further tasks, (tasks, F'); those that are there keep every bit."""
        self.vectors = torch.cat([self.vectors, _scaled(vectors.to(self.vectors))])

    def replace(self, task: int, vector: Tensor) -> None:
        """Describes task number `task` anew, vector (F'); the others keep every bit."""
        vectors = self.vectors.clone()
        vectors[task] = _scaled(vector.to(vectors).unsqueeze(0))[0]
        self.vectors = vectors

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows (C, P, d) of the batch's distinct tasks, and each sample's place among them (B,)."""
        said: Tensor = self.project(self.vectors[batch.tasks].to(self.project.weight.dtype))
        return said.unsqueeze(1) + self.places(self.every_place), batch.task_rows


def _scaled(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=1) * vectors.shape[1] ** 0.5
