"""The ways to run a stack of adapter sites, or a low-rank delta, that bench_kernels.py compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PEERS = (
    "gather",
    "eager_bmm",
    "generation",
    "compiled",
    "graph",
    "grouped_mm",
    "block",
    "loop_task",
    "loop_example",
    "per_token",
    "half_padded",
    "chunked",
    "peft_mixed_batch",
)
DEFAULT_PEERS = tuple(name for name in PEERS if name not in ("compiled", "graph"))
LOOPED = ("loop_task", "loop_example", "per_token")
"""Not for batches of more than 64 samples: they would take most of a run's time."""

EACH_SITE = ("block", "eager_bmm", "loop_task", "loop_example")
"""They generate weights site by site."""


def systems(case: Any, names: tuple[str, ...], device: str, dtype: Any) -> dict[str, Callable[[], None]]:
    """One forward and backward pass through all sites of a case, for every system that can run it."""
    import torch
    from gpu_profile import captured

    from hyperpelt_ds.kernels import generate
    from hyperpelt_ds.kernels.adapter import bind
    from hyperpelt_ds.kernels.generate import sites_at_once, unpack
    from hyperpelt_ds.kernels.regenerate import later

    def draw(*shape: int, std: float = 1.0) -> Any:
        return (torch.randn(shape, generator=generator) * std).to(device, dtype).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    x = draw(case.samples, case.tokens, case.size)
    hyper = draw(case.sites, case.groups, case.hyper)
    weight = draw(case.parameters, case.hyper, std=(case.hyper * case.size) ** -0.5)
    bias, scale = draw(case.parameters, std=0.0), draw(case.sites)
    leaves = (x, hyper, weight, bias, scale)
    users = _users(case, device)

    def all_sites(body: Callable[..., Any]) -> Callable[[], None]:
        def step() -> None:
            made = unpack(generate(hyper, weight, bias), shapes)
            _backward(_through(body, x, zip(*(part.unbind() for part in (*made, scale)), strict=True)), leaves)

        return step

    def each_site(body: Callable[..., Any]) -> Callable[[], None]:
        def step() -> None:
            y = x
            for site in range(case.sites):
                y = body(y, hyper[site], weight, bias, scale[site])
            _backward(y, leaves)

        return step

    def chunked() -> None:
        parts = later(hyper, weight, bias, scale, shapes, at_once)
        y = x
        for part in parts:
            y = bind([part._replace(users=users)], "relu")(y, y)
        _backward(y, leaves)

    def generation() -> None:
        with torch.no_grad():
            generate(hyper, weight, bias)

    shapes = ((case.size, case.bottleneck), (case.bottleneck,), (case.bottleneck, case.size), (case.size,))
    at_once = sites_at_once(hyper.shape, share=0.0)
    bodies = _bodies(case, users, shapes)
    repeated = case.samples * case.tokens * case.parameters * case.sites * dtype.itemsize
    made: dict[str, Callable[[], None]] = {}
    for name in names:
        if name == "chunked" and at_once < case.sites:
            made[name] = chunked
        elif name == "generation":
            made[name] = generation
        elif name == "graph" and device == "cuda":
            made[name] = captured(all_sites(bodies["ours"]))
        if name not in bodies or (name in LOOPED and case.samples > 64):
            continue
        if name == "per_token" and repeated > (64 << 30 if device == "cuda" else 1 << 30):
            continue
        if name == "loop_task" and not case.conditions:
            continue
        made[name] = (each_site if name in EACH_SITE else all_sites)(bodies[name])
    return made


def _bodies(case: Any, users: Any, shapes: Any) -> dict[str, Callable[..., Any]]:
    """What each system does at one site: from made weights, or from hyper-embeddings (block and the loops)."""
    import torch
    import torch.nn.functional as F

    from hyperpelt_ds.kernels import adapter, generate
    from hyperpelt_ds.kernels.adapter import SiteAdapter
    from hyperpelt_ds.kernels.generate import unpack

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

    def eager_bmm(x: Any, hyper: Any, weight: Any, bias: Any, scale: Any) -> Any:
        down, down_bias, up, up_bias = unpack(F.linear(hyper.index_select(0, rows), weight, bias), shapes)
        h = torch.relu(torch.bmm(x, down) + down_bias.unsqueeze(1))
        return x + scale * (torch.bmm(h, up) + up_bias.unsqueeze(1))

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
        return ours(x, *unpack(generate(hyper, weight, bias), shapes), scale)

    def one(x: Any, made: Any, scale: Any) -> Any:
        down, down_bias, up, up_bias = unpack(made, shapes)
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
        eager_bmm=eager_bmm,
        half_padded=half_padded,
        compiled=torch.compile(gather, dynamic=False),
        grouped_mm=grouped_mm,
        per_token=per_token,
        block=block,
        loop_task=loop_task,
        loop_example=loop_example,
    )


def low_rank_systems(case: Any, names: tuple[str, ...], device: str, dtype: Any) -> dict[str, Callable[[], Any]]:
    """A linear map with a low-rank delta for each condition on a mixed batch, forward; returns the output."""
    import torch
    from torch import nn

    from hyperpelt_ds.kernels import low_rank
    from hyperpelt_ds.kernels.low_rank import SiteLowRank

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return (torch.randn(shape, generator=generator) * case.size**-0.5).to(device, dtype)

    size, rank = case.size, case.rank
    x, base = draw(case.samples, case.tokens, size), nn.Linear(size, size).to(device, dtype).requires_grad_(False)
    down, up = draw(case.groups, size, rank), draw(case.groups, rank, size)
    users = _users(case, device)
    rows = users.ids.long()

    def ours() -> Any:
        return low_rank(x, base(x), [SiteLowRank(down, up, users)])

    def gather() -> Any:
        return torch.baddbmm(base(x), torch.bmm(x, down.index_select(0, rows)), up.index_select(0, rows))

    made: dict[str, Callable[[], Any]] = {"ours": ours, "gather": gather}
    if "peft_mixed_batch" in names:
        layer, adapter_names = _peft_layer(base, down, up), [str(row) for row in case.ids]
        made["peft_mixed_batch"] = lambda: layer(x, adapter_names=adapter_names)
    return {name: torch.inference_mode()(made[name]) for name in names if name in made}


def _peft_layer(base: Any, down: Any, up: Any) -> Any:
    """peft's LoRA layer around a linear map, with an adapter of each condition's delta, named by its number."""
    import torch
    from peft import LoraConfig, get_peft_model

    rank = down.shape[2]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model: Any = get_peft_model(torch.nn.Sequential(base), config, adapter_name="0")
    for number in range(1, len(down)):
        model.add_adapter(str(number), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for number in range(len(down)):
            layer.lora_A[str(number)].weight.copy_(down[number].T)
            layer.lora_B[str(number)].weight.copy_(up[number].T)
    return layer.to(down).eval()


def _users(case: Any, device: str) -> Any:
    """The index that a model has: made where the batch is."""
    import torch

    from hyperpelt_ds.kernels.index import index_batch, index_on_device

    if device == "cpu":
        return index_batch(case.ids, groups=case.groups)
    return index_on_device(torch.tensor(case.ids, device=device), case.groups)


def _through(body: Callable[..., Any], x: Any, sites: Any) -> Any:
    for made in sites:
        x = body(x, *made)
    return x


def _backward(y: Any, leaves: tuple[Any, ...]) -> None:
    y.float().square().mean().backward()
    for leaf in leaves:
        leaf.grad = None
