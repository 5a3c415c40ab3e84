"""From hyper-embeddings to weights: one linear map a module kind, shared by every site and condition."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hyperpelt_ds.contracts import Adapter, Prefix
from hyperpelt_ds.kernels import generate


class PrefixHead(nn.Module):
    """h^P: each of the P rows of a hyper-embedding gives one key row and one value row."""

    def __init__(self, hyper_size: int, prefix_size: int, std: float):
        super().__init__()
        self.linear = Generator(hyper_size, 2 * prefix_size, std)

    def forward(self, hyper: Tensor) -> Prefix:
        """hyper (S, C, P, E) -> keys and values, each (S, C, P, K)."""
        keys, values = self.linear(hyper).chunk(2, dim=-1)
        return Prefix(keys, values)


class AdapterHead(nn.Module):
    """h^A: the mean over the rows of a hyper-embedding gives an adapter.

    The part that makes `up` and `up_bias` starts at zero, so a new adapter is exactly a no-op.
    """

    def __init__(self, hyper_size: int, model_size: int, bottleneck: int, sites: int, std: float):
        super().__init__()
        self.model_size, self.bottleneck = model_size, bottleneck
        self.sizes = [model_size * bottleneck, bottleneck, bottleneck * model_size, model_size]
        self.linear = Generator(hyper_size, sum(self.sizes), std)
        with torch.no_grad():
            self.linear.weight[sum(self.sizes[:2]) :].zero_()
        self.scale = nn.Parameter(torch.ones(sites))

    def forward(self, hyper: Tensor) -> Adapter:
        """hyper (S, C, P, E) -> the adapters of all S sites and C conditions (shapes in `Adapter`)."""
        down, down_bias, up, up_bias = self.linear(hyper.mean(2)).split(self.sizes, dim=-1)
        return Adapter(
            down.unflatten(-1, (self.model_size, self.bottleneck)),
            down_bias,
            up.unflatten(-1, (self.bottleneck, self.model_size)),
            up_bias,
            self.scale.clone(),  # ZeRO-3 takes the parameter itself away when this forward ends
        )


class Generator(nn.Linear):
    """The linear map that emits weights, initialised as HyperFormer does: N(0, std^2), no bias at the start."""

    def __init__(self, hyper_size: int, outputs: int, std: float):
        super().__init__(hyper_size, outputs)
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, hyper: Tensor) -> Tensor:
        return generate(hyper, self.weight, self.bias)
