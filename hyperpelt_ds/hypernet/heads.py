"""From hyper-embeddings to weights: one linear map a module kind, shared by every site and condition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperpelt_ds.config import ModulesConfig
from hyperpelt_ds.contracts import Adapter, LowRank, Prefix, PrefixRows, Projection
from hyperpelt_ds.kernels import generate


class PrefixHead(nn.Module):
    """h^P: each of the P rows of a hyper-embedding gives one key row and one value row."""

    def __init__(self, hyper_size: int, prefix_size: int, sites: int, modules: ModulesConfig, std: float):
        super().__init__()
        self.linear = PrefixGenerator(hyper_size, 2 * prefix_size, std)
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
        self.model_size, self.bottleneck = model_size, modules.bottleneck
        self.sizes = [model_size * self.bottleneck, self.bottleneck, self.bottleneck * model_size, model_size]
        last = sum(self.sizes[:2])
        if modules.adapter_norm:
            last = sum(self.sizes)
            self.sizes += [model_size, model_size]
        self.linear = Generator(hyper_size, sum(self.sizes), std)
        if modules.adapter_start == "no_op":
            with torch.no_grad():
                self.linear.weight[last:].zero_()
        self.scale = AdapterScale(sites, modules)

    def forward(self, hyper: Tensor) -> Adapter:
        """hyper (S, C, P, E) -> the adapters of all S sites and C conditions (shapes in `Adapter`)."""
        down, down_bias, up, up_bias, *norm = self.linear(hyper.mean(2)).split(self.sizes, dim=-1)
        return Adapter(
            down.unflatten(-1, (self.model_size, self.bottleneck)),
            down_bias,
            up.unflatten(-1, (self.bottleneck, self.model_size)),
            up_bias,
            self.scale(),
            *norm,
        )


class LowRankHead(nn.Module):
    """The mean over the rows of a hyper-embedding gives the low-rank delta of one projection; `up` starts at zero."""

    def __init__(self, hyper_size: int, projection: Projection, modules: ModulesConfig, std: float):
        super().__init__()
        self.rank, self.scale = modules.lora_rank, modules.lora_alpha / modules.lora_rank
        self.inputs, self.outputs = projection.inputs, projection.outputs
        self.linear = Generator(hyper_size, self.rank * (self.inputs + self.outputs), std)
        if modules.adapter_start == "no_op":
            with torch.no_grad():
                self.linear.weight[self.rank * self.inputs :].zero_()

    def forward(self, hyper: Tensor) -> LowRank:
        """hyper (S, C, P, E) -> the deltas of all S sites and C conditions (shapes in `LowRank`)."""
        sizes = [self.rank * self.inputs, self.rank * self.outputs]
        down, up = self.linear(hyper.mean(2)).split(sizes, dim=-1)
        return LowRank(
            down.unflatten(-1, (self.inputs, self.rank)), self.scale * up.unflatten(-1, (self.rank, self.outputs))
        )


class Generator(nn.Linear):
    """The linear map that emits weights, initialised as HyperFormer does: N(0, std^2), no bias at the start."""

    def __init__(self, hyper_size: int, outputs: int, std: float):
        super().__init__(hyper_size, outputs)
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, hyper: Tensor) -> Tensor:
        return generate(hyper, self.weight, self.bias)


class PrefixGenerator(Generator):
    """A map that can be handed on, for attention to use in place of what it makes."""

    def forward(self, hyper: Tensor | None) -> Any:
        """What it makes of `hyper`, or without any, its weight (N, E) and bias (N,)."""
        if hyper is None:
            return self.weight.clone(), self.bias.clone()  # ZeRO-3 takes the parameters away when this forward ends
        return super().forward(hyper)


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
