"""On two ranks: a step that is not finite, on one of them and for one reason, changes nothing on any.

deepspeed tests/two_ranks_skip.py SETTINGS.json..., each a DeepSpeed configuration.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from train_states import allow_fp16

from hyperpelt_ds import dist
from hyperpelt_ds.config import Config
from hyperpelt_ds.train import engine, partitions

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a loss that is NaN": lambda loss: loss * math.nan,
    "an infinite loss with a finite gradient": lambda loss: loss + math.inf,
}
"""What befalls the loss of rank 1."""


def check(path: str) -> None:
    config = Config().override(["train.global_batch=4", "train.micro_batch=1", "train.weight_decay=0.1"])
    torch.manual_seed(0)
    wrapped = engine.start(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), config, path)
    assert wrapped.accumulation == 2
    first = next(wrapped.model.parameters())

    def step(fault: Callable[[Tensor], Tensor] | None = None) -> bool:
        for last in (False, True):
            loss = (
                wrapped.forward(torch.ones(1, 4, dtype=first.dtype) * (1 + dist.rank()), last).float().square().sum()
                * 100
            )
            wrapped.backward(fault(loss) if fault and dist.rank() == 1 and not last else loss)
        return wrapped.step()

    def state() -> dict[str, Any]:
        optimizer = wrapped._engine.basic_optimizer  # torch's own, with this rank's part of the moments
        moments = {
            f"{number} {kind}": value.clone()
            for number, values in enumerate(optimizer.state.values())
            for kind, value in values.items()
        }
        assert moments
        return {**wrapped.weights(), **moments, "rate": torch.tensor(wrapped.learning_rate())}

    def unchanged(before: dict[str, Any]) -> bool:
        after = state()
        return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    own, scaler = partitions.scalers(wrapped._engine)
    skipped = 0
    while not step():  # float16's scale comes down from 65536
        skipped += 1
        scale = own.cur_scale if own else scaler.get_scale()
        assert wrapped.searches_scale and scale == 65536 / 2**skipped >= 1, f"{path}: the loss scale"
    assert step(), path
    for name, fault in FAULTS.items():
        before = state()
        assert not step(fault), f"{path}: a step was applied after {name}"
        assert unchanged(before), f"{path}: a step changed something after {name}"
    before = state()
    hook = first.register_hook(lambda gradient: gradient * math.inf if dist.rank() == 1 else gradient)
    assert not step() and unchanged(before), f"{path}: one gradient was not finite"
    hook.remove()
    assert step() and not unchanged(before), f"{path}: the next step"
    assert all(value.isfinite().all() for value in state().values())
    sums = dist.gather(wrapped.checksums())
    assert sums[0] == sums[1]
    if dist.rank() == 0:
        print("held:", path, type(wrapped._engine.optimizer).__name__, f"after {skipped} to find a scale", flush=True)


if __name__ == "__main__":
    engine.start_distributed()
    allow_fp16()
    for argument in (argument for argument in sys.argv[1:] if argument.endswith(".json")):
        check(argument)
    dist.leave()
