"""Counts the bytes of tensors that are alive together, on any device, whatever an allocator keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows the storage of every tensor that an operation makes, forward and backward.

    Not those of `known` tensors, nor any smaller than `at_least` bytes. `peak` is the most that was alive at a time,
    `made` how many there were.
    """

    def __init__(self, known: Iterable[Tensor] = (), at_least: int = 1):
        super().__init__()
        self.now = self.peak = self.made = 0
        self._at_least = at_least
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size < self._at_least or key in self._known or key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.made += 1
        self.now += size
        self.peak = max(self.peak, self.now)
