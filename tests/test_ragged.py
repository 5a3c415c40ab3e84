"""Padding that adapters leave out: no real token, loss or gradient changes, and what is left there is finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import KINDS, tiny_batch, tiny_hypernet, tiny_model, tiny_modules
from torch import Tensor

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.backbones.ragged import ends_of

HYPERFORMER = dict(
    kinds=("adapter",),
    adapter_placement="sequential",
    adapter_blocks=("encoder_self", "encoder_ffn", "decoder_self", "decoder_cross", "decoder_ffn"),
)


def run(
    kind: str, skips: bool, checkpointing: bool = False, image_tokens: bool = False, **modules: Any
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Logits of all places (B, T', vocabulary), the gradients of real ones, and every adapted block's output."""
    model = tiny_model(kind).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone = Backbone(model, None, tiny_modules(**modules))
    backbone.skips_padding = skips
    backbone.train(checkpointing)
    outputs: list[Tensor] = []
    for sublayer in backbone._family.sublayers(model):
        if sublayer.site in backbone.geometry.adapter_sites:
            sublayer.last.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    network = tiny_hypernet(backbone, image_tokens=image_tokens).double()
    batch = tiny_batch(model)
    batch = batch._replace(images=batch.images.double())
    weights = network(batch)
    logits = backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)
    made = outputs[:]
    logits.flatten(0, 1)[batch.targets].logsumexp(-1).sum().backward()
    return logits.detach(), {name: p.grad for name, p in network.named_parameters()}, made


def alike(one: tuple[Any, ...], two: tuple[Any, ...], kind: str) -> None:
    """Skipping changes the places of padding and nothing else."""
    targets = tiny_batch(tiny_model(kind)).targets
    assert torch.allclose(one[0].flatten(0, 1)[targets], two[0].flatten(0, 1)[targets], rtol=0, atol=1e-12)
    for name, gradient in one[1].items():
        assert (gradient is None) == (two[1][name] is None), name
        if gradient is not None:
            assert torch.allclose(gradient, two[1][name], rtol=1e-10, atol=1e-10), name
    for plain, skipped in zip(one[2], two[2], strict=True):
        assert skipped.isfinite().all()
        assert not torch.equal(plain, skipped), "every site has padding, which gets nothing now"
    assert two[0].isfinite().all()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_real_tokens_and_every_gradient_stay_and_padding_gets_nothing(kind, checkpointing):
    alike(run(kind, False, checkpointing), run(kind, True, checkpointing), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_are_real_wherever_they_stand(kind):
    alike(run(kind, False, image_tokens=True), run(kind, True, image_tokens=True), kind)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_adapters_after_attention_leave_out_the_same(kind):
    alike(run(kind, False, **HYPERFORMER), run(kind, True, **HYPERFORMER), kind)


def test_generation_leaves_nothing_out():
    answers = []
    for skips in (False, True):
        backbone = Backbone(tiny_model("t5"), None, tiny_modules())
        backbone.skips_padding = skips
        weights, batch = tiny_hypernet(backbone)(tiny_batch(backbone.model)), tiny_batch(backbone.model)
        backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)
        answers.append(backbone.generate(weights, batch.input_ids, batch.attention_mask, 6, num_beams=2))
        assert backbone.slot.ends is None
    assert torch.equal(*answers)


def test_a_sample_ends_behind_its_last_real_token_wherever_its_padding_is():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    labels = torch.tensor([[5, -100], [5, 6], [-100, -100]])
    ends = ends_of({"attention_mask": mask}, labels, one_sequence=False)
    assert (ends.encoder.tolist(), ends.decoder.tolist()) == ([2, 4, 0], [1, 2, 0])
    assert ends_of({"attention_mask": mask}, labels, one_sequence=True).decoder.tolist() == [2, 4, 0]
    assert ends.encoder.dtype == ends.decoder.dtype == torch.int32
