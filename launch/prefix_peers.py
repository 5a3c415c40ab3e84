"""The ways to compute attention with prefixes that bench_kernels.py compares, each as one forward and backward pass.

All begin with the rows that a hypernetwork made and with the map to keys and values:

    copied     keys and values made, and put before the others; torch's own attention (what models get on CUDA)
    merged     keys and values made; each part attended to alone, and merged
    explicit   the map absorbed, scores written out
    absorbed   the map absorbed, and merged
    none       attention without a prefix: the floor
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def systems(case: Any, device: str, dtype: Any) -> dict[str, Callable[[], None]]:
    """One forward and backward pass through a site of a case, with a mask and a bias as T5 has them."""
    import torch

    from hyperpelt_ds.kernels.prefix_attention import (
        CPU,
        CUDA,
        SiteRows,
        concatenated,
        explicit,
        merged,
        prefix_attention,
        score_bias,
    )

    def draw(*shape: int, std: float = 1.0) -> Any:
        return (torch.randn(shape, generator=generator) * std).to(device, dtype).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    width = case.heads * case.size
    query = draw(case.samples, case.queries, case.heads, case.size).transpose(1, 2)
    key, value = (draw(case.samples, case.keys, case.heads, case.size).transpose(1, 2) for _ in range(2))
    hyper = draw(case.groups, case.rows, case.hyper)
    weight, bias = draw(2 * width, case.hyper, std=case.hyper**-0.5), draw(2 * width)
    rows = SiteRows(hyper, weight, bias, torch.tensor(case.ids, device=device))
    real = torch.arange(case.keys) < torch.arange(case.samples).add(1).clamp(max=case.keys).view(-1, 1, 1, 1)
    mask = real.expand(-1, 1, case.queries, -1).to(device)
    positions = torch.randn((1, case.heads, case.queries, case.keys), generator=generator).to(device, dtype)
    added, scale = score_bias(mask, positions, dtype), case.size**-0.5
    flash = CUDA if device == "cuda" else CPU
    given, inputs = (query, key, value), [query, key, value, hyper, weight, bias]

    def through(attend: Callable[[], Any], leaves: list[Any]) -> Callable[[], None]:
        return lambda: (torch.autograd.grad(attend().float().square().mean(), leaves), None)[1]

    return {
        "copied": through(lambda: concatenated(*given, [rows.materialised()], added, scale, 0.0), inputs),
        "merged": through(lambda: merged(flash, *given, [rows.materialised()], added, scale), inputs),
        "explicit": through(lambda: explicit(*given, [rows], added, scale, 0.0), inputs),
        "absorbed": through(lambda: merged(flash, *given, [rows], added, scale), inputs),
        "none": through(lambda: prefix_attention(*given, [], None, added, scale), inputs[:3]),
    }
