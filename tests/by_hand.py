"""The reference for what modules do: a plain transformers model into which one sample's weights are put by formula.

Each sample runs alone and unpadded. Low-rank deltas are added to the matrices, adapters by hooks on whole blocks, and
attention is written out in float64. Of ours, only `Weights`, the order of sites in a `Geometry` and how a model is told
which attention to call are taken.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from tiny import pick
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hyperpelt_ds.backbones import Backbone
from hyperpelt_ds.backbones.attention import call_by_name
from hyperpelt_ds.config import ModulesConfig
from hyperpelt_ds.contracts import Batch, Block, Site, Weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_new": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@dataclasses.dataclass
class Place:
    """A block of a plain model: where its input enters and its output leaves, its linear maps, its attention."""

    entry: nn.Module
    exit: nn.Module
    linears: dict[str, nn.Linear]
    attention: nn.Module | None = None


def places(model: Any) -> dict[Site, Place]:
    """Where everything is in a plain model, by the names that transformers gives."""
    t5 = hasattr(model.get_encoder(), "block")

    def attention(module: Any) -> Place:
        names = ("q", "k", "v", "o") if t5 else ("q_proj", "k_proj", "v_proj", "out_proj")
        linears = (getattr(module, name) for name in names)
        return Place(module, module, dict(zip(("query", "key", "value", "output"), linears, strict=True)), module)

    def ffn(module: Any) -> Place:
        if not t5:
            return Place(module.fc1, module.fc2, {"up": module.fc1, "down": module.fc2})
        inner = {"up": module.wi} if hasattr(module, "wi") else {"gate": module.wi_0, "up": module.wi_1}
        return Place(module, module, {**inner, "down": module.wo})

    found: dict[Site, Place] = {}
    for n, layer in enumerate(model.get_encoder().block if t5 else model.get_encoder().layers):
        found[Site(Block.ENCODER_SELF, n)] = attention(layer.layer[0].SelfAttention if t5 else layer.self_attn)
        found[Site(Block.ENCODER_FFN, n)] = ffn(layer.layer[1].DenseReluDense if t5 else layer)
    for n, layer in enumerate(model.get_decoder().block if t5 else model.get_decoder().layers):
        found[Site(Block.DECODER_SELF, n)] = attention(layer.layer[0].SelfAttention if t5 else layer.self_attn)
        found[Site(Block.DECODER_CROSS, n)] = attention(layer.layer[1].EncDecAttention if t5 else layer.encoder_attn)
        found[Site(Block.DECODER_FFN, n)] = ffn(layer.layer[2].DenseReluDense if t5 else layer)
    return found


def by_hand(backbone: Backbone, model: nn.Module, weights: Weights, batch: Batch) -> list[Tensor]:
    """The logits (T', vocabulary) of every sample, each from a copy of the plain `model` of its own."""
    rows = range(len(batch.samples))
    return [_alone(backbone, copy.deepcopy(model), weights, pick(batch, row), row) for row in rows]


@torch.no_grad()
def _alone(backbone: Backbone, plain: Any, weights: Weights, sample: Batch, row: int) -> Tensor:
    geometry, modules = backbone.geometry, backbone.modules
    branches = [(branch, int(branch.rows[row])) for branch in weights.branches if branch.rows[row] >= 0]
    found = places(plain)
    for site, place in found.items():
        if site in geometry.adapter_sites:
            s = geometry.adapter_sites.index(site)
            parts = [{n: t[s] if n == "scale" else t[s, c] for n, t in b.adapter._asdict().items() if t is not None}
                     for b, c in branches]  # fmt: skip
            _add_adapters(place, parts, modules)
    for p, target in enumerate(geometry.projections):
        for s, site in enumerate(target.sites):
            for branch, c in branches:
                delta = branch.lora[p].down[s, c] @ branch.lora[p].up[s, c]
                found[site].linears[target.name].weight += delta.T
    cells = 0
    inputs: dict[str, Any] = dict(input_ids=sample.input_ids)
    if weights.tokens is not None and weights.tokens.rows[row] >= 0:
        tokens = weights.tokens.values[weights.tokens.rows[row]].unsqueeze(0)
        cells, encoder = tokens.shape[1], plain.get_encoder()
        words = encoder.embed_tokens(sample.input_ids) * (
            encoder.embed_scale if plain.config.model_type == "marian" else 1
        )
        inputs = dict(inputs_embeds=torch.cat([words, tokens], 1))
        if not hasattr(encoder, "block"):  # image tokens get no position

            def without_images(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                flat = output.view(-1, output.shape[-1])  # (1, T, D) in BART, (T, D) in Marian
                return torch.cat([flat[:-cells], 0 * flat[-cells:]]).view_as(output)

            encoder.embed_positions.register_forward_hook(without_images)
    prefixes = {
        id(found[site].attention): [(b.prefix.keys[s, c], b.prefix.values[s, c], _factor(b.prefix, s, modules))
                                    for b, c in branches]
        for s, site in enumerate(geometry.prefix_sites)
    }  # fmt: skip
    with_images = {id(p.attention) for s, p in found.items() if s.block == Block.ENCODER_SELF}
    AttentionInterface.register("by_hand", _attention(prefixes, with_images, cells))
    AttentionMaskInterface.register("by_hand", eager_mask)
    call_by_name(plain, "by_hand")
    if weights.norms is not None:
        named = ((m, n) for m in plain.modules() if "Norm" in type(m).__name__ for n in ("weight", "bias"))
        own = [getattr(m, n) for m, n in named if getattr(m, n, None) is not None]
        for parameter, value in zip(own, weights.norms, strict=True):
            parameter.copy_(value)
    mask = torch.ones(1, sample.input_ids.shape[1] + cells, dtype=torch.long)
    logits: Tensor = plain(**inputs, attention_mask=mask, labels=sample.labels).logits[0]
    return logits


def _factor(prefix: Any, site: int, modules: ModulesConfig) -> Tensor | float:
    """By how much the share of a prefix column is multiplied."""
    return 1.0 if modules.prefix_weighting == "none" else prefix.offset[site].exp()


def _attention(prefixes: dict[int, list[Any]], with_images: set[int], cells: int) -> Any:
    """sum_j share_j v_j / sum_j share_j over prefix rows and tokens, share_j = exp(score_j), in float64."""

    def attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
        heads, size = query.shape[1], query.shape[3]
        scale = size**-0.5 if scaling is None else scaling
        q, k, v = (tensor[0].double() for tensor in (query, key, value))
        scores = q @ k.mT * scale
        if position_bias is not None:
            bias = position_bias[0].double().clone()
            if id(module) in with_images and cells:
                bias[:, -cells:, :] = 0
                bias[:, :, -cells:] = 0
            scores = scores + bias
        if attention_mask is not None:
            scores = scores + attention_mask[0].double()
        all_scores, values, factors = [scores], [v], [torch.ones(v.shape[1])]
        for keys, rows, factor in prefixes.get(id(module), []):
            keys, rows = (t.double().view(-1, heads, size).transpose(0, 1) for t in (keys, rows))
            all_scores.append(q @ keys.mT * scale)
            values.append(rows)
            factors.append(factor * torch.ones(rows.shape[1]))
        score = torch.cat(all_scores, -1)
        share = torch.cat(factors) * (score - score.amax(-1, keepdim=True)).exp()  # exp alone would overflow
        mixed = share @ torch.cat(values, 1) / share.sum(-1, keepdim=True)
        return mixed.transpose(0, 1).unsqueeze(0).to(query.dtype), None

    return attention


def _add_adapters(place: Place, parts: list[dict[str, Tensor]], modules: ModulesConfig) -> None:
    seen: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        result = output[0] if isinstance(output, tuple) else output
        x, added = seen[0] if modules.adapter_placement == "parallel" else result, 0
        for part in parts:
            hidden = ACTIVATIONS[modules.adapter_activation](x @ part["down"] + part["down_bias"])
            y = hidden @ part["up"] + part["up_bias"]
            if modules.adapter_norm:
                y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
                y = y * part["gain"] + part["shift"]
            added = added + part["scale"] * y
        return (result + added, *output[1:]) if isinstance(output, tuple) else result + added

    place.entry.register_forward_pre_hook(before, with_kwargs=True)
    place.exit.register_forward_hook(after)
