"""The ways to run a stack of adapter sites that bench_kernels.py compares, each as one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PEERS = ("gather", "compiled", "grouped_mm", "block", "loop_task", "loop_example", "per_token", "half_padded")
DEFAULT_PEERS = tuple(name for name in PEERS if name != "compiled")


def systems(case: Any, names: tuple[str, ...], device: str, dtype: Any) -> dict[str, Callable[[], None]]:
    """One forward and backward pass through all sites of a case, for every system that can run it."""
    import torch

    from hyperpelt_ds.kernels import generate, index_batch

    def draw(*shape: int, std: float = 1.0) -> Any:
        return (torch.randn(shape, generator=generator) * std).to(device, dtype).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    x = draw(case.samples, case.tokens, case.size)
    hyper = draw(case.sites, case.groups, case.hyper)
    weight = draw(case.parameters, case.hyper, std=(case.hyper * case.size) ** -0.5)
    bias, scale = draw(case.parameters, std=0.0), draw(case.sites)
    leaves = (x, hyper, weight, bias, scale)
    users = index_batch(case.ids, groups=case.groups, device=device)

    def all_sites(body: Callable[..., Any]) -> Callable[[], None]:
        def step() -> None:
            made = _split(generate(hyper, weight, bias), case)
            _backward(_through(body, x, zip(*(part.unbind() for part in (*made, scale)), strict=True)), leaves)

        return step

    def each_site(body: Callable[..., Any]) -> Callable[[], None]:
        def step() -> None:
            y = x
            for site in range(case.sites):
                y = body(y, hyper[site], weight, bias, scale[site])
            _backward(y, leaves)

        return step

    bodies = _bodies(case, users)
    repeated = case.samples * case.tokens * case.parameters * case.sites * dtype.itemsize
    made: dict[str, Callable[[], None]] = {}
    for name in names:
        if name == "per_token" and repeated > (64 << 30 if device == "cuda" else 1 << 30):
            continue
        if name == "loop_task" and not case.conditions:
            continue
        made[name] = (each_site if name in ("block", "loop_task", "loop_example") else all_sites)(bodies[name])
    return made


def _bodies(case: Any, users: Any) -> dict[str, Callable[..., Any]]:
    """What each system does at one site: from made weights, or from hyper-embeddings (block and the loops)."""
    import torch
    import torch.nn.functional as F

    from hyperpelt_ds.kernels import adapter, generate
    from hyperpelt_ds.kernels.adapter import SiteAdapter

    rows = users.ids.long()
    ends = users.ptr[1:].clone()
    of_task = [
        range(n * case.samples // case.groups, (n + 1) * case.samples // case.groups) for n in range(case.groups)
    ]

    def ours(x: Any, *made: Any) -> Any:
        return adapter(x, x, [SiteAdapter._make((*made, users, None, None))], "relu")

    lengths = torch.full_like(users.ids, case.tokens)
    lengths[::2] = 1
    ragged = users._replace(lengths=lengths)

    def half_padded(x: Any, *made: Any) -> Any:
        return adapter(x, x, [SiteAdapter._make((*made, ragged, None, None))], "relu")

    def gather(x: Any, *made: Any) -> Any:
        return adapter(x, x, [SiteAdapter._make((*made, users, None, None))], "relu", backend="reference")

    def grouped_mm(x: Any, down: Any, down_bias: Any, up: Any, up_bias: Any, scale: Any) -> Any:
        flat, stops = x.flatten(0, 1), ends * case.tokens
        by_token = rows.repeat_interleave(case.tokens)
        h = torch.relu(F.grouped_mm(flat, down.contiguous(), offs=stops) + down_bias.index_select(0, by_token))
        y = F.grouped_mm(h, up.contiguous(), offs=stops) + up_bias.index_select(0, by_token)
        return x + scale * y.view_as(x)

    def per_token(x: Any, down: Any, down_bias: Any, up: Any, up_bias: Any, scale: Any) -> Any:
        of = [part.index_select(0, rows).repeat_interleave(case.tokens, 0) for part in (down, down_bias, up, up_bias)]
        flat = x.flatten(0, 1).unsqueeze(1)
        h = torch.relu(torch.bmm(flat, of[0]) + of[1].unsqueeze(1))
        return x + scale * (torch.bmm(h, of[2]) + of[3].unsqueeze(1)).view_as(x)

    def block(x: Any, hyper: Any, weight: Any, bias: Any, scale: Any) -> Any:
        return ours(x, *_split(generate(hyper, weight, bias), case), scale)

    def one(x: Any, made: Any, scale: Any) -> Any:
        down, down_bias, up, up_bias = _split(made, case)
        return x + scale * (torch.relu(x @ down + down_bias) @ up + up_bias)

    def loop_task(x: Any, hyper: Any, weight: Any, bias: Any, scale: Any) -> Any:
        parts = []
        for task, samples in enumerate(of_task):
            parts.append(one(x[samples.start : samples.stop], F.linear(hyper[task], weight, bias), scale))
        return torch.cat(parts)

    def loop_example(x: Any, hyper: Any, weight: Any, bias: Any, scale: Any) -> Any:
        made = (one(x[n], F.linear(hyper[row], weight, bias), scale) for n, row in enumerate(case.ids))
        return torch.stack(list(made))

    return dict(
        ours=ours,
        gather=gather,
        half_padded=half_padded,
        compiled=torch.compile(gather, dynamic=False),
        grouped_mm=grouped_mm,
        per_token=per_token,
        block=block,
        loop_task=loop_task,
        loop_example=loop_example,
    )


def _split(made: Any, case: Any) -> tuple[Any, ...]:
    """Packed rows (..., P) as down, down_bias, up, up_bias, the order in which the model's head packs them."""
    size, narrow = case.size, case.bottleneck
    down, down_bias, up, up_bias = made.split([size * narrow, narrow, narrow * size, size], dim=-1)
    return down.unflatten(-1, (size, narrow)), down_bias, up.unflatten(-1, (narrow, size)), up_bias


def _through(body: Callable[..., Any], x: Any, sites: Any) -> Any:
    for made in sites:
        x = body(x, *made)
    return x


def _backward(y: Any, leaves: tuple[Any, ...]) -> None:
    y.float().square().mean().backward()
    for leaf in leaves:
        leaf.grad = None
