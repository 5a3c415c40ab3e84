"""The one piece of mutable state: the weights that the frozen model's hooks read.

They are set by a forward pass and stay until the next one, because activation checkpointing runs blocks again in the
backward pass. (Clearing them after the forward pass costs the gradient, and with reentrant checkpointing without any
error.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperpelt_ds.backbones.prefix_form import Form, by_site
from hyperpelt_ds.backbones.ragged import Ends
from hyperpelt_ds.contracts import Branch, Tokens, Unmade
from hyperpelt_ds.kernels.adapter import SiteAdapter
from hyperpelt_ds.kernels.adapter import bind as bind_adapter
from hyperpelt_ds.kernels.index import BatchIndex, index_batch, index_on_device
from hyperpelt_ds.kernels.low_rank import SiteLowRank
from hyperpelt_ds.kernels.low_rank import bind as bind_low_rank
from hyperpelt_ds.kernels.prefix_attention import AnyPrefix, SitePrefix, Spread, join, spread, spread_of
from hyperpelt_ds.kernels.regenerate import Later, later

REMEMBERED = 4
"""Results that `once` keeps: a decoder's layers take turns between two masks."""

Apply = Callable[[Tensor, Tensor], Tensor]
"""From a block's input and output to its output with what is added."""


class Slot:
    """The branches of the current forward pass, site by site, and its images' tokens."""

    def __init__(self) -> None:
        self.shares: dict[int, Tensor] | None = None
        """By prefix site, what part of attention its prefixes got (B, T), if someone wants to know."""
        self.set((), None)

    def set(
        self, branches: tuple[Branch, ...], tokens: Tokens | None, lengths: Sequence[int] = (), form: Form = "auto"
    ) -> None:
        """`lengths` are the queries that a sample has at each prefix site at a time, `form` how prefixes are used."""
        self.tokens = tokens
        self.ends: Ends | None = None
        """Where adapters stop, if they are to leave out padding; set after the weights and before the model runs."""
        self._samples = [branch.rows for branch in branches]
        self._prefixes = [by_site(branch.prefix, branch.rows, lengths, form) for branch in branches]
        self._adapters = [_by_site(branch.adapter, SiteAdapter) for branch in branches]
        self._deltas = [[_by_site(kind, SiteLowRank) for kind in branch.lora or ()] for branch in branches]
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._indices: dict[tuple[int, int], BatchIndex] = {}
        self._site_adapters: dict[tuple[int, int], Apply | None] = {}
        self._site_deltas: dict[tuple[int, int, int], Apply | None] = {}
        self._spreads: dict[tuple[int, int], Spread] = {}
        self.forget()

    def prefixes(self, site: int, batch: int, length: int) -> list[AnyPrefix]:
        """The prefixes of prefix site `site` for `batch` rows of `length` queries.

        One query a row is a token of many that are generated one after the other: what its prefixes are copied for is
        then done at the first.
        """
        decoding = length == 1 and not torch.is_grad_enabled()
        if decoding and (site, batch) in self._decoding:
            return self._decoding[site, batch]
        found: list[AnyPrefix] = [
            sites[site]._replace(rows=self._rows_for(number, batch), spread=self._spread_for(number, batch, sites))
            for number, sites in enumerate(self._prefixes)
            if sites
        ]
        if decoding:
            found = self._decoding[site, batch] = [spread(_looked_at(prefix)) for prefix in found]
        return found

    def joined(
        self, site: int, key: Tensor, value: Tensor, prefixes: list[AnyPrefix]
    ) -> tuple[Tensor, Tensor, int, list[AnyPrefix]]:
        """key and value (B, H, T', d) at a token of many, with those prefixes in front that can be; how many rows these
        have; and the other prefixes.

        Where a call brings the very tensors of the one before, as attention to an encoder does, the copy is made once.
        """
        known, made = self._joined.get(site, (None, None))
        if known is not key:
            self._joined[site] = (key, None)
            return key, value, 0, prefixes
        if made is None:
            plain = [p for p in prefixes if isinstance(p, SitePrefix) and p.offset is None and _serves_all(p)]
            rest = [prefix for prefix in prefixes if not any(prefix is other for other in plain)]
            longer = join(key, value, plain) if plain else (key, value)
            made = (*longer, sum(prefix.keys.shape[1] for prefix in plain), rest)
            self._joined[site] = (key, made)
        return made

    def forget(self) -> None:
        """Lets go of what was kept for one generation."""
        self._decoding: dict[tuple[int, int], list[AnyPrefix]] = {}
        self._joined: dict[int, tuple[Any, Any]] = {}
        self._remembered: list[tuple[Any, tuple[Any, ...], Any]] = []

    def once(self, make: Callable[..., Any], *given: Any) -> Any:
        """make(*given), not made anew for the same objects until the next forward pass: a stack's layers share them."""
        for made_by, made_from, result in self._remembered:
            if made_by is make and all(one is two for one, two in zip(made_from, given, strict=True)):
                return result
        result = make(*given)
        self._remembered = [*self._remembered[1 - REMEMBERED :], (make, given, result)]
        return result

    def adapter(self, site: int, batch: int, activation: str, in_encoder: bool) -> Apply | None:
        """What adds the adapters of adapter site `site` to `batch` rows, or None; made once for these weights."""
        key = (site, batch)
        if key not in self._site_adapters:
            # the same tensor for every branch: those that share their lengths share a launch
            lengths = None if self.ends is None else self.ends.encoder if in_encoder else self.ends.decoder
            found = [(number, sites[site]) for number, sites in enumerate(self._adapters) if sites]
            parts = [self._used(own, number, batch, lengths) for number, own in found]
            self._site_adapters[key] = bind_adapter(parts, activation) if parts else None
        return self._site_adapters[key]

    def low_rank(self, projection: int, site: int, batch: int) -> Apply | None:
        """What adds the low-rank deltas of site `site` of projection `projection` to `batch` rows, likewise."""
        key = (projection, site, batch)
        if key not in self._site_deltas:
            found = [(number, kinds[projection][site]) for number, kinds in enumerate(self._deltas) if kinds]
            parts = [self._used(own, number, batch) for number, own in found]
            self._site_deltas[key] = bind_low_rank(parts) if parts else None
        return self._site_deltas[key]

    def _used(self, part: Any, number: int, batch: int, lengths: Tensor | None = None) -> Any:
        """The part of branch `number` at a site, with which rows use which condition, and how many tokens of them."""
        conditions = part.store.conditions if isinstance(part, Later) else len(part.down)
        return part._replace(users=self._index_for(number, batch, conditions)._replace(lengths=lengths))

    def _index_for(self, number: int, batch: int, groups: int) -> BatchIndex:
        """Which rows use which condition of branch `number`: once a batch, for all its sites."""
        if (number, batch) not in self._indices:
            rows = self._rows_for(number, batch)
            make = index_batch if rows.device.type == "cpu" else index_on_device
            self._indices[number, batch] = make(rows, groups=groups)
        return self._indices[number, batch]

    def _rows_for(self, number: int, batch: int) -> Tensor:
        """Beam search calls with samples x beams rows, beams of a sample side by side: rows repeat, weights do not."""
        if (number, batch) not in self._rows:
            rows = self._samples[number]
            beams, rest = divmod(batch, len(rows))
            assert rest == 0, f"{batch} rows do not divide into {len(rows)} samples"
            self._rows[number, batch] = rows if beams == 1 else rows.repeat_interleave(beams)
        return self._rows[number, batch]

    def _spread_for(self, number: int, batch: int, sites: list[AnyPrefix]) -> Spread:
        """How a branch's conditions come to samples; a sample's beams share what is copied for it."""
        if (number, batch) not in self._spreads:
            rows = self._samples[number]
            condition, missing = spread_of(rows, len(sites[0][0]))
            if missing is not None:
                missing = missing.repeat_interleave(batch // len(rows))
            self._spreads[number, batch] = Spread(condition, missing)
        return self._spreads[number, batch]


def _looked_at(prefix: AnyPrefix) -> AnyPrefix:
    """The prefix without a tensor of the samples that lack it, if none does: to look waits for the device, which at a
    generation's first token is little beside what every later one is spared."""
    known = prefix.spread
    if known is None or known.missing is None or known.missing.any():
        return prefix
    return prefix._replace(spread=known._replace(missing=None))


def _serves_all(prefix: AnyPrefix) -> bool:
    return prefix.spread is not None and prefix.spread.missing is None


def _by_site(module: Any, kind: type[SiteAdapter] | type[SiteLowRank]) -> list[Any]:
    """What each site has of a module kind (both stacks' in a tuple), but for its users; [] without such a module.

    Unbound once for all sites: taking `tensor[site]` at every site would fill and add a whole (S, ...) gradient for
    each of them (7 % of a training step on a CPU, measured on the demo's shapes).
    """
    if module is None:
        return []
    if isinstance(module, Unmade):
        return later(*module)
    if not hasattr(module, "_fields"):
        return [part for stack in module for part in _by_site(stack, kind)]
    fields = {name: tensor.unbind() for name, tensor in module._asdict().items() if tensor is not None}
    values = zip(*fields.values(), strict=True)
    return [kind(users=None, **dict(zip(fields, of_site, strict=True))) for of_site in values]  # type: ignore[arg-type]
