"""The same weights from plain parameters: what a hypernetwork is compared with.

Adapters, prefix-tuning, LoRA and MAM adapters, a set for each task or one for all, through the same contract, data and
loop as generated weights. Initialised as their authors do where that is known (MAM, LoRA).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hyperpelt_ds.config import HypernetConfig, ModulesConfig
from hyperpelt_ds.contracts import Adapter, Batch, Branch, Geometry, LowRank, Prefix, Projection, Site
from hyperpelt_ds.hypernet.heads import AdapterScale, PrefixWeighting


class FreeBranch(nn.Module):
    """One branch of weights with no input but which task a sample is of, and not even that if they are shared."""

    def __init__(self, config: HypernetConfig, modules: ModulesConfig, geometry: Geometry, tasks: int):
        super().__init__()
        self.shared = config.parameters == "shared"
        sets = 1 if self.shared else tasks
        self.prefix = self.adapter = self.lora = None
        if "prefix" in modules.kinds:
            kind = MadePrefix if config.prefix_mlp else FreePrefix
            self.prefix = kind(sets, config, modules, geometry)
        if "adapter" in modules.kinds:
            self.adapter = FreeAdapter(sets, modules, geometry)
        if "lora" in modules.kinds:
            self.lora = nn.ModuleList(FreeLowRank(sets, modules, target) for target in geometry.projections)

    def forward(self, batch: Batch) -> Branch:
        """The weights of the batch's distinct tasks, or the one set there is."""
        index = torch.zeros_like(batch.tasks[:1]) if self.shared else batch.tasks
        return Branch(
            torch.zeros_like(batch.task_rows) if self.shared else batch.task_rows,
            self.prefix(index) if self.prefix is not None else None,
            self.adapter(index) if self.adapter is not None else None,
            tuple(kind(index) for kind in self.lora) if self.lora is not None else None,
        )


class FreePrefix(nn.Module):
    """Prefix-tuning without a reparametrisation: key and value rows are parameters."""

    STD = 0.02

    def __init__(self, sets: int, config: HypernetConfig, modules: ModulesConfig, geometry: Geometry):
        super().__init__()
        shape = (len(geometry.prefix_sites), sets, modules.prefix_length, geometry.prefix_size)
        self.keys, self.values = (nn.Parameter(torch.randn(shape) * self.STD) for _ in range(2))
        self.weighting = PrefixWeighting(shape[0], modules)

    def forward(self, index: Tensor) -> Prefix:
        """index (C,) -> keys and values (S, C, P, K)."""
        return Prefix(self.keys.index_select(1, index), self.values.index_select(1, index), self.weighting())


class MadePrefix(nn.Module):
    """Prefix-tuning as Li & Liang train it: P = MLP(E), an MLP for each kind of attention that makes the rows of all
    its layers from one learned table (paper appendix A: this already is a hypernetwork)."""

    order: Tensor

    def __init__(self, sets: int, config: HypernetConfig, modules: ModulesConfig, geometry: Geometry):
        super().__init__()
        assert sets == 1
        size, hidden = geometry.model_size, config.prefix_mlp
        self.rows, self.width = modules.prefix_length, geometry.prefix_size
        blocks = sorted({site.block for site in geometry.prefix_sites})
        layers = [[s for s in geometry.prefix_sites if s.block == block] for block in blocks]
        self.makers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, 2 * len(own) * self.width))
            for own in layers
        )
        self.tables = nn.ModuleList(nn.Embedding(self.rows, size) for _ in layers)
        self.weighting = PrefixWeighting(len(geometry.prefix_sites), modules)
        made: list[Site] = [site for own in layers for site in own]
        order = torch.tensor([made.index(site) for site in geometry.prefix_sites])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("every_row", torch.arange(self.rows), persistent=False)

    def forward(self, index: Tensor) -> Prefix:
        """index (1,) -> keys and values (S, 1, P, K)."""
        made = [maker(table(self.every_row)) for maker, table in zip(self.makers, self.tables, strict=True)]
        rows = torch.cat([part.view(self.rows, -1, 2, self.width) for part in made], dim=1)  # (P, S, 2, K)
        keys, values = rows.index_select(1, self.order).permute(2, 1, 0, 3).unsqueeze(2)
        return Prefix(keys, values, self.weighting())


class FreeAdapter(nn.Module):
    """Bottleneck adapters as parameters: Kaiming-uniform down, and what comes last zero unless told otherwise (MAM)."""

    linear_maps = "down", "up"

    def __init__(self, sets: int, modules: ModulesConfig, geometry: Geometry):
        super().__init__()
        sites, size, narrow = len(geometry.adapter_sites), geometry.model_size, modules.bottleneck
        no_op, norm = modules.adapter_start == "no_op", modules.adapter_norm
        self.down = _uniform(sites, sets, size, narrow)
        self.down_bias = nn.Parameter(torch.zeros(sites, sets, narrow))
        self.up = _uniform(sites, sets, narrow, size)
        self.up_bias = nn.Parameter(torch.zeros(sites, sets, size))
        self.gain = self.shift = None
        if norm:
            self.gain = nn.Parameter(torch.full((sites, sets, size), 0.0 if no_op else 1.0))
            self.shift = nn.Parameter(torch.zeros(sites, sets, size))
        elif no_op:
            nn.init.zeros_(self.up)
        self.scale = AdapterScale(sites, modules)

    def forward(self, index: Tensor) -> Adapter:
        """index (C,) -> shapes as in `Adapter`."""

        def of(parameter: nn.Parameter | None) -> Any:
            return None if parameter is None else parameter.index_select(1, index)

        return Adapter(
            of(self.down),
            of(self.down_bias),
            of(self.up),
            of(self.up_bias),
            self.scale(),
            of(self.gain),
            of(self.shift),
        )


class FreeLowRank(nn.Module):
    """LoRA as Hu et al. start it: Kaiming-uniform down, zero up."""

    linear_maps = "down", "up"

    def __init__(self, sets: int, modules: ModulesConfig, target: Projection):
        super().__init__()
        self.scale = modules.lora_alpha / modules.lora_rank
        self.down = _uniform(len(target.sites), sets, target.inputs, modules.lora_rank)
        self.up = _uniform(len(target.sites), sets, modules.lora_rank, target.outputs)
        if modules.adapter_start == "no_op":
            nn.init.zeros_(self.up)

    def forward(self, index: Tensor) -> LowRank:
        """index (C,) -> shapes as in `LowRank`."""
        return LowRank(self.down.index_select(1, index), self.scale * self.up.index_select(1, index))


def _uniform(sites: int, sets: int, inputs: int, outputs: int) -> nn.Parameter:
    """What torch draws for a linear map: U(-1, 1) / sqrt(inputs), which is kaiming_uniform(a=sqrt(5))."""
    return nn.Parameter(torch.empty(sites, sets, inputs, outputs).uniform_(-1, 1) / math.sqrt(inputs))
