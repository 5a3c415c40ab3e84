"""What every rank must see of a split backbone: torchrun --nproc_per_node N tests/ranks_shard.py

Each check builds the same tiny model twice, whole and split, and does the same with both.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from tiny import MODULES, tiny_batch, tiny_hypernet, tiny_model, tiny_modules
from torch.multiprocessing.reductions import StorageWeakRef

from hyperpelt_ds import dist
from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.config import ModulesConfig
from hyperpelt_ds.contracts import Batch
from hyperpelt_ds.forecast.gathering import Gathering
from hyperpelt_ds.hypernet import HyperNetwork

IN_DECODER = tiny_modules(kinds=("prefix",), prefix_blocks=("decoder_cross",), train_norms=False)
SETTINGS = [
    ("t5", {}),
    ("t5", {"modules": IN_DECODER}),  # without image tokens, nothing before the decoder has a gradient
    ("t5v1.1", {"checkpointing": True}),
    ("marian", {}),
    ("bart", {"dtype": torch.bfloat16}),
    ("llama", {}),
]
INT8 = [("t5v1.1", {"int8": True}), ("qwen2", {"int8": True, "checkpointing": True})]


def build(
    kind: str,
    split: bool,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    checkpointing: bool = False,
    modules: ModulesConfig = MODULES,
) -> Backbone:
    backbone = Backbone(tiny_model(kind).to(dtype), None, modules)
    if checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    if int8:
        backbone.quantize()
    if split:
        backbone.shard()
    return backbone


def own_batch(backbone: Backbone) -> Batch:
    """A text batch on odd ranks, one with images on even ones; no two alike."""
    batch = tiny_batch(backbone.model, seed=dist.rank())
    if dist.rank() % 2 == 0:
        return batch
    return batch._replace(image_rows=torch.full((4,), -1), samples=tuple(s._replace(image=None) for s in batch.samples))


def step(backbone: Backbone, network: HyperNetwork, batch: Batch) -> list[torch.Tensor]:
    """The logits of a batch and the gradients of all trainables, as in training."""
    network.zero_grad()
    backbone.train()
    weights = network(batch)
    if all(sample.image is None for sample in batch.samples):  # as the model leaves out what no sample uses
        weights = weights._replace(branches=tuple(b for b in weights.branches if (b.rows >= 0).all()), tokens=None)
    logits = backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels, batch.targets)
    F.cross_entropy(logits.float(), batch.labels.flatten()[batch.targets]).backward()
    backbone.train(False)
    return [logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def answer(backbone: Backbone, network: HyperNetwork, batch: Batch, length: int, beams: int) -> torch.Tensor:
    with torch.no_grad():
        return backbone.generate(network(batch), batch.input_ids, batch.attention_mask, length, beams)


@contextmanager
def gathered_bytes() -> Iterator[tuple[list[int], list[int]]]:
    """Bytes of all gathered buffers that are alive, autograd's references included, after every gathering, and of each
    buffer alone."""
    real, alive, totals, each = torch_dist.all_gather_into_tensor, [], [], []

    def watched(output: torch.Tensor, shard: torch.Tensor) -> object:
        for _ in range(5000):  # gloo's own thread lets go a moment after the ranks go on
            alive[:] = [(ref, size) for ref, size in alive if not ref.expired()]
            if not alive:
                break
            time.sleep(0.001)
        alive.append((StorageWeakRef(output.untyped_storage()), output.nbytes))
        totals.append(sum(size for _, size in alive))
        each.append(output.nbytes)
        return real(output, shard)

    torch_dist.all_gather_into_tensor = watched
    try:
        yield totals, each
    finally:
        torch_dist.all_gather_into_tensor = real


def check_like_the_whole_one(kind: str, settings: dict) -> None:
    whole, split = build(kind, False, **settings), build(kind, True, **settings)
    noting = build(kind, False, **settings)
    noting.shards = noted = Gathering(noting.groups)
    for image_tokens in (False, True):
        network = tiny_hypernet(whole, image_tokens=image_tokens)
        for _ in range(2):
            batch = own_batch(whole)
            with gathered_bytes() as (totals, each):
                found = step(split, network, batch)
            for one, other in zip(step(whole, network, batch), found, strict=True):
                assert torch.equal(one, other), (kind, settings, image_tokens)
            blocks = len(list(split._family.blocks(split.model)))
            assert len(totals) >= 2 * blocks, "each is gathered in the forward pass, and again in the backward pass"
            check_bytes(whole, split, max(totals))
            noted.sizes.clear()
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, noted.again):
                step(noting, network, batch)
            padding = 64 * dist.world_size()
            assert all(size <= moved < size + padding for size, moved in zip(noted.sizes, each, strict=True))
    assert not any(name for name, p in split.model.named_parameters() if p.grad is not None)


def check_bytes(whole: Backbone, split: Backbone, gathered: int) -> None:
    """At most the W-th part of all, and one block; 64 bytes a share are padding."""
    ranks, groups = dist.world_size(), whole.groups
    total, blocks = sum(group.bytes for group in groups), [group.bytes for group in groups]
    assert split.shards.own_bytes <= total / ranks + 64 * len(groups)
    assert gathered <= max(blocks) + 64 * ranks, (gathered, blocks)
    left = sum(p.untyped_storage().nbytes() for p in split.model.parameters())
    assert left <= 8 * len(list(split.model.parameters())), "what stands for a weight takes one number's room"
    assert split.shards.own_bytes + gathered <= split.sizes.held(1)


def check_answers_at_own_pace(kind: str, settings: dict) -> None:
    """Answers of different lengths, and different numbers of calls: none at all on the last rank."""
    whole, split = build(kind, False, **settings), build(kind, True, **settings)
    network = tiny_hypernet(whole)
    calls = [(length, beams) for length in (3, 9) for beams in (1, 2)][: dist.world_size() - 1 - dist.rank()]
    with gathered_bytes() as (totals, _), split.own_pace():
        for length, beams in calls:
            found = answer(split, network, own_batch(whole), length, beams)
            assert torch.equal(found, answer(whole, network, own_batch(whole), length, beams))
    check_bytes(whole, split, max(totals))
    found = answer(split, network, own_batch(whole), 2 + 3 * dist.rank(), 1)
    assert torch.equal(found, answer(whole, network, own_batch(whole), 2 + 3 * dist.rank(), 1))
    dist.barrier()


def check_fingerprint(kind: str, settings: dict) -> None:
    whole, split = build(kind, False, **settings), build(kind, True, **settings)
    before = whole.fingerprint()
    assert split.fingerprint() == before
    network = tiny_hypernet(whole)
    step(split, network, own_batch(whole))
    assert split.fingerprint() == before
    if dist.rank() == 0:
        split.shards._splits[-1].share[0] ^= 1
    assert split.fingerprint() != before, "one bit on one rank"


def check_loading() -> None:
    turns = []
    dist.one_after_another(lambda: turns.append(dist.rank()))
    assert turns == [dist.rank()]

    def fail() -> None:
        if dist.local_rank() == dist.world_size() - 1:
            raise ValueError("no such model")

    try:
        dist.one_after_another(fail)
    except ValueError as error:
        assert str(error) == "no such model"
    else:
        raise AssertionError("what the last rank cannot load, nobody trains")


if __name__ == "__main__":
    torch_dist.init_process_group("gloo")
    check_loading()
    for kind, settings in [*SETTINGS, *(INT8 if importlib.util.find_spec("torchao") else [])]:
        check_like_the_whole_one(kind, settings)
        check_answers_at_own_pace(kind, settings)
        check_fingerprint(kind, settings)
        gc.collect()
        if dist.rank() == 0:
            print("held", kind, settings, flush=True)
    dist.leave()
