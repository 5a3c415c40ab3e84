"""On two ranks: what one of them knows, both decide by, and whatever differs is said on both.

deepspeed tests/two_ranks_agree.py FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.train import agreement, engine
from hyperpelt_ds.train.agreement import GradientWatch
from hyperpelt_ds.train.control import Control
from hyperpelt_ds.train.outcome import Diverged


def raised(kind: type[Exception], call: Callable[[], None]) -> str:
    """What both ranks raise."""
    try:
        call()
    except kind as error:
        dist.barrier()
        return str(error)
    raise AssertionError(f"no {kind.__name__} on rank {dist.rank()}")


def check_words() -> None:
    with Control() as control:
        assert control.poll(3 + dist.rank()) == (7, False, False)
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert control.poll(1, fault=dist.rank() == 0) == (2, True, True)


def check_start(folder: Path) -> None:
    agreement.check_versions()
    agreement.check_shared(folder / "shared")
    dist.barrier()  # rank 0 deletes its file after the others have seen it
    assert not list((folder / "shared").iterdir())
    text = raised(ValueError, lambda: agreement.check_shared(folder / str(dist.rank()), patience=0.5))
    assert "of rank 1 on" in text and "must see the same one" in text
    assert "disagree" in raised(RuntimeError, lambda: dist.agree("the time of day", dist.rank()))
    tree = {"model": {"backbone": "b" * 900}, "train": {"steps": 9, "learning_rate": 1 / (1 + dist.rank())}}
    text = raised(RuntimeError, lambda: dist.agree("the configuration", tree))
    assert "rank 0 has train.learning_rate 1.0, rank 1 has train.learning_rate 0.5;" in text, text


class Pair(nn.Module):
    """Two parameters; the second is left out of the forward pass when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, batch: tuple[torch.Tensor, bool]) -> torch.Tensor:
        values, both = batch
        return (self.first(values) + (self.second(values) if both else 0)).square().sum()


def check_gradients(folder: Path, stage: int) -> None:
    file = folder / f"{stage}.json"
    if dist.rank() == 0:
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    dist.barrier()
    torch.manual_seed(0)
    config = Config().override(["train.global_batch=4", "train.micro_batch=1"])
    wrapped = engine.start(Pair(), config, file)

    def watched(both: bool = True) -> None:
        watch = GradientWatch(wrapped.model)
        for last in (False, True):
            values = torch.arange(4.0)[None] * (1 + dist.rank()) + last
            wrapped.backward(wrapped.forward((values, both or last), last))
        try:
            watch.check(wrapped)
        finally:
            wrapped.step()

    watched()
    agreement.check_weights(wrapped, 1)
    if stage == 0:  # the others do not get so far: DeepSpeed's own reductions then fit together no more
        text = raised(Diverged, lambda: watched(both=dist.rank() == 0))
        assert "second.weight took part in (2, 1) micro-batches" in text, text
        wrapped._engine.enable_backward_allreduce = False
        assert "gradients are not synchronised: that of first.weight" in raised(Diverged, watched)
        text = raised(Diverged, lambda: agreement.check_weights(wrapped, 2))
        assert "different weights of 4 parameters: first.weight" in text


if __name__ == "__main__":
    engine.start_distributed()
    place = Path(sys.argv[-1])
    check_words()
    check_start(place)
    for zero in (0, 2, 3):
        check_gradients(place, zero)
    print("held", flush=True)
    dist.leave()
