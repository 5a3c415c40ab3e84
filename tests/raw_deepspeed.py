"""What DeepSpeed itself does with a parameter that takes no part in a step: the reason why all of ours always do.

python tests/raw_deepspeed.py FOLDER: at every ZeRO stage, plain SGD, and a map that is used in odd steps alone. Writes
{stage: by how much that changed in even steps} to FOLDER/changed.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from torch import nn

from hyperpelt_ds import dist
from hyperpelt_ds.train import engine


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.always, self.odd = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, values: torch.Tensor, both: bool) -> torch.Tensor:
        return (self.always(values) + (self.odd(values) if both else 0)).square().sum()


def changed(stage: int) -> float:
    """The largest change of the odd map's weight in an even step."""
    torch.manual_seed(0)
    model = Pair()
    wrapped, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        config={
            "train_batch_size": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        },
    )
    largest = 0.0
    for step in range(1, 7):
        with deepspeed.zero.GatheredParameters([model.odd.weight], enabled=stage == 3):
            before = model.odd.weight.detach().clone()
        wrapped.backward(wrapped(torch.arange(4.0)[None] * step, step % 2 == 1))
        wrapped.step()
        with deepspeed.zero.GatheredParameters([model.odd.weight], enabled=stage == 3):
            change = float((model.odd.weight.detach() - before).abs().max())
        if step % 2 == 0:
            largest = max(largest, change)
        else:
            assert change > 0, "it is trained in odd steps"
    return largest


if __name__ == "__main__":
    engine.start_distributed()
    found = {stage: changed(stage) for stage in range(4)}
    Path(sys.argv[1], "changed.json").write_text(json.dumps(found))
    dist.leave()
