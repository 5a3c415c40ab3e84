"""All that is trained beside the frozen model: every weight of every site from the conditions of a batch, in one pass.

It knows a Geometry and nothing else of any backbone, and it is all that the training engine ever sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperpelt_ds.config import HypernetConfig, ModulesConfig
from hyperpelt_ds.contracts import (
    Batch,
    Branch,
    Conditions,
    Geometry,
    PrefixRows,
    Site,
    Tokens,
    Unmade,
    Weights,
)
from hyperpelt_ds.hypernet.conditions import SOURCES
from hyperpelt_ds.hypernet.embeddings import SiteEmbedding
from hyperpelt_ds.hypernet.free import FreeBranch
from hyperpelt_ds.hypernet.heads import AdapterHead, LowRankHead, PrefixHead


class Projector(nn.Module):
    """h_I: I = norm(W2 relu(W1 [z; l; b])), the hyper-embedding of a condition at a site (paper section 4).

    W1 is held as its three column blocks, so that the product is made once per condition and once per site and only
    the sum is made for every pair.
    """

    def __init__(self, config: HypernetConfig):
        super().__init__()
        size, depth = config.embedding_size, config.projector_depth
        widths = [config.hidden_size] * (depth - 1) + [config.hyper_size]
        joint = nn.Linear(3 * size, widths[0])  # initialised whole, so that the split changes no statistics
        self.condition = nn.Linear(size, widths[0])
        self.layer = nn.Linear(size, widths[0], bias=False)
        self.block = nn.Linear(size, widths[0], bias=False)
        with torch.no_grad():
            parts = joint.weight.split(size, dim=1)
            for part, module in zip(parts, (self.condition, self.layer, self.block), strict=True):
                module.weight.copy_(part)
            self.condition.bias.copy_(joint.bias)
        self.rest = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.norm = nn.LayerNorm(config.hyper_size, eps=1e-6) if config.projector_norm else nn.Identity()
        self.scale = config.hyper_scale

    def forward(self, conditions: Tensor, layers: Tensor, blocks: Tensor) -> Tensor:
        """conditions (C, P, d), layers and blocks (S, P or 1, d) -> (S, C, P, E)."""
        sites = self.layer(layers) + self.block(blocks)
        hidden = self.condition(conditions).unsqueeze(0) + sites.unsqueeze(1)
        for linear in self.rest:
            hidden = linear(F.relu(hidden))
        projected: Tensor = self.norm(hidden)
        return projected if self.scale == 1 else projected * self.scale


class Controller(nn.Module):
    """From condition rows to the weights of all sites of `geometry`: a projector, and a head for each kind."""

    def __init__(self, config: HypernetConfig, modules: ModulesConfig, geometry: Geometry):
        super().__init__()
        size, std = config.hyper_size, config.head_std / config.hyper_scale
        self.projector = Projector(config)
        self.heads = nn.ModuleDict()
        places: dict[str, tuple[Site, ...]] = {}
        if geometry.prefix_sites:
            places["prefix"] = geometry.prefix_sites
            self.heads["prefix"] = PrefixHead(size, geometry.prefix_size, len(geometry.prefix_sites), modules, std)
        if geometry.adapter_sites:
            places["adapter"] = geometry.adapter_sites
            self.heads["adapter"] = AdapterHead(size, geometry.model_size, len(geometry.adapter_sites), modules, std)
        for target in geometry.projections:
            if target.sites:
                places[target.name] = target.sites
                self.heads[target.name] = LowRankHead(size, target, modules, std)
        for name, sites in places.items():
            index = torch.tensor([geometry.sites.index(site) for site in sites])
            self.register_buffer(f"{name}_places", index, persistent=False)

    @property
    def numbers(self) -> int:
        """How many are generated for one condition's adapters and deltas at all sites."""
        total = 0
        for name, head in self.heads.items():
            linear: Any = head.get_submodule("linear")
            total += 0 if name == "prefix" else len(self.get_buffer(f"{name}_places")) * linear.out_features
        return total

    def forward(
        self, conditions: Tensor, layers: Tensor, blocks: Tensor, prefix_rows: bool, share: float | None
    ) -> dict[str, Any]:
        """conditions (C, P, d), layers and blocks (S, P or 1, d) -> the weights by kind, deltas by projection name."""
        hyper = self.projector(conditions, layers, blocks)
        made = {}
        for name, head in self.heads.items():
            own = hyper.index_select(0, self.get_buffer(f"{name}_places"))
            made[name] = head(own, prefix_rows if name == "prefix" else share)
        return made


class NormBank(nn.Module):
    """The backbone's trained layer-norm vectors, held here so that the engine sees them: (norms, D)."""

    def __init__(self, initial: Tensor):
        super().__init__()
        self.values = nn.Parameter(initial.detach().float().clone())

    def forward(self) -> Tensor:
        return self.values.clone()  # ZeRO-3 takes the parameter itself away when this forward ends


class VisualTokens(nn.Module):
    """An image's cells as tokens of the encoder: a linear map to the model's size, then a layer norm (VL-Adapter)."""

    def __init__(self, channels: int, model_size: int):
        super().__init__()
        self.project = nn.Linear(channels, model_size)
        self.norm = nn.LayerNorm(model_size)

    def forward(self, batch: Batch) -> Tokens:
        """Tokens (C, V, D) of the batch's distinct images, and each sample's place among them (B,), or -1."""
        assert batch.images is not None and batch.image_rows is not None
        return Tokens(self.norm(self.project(batch.images.to(self.project.weight.dtype))), batch.image_rows)


