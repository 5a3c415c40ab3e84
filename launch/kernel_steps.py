"""Train steps of whole models for bench_kernels.py: HyperPELT on a T5, eight tasks in the batch, in bf16 on a GPU.

ours    with the op as models get it
gather  with weights copied for every sample
merged  with prefixes merged
floor   the frozen model alone: its own forward and its backward to the inputs, no weight gradients
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

_T5_BASE: dict[str, Any] = dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
_TINY: dict[str, Any] = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
VISION = ("vision.encoder=resnet18", "vision.cells=49", "vision.channels=512")


class Step(NamedTuple):
    """Samples, source and target tokens, the model's shape, whether every sample has an image, E."""

    samples: int
    source: int
    target: int
    shape: dict[str, Any]
    images: bool = False
    hyper: int = 64


STEPS = {
    "t5_base": Step(64, 64, 8, _T5_BASE),
    "t5_base_long": Step(64, 512, 64, _T5_BASE),
    "t5_base_images": Step(64, 64, 8, _T5_BASE, images=True),
    "t5_xxl_6x6_layers": Step(
        64,
        64,
        8,
        dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=6, num_heads=64, feed_forward_proj="gated-gelu"),
        hyper=128,
    ),
    "tiny": Step(4, 8, 4, _TINY),
    "tiny_images": Step(4, 8, 4, _TINY, images=True),
}
"""T5-XXL's layers, six of its 24 in each stack: what they cost is the same in each."""


def actions(step: Step, device: str, dtype: Any) -> tuple[dict[str, Callable[[], None]], int]:
    """The systems, and the FLOPs of `floor`: useful ones, by which any of them is measured."""
    from unittest.mock import patch

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from hyperpelt_ds.backbones import Backbone, random_model
    from hyperpelt_ds.config import Config
    from hyperpelt_ds.kernels import dispatch
    from hyperpelt_ds.kernels.prefix_attention import CPU, CUDA, MERGED
    from hyperpelt_ds.model import HyperPELT

    torch.manual_seed(0)
    plain = random_model("t5", vocab_size=32128, dropout_rate=0.0, decoder_start_token_id=0, **step.shape).to(dtype)
    sizes = ["modules.prefix_length=16", "modules.bottleneck=64", f"hypernet.hyper_size={step.hyper}"]
    config = Config().override([*sizes, *(VISION if step.images else ())])
    backbone = Backbone(copy.deepcopy(plain), None, config.modules)
    model = HyperPELT(config, backbone, [f"task{n}" for n in range(8)])
    model.to_device(torch.device(device)).to(dtype).train()  # as DeepSpeed's bf16 has it
    batch = _batch(step).to(torch.device(device))
    frozen = plain.to(device).requires_grad_(False).train()

    def ours() -> None:
        model(batch).loss.backward()
        model.zero_grad()

    def gather() -> None:
        with patch.object(dispatch, "choose", lambda *_: "reference"):
            ours()

    def merged() -> None:
        with patch.dict(MERGED, {device: CUDA if device == "cuda" else CPU}):
            ours()

    def floor() -> None:
        embedded = frozen.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        frozen(inputs_embeds=embedded, labels=batch.labels, use_cache=False).loss.backward()

    with FlopCounterMode(display=False) as counter:
        floor()
    return {"ours": ours, "gather": gather, "merged": merged, "floor": floor}, counter.get_total_flops()


def _batch(step: Step) -> Any:
    import torch

    from hyperpelt_ds.contracts import Batch, Sample

    samples = step.samples
    return Batch(
        input_ids=torch.randint(3, 32128, (samples, step.source)),
        attention_mask=torch.ones((samples, step.source), dtype=torch.long),
        labels=torch.randint(3, 32128, (samples, step.target)),
        targets=torch.arange(samples * step.target),
        tasks=torch.arange(8),
        task_rows=torch.arange(samples) * 8 // samples,
        images=torch.randn(samples, 49, 512) if step.images else None,
        image_rows=torch.arange(samples) if step.images else None,
        loss_weights=torch.full((samples,), 1 / samples),
        samples=tuple(Sample(str(n), "task0", "", "", image=str(n) if step.images else None) for n in range(samples)),
    )
