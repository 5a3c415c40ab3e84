"""A plan counts what is generated, computed, moved and held, and says which way it will be run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hyperpelt_ds.kernels import plan
from hyperpelt_ds.kernels.cases import ADAPTER_CASES, PrefixCase

ONE = replace(ADAPTER_CASES[0], samples=2, tokens=3, size=8, bottleneck=2, hyper=5, sites=1, conditions=1)
IMAGES = replace(ADAPTER_CASES[0], samples=8, tokens=3, size=8, bottleneck=2, hyper=4, sites=6, conditions=0)
PREFIXES = PrefixCase("base", 64, queries=20, keys=20, heads=12, size=64, rows=49, conditions=0, hyper=64, sites=36)


def test_adapters_made_at_once():
    wide, thin, made = 6 * 8, 6 * 2, 2 * 8 * 2 + 8 + 2
    (found,) = plan(ONE, rate=1e9).costs
    assert (found.variant, found.backend) == ("whole", "torch")
    assert found.forward_flops == 4 * wide * 2 + 2 * made * 5 and found.flops == 3 * found.forward_flops
    assert found.bytes == 4 * (8 * wide + 4 * thin + 6 * made + 3 * made * 5) and found.floor_s == found.bytes / 1e9
    assert found.live_bytes == 4 * (2 * made + thin) and found.generated_bytes == 4 * made


def test_the_backend_is_the_one_that_would_run_and_says_why():
    assert plan(ONE, dtype=torch.bfloat16, device="cuda").costs[0].backend == "triton"
    (odd,) = plan(replace(ONE, size=9), dtype=torch.bfloat16, device="cuda").costs
    assert odd.backend == "reference" and "multiple of 8" in str(odd)


@pytest.mark.parametrize("budget, at_once", [(None, 6), (1e9, 6), (0.5, 3), (0.1, 2)])
def test_a_budget_decides_how_many_sites_are_made_at_a_time(budget, at_once):
    """In shares of all weights; two sites are the fewest for eight conditions of four numbers."""
    whole, made = plan(IMAGES).costs[0], 8 * IMAGES.parameters
    (found,) = plan(IMAGES, budget=None if budget is None else budget * whole.generated_bytes).costs
    if at_once == 6:
        assert found == whole
        return
    assert f"{6 // at_once} chunks of {at_once} sites" in str(found)
    assert found.live_bytes == 4 * (at_once + 1) * made < whole.live_bytes
    assert found.forward_flops == whole.forward_flops
    assert found.backward_flops == 1.5 * whole.backward_flops, "weights and op once more"
    assert found.bytes > whole.bytes


def test_several_kinds_share_a_budget():
    other = replace(IMAGES, bottleneck=4)
    total = sum(cost.generated_bytes for cost in plan(IMAGES, other).costs)
    found = plan(IMAGES, other, budget=0.5 * total)
    assert [cost.variant for cost in found.costs] == ["2 chunks of 3 sites"] * 2
    assert len(str(found).splitlines()) == 2


def test_an_image_s_prefixes_absorbed_take_a_twenty_fourth_of_the_bytes():
    made, absorbed = plan(PREFIXES, dtype=torch.bfloat16).costs
    assert (made.variant, absorbed.variant) == ("materialised", "absorbed")
    assert made.generated_bytes == 2 * 64 * 49 * 2 * 768 * 36 and absorbed.generated_bytes == 0
    assert made.live_bytes == 24 * absorbed.live_bytes
    assert made.bytes > 10 * absorbed.bytes
