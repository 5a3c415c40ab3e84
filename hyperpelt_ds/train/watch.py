"""What can only be heard while a step is taken: gradients of generated weights, and the attention that prefixes get.

Deduplicated conditions keep tasks apart: the gradient of what was generated for a task comes from its samples alone,
and is there in every backward pass. It must not know DeepSpeed, files, nor when a step is to be watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hyperpelt_ds import dist
from hyperpelt_ds.contracts import Adapter, Batch, Branch, Geometry, LowRank, Prefix, PrefixRows, Site, Weights
from hyperpelt_ds.hypernet import HyperNetwork
from hyperpelt_ds.model import HyperPELT

PER_CONDITION = ("keys", "values", "rows", "down", "down_bias", "up", "up_bias", "gain", "shift")
"""The fields (S, C, ...) of generated modules that hold something of their own for every condition."""
MOST = 2**24
"""Numbers of gradients that are kept, over all tasks. Of larger models, only every second, third, ... site is heard."""


def branches_by_task(network: HyperNetwork) -> list[int]:
    """The branches whose conditions are the tasks of a batch, in the order of `Batch.tasks`."""
    shared = network.free is not None and network.free.shared
    return [i for i, name in enumerate(network.branch_names) if name != "image" and not (name == "free" and shared)]


def modules_of(branch: Branch, geometry: Geometry) -> dict[str, tuple[tuple[Site, ...], list[Tensor]]]:
    """What a branch holds of each kind, low-rank deltas by their projection: sites (S) and tensors (S, C, ...).

    Kinds that are made later, in chunks, have no tensors and are left out.
    """
    lora = zip(geometry.projections, branch.lora or [None] * len(geometry.projections), strict=True)
    found: dict[str, tuple[tuple[Site, ...], Any]] = {
        "prefix": (geometry.prefix_sites, branch.prefix),
        "adapter": (geometry.adapter_sites, branch.adapter),
        **{projection.name: (projection.sites, deltas) for projection, deltas in lora},
    }
    return {
        kind: (sites, [t for name, t in module._asdict().items() if name in PER_CONDITION and t is not None])
        for kind, (sites, module) in found.items()
        if isinstance(module, Prefix | PrefixRows | Adapter | LowRank)
    }


class Watch:
    """Listens to the micro-batches of one step on this rank; asked what it heard, ranks put it together."""

    def __init__(self, model: HyperPELT, most: int = MOST):
        self._model, self._most, self._tasks = model, most, len(model.tasks)
        self._own = branches_by_task(model.hypernet)
        self._gradients: dict[tuple[str, int, int], Tensor] = {}
        """By kind, branch and field, the sum so far (T, S, ...), of every site or every so many-th."""
        self._shares: dict[str, Tensor] = {}
        self._images: dict[tuple[str, str], list[Tensor]] = {}
        self._squares: dict[str, Tensor] = {}
        self._loss_scale = 1.0

    @contextmanager
    def listening(self, batch: Batch) -> Iterator[None]:
        """Around the forward pass of a micro-batch; its backward pass is heard whenever it comes."""
        hook = self._model.hypernet.register_forward_hook(self._hear)
        try:
            with self._model.backbone.watched() as shares:
                yield
        finally:
            hook.remove()
        self._add_shares(batch, shares)

    def note_gradients(self, gradient: Callable[[nn.Parameter], Tensor | None], loss_scale: float) -> None:
        """Before the update: the step's gradient by group of parameters, and what losses were multiplied by.

        Every rank calls it.
        """
        self._loss_scale = loss_scale
        for name, parameter in self._model.named_parameters():
            own = gradient(parameter) if parameter.requires_grad else None
            if own is not None:
                group, square = group_of(name), own.float().square().sum()
                self._squares[group] = self._squares.get(group, 0.0) + square

    def parameter_norms(self, total: float) -> dict[str, float]:
        """Norms by group, of a gradient whose norm is `total`: whatever the loss was scaled by."""
        if not self._squares:
            return {}
        squares = torch.stack(list(self._squares.values())).tolist()
        scale = total / math.sqrt(sum(squares)) if any(squares) else 0.0
        return {group: scale * math.sqrt(square) for group, square in zip(self._squares, squares, strict=True)}

    def products(self) -> dict[str, Tensor]:
        """By kind, the inner products (T, T) of the gradients that each task's part of the loss has with respect to
        what was generated for it.

        Gradients are summed over the step's micro-batches and ranks first. Every rank calls it, rank 0 gets them.
        """
        found: dict[str, Tensor] = {}
        for (kind, _, _), gradients in self._gradients.items():
            rows = gradients.flatten(1)
            dist.sum_to_first(rows)
            rows /= dist.world_size() * self._loss_scale
            found[kind] = found.get(kind, 0.0) + rows @ rows.mT
        self._gradients.clear()
        return found if dist.rank() == 0 else {}

    def prefix_shares(self) -> dict[str, tuple[list[float], float]]:
        """By block, the mean share of attention that prefixes got from the samples of each task (nan without any), and
        from all. Every rank calls it."""
        ranks = dist.gather({block: sums.tolist() for block, sums in self._shares.items()})
        found = {}
        for block in ranks[0]:
            sums, counts = torch.tensor([rank[block] for rank in ranks if block in rank]).sum(0)
            found[block] = ((sums / counts).tolist(), float(sums.sum() / counts.sum()))
        return found

    def image_norms(self) -> dict[tuple[str, str], float]:
        """By block and kind, the norm of what was made for one image at one site, in the mean over this rank's."""
        return {key: float(torch.cat(norms).mean()) for key, norms in self._images.items()}

    def _hear(self, network: Any, args: tuple[Any, ...], weights: Weights) -> None:
        batch: Batch = args[0]
        if torch.is_grad_enabled() and self._model.generation_budget is None:
            for number in self._own:
                self._hear_gradients(number, weights.branches[number], batch.tasks)
        if any(sample.image is not None for sample in batch.samples) and "image" in network.branch_names:
            self._add_images(weights.branches[network.branch_names.index("image")])

    def _hear_gradients(self, number: int, branch: Branch, tasks: Tensor) -> None:
        made = modules_of(branch, self._model.backbone.geometry)
        parts = {(kind, number, place): part for kind, (_, own) in made.items() for place, part in enumerate(own)}
        numbers = sum(part.numel() // part.shape[1] for part in parts.values())
        every = math.ceil(self._tasks * numbers / self._most)
        for key, part in parts.items():
            if part.requires_grad:
                if key not in self._gradients:
                    shape = (self._tasks, len(part[::every]), *part.shape[2:])
                    self._gradients[key] = part.new_zeros(shape, dtype=torch.float32)
                part.register_hook(_adding(self._gradients[key], tasks, every))

    def _add_images(self, branch: Branch) -> None:
        if isinstance(branch.prefix, PrefixRows):
            branch = branch._replace(prefix=None)
        for kind, (sites, parts) in modules_of(branch, self._model.backbone.geometry).items():
            for site, norms in zip(sites, site_norms(parts), strict=True):
                self._images.setdefault((block_name(site), kind), []).append(norms)

    def _add_shares(self, batch: Batch, shares: dict[int, Tensor]) -> None:
        sites, usable = self._model.backbone.geometry.prefix_sites, (batch.loss_weights > 0).float()
        rows = batch.tasks[batch.task_rows]
        for place, share in shares.items():
            sums = self._shares.setdefault(block_name(sites[place]), share.new_zeros((2, self._tasks)))
            sums[0].index_add_(0, rows, share * usable)
            sums[1].index_add_(0, rows, usable)


def block_name(site: Site) -> str:
    return site.block.name.lower()


def site_norms(parts: list[Tensor]) -> Tensor:
    """The norm (S, C) over all numbers of each site and condition."""
    squares = [part.detach().flatten(2).float().square().sum(-1) for part in parts]
    return torch.stack(squares).sum(0).sqrt()


def group_of(name: str) -> str:
    """The group that a parameter is reported with: embeddings, projectors and heads by what they are made for."""
    parts = name.removeprefix("hypernet.").split(".")
    if name.startswith("trained_backbone."):
        return "backbone"
    if parts[0] in ("conditions", "sites"):
        return f"{parts[1]}_embeddings" if parts[0] == "conditions" else f"{parts[1]}_site_embeddings"
    if parts[0] == "controllers":
        return f"{parts[1]}_projector" if parts[3] == "projector" else f"{parts[1]}_{parts[4]}_head"
    return f"free_{parts[1]}" if parts[0] == "free" else parts[0]


def _adding(total: Tensor, tasks: Tensor, every: int) -> Callable[[Tensor], None]:
    def add(gradient: Tensor) -> None:
        total.index_add_(0, tasks, gradient[::every].transpose(0, 1).to(total.dtype))

    return add
