"""A frozen model whose weights are split over the ranks: a rank has its share of all, and the whole of one block.

The weights of a block are one run of bytes, cut into as many equal shares as there are ranks. Who runs the block
gathers it first; the backward pass gathers it again. Bytes are moved, so that results are those of the whole model to
the last bit, whatever the type. Gathering takes all ranks together. This file must not know what the model is, nor how
it is trained.

torch's `fully_shard` was tried (2.14, gloo): it trains. But embeddings, which are used before the model itself runs,
had to be gathered by hand and for the whole step, and gradients differed in their last bits. By its design, not tried,
ranks that decode answers of different lengths would wait for each other for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from hyperpelt_ds import dist
from hyperpelt_ds.backbones.int8 import Parts, parts_of

ALIGNMENT = 64
"""Every tensor begins at a multiple of so many bytes, as those that torch allocates do: kernels round by it."""


@dataclass
class Group:
    """Weights that are gathered together: those of a block, or of modules outside that share one."""

    weights: dict[nn.Parameter, list[tuple[nn.Module, str]]]
    """Where each one stands: a tied one in several modules."""

    @property
    def bytes(self) -> int:
        return sum(_room(part) for weight in self.weights for part in parts_of(weight)[0].values())


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's weights: of every group, and of what stays whole on every rank."""

    groups: tuple[int, ...]
    rest: int

    def held(self, ranks: int) -> int:
        """What each of so many ranks holds while a block runs, at most. One rank has all, gathered."""
        if ranks == 1:
            return self.rest + sum(self.groups)
        shares = [_share(size, ranks) for size in self.groups]
        return self.rest + sum(shares) + ranks * max(shares)


def groups_of(model: nn.Module, blocks: Sequence[nn.Module]) -> list[Group]:
    """Every parameter of `model`, in the order of its modules: a group for each block, and for each module outside."""
    block_of = {module: block for block in blocks for module in block.modules()}
    groups: list[Group] = []
    used_by: dict[nn.Module, Group] = {}
    for module in model.modules():
        own = [(name, weight) for name, weight in module._parameters.items() if weight is not None]
        if not own:
            continue
        user = block_of.get(module, module)
        tied = (known for known in groups for _, weight in own if weight in known.weights)
        group = used_by.get(user) or next(tied, None)
        if group is None:
            group = Group({})
            groups.append(group)
        used_by[user] = group
        for name, weight in own:
            group.weights.setdefault(weight, []).append((module, name))
    return groups


@dataclass
class _Piece:
    """A tensor's place in its group's bytes."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, gathered: Tensor) -> Tensor:
        size = self.shape.numel() * self.dtype.itemsize
        return gathered[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class _Split:
    """A group of which this rank has its share. Where its weights stood stand parameters without content meanwhile."""

    def __init__(self, group: Group, device: torch.device):
        self._weights: list[tuple[list[tuple[nn.Module, str]], dict[str, _Piece], Callable[[Parts], Tensor]]] = []
        ranks, share = dist.world_size(), _share(group.bytes, dist.world_size())
        whole, offset = torch.zeros(ranks * share, dtype=torch.uint8), 0
        for weight, places in group.weights.items():
            parts, rebuild = parts_of(weight)
            pieces = {}
            for name, part in parts.items():
                pieces[name] = _Piece(offset, part.dtype, part.shape)
                pieces[name].of(whole).copy_(part)
                offset += _room(part)
            self._weights.append((places, pieces, rebuild))
            _put(places, nn.Parameter(_empty(weight, device), requires_grad=False))
        self.share = whole[dist.rank() * share :][:share].clone().to(device)

    def to(self, device: torch.device) -> None:
        self.share = self.share.to(device)
        for places, _, _ in self._weights:
            module, name = places[0]
            _put(places, nn.Parameter(_empty(module._parameters[name], device), requires_grad=False))

    def gathered(self) -> Tensor:
        """The bytes of all ranks' shares; every rank calls it."""
        whole = torch.empty(dist.world_size() * len(self.share), dtype=torch.uint8, device=self.share.device)
        torch_dist.all_gather_into_tensor(whole, self.share)
        return whole

    def lend(self, whole: Tensor) -> None:
        """Lets the modules find their weights in `whole`."""
        for places, pieces, rebuild in self._weights:
            weight = rebuild({name: piece.of(whole) for name, piece in pieces.items()})
            for module, name in places:
                module.__dict__[name] = weight  # is found before the parameter of that name

    def take_back(self) -> None:
        for places, _, _ in self._weights:
            for module, name in places:
                del module.__dict__[name]

    @property
    def names(self) -> Iterator[tuple[nn.Module, str]]:
        return (place for places, _, _ in self._weights for place in places)


