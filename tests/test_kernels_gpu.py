"""The adapter kernels on CUDA: accuracy against the torch baseline, repeatability, launches, graphs. Not run yet
anywhere by us: no GPU was at hand when they were written."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from adapter_cases import by_formula, draw_adapter, error, leaves
from torch import Tensor

from hyperpelt_ds.kernels import adapter, dispatch, index_batch, low_rank
from hyperpelt_ds.kernels.adapter import SiteAdapter
from hyperpelt_ds.kernels.cases import ADAPTER_CASES
from hyperpelt_ds.kernels.index import index_on_device
from hyperpelt_ds.kernels.low_rank import SiteLowRank

pytestmark = pytest.mark.gpu
CASES = {case.name: case for case in ADAPTER_CASES}
SOME = [CASES[name] for name in ("tasks4_B64_S8_m64", "images_B16_S32_m24_d512", "tasks8_B64_S64_m64")]
EVERY = [*SOME, *(CASES[name] for name in ("tasks8_B64_S512_m8", "tasks8_B64_S512_m64", "tasks8_B64_S64_m64_d4096"))]
"""Each needs kernels of its own, which take seconds to compile: hence not all of every type."""
CALLS = [
    *itertools.product(EVERY, [torch.bfloat16], [1, 2]),
    *itertools.product(SOME[1:], [torch.float16, torch.float32], [2]),
    (CASES["tasks8_B64_S512_m64"], torch.float32, 1),
]


def _on_gpu(part: SiteAdapter) -> SiteAdapter:
    """Its weights as views of one row a condition, as heads make them."""
    users = index_batch(part.users.ids, part.users.lengths, groups=part.users.groups, device="cuda")
    row = torch.cat([tensor.detach().flatten(1) for tensor in part[:4]], 1).cuda().requires_grad_()
    sizes = [math.prod(tensor.shape[1:]) for tensor in part[:4]]
    views = [own.view(of.shape) if of.ndim < 3 else own.unflatten(1, of.shape[1:])
             for own, of in zip(row.split(sizes, 1), part[:4], strict=True)]  # fmt: skip
    return SiteAdapter(*views, part.scale.detach().cuda().requires_grad_(), users)


def _drawn(case, dtype: torch.dtype, branches: int = 1):
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (
        torch.randn(case.samples, case.tokens, case.size, generator=generator).to("cuda", dtype) for _ in range(3)
    )
    ids = [case.ids, list(range(case.samples))][:branches]
    sizes = [(max(own) + 1, case.size, case.bottleneck, dtype) for own in ids]
    parts = [_on_gpu(draw_adapter(generator, own, *size)) for own, size in zip(ids, sizes, strict=True)]
    return x.requires_grad_(), residual.requires_grad_(), parts, dy


def _activation(x: Tensor) -> str:
    """In bfloat16 the benchmark's, which then finds compiled what it times; the interpreter's tests have every one."""
    return "relu" if x.dtype == torch.bfloat16 else "gelu_new"


def _run(x, residual, parts, dy, backend="auto") -> list[Tensor]:
    y = adapter(x, residual, parts, _activation(x), backend=backend)
    return [y, *torch.autograd.grad(y, leaves(x, residual, parts), dy)]


def test_a_machine_with_cuda_has_triton_and_uses_it():
    assert torch.cuda.is_available()
    assert dispatch.choose("auto", torch.ones(1, device="cuda"), lambda: None, lambda: None) == "triton"


@pytest.mark.parametrize("case, dtype, branches", CALLS, ids=lambda part: getattr(part, "name", str(part)))
def test_the_error_is_at_most_a_quarter_above_that_of_plain_torch(case, dtype, branches):
    """A scale's gradient is one number, of terms that cancel: one or the other may be near by luck, so that it may be
    off by its own rounding and by that of the terms besides."""
    x, residual, parts, dy = _drawn(case, dtype, branches)
    expected, gradients = by_formula(x, residual, parts, _activation(x), dy)
    ours, theirs = _run(x, residual, parts, dy), _run(x, residual, parts, dy, "reference")
    floor, epsilon = 1e-6 if dtype == torch.float32 else 1e-4, torch.finfo(dtype).eps
    terms = (dy.double() * (expected - residual)).norm()
    for n, (one, two, wanted) in enumerate(zip(ours, theirs, [expected, *gradients], strict=True)):
        limit = 1.25 * error(two, wanted) + floor
        if wanted.numel() == 1:
            limit += epsilon * (1 + 4 * terms / wanted.abs()).item()
        assert error(one, wanted) <= limit, n


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_answers_repeat_and_a_samples_own_does_not_depend_on_the_others(case):
    x, residual, parts, dy = _drawn(case, torch.bfloat16, 2)
    first = _run(x, residual, parts, dy)
    for _ in range(3):
        assert all(torch.equal(one, two) for one, two in zip(first, _run(x, residual, parts, dy), strict=True))
    for n in (0, case.samples - 1):
        alone = [
            part._replace(users=index_batch(part.users.ids[n : n + 1].cpu(), groups=part.users.groups, device="cuda"))
            for part in parts
        ]
        assert torch.equal(adapter(x[n : n + 1], residual[n : n + 1], alone, _activation(x))[0], first[0][n])


def test_gradients_of_low_rank_deltas_repeat_bit_for_bit():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16).requires_grad_()

    x, output, down, up = draw(64, 64, 256), draw(64, 64, 256), draw(3, 256, 8), draw(3, 8, 256)
    users = index_on_device(torch.randint(-1, 3, (64,), generator=generator).cuda(), 3)
    runs = []
    for _ in range(4):
        y = low_rank(x, output, [SiteLowRank(down, up, users)])
        runs.append([y, *torch.autograd.grad(y.float().sin().sum(), [x, down, up])])
    assert all(torch.equal(one, two) for run in runs[1:] for one, two in zip(runs[0], run, strict=True))


def test_nothing_waits_for_the_gpu_and_a_graph_can_be_captured():
    x, residual, parts, dy = _drawn(SOME[0], torch.bfloat16, 2)
    rows = [part.users.ids.long() for part in parts]
    expected = _run(x, residual, parts, dy)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        users = [index_on_device(own, part.users.groups) for own, part in zip(rows, parts, strict=True)]
        made = _run(x, residual, [p._replace(users=own) for p, own in zip(parts, users, strict=True)], dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, two) for one, two in zip(made, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = adapter(x, residual, parts, _activation(x))
    graph.replay()
    assert torch.equal(captured, expected[0])


def test_memory_that_nobody_wrote_reaches_no_result():
    x, residual, parts, dy = _drawn(SOME[0], torch.float32, 2)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert not any(tensor.isnan().any() for tensor in _run(x, residual, parts, dy))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_compiled_function_gives_the_same():
    x, residual, parts, _ = _drawn(SOME[1], torch.bfloat16)

    def run(x, residual, *tensors):
        return adapter(x, residual, [SiteAdapter(*tensors, parts[0].users)], _activation(x)).float().sin().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    inputs = [x, residual, *parts[0][:5]]
    pairs = zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(run(*inputs), inputs), strict=True)
    assert all(error(one, two) < 2e-2 for one, two in pairs)
