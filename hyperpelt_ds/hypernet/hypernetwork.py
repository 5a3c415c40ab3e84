"""The hypernetwork: every weight of every site from the conditions of a batch, in one pass.

It knows a Geometry and nothing else of any backbone, and it is all that the training engine ever sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperpelt_ds.config import HypernetConfig
from hyperpelt_ds.contracts import Batch, Block, Branch, Geometry, Weights
from hyperpelt_ds.hypernet.embeddings import CellProjection, RowEmbedding, SiteEmbedding
from hyperpelt_ds.hypernet.heads import AdapterHead, PrefixHead


class Projector(nn.Module):
    """h_I: I = norm(W2 relu(W1 [z; l; b])), the hyper-embedding of a condition at a site (paper section 4).

    W1 is held as its three column blocks, so that the product is made once per condition and once per site and only
    the sum is made for every pair.
    """

    def __init__(self, config: HypernetConfig):
        super().__init__()
        size, hidden = config.embedding_size, config.hidden_size
        joint = nn.Linear(3 * size, hidden)  # initialised whole, so that the split changes no statistics
        self.condition = nn.Linear(size, hidden)
        self.layer = nn.Linear(size, hidden, bias=False)
        self.block = nn.Linear(size, hidden, bias=False)
        with torch.no_grad():
            parts = joint.weight.split(size, dim=1)
            for part, module in zip(parts, (self.condition, self.layer, self.block), strict=True):
                module.weight.copy_(part)
            self.condition.bias.copy_(joint.bias)
        self.out = nn.Linear(hidden, config.hyper_size)
        self.norm = nn.LayerNorm(config.hyper_size, eps=1e-6) if config.projector_norm else nn.Identity()

    def forward(self, conditions: Tensor, layers: Tensor, blocks: Tensor) -> Tensor:
        """conditions (C, P, d), layers and blocks (S, P, d) -> (S, C, P, E)."""
        sites = self.layer(layers) + self.block(blocks)
        hidden = F.relu(self.condition(conditions).unsqueeze(0) + sites.unsqueeze(1))
        projected: Tensor = self.norm(self.out(hidden))
        return projected


class BranchNetwork(nn.Module):
    """From rows of condition vectors to one branch of weights: a projector and the heads behind it."""

    def __init__(self, config: HypernetConfig, geometry: Geometry):
        super().__init__()
        self.attention_sites = len(geometry.attention_sites)
        self.projector = Projector(config)
        self.prefix = self.adapter = None
        if "prefix" in config.modules:
            self.prefix = PrefixHead(config.hyper_size, geometry.prefix_size, config.head_std)
        if "adapter" in config.modules:
            sites = len(geometry.ffn_sites)
            self.adapter = AdapterHead(
                config.hyper_size, geometry.model_size, config.bottleneck, sites, config.head_std
            )

    def forward(self, conditions: Tensor, layers: Tensor, blocks: Tensor, rows: Tensor) -> Branch:
        """conditions (C, P, d), layers and blocks (S, P, d) with attention sites first, rows (B,)."""
        hyper = self.projector(conditions, layers, blocks)
        return Branch(
            rows,
            self.prefix(hyper[: self.attention_sites]) if self.prefix is not None else None,
            self.adapter(hyper[self.attention_sites :]) if self.adapter is not None else None,
        )


class NormBank(nn.Module):
    """The backbone's trained layer-norm vectors, held here so that the engine sees them: (norms, D)."""

    def __init__(self, initial: Tensor):
        super().__init__()
        self.values = nn.Parameter(initial.detach().float().clone())

    def forward(self) -> Tensor:
        return self.values.clone()  # ZeRO-3 takes the parameter itself away when this forward ends


class HyperNetwork(nn.Module):
    """All trainables of a run.

    `initial_norms` (norms, D) are the backbone's own layer-norm vectors, from which training starts.
    `channels` is the size of an image cell's features, None for a run without images.
    """

    def __init__(
        self,
        config: HypernetConfig,
        geometry: Geometry,
        tasks: int,
        initial_norms: Tensor,
        cells: int | None = None,
        channels: int | None = None,
    ):
        super().__init__()
        sites = geometry.attention_sites + geometry.ffn_sites
        size = config.embedding_size

        def positions(rows: int) -> SiteEmbedding:
            return SiteEmbedding(sites, geometry.layers, len(Block), rows, size)

        self.tasks = RowEmbedding(tasks, config.prefix_length, size)
        self.sites = positions(config.prefix_length)
        self.task_branch = BranchNetwork(config, geometry)
        self.images = self.image_sites = self.image_branch = None
        if cells is not None and channels is not None:
            self.images = CellProjection(channels, size)
            self.image_sites = positions(cells) if config.visual_embeddings == "own" else None
            self.image_branch = BranchNetwork(config, geometry)
        self.norms = NormBank(initial_norms) if config.train_norms else None

    def forward(self, batch: Batch) -> Weights:
        """The weights of every site for the conditions of `batch`; samples refer to them by `Branch.rows`."""
        layers, blocks = self.sites()
        branches = [self.task_branch(self.tasks(batch.tasks), layers, blocks, batch.task_rows)]
        if self.images is not None and self.image_branch is not None:
            assert batch.images is not None and batch.image_rows is not None
            if self.image_sites is not None:
                layers, blocks = self.image_sites()
            cells = batch.images.to(self.images.project.weight.dtype)
            branches.append(self.image_branch(self.images(cells), layers, blocks, batch.image_rows))
        return Weights(tuple(branches), self.norms() if self.norms is not None else None)
