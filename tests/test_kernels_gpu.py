"""The adapter kernels on CUDA: accuracy against the torch baseline, repeatability, launches, graphs. Not run yet
anywhere by us: no GPU was at hand when they were written."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import by_formula, draw_adapter, error, leaves
from torch import Tensor

from hyperpelt_ds.kernels import adapter, index_batch
from hyperpelt_ds.kernels.adapter import SiteAdapter
from hyperpelt_ds.kernels.cases import ADAPTER_CASES
from hyperpelt_ds.kernels.index import index_on_device

pytestmark = pytest.mark.gpu
CASES = [case for case in ADAPTER_CASES if case.samples * case.tokens * case.size < 1 << 25]


def _on_gpu(part: SiteAdapter) -> SiteAdapter:
    users = index_batch(part.users.ids, part.users.lengths, groups=part.users.groups, device="cuda")
    return SiteAdapter(*(tensor.detach().cuda().requires_grad_() for tensor in part[:5]), users)


def _drawn(case, dtype: torch.dtype, branches: int = 1):
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (
        torch.randn(case.samples, case.tokens, case.size, generator=generator).to("cuda", dtype) for _ in range(3)
    )
    ids = [case.ids, list(range(case.samples))][:branches]
    sizes = [(max(own) + 1, case.size, case.bottleneck, dtype) for own in ids]
    parts = [_on_gpu(draw_adapter(generator, own, *size)) for own, size in zip(ids, sizes, strict=True)]
    return x.requires_grad_(), residual.requires_grad_(), parts, dy


def _run(x, residual, parts, dy, backend="auto") -> list[Tensor]:
    y = adapter(x, residual, parts, "gelu_new", backend=backend)
    return [y, *torch.autograd.grad(y, leaves(x, residual, parts), dy)]


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_error_is_at_most_a_quarter_above_that_of_plain_torch(case, dtype, branches):
    x, residual, parts, dy = _drawn(case, dtype, branches)
    expected, gradients = by_formula(x, residual, parts, "gelu_new", dy)
    ours, theirs = _run(x, residual, parts, dy), _run(x, residual, parts, dy, "reference")
    floor = 1e-6 if dtype == torch.float32 else 1e-4
    for n, (one, two, wanted) in enumerate(zip(ours, theirs, [expected, *gradients], strict=True)):
        assert error(one, wanted) <= 1.25 * error(two, wanted) + floor, n


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
        assert torch.equal(adapter(x[n : n + 1], residual[n : n + 1], alone, "gelu_new")[0], first[0][n])


def test_nothing_waits_for_the_gpu_and_a_graph_can_be_captured():
    x, residual, parts, dy = _drawn(CASES[0], torch.bfloat16, 2)
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
        captured = adapter(x, residual, parts, "gelu_new")
    graph.replay()
    assert torch.equal(captured, expected[0])


def test_memory_that_nobody_wrote_reaches_no_result():
    x, residual, parts, dy = _drawn(CASES[0], torch.float32, 2)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert not any(tensor.isnan().any() for tensor in _run(x, residual, parts, dy))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_compiled_function_gives_the_same():
    x, residual, parts, _ = _drawn(CASES[1], torch.bfloat16)

    def run(x, residual, *tensors):
        return adapter(x, residual, [SiteAdapter(*tensors, parts[0].users)], "gelu_new").float().sin().sum()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    inputs = [x, residual, *parts[0][:5]]
    pairs = zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(run(*inputs), inputs), strict=True)
    assert all(error(one, two) < 2e-2 for one, two in pairs)