class Shards:
    """The split weights of a model, of which one group is whole at a time."""

    def __init__(self, groups: Sequence[Group], device: torch.device):
        self._splits = [_Split(group, device) for group in groups]
        self._by_place = {place: split for split in self._splits for place in split.names}
        self._whole: tuple[_Split, Tensor] | None = None
        self._apart = 0
        for module, split in {module: split for (module, _), split in self._by_place.items()}.items():
            # not before the block: transformers lets hooks of a checkpointed block run once, and its modules' twice
            module.register_forward_pre_hook(self._before(split), prepend=True)

    def to(self, device: torch.device) -> None:
        self._let_go()
        for split in self._splits:
            split.to(device)

    @property
    def own_bytes(self) -> int:
        """Bytes of this rank's shares."""
        return sum(len(split.share) for split in self._splits)

    def weight(self, module: nn.Module, name: str) -> Tensor:
        """One weight, whole until the next is asked for; every rank calls it."""
        self._gather(self._by_place[module, name])
        weight: Tensor = module.__dict__[name]
        return weight

    def saving(self) -> AbstractContextManager[Any]:
        """Within, autograd keeps where a weight stands instead of the weight.

        The backward pass gathers what it needs, so that ranks must run the same blocks in it.
        """
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @contextmanager
    def own_pace(self) -> Iterator[None]:
        """Within, each rank may run the model as often and for as long as it likes, without gradients, if it does
        nothing else that ranks do together; at the end it helps the others until they are done as well."""
        self._apart += 1
        try:
            yield
            if self._apart == 1:
                self._let_go()
                while self._take_turn(None) is not None:
                    pass
        finally:
            self._apart -= 1

    def _before(self, split: _Split) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self._gather(split)

    def _gather(self, split: _Split) -> None:
        if self._whole is not None and self._whole[0] is split:
            return
        self._let_go()
        if self._apart:
            while self._take_turn(split) is not split:
                pass
        else:
            self._hold(split, split.gathered())

    def _take_turn(self, wanted: _Split | None) -> _Split | None:
        """The ranks say what they want, and the first of it is gathered; None once nobody wants anything.

        Ranks that want the same at the same time share a turn, and one that is behind is served first.
        """
        asked = dist.host_sum([split is wanted for split in self._splits])
        served = next((split for split, ranks in zip(self._splits, asked, strict=True) if ranks), None)
        if served is not None:
            whole = served.gathered()
            if served is wanted:
                self._hold(served, whole)
        return served

    def _hold(self, split: _Split, whole: Tensor) -> None:
        split.lend(whole)
        self._whole = (split, whole)

    def _let_go(self) -> None:
        if self._whole is not None:
            self._whole[0].take_back()
            self._whole = None

    def _pack(self, tensor: Tensor) -> Any:
        if self._whole is None:
            return tensor
        split, whole = self._whole
        if tensor.untyped_storage().data_ptr() != whole.data_ptr():
            return tensor
        return split, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        split, dtype, shape, stride, offset = packed
        self._gather(split)
        assert self._whole is not None
        return self._whole[1].view(dtype).as_strided(shape, stride, offset)


def _put(places: list[tuple[nn.Module, str]], weight: nn.Parameter) -> None:
    for module, name in places:
        setattr(module, name, weight)


def _empty(weight: Any, device: torch.device) -> Tensor:
    """A tensor with the shape and type of `weight` that takes one number's room; whoever uses it gets NaN."""
    return torch.full((), math.nan, dtype=weight.dtype, device=device).expand(weight.shape)


def _share(size: int, ranks: int) -> int:
    """Bytes of the share that each of so many ranks has of `size` bytes."""
    return _up(math.ceil(size / ranks))


def _room(part: Tensor) -> int:
    return _up(part.numel() * part.element_size())


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
