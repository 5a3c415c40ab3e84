"""Where generated prefixes, adapters and low-rank deltas enter a frozen model: hooks that read the slot.

It knows a model by its family's record alone, and must not know where weights come from or what becomes of the output.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hyperpelt_ds.backbones import attention
from hyperpelt_ds.backbones.family import Family, Sublayer
from hyperpelt_ds.backbones.slot import Slot
from hyperpelt_ds.config import ModulesConfig
from hyperpelt_ds.contracts import Block, Geometry, Projection, Site


def attach(model: Any, family: Family, wanted: ModulesConfig, slot: Slot) -> Geometry:
    """Puts the hooks of every kind of module in its places in `model`; where these are (norms are not counted).

    Raises ValueError for a kind of module that has no place in the model, and for linear maps that differ in size.
    """
    kinds = wanted.kinds
    prefix_sites: list[Site] = []
    adapter_sites: list[Site] = []
    linears: dict[str, list[tuple[Site, nn.Linear]]] = {}
    for sublayer in family.sublayers(model):
        name = sublayer.site.block.name.lower()
        if sublayer.attention is not None:
            has_prefix = "prefix" in kinds and name in wanted.prefix_blocks
            place = len(prefix_sites) if has_prefix else None
            attention.attach(sublayer.attention, slot, place, sublayer.site.block == Block.ENCODER_SELF)
            prefix_sites += [sublayer.site] if has_prefix else []
        for target in wanted.lora_targets if "lora" in kinds else ():
            if target in sublayer.linears:
                own = linears.setdefault(target, [])
                number = wanted.lora_targets.index(target)
                _attach_low_rank(sublayer.linears[target], slot, number, len(own))
                own.append((sublayer.site, sublayer.linears[target]))
        if "adapter" in kinds and name in wanted.adapter_blocks:  # after the deltas: it reads what they changed
            _attach_adapter(sublayer, slot, len(adapter_sites), wanted)
            adapter_sites.append(sublayer.site)
    model_type = model.config.model_type
    for kind, name, found in (
        ("prefix", "prefix_blocks", prefix_sites),
        ("adapter", "adapter_blocks", adapter_sites),
    ):
        if kind in kinds and not found:
            raise ValueError(
                f"modules.{name}: a {model_type} model has none of {', '.join(getattr(wanted, name))}; name others"
            )
    for target in wanted.lora_targets if "lora" in kinds else ():
        if target not in linears:
            raise ValueError(
                f"modules.lora_targets: a {model_type} model has no {target!r} here; it has {', '.join(linears)}"
            )
        if len({(linear.in_features, linear.out_features) for _, linear in linears[target]}) > 1:
            raise ValueError(
                f"modules.lora_targets: {target!r} maps of this model differ in size between blocks; leave it out"
            )
    return Geometry(
        prefix_sites=tuple(prefix_sites),
        adapter_sites=tuple(adapter_sites),
        projections=tuple(
            Projection(target, tuple(site for site, _ in own), own[0][1].in_features, own[0][1].out_features)
            for target, own in ((target, linears[target]) for target in wanted.lora_targets if target in linears)
        ),
        prefix_size=family.prefix_size(model),
        model_size=model.config.hidden_size,
        norms=0,
    )


def _attach_adapter(sublayer: Sublayer, slot: Slot, place: int, modules: ModulesConfig) -> None:
    """Adds the adapters of adapter site number `place` beside the block (parallel), or after it (sequential)."""
    inputs: list[Tensor] = []
    parallel = modules.adapter_placement == "parallel"

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs.pop() if parallel else output
        apply = slot.adapter(place, x.shape[0], modules.adapter_activation, sublayer.site.block.in_encoder)
        return apply(x, output) if apply is not None else output

    if parallel:
        sublayer.first.register_forward_pre_hook(before)
    sublayer.last.register_forward_hook(after)


def _attach_low_rank(linear: nn.Linear, slot: Slot, projection: int, place: int) -> None:
    """Adds the low-rank deltas of site number `place` of a projection to a linear map."""

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        apply = slot.low_rank(projection, place, output.shape[0])
        return apply(args[0], output) if apply is not None else output

    linear.register_forward_hook(after)
