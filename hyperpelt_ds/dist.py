"""Rank, world size and agreement between ranks. Works the same with no process group at all."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's rank: from the process group, else from the launcher's environment, else 0."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def has_gpu() -> bool:
    """Whether to use CUDA: it is there, and DS_ACCELERATOR=cpu does not say otherwise (DeepSpeed heeds it as well)."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device() -> torch.device:
    """The accelerator of this rank, or the CPU."""
    return torch.device("cuda", local_rank()) if has_gpu() else torch.device("cpu")


def barrier() -> None:
    if torch_dist.is_initialized():
        torch_dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. Pickles; for small host-side values only."""
    if not torch_dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def one_after_another(make: Callable[[], T]) -> T:
    """make() on every rank, those of a node one after the other; a ValueError of one is raised by all."""
    made: list[T] = []
    for turn in range(max(gather(local_rank())) + 1):
        fault = None
        if turn == local_rank():
            try:
                made.append(make())
            except ValueError as error:
                fault = str(error)
        faults = [text for text in gather(fault) if text is not None]
        if faults:
            raise ValueError(faults[0])
    return made[0]


def sum_to_first(tensor: Tensor) -> None:
    """Leaves in rank 0's `tensor` the sum over all ranks, whose tensors are of one shape; the others' are spoilt."""
    if torch_dist.is_initialized():
        torch_dist.reduce(tensor, dst=0)


def host_sum(values: Sequence[int]) -> list[int]:
    """The sums over all ranks of a few integers of each; waits for the other ranks' hosts, for no device."""
    numbers = torch.tensor([int(value) for value in values], dtype=torch.int64)
    if torch_dist.is_initialized():
        torch_dist.all_reduce(numbers, group=_host_group())
    return [int(number) for number in numbers]


def _host_group() -> Any:
    """A group of all ranks over gloo, whatever the devices use."""
    world = torch_dist.group.WORLD
    return world if torch_dist.get_backend() == "gloo" else _gloo_beside(world)


@functools.cache
def _gloo_beside(world: Any) -> Any:
    return torch_dist.new_group(backend="gloo")


def leave(code: int = 0, *, together: bool = True) -> NoReturn:
    """Ends this process with an exit code: with `together` once all ranks are here.

    It does what the interpreter does at its end, but does not take itself apart. DeepSpeed's hooks keep the process
    group alive, and a thread of it that then still lets go of a tensor ends the process with code -6, "terminate called
    without an active exception" (seen with gloo, torch 2.14 and 2.15, in one of some hundred exits).
    """
    if together and torch_dist.is_initialized():
        torch_dist.barrier()
        torch_dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or its disk is full
            stream.flush()
    os._exit(code)


def _facts(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """What is in a value, each fact of a dictionary of dictionaries by its dotted name."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _facts(part, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


def agree(name: str, value: Any) -> None:
    """Raises RuntimeError on every rank if the ranks do not hold the same JSON-able `value`."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
    digests = gather(digest)
    if len(set(digests)) > 1:
        different = [r for r, other in enumerate(digests) if other != digests[0]]
        values = gather(dict(_facts(value)) if rank() in (0, different[0]) else None)
        ours, theirs = values[0], values[different[0]]
        apart = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        first, other = ("; ".join(f"{key} {of.get(key)!r}".strip() for key in apart)[:1000] for of in (ours, theirs))
        raise RuntimeError(
            f"ranks {different} disagree with rank 0 about {name}: rank 0 has {first}, rank {different[0]} has "
            f"{other}; all must be started with the same"
        )


def logger(name: str) -> logging.Logger:
    """A logger that speaks on rank 0 and stays silent below warnings elsewhere."""
    log = logging.getLogger(name)
    log.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    return log
