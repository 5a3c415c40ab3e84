"""A look at the model between two steps: what the hypernetwork makes for each task, and how tasks get on.

What is found is plain numbers, for whoever writes or draws them. Every rank looks, since ZeRO-3 needs all of them to
see a weight, and rank 0 gets the result. It must not know DeepSpeed, files, TensorBoard, nor when a look is due.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Site, Weights
from hyperpelt_ds.hypernet.embeddings import SiteEmbedding
from hyperpelt_ds.model import HyperPELT
from hyperpelt_ds.train.watch import Watch, block_name, branches_by_task, modules_of, site_norms

SHOWN = 2**14
"""Numbers that a histogram is made of, evenly spaced among what there is."""

MATRIX_TASKS = 50
"""With more trained tasks nothing is kept or drawn for every pair of them: nobody could read it, and it grows fast."""

Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Embedding:
    """Points (N, d) with labels: a row of words for each, under the names of `columns`."""

    columns: tuple[str, ...]
    labels: Sequence[tuple[str, ...]]
    points: np.ndarray


@dataclass(frozen=True)
class Observation:
    """What a look found. docs/monitoring.md says what `record` holds."""

    step: int
    scalars: dict[str, float]
    record: dict[str, Any]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    """For histograms."""
    embeddings: dict[str, Embedding] = field(default_factory=dict)


def look(
    model: HyperPELT,
    config: Config,
    step: int,
    watch: Watch,
    gradient_norm: float,
    planned: Mapping[str, float],
    drawn: Mapping[str, int],
) -> Observation | None:
    """What `watch` heard of the step just applied, and what the model now makes of every trained task.

    gradient_norm: over all trainables; planned: the probability of each task, drawn: its samples so far (or nothing, if
    they are not known). Every rank calls it; None on all but rank 0. Waits for the device.
    """
    tasks = [config.data.tasks.index(name) for name in config.trained_tasks]
    products, shares = watch.products(), watch.prefix_shares()
    parts = _Made(model, torch.tensor(tasks, device=next(model.parameters()).device), config)
    if dist.rank() != 0:
        return None
    scalars = {f"gradient_norm/{group}": norm for group, norm in watch.parameter_norms(gradient_norm).items()}
    gradients = {}
    for kind, product in products.items():
        own = product[tasks][:, tasks].double().cpu()
        cosines = _cosines(own)
        norms = [norm or None for norm in _known(own.diagonal().sqrt())]
        gradients[kind] = {"norms": norms, **_matrix(cosines)}
        pairs = [value for i, row in enumerate(cosines) for value in row[:i] if value is not None]
        if pairs:
            scalars[f"gradient_cosine/{kind}"] = sum(pairs) / len(pairs)
            scalars[f"gradient_conflict/{kind}"] = sum(value < 0 for value in pairs) / len(pairs)
    scalars |= {f"prefix_share/{block}": of_all for block, (_, of_all) in shares.items()}
    scalars |= parts.norms()
    scalars |= {f"weights/image/{block}/{kind}": norm for (block, kind), norm in watch.image_norms().items()}
    record = {
        "tasks": list(config.trained_tasks),
        "layers": parts.layers,
        "gradients": gradients,
        "weights": parts.by_task(),
        "hyper_embeddings": parts.hyper_cosines(),
        "prefix_share": {block: _known([by_task[t] for t in tasks]) for block, (by_task, _) in shares.items()},
        "mixture": _mixture(config.trained_tasks, planned, drawn),
    }
    return Observation(step, scalars, {k: v for k, v in record.items() if v}, parts.numbers(), parts.embeddings())


class _Made:
    """What the hypernetwork makes of tasks (T,), given at once, and what it is made from."""

    def __init__(self, model: HyperPELT, tasks: Tensor, config: Config):
        self.network, self.geometry = model.hypernet, model.backbone.geometry
        self.names = [config.data.tasks[i] for i in tasks.tolist()]
        self.seen: dict[str, Any] = {}
        with torch.no_grad(), self._seeing():
            weights: Weights = self.network(_batch(tasks, config))
        by_task = branches_by_task(self.network)
        self.branches = {
            name: (modules_of(branch, self.geometry), number in by_task)
            for number, (name, branch) in enumerate(zip(self.network.branch_names, weights.branches, strict=True))
            if name != "image"
        }
        layers = sorted({_layer(site) for site in self.geometry.sites})
        self.layers = [f"{'decoder' if second else 'encoder'} {number}" for second, number in layers]
        self._columns = {layer: column for column, layer in enumerate(layers)}

    @contextmanager
    def _seeing(self) -> Iterator[None]:
        """Keeps what the embeddings and projectors give: their parameters may not be here outside their forward."""
        network, hooks = self.network, []

        def keep(name: str) -> Any:
            return lambda module, args, output: self.seen.__setitem__(name, output)

        for kind, modules in (("sites", network.sites), ("controllers", network.controllers)):
            for name, stacks in modules.items():
                for number, module in enumerate(stacks.children()):
                    seen = module if kind == "sites" else module.get_submodule("projector")
                    hooks.append(seen.register_forward_hook(keep(f"{kind}/{name}/{number}")))
        for name, condition in network.conditions.items():
            hooks.append(condition.register_forward_hook(keep(f"conditions/{name}")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def norms(self) -> dict[str, float]:
        """The norm of what is made for one condition at one site, in the mean over those of a block."""
        found: dict[str, list[Tensor]] = {}
        for branch, (kinds, _) in self.branches.items():
            for kind, (sites, parts) in kinds.items():
                for site, norms in zip(sites, site_norms(parts), strict=True):
                    found.setdefault(f"weights/{branch}/{block_name(site)}/{kind}", []).append(norms)
        means = torch.stack([torch.cat(norms).mean() for norms in found.values()]).tolist() if found else []
        return dict(zip(found, means, strict=True))

    def by_task(self) -> dict[str, Any]:
        """By kind: norms (T, L) by task and layer, and cosines (T, T) between tasks."""
        squares: dict[str, Tensor] = {}
        products: dict[str, Tensor] = {}
        for kinds, by_task in self.branches.values():
            for kind, (sites, parts) in kinds.items() if by_task else ():
                columns = torch.tensor([self._columns[_layer(site)] for site in sites], device=parts[0].device)
                own = squares.setdefault(kind, parts[0].new_zeros((len(self.names), len(self.layers))))
                own.index_add_(1, columns, site_norms(parts).square().mT.to(own.dtype))
                for part in parts:
                    rows = part.transpose(0, 1).flatten(1).float()
                    products[kind] = products.get(kind, 0.0) + rows @ rows.mT
        return {
            kind: {"norms": [_known(row) for row in own.sqrt()], **_matrix(_cosines(products[kind]))}
            for kind, own in squares.items()
        }

    def hyper_cosines(self) -> dict[str, Any]:
        found = {}
        for name in self._task_conditions() if len(self.names) <= MATRIX_TASKS else ():
            rows = torch.cat([hyper.transpose(0, 1).flatten(1) for hyper in self._hyper(name)], 1).float()
            found[name] = _matrix(_cosines(rows @ rows.mT))
        return found

    def numbers(self) -> dict[str, np.ndarray]:
        """Some numbers of everything, by its name, which must be no scalar's: TensorBoard shows only one of the two."""
        found = {f"hyper_embeddings/{name}": [_some(h) for h in self._hyper(name)] for name in self._task_conditions()}
        for branch, (kinds, _) in self.branches.items():
            for kind, (sites, parts) in kinds.items():
                for block in dict.fromkeys(block_name(site) for site in sites):
                    places = [place for place, site in enumerate(sites) if block_name(site) == block]
                    share = max(1, SHOWN // (len(parts) * len(places)))
                    some = [_some(part[place], share) for part in parts for place in places]
                    found[f"generated/{branch}/{block}/{kind}"] = some
        return {name: torch.cat(parts).float().cpu().numpy() for name, parts in found.items()}

    def embeddings(self) -> dict[str, Embedding]:
        """Every embedding with its name, and the hyper-embeddings (the mean over their rows) with task and site."""
        found = {}
        for name in self._task_conditions():
            points = self.seen[f"conditions/{name}"][0].flatten(1)
            found[f"{name}_embeddings"] = _embedding(("task",), [(task,) for task in self.names], points)
            sites = [site for stack in self.network.sites["task"].children() for site in _sites(stack)]
            labels = [(task, block_name(site), str(site.layer)) for site in sites for task in self.names]
            hyper = torch.cat([stack.mean(2).flatten(0, 1) for stack in self._hyper(name)])
            found[f"{name}_hyper_embeddings"] = _embedding(("task", "block", "layer"), labels, hyper)
        for where, stacks in self.network.sites.items():
            rows: dict[str, dict[str, Tensor]] = {"layer": {}, "block": {}}
            for number, stack in enumerate(stacks.children()):
                layers, blocks = self.seen[f"sites/{where}/{number}"]
                for site, layer, block in zip(_sites(stack), layers, blocks, strict=True):
                    own = f"{_stack_name(site)} " if len(list(stacks.children())) > 1 else ""
                    rows["layer"].setdefault(f"{own}layer {site.layer}", layer.flatten())
                    rows["block"].setdefault(block_name(site), block.flatten())
            for kind, by_label in rows.items():
                points = torch.stack(list(by_label.values()))
                found[f"{where}_{kind}_embeddings"] = _embedding((kind,), [(label,) for label in by_label], points)
        return found

    def _task_conditions(self) -> list[str]:
        return [name for name in self.network.conditions if name != "image"]

    def _hyper(self, name: str) -> list[Tensor]:
        """The hyper-embeddings (S, T, P, E) of each stack."""
        stacks = list(self.network.controllers[name].children())
        return [self.seen[f"controllers/{name}/{number}"] for number in range(len(stacks))]


def _batch(tasks: Tensor, config: Config) -> Batch:
    """A batch of one sample a task, without words and images: all that a hypernetwork asks of it."""
    places, vision = torch.arange(len(tasks), device=tasks.device), config.vision
    nothing = tasks.new_zeros((len(tasks), 0))
    has_images = vision.encoder is not None
    return Batch(
        input_ids=nothing,
        attention_mask=nothing,
        labels=nothing,
        targets=nothing[0],
        tasks=tasks,
        task_rows=places,
        images=torch.zeros(1, vision.cells, vision.channels, device=tasks.device) if has_images else None,
        image_rows=torch.full_like(places, -1) if has_images else None,
        loss_weights=torch.ones(len(tasks), device=tasks.device),
        samples=(),
    )


def _sites(stack: Any) -> tuple[Site, ...]:
    assert isinstance(stack, SiteEmbedding)
    return stack.sites


def _layer(site: Site) -> tuple[bool, int]:
    """Encoder layers before decoder layers."""
    return not site.block.in_encoder, site.layer


def _stack_name(site: Site) -> str:
    return "encoder" if site.block.in_encoder else "decoder"


def _cosines(products: Tensor) -> Matrix:
    """From inner products (T, T); None where there is nothing to compare with."""
    sizes = products.diagonal().sqrt()
    cosines = (products / sizes.outer(sizes)).clamp(-1, 1)
    return [_known(row) for row in cosines]


def _matrix(cosines: Matrix) -> dict[str, Matrix]:
    """The entry of a record, if there are few enough tasks."""
    return {"cosines": cosines} if len(cosines) <= MATRIX_TASKS else {}


def _known(values: Sequence[float] | Tensor) -> list[float | None]:
    """The numbers, with None for those that do not exist."""
    numbers = values.tolist() if isinstance(values, Tensor) else values
    return [_rounded(value) if math.isfinite(value) else None for value in numbers]


def _rounded(value: float) -> float:
    """To six digits: all that float32 knows, in half the room."""
    return float(f"{value:.6g}")


def _mixture(tasks: Sequence[str], planned: Mapping[str, float], drawn: Mapping[str, int]) -> dict[str, list[float]]:
    total = sum(drawn.values())
    if not total:
        return {}
    return {
        "planned": [_rounded(planned[task]) for task in tasks],
        "drawn": [_rounded(drawn[task] / total) for task in tasks],
    }


def _some(tensor: Tensor, most: int = SHOWN) -> Tensor:
    flat = tensor.flatten()
    return flat[:: -(-len(flat) // most)]


def _embedding(columns: tuple[str, ...], labels: Sequence[tuple[str, ...]], points: Tensor) -> Embedding:
    return Embedding(columns, labels, points.float().cpu().numpy())
