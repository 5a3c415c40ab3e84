"""Which frozen weights become whole, and in which order, where the ranks split them: noted, nothing is moved.

What backbones/sharded.py does in a run; tests/ranks_shard.py compares the two. This file must not know ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from hyperpelt_ds.backbones.int8 import parts_of
from hyperpelt_ds.backbones.sharded import Group


class Gathering:
    """Stands where a backbone has its `Shards`, in a model that is whole."""

    def __init__(self, groups: Sequence[Group]):
        self.sizes: list[int] = []
        """Bytes of every group that was gathered, in order."""
        self._whole: Group | None = None
        self._group_of: dict[int, Group] = {}
        by_module = {}
        for group in groups:
            for weight, places in group.weights.items():
                self._group_of.update(dict.fromkeys(map(storage_of, parts_of(weight)[0].values()), group))
                by_module.update({module: group for module, _ in places})
        for module, group in by_module.items():
            module.register_forward_pre_hook(self._before(group), prepend=True)

    def saving(self) -> AbstractContextManager[None]:
        """Nothing to do: who runs the backward pass calls `again`."""
        return nullcontext()

    def again(self, tensor: Tensor) -> Tensor:
        """What the backward pass asks autograd for; a weight is gathered first."""
        group = self._group_of.get(storage_of(tensor))
        if group is not None:
            self._gather(group)
        return tensor

    def _before(self, group: Group) -> Callable[[Any, Any], None]:
        return lambda module, args: self._gather(group)

    def _gather(self, group: Group) -> None:
        if self._whole is not group:
            self._whole = group
            self.sizes.append(group.bytes)


def storage_of(tensor: Tensor) -> int:
    """What tells storages apart, also of tensors without memory."""
    return tensor.untyped_storage()._cdata