class HyperNetwork(nn.Module):
    """All trainables of a run: a branch of weights for each condition, plain parameters, image tokens, norms.

    `initial_norms` (norms, D) are the backbone's own layer-norm vectors, from which training starts. Conditions that
    the run does not have (images in a run with text only) make no branch.
    """

    def __init__(
        self,
        config: HypernetConfig,
        modules: ModulesConfig,
        geometry: Geometry,
        available: Conditions,
        initial_norms: Tensor,
        image_tokens: bool = False,
    ):
        super().__init__()
        has_images = available.cells is not None
        names = [name for name in config.conditions if name != "image" or has_images] if modules.kinds else []
        stacks = [geometry] if config.copies == 1 else [geometry.stack(encoder=True), geometry.stack(encoder=False)]
        stacks = [stack for stack in stacks if stack.sites]
        self.projections = geometry.projections
        self.conditions, self.sites, self.controllers = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self._sites_of: dict[str, str] = {}
        for name in names:
            source: Any = SOURCES[name](config, modules.prefix_length, available)
            where = "image" if name == "image" and config.visual_embeddings == "own" else "task"
            if where not in self.sites:
                self.sites[where] = nn.ModuleList(
                    SiteEmbedding(stack.sites, source.rows, config.embedding_size, config.rows == "expanded")
                    for stack in stacks
                )
            self.conditions[name], self._sites_of[name] = source, where
            self.controllers[name] = nn.ModuleList(Controller(config, modules, stack) for stack in stacks)
        self.free = None
        if modules.kinds and config.parameters != "none":
            self.free = FreeBranch(config, modules, geometry, available.tasks)
        self.image_tokens = None
        if image_tokens:
            assert available.channels is not None
            self.image_tokens = VisualTokens(available.channels, geometry.model_size)
        self.norms = NormBank(initial_norms) if modules.train_norms and geometry.norms else None
        self.per_task: dict[str, int] = {}
        """The parameters that have an entry for each task, by name, and along which dimension."""
        if "task" in self.conditions:
            self.per_task["conditions.task.embedding.table.weight"] = 0
        if self.free is not None and not self.free.shared:
            several = (name for name, parameter in self.free.named_parameters() if parameter.ndim > 1)
            self.per_task.update({f"free.{name}": 1 for name in several})

    @property
    def branch_names(self) -> tuple[str, ...]:
        """What each of the branches that `forward` gives is made from, in their order."""
        return (*self.conditions, *(["free"] if self.free is not None else []))

    def forward(self, batch: Batch, prefix_rows: bool = False, most: int | None = None) -> Weights:
        """The weights of every site for the conditions of `batch`; samples refer to them by `Branch.rows`.

        With `prefix_rows`, generated prefixes are left as the rows and the map that they would be made from, for who
        knows how often they are looked at to decide. Where adapters and deltas for the batch are more than `most`
        numbers, they come as Unmade, each kind to be made in that share.
        """
        sites = {name: [embedding() for embedding in _stacks(stacks)] for name, stacks in self.sites.items()}
        branches = []
        found = {name: condition(batch) for name, condition in self.conditions.items()}
        share = None if most is None else most / max(1, self.numbers({n: len(v) for n, (v, _) in found.items()}))
        for name, (vectors, rows) in found.items():
            pairs = zip(_stacks(self.controllers[name]), sites[self._sites_of[name]], strict=True)
            made = _join([controller(vectors, *where, prefix_rows, share) for controller, where in pairs])
            lora = tuple(made[target.name] for target in self.projections)
            branches.append(Branch(rows, made.get("prefix"), made.get("adapter"), lora or None))
        if self.free is not None:
            branches.append(self.free(batch))
        return Weights(
            tuple(branches),
            self.norms() if self.norms is not None else None,
            self.image_tokens(batch) if self.image_tokens is not None else None,
        )

    def numbers(self, conditions: dict[str, int]) -> int:
        """How many are generated for adapters and deltas of so many conditions by name."""
        return sum(
            count * controller.numbers
            for name, count in conditions.items()
            for controller in _stacks(self.controllers[name])
        )

    @contextmanager
    def shifted_layers(self, by: int = 1) -> Iterator[None]:
        """Within, what is generated for a layer goes to the one `by` before it: a control for what layers carry."""
        embeddings = [embedding for stacks in self.sites.values() for embedding in _stacks(stacks)]
        for embedding in embeddings:
            embedding.shift_layers(by)
        try:
            yield
        finally:
            for embedding in embeddings:
                embedding.shift_layers(-by)


def _stacks(modules: nn.Module) -> list[Any]:
    """The members of a module list: one for both stacks, or the encoder's and the decoder's."""
    return list(modules.children())


def _join(stacks: list[dict[str, Any]]) -> dict[str, Any]:
    """The weights of one stack's sites after the other's."""
    if len(stacks) == 1:
        return stacks[0]
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for stack in stacks for name in stack):
        parts = [stack[name] for stack in stacks if name in stack]
        if any(isinstance(part, Unmade) for part in parts):
            joined[name] = tuple(parts)
            continue
        if isinstance(parts[0], PrefixRows):  # each stack has its own map: one for each of its sites
            parts = [
                part._replace(
                    weight=part.weight.expand(len(part.rows), -1, -1), bias=part.bias.expand(len(part.rows), -1)
                )
                for part in parts
            ]
        columns = zip(*parts, strict=True)
        joined[name] = type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))
    return joined
