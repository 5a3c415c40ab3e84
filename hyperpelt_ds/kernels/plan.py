"""What generated modules will cost in a training step and how they will be run, told from sizes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hyperpelt_ds.kernels.adapter import triton_limit
from hyperpelt_ds.kernels.cases import AdapterCase, PrefixCase
from hyperpelt_ds.kernels.generate import sites_at_once


class Cost(NamedTuple):
    """One training step of all sites of a kind: generation, application, and both backward.

    `bytes` must move whatever the kernels: every activation, generated weight and gradient once (an output's gradient
    twice, since weights and inputs need it at different times), and for prefixes only what attention without them does
    not move. `floor_s` is their time at the given copy rate. `live_bytes` is the most that generated weights, their
    gradients and what an op keeps of them take at a time.
    """

    kind: str
    variant: str
    backend: str
    why: str
    generated_bytes: int
    """All weights of all sites, whether they are there together or not."""
    forward_flops: int
    backward_flops: int
    bytes: int
    live_bytes: int
    launches: int | None
    floor_s: float | None

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops

    def __str__(self) -> str:
        floor = "" if self.floor_s is None else f", at least {self.floor_s * 1e3:.2f} ms"
        return (
            f"{self.kind}, {self.variant}, {self.backend} ({self.why}): {self.generated_bytes / 1e6:.0f} MB generated, "
            f"{self.forward_flops / 1e9:.1f} GFLOP forward and {self.backward_flops / 1e9:.1f} backward, "
            f"{self.bytes / 1e6:.0f} MB moved{floor}, {self.live_bytes / 1e6:.0f} MB live"
        )


class Plan(NamedTuple):
    """The costs of every kind that was asked for; prefixes have one in each form, of which attention takes one."""

    costs: tuple[Cost, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.costs))


def plan(
    *cases: AdapterCase | PrefixCase,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rate: float | None = None,
    budget: float | None = None,
) -> Plan:
    """The costs of `cases` in `dtype` on a kind of device.

    `rate` is the device's copy rate in bytes a second, `budget` the bytes of generated adapters that may be there at a
    time, all cases together (model.generation_budget_mb; None for all).
    """
    adapters = [case for case in cases if isinstance(case, AdapterCase)]
    total = sum(case.sites * case.groups * case.parameters for case in adapters) * dtype.itemsize
    share = None if budget is None or not total else budget / total
    costs: list[Cost] = []
    for case in cases:
        if isinstance(case, AdapterCase):
            costs.append(_adapters(case, dtype, device, rate, share))
        else:
            costs += _prefixes(case, dtype, device, rate)
    return Plan(tuple(costs))


def _adapters(case: AdapterCase, dtype: torch.dtype, device: str, rate: float | None, share: float | None) -> Cost:
    tokens, made = case.samples * case.tokens, case.groups * case.parameters
    wide, thin, source = tokens * case.size, tokens * case.bottleneck, case.parameters * case.hyper
    apply, generate = 4 * wide * case.bottleneck, 2 * made * case.hyper
    at_once = sites_at_once((case.sites, case.groups, case.hyper), share)
    whole = at_once == case.sites
    forward = 3 * wide + 2 * made + (thin if whole else 0)  # x, residual, y; weights written and read; z
    backward = 5 * wide + 3 * thin + 4 * made  # dy twice, x, dx, residual's; z, dz twice; weights and gradients
    moved = case.sites * (forward + backward) + 3 * source
    live = case.sites * (2 * made + thin)
    backward_flops = 2 * apply + 2 * generate
    variant, launches = "whole", None
    if not whole:  # weights and op once more; gradients moved; the map read twice more and its gradient added
        chunks = math.ceil(case.sites / at_once)
        variant = f"{chunks} chunks of {at_once} site{'s' if at_once > 1 else ''}"
        moved = case.sites * (forward + backward + 3 * wide + thin + 4 * made) + 6 * chunks * source
        live = (at_once + 1) * made
        backward_flops += apply + generate
    problem = triton_limit(dtype, case.size, case.bottleneck)
    if device != "cuda":
        backend, why = "torch", f"slices of weights and samples on {device}"
    elif problem is None:
        backend, why, launches = "triton", "fused kernels", 3 * case.sites + 3 if whole else None
    else:
        backend, why = "reference", str(problem)
    return Cost(
        "adapters",
        variant,
        backend,
        why,
        generated_bytes=case.sites * made * dtype.itemsize,
        forward_flops=case.sites * (apply + generate),
        backward_flops=case.sites * backward_flops,
        bytes=moved * dtype.itemsize,
        live_bytes=live * dtype.itemsize,
        launches=launches,
        floor_s=None if rate is None else moved * dtype.itemsize / rate,
    )


def _prefixes(case: PrefixCase, dtype: torch.dtype, device: str, rate: float | None) -> Sequence[Cost]:
    """In both forms: keys and values made, or rows looked at through a map in query and output (docs/kernels.md)."""
    queries, rows = case.samples * case.queries, case.groups * case.rows
    width = case.heads * case.size
    made, source, given = 2 * rows * width, 2 * width * case.hyper, rows * case.hyper
    looks = 2 * queries * case.rows * width  # one product of all queries with keys or values
    turns = 2 * queries * width * case.hyper  # one of all queries with a half of the map
    through = 2 * queries * case.heads * case.rows * case.hyper  # one of turned queries with rows
    forms = {
        "materialised": (
            2 * looks + 2 * made * case.hyper,
            5 * looks + 4 * made * case.hyper,
            5 * made + 3 * given,  # written, read twice, gradient written and read; rows read twice, gradient written
            2 * made,
            made,
        ),
        "absorbed": (2 * turns + 2 * through, 5 * turns + 6 * through, 3 * given + 2 * source, 2 * given, 0),
    }
    backend, why = ("torch", "parts merged by their sums") if device != "cuda" else ("torch", "its own attention")
    return [
        Cost(
            "prefixes",
            form,
            backend,
            why,
            generated_bytes=case.sites * generated * dtype.itemsize,
            forward_flops=case.sites * forward,
            backward_flops=case.sites * backward,
            bytes=(case.sites * moved + 3 * source) * dtype.itemsize,
            live_bytes=case.sites * live * dtype.itemsize,
            launches=None,
            floor_s=None if rate is None else (case.sites * moved + 3 * source) * dtype.itemsize / rate,
        )
        for form, (forward, backward, moved, live, generated) in forms.items()
    ]
