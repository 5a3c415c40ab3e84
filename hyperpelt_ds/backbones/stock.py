"""Generated weights as a stock model of transformers could hold them: each tensor named by the module it belongs to.

The counterpart of `static.py`, which puts such tensors into a model. It knows no files, and no run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hyperpelt_ds.backbones.base import Backbone
from hyperpelt_ds.backbones.families import family_of
from hyperpelt_ds.backbones.family import Family
from hyperpelt_ds.contracts import Adapter, Batch, LowRank, Prefix, Weights


def static_tensors(backbone: Backbone, weights: Weights, row: int) -> dict[str, Tensor]:
    """What `weights` give sample number `row`, its branches merged, by module and field (the fields of static.py).

    Prefixes are joined along P, deltas along their rank and adapters along their bottleneck, with scales within `up`.
    Adapters with a norm stay apart, with scales within gain and shift.
    """
    model, geometry = backbone.model, backbone.geometry
    family, names = _family(model), {module: name for name, module in model.named_modules()}
    sublayers = {sublayer.site: sublayer for sublayer in family.sublayers(model)}
    found: dict[str, Tensor] = {}

    def put(modules: Sequence[nn.Module | None], fields: Mapping[str, Tensor]) -> None:
        for field, values in fields.items():
            for module, value in zip(modules, values.unbind(), strict=True):
                assert module is not None
                found[f"{names[module]}.{field}"] = value.detach().float().cpu().contiguous()

    branches = [branch for branch in weights.branches if branch.rows[row] >= 0]
    prefixes = [_of(b.prefix, b.rows[row]) for b in branches if b.prefix is not None]
    adapters = [_of(b.adapter, b.rows[row]) for b in branches if b.adapter is not None]
    if prefixes:
        put([sublayers[site].attention for site in geometry.prefix_sites], _joined_prefixes(prefixes))
    if adapters:
        put([sublayers[site].last for site in geometry.adapter_sites], _joined_adapters(adapters))
    for number, target in enumerate(geometry.projections):
        deltas = [_of(branch.lora[number], branch.rows[row]) for branch in branches if branch.lora]
        if deltas:
            put([sublayers[site].linears[target.name] for site in target.sites], _joined_deltas(deltas))
    if weights.norms is not None:
        norms = ((m, n) for m in family.norms(model) for n in ("weight", "bias") if getattr(m, n, None) is not None)
        for (module, field), value in zip(norms, weights.norms.unbind(), strict=True):
            put([module], {field: value.unsqueeze(0)})
    if weights.tokens is not None and weights.tokens.rows[row] >= 0:
        put([model.get_encoder()], {"image_tokens": weights.tokens.values[weights.tokens.rows[row]].unsqueeze(0)})
    return found


def places(backbone: Backbone) -> tuple[dict[str, str], dict[str, str | None]]:
    """Site -> module that stands for it; and, for adapters, the module whose output each is added to -> the module
    whose input it reads, or None where it reads that output."""
    model, geometry = backbone.model, backbone.geometry
    names = {module: name for name, module in model.named_modules()}
    sublayers = {sublayer.site: sublayer for sublayer in _family(model).sublayers(model)}
    parallel = backbone.modules.adapter_placement == "parallel"
    adapted = [sublayers[site] for site in geometry.adapter_sites]
    sites = {site: names[sublayers[site].attention or sublayers[site].last] for site in geometry.sites}
    return (
        {f"{site.block.name.lower()}.{site.layer}": name for site, name in sites.items()},
        {names[sublayer.last]: names[sublayer.first] if parallel else None for sublayer in adapted},
    )


@torch.no_grad()
def stock_logits(model: Any, batch: Batch) -> Tensor:
    """The logits (N, vocabulary) of the batch's real target tokens, from a model that knows nothing of this package."""
    family = _family(model)
    words = family.embed(model, batch.input_ids)
    inputs, order = family.layout.with_labels(model, words, batch.attention_mask, batch.labels)
    chosen = batch.targets if order is None else order.flatten()[batch.targets]
    return cast(Tensor, model(**inputs, use_cache=False).logits.flatten(0, 1)[chosen])


def _family(model: Any) -> Family:
    return family_of(model.config.model_type, str(model.config.name_or_path))


def _of(kind: Any, condition: Tensor) -> Any:
    """The weights (S, ...) of one condition, from those of all (S, C, ...). Scales and offsets (S,) have none."""
    return type(kind)(*(part if part is None or part.ndim == 1 else part[:, condition] for part in kind))


def _joined_prefixes(prefixes: Sequence[Prefix]) -> dict[str, Tensor]:
    joined = {
        "prefix_keys": torch.cat([prefix.keys for prefix in prefixes], 1),
        "prefix_values": torch.cat([prefix.values for prefix in prefixes], 1),
    }
    if prefixes[0].offset is not None:
        columns = [cast(Tensor, p.offset).unsqueeze(1).expand(-1, p.keys.shape[1]) for p in prefixes]
        joined["prefix_offset"] = torch.cat(columns, 1)
    return joined


def _joined_adapters(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    if adapters[0].gain is None:
        scales = [adapter.scale.unsqueeze(1) for adapter in adapters]
        parts = [
            {
                "down": torch.cat([adapter.down for adapter in adapters], 2),
                "down_bias": torch.cat([adapter.down_bias for adapter in adapters], 1),
                "up": torch.cat([s.unsqueeze(2) * a.up for s, a in zip(scales, adapters, strict=True)], 1),
                "up_bias": torch.stack([s * a.up_bias for s, a in zip(scales, adapters, strict=True)]).sum(0),
            }
        ]
    else:
        parts = [
            {
                **{field: getattr(adapter, field) for field in ("down", "down_bias", "up", "up_bias")},
                "gain": adapter.scale.unsqueeze(1) * cast(Tensor, adapter.gain),
                "shift": adapter.scale.unsqueeze(1) * cast(Tensor, adapter.shift),
            }
            for adapter in adapters
        ]
    return {f"adapter_{n}_{field}": value for n, part in enumerate(parts) for field, value in part.items()}


def _joined_deltas(deltas: Sequence[LowRank]) -> dict[str, Tensor]:
    return {"lora_down": torch.cat([d.down for d in deltas], 2), "lora_up": torch.cat([d.up for d in deltas], 1)}
