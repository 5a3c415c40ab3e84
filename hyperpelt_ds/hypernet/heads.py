"""From hyper-embeddings to weights: one linear map a module kind, shared by every site and condition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperpelt_ds.config import ModulesConfig
from hyperpelt_ds.contracts import Adapter, LowRank, Prefix, PrefixRows, Projection, Unmade
from hyperpelt_ds.kernels import generate
from hyperpelt_ds.kernels.generate import sites_at_once, unpack


class PrefixHead(nn.Module):
    """h^P: each of the P rows of a hyper-embedding gives one key row and one value row."""

    def __init__(self, hyper_size: int, prefix_size: int, sites: int, modules: ModulesConfig, std: float):
        super().__init__()
        self.linear = Generator(hyper_size, 2 * prefix_size, std)
        self.weighting = PrefixWeighting(sites, modules)

    def forward(self, hyper: Tensor, rows: bool = False) -> Prefix | PrefixRows:
        """hyper (S, C, P, E) -> keys and values, each (S, C, P, K); with `rows`, what they would be made from."""
        if rows:
            weight, bias = self.linear(None)
            return PrefixRows(hyper, weight.unsqueeze(0), bias.unsqueeze(0), self.weighting())
        keys, values = self.linear(hyper).chunk(2, dim=-1)
        return Prefix(keys, values, self.weighting())


class AdapterHead(nn.Module):
    """h^A: the mean over the rows of a hyper-embedding gives an adapter.

    Unless modules.adapter_start says otherwise, the part that makes the adapter's last factors starts at zero (`up` and
    `up_bias`, or gain and shift of its norm), so that a new adapter is exactly a no-op.
    """

    def __init__(self, hyper_size: int, model_size: int, sites: int, modules: ModulesConfig, std: float):
        super().__init__()
        size, narrow = model_size, modules.bottleneck
        self.shapes: tuple[tuple[int, ...], ...] = ((size, narrow), (narrow,), (narrow, size), (size,))
        last = _numbers(self.shapes[:2])
        if modules.adapter_norm:
            last = _numbers(self.shapes)
            self.shapes = (*self.shapes, (size,), (size,))
        self.linear = Generator(hyper_size, _numbers(self.shapes), std)
        if modules.adapter_start == "no_op":
            with torch.no_grad():
                self.linear.weight[last:].zero_()
        self.scale = AdapterScale(sites, modules)

    def forward(self, hyper: Tensor, share: float | None = None) -> Adapter | Unmade:
        """hyper (S, C, P, E) -> the adapters of all S sites and C conditions (shapes in `Adapter`), or what makes them
        where only a share may be there at a time."""
        rows = hyper.mean(2)
        at_once = sites_at_once(rows.shape, share)
        if at_once < len(rows):
            weight, bias = self.linear(None)
            return Unmade(rows, weight, bias, self.scale(), self.shapes, at_once)
        down, down_bias, up, up_bias, *norm = unpack(self.linear(rows), self.shapes)
        return Adapter(down, down_bias, up, up_bias, self.scale(), *norm)


class LowRankHead(nn.Module):
    """The mean over the rows of a hyper-embedding gives the low-rank delta of one projection; `up` starts at zero."""

    def __init__(self, hyper_size: int, projection: Projection, modules: ModulesConfig, std: float):
        super().__init__()
        self.scale = modules.lora_alpha / modules.lora_rank
        self.shapes = ((projection.inputs, modules.lora_rank), (modules.lora_rank, projection.outputs))
        self.linear = Generator(hyper_size, _numbers(self.shapes), std)
        if modules.adapter_start == "no_op":
            with torch.no_grad():
                self.linear.weight[_numbers(self.shapes[:1]) :].zero_()

    def forward(self, hyper: Tensor, share: float | None = None) -> LowRank | Unmade:
        """hyper (S, C, P, E) -> the deltas of all S sites and C conditions (shapes in `LowRank`), or what makes them
        where only a share may be there at a time."""
        rows = hyper.mean(2)
        at_once = sites_at_once(rows.shape, share)
        if at_once < len(rows):
            scale = rows.new_full((len(rows),), self.scale)
            weight, bias = self.linear(None)
            return Unmade(rows, weight, bias, scale, self.shapes, at_once)
        down, up = unpack(self.linear(rows), self.shapes)
        return LowRank(down, self.scale * up)


class Generator(nn.Linear):
    """The linear map that emits weights, initialised as HyperFormer does: N(0, std^2), no bias at the start."""

    def __init__(self, hyper_size: int, outputs: int, std: float):
        super().__init__(hyper_size, outputs)
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, hyper: Tensor | None) -> Any:
        """What it makes of `hyper`, or without any, its weight (N, E) and bias (N,), to be used later and elsewhere."""
        if hyper is None:
            return self.weight.clone(), self.bias.clone()  # ZeRO-3 takes the parameters away when this forward ends
        return generate(hyper, self.weight, self.bias)


class AdapterScale(nn.Module):
    """lambda: the factor on an adapter's output; for each site or one for all, learned or fixed."""

    values: Tensor

    def __init__(self, sites: int, modules: ModulesConfig):
        super().__init__()
        self.sites = sites
        values = torch.full((sites if modules.adapter_scale_sharing == "position" else 1,), modules.adapter_scale_value)
        if modules.adapter_scale == "learned":
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values, persistent=False)

    def forward(self) -> Tensor:
        """(S,)"""
        return self.values.clone().expand(self.sites)  # ZeRO-3 takes the parameter itself away when this forward ends


class PrefixWeighting(nn.Module):
    """What is added to the scores of prefix columns, one number an attention site: free, or the log of a sigmoid."""

    OPEN = 4.0  # a gate starts at sigmoid(4) = 0.98

    def __init__(self, sites: int, modules: ModulesConfig):
        super().__init__()
        self.gated = modules.prefix_weighting == "gate"
        self.values = None
        if modules.prefix_weighting != "none":
            self.values = nn.Parameter(torch.full((sites,), self.OPEN if self.gated else 0.0))

    def forward(self) -> Tensor | None:
        """(S,), or None where the columns are as the paper has them."""
        if self.values is None:
            return None
        return F.logsigmoid(self.values) if self.gated else self.values.clone()


def _numbers(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
