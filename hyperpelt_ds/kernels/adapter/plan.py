"""What a stack of adapter sites will cost, and which backend runs it, told from sizes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hyperpelt_ds.kernels.adapter import triton_limit
from hyperpelt_ds.kernels.cases import AdapterCase


class Plan(NamedTuple):
    """One training step of all sites: generation in one product, application, and both backward.

    `bytes` must move whatever the kernels (every activation, generated weight and gradient once; the output's gradient
    twice, since weights and inputs need it at different times); `floor_s` is their time at the given copy rate.
    `weight_bytes` are live between forward and backward: generated weights with their gradients, and each site's z.
    """

    backend: str
    why: str
    flops: int
    bytes: int
    weight_bytes: int
    launches: int | None
    floor_s: float | None

    def __str__(self) -> str:
        floor = "" if self.floor_s is None else f", at least {self.floor_s * 1e3:.2f} ms"
        return (
            f"{self.backend} ({self.why}): {self.flops / 1e9:.1f} GFLOP, {self.bytes / 1e6:.0f} MB moved{floor}, "
            f"{self.weight_bytes / 1e6:.0f} MB of generated weights live"
        )


def plan(
    case: AdapterCase,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rate: float | None = None,
) -> Plan:
    """The cost of `case` in `dtype` on a kind of device; `rate` is its copy rate in bytes a second."""
    tokens, made = case.samples * case.tokens, case.groups * case.parameters
    wide, thin, source = tokens * case.size, tokens * case.bottleneck, case.parameters * case.hyper
    forward = 3 * wide + thin + 2 * made  # x, residual, y; z; weights written and read
    backward = 5 * wide + 3 * thin + 4 * made  # dy twice, x, dx, residual's; z, dz twice; weights and gradients
    flops = case.sites * (12 * wide * case.bottleneck + 6 * made * case.hyper)
    moved = (case.sites * (forward + backward) + 3 * source) * dtype.itemsize
    problem = triton_limit(dtype, case.size, case.bottleneck)
    if device != "cuda":
        backend, why, launches = "torch", f"slices of weights and samples on {device}", None
    elif problem is None:
        backend, why, launches = "triton", "fused kernels", 3 * case.sites + 3
    else:
        backend, why, launches = "reference", str(problem), None
    return Plan(
        backend,
        why,
        flops,
        moved,
        case.sites * (2 * made + thin) * dtype.itemsize,
        launches,
        None if rate is None else moved / rate,
    )
