"""How a rank ends."""

from __future__ import annotations

import pytest

# the other rank is slow, so that gloo still has work, with tensors of Python's, when this one is at its end
BUSY = """
import atexit, os, sys, time
import torch
import torch.distributed as torch_dist
from hyperpelt_ds import dist

rank = 0 if os.fork() else 1
torch_dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
torch_dist.barrier()
kept = torch_dist.group.WORLD
for _ in range(2000):
    torch_dist.all_reduce(torch.ones(1), async_op=True)
    if rank:
        time.sleep(0.001)
if rank:
    os._exit(0)
atexit.register(print, "an exit function ran")
print("at the end")
"""


@pytest.mark.parametrize("time", range(3))
def test_a_rank_that_gloo_still_works_for_ends_with_its_code(run_python, tmp_path, time):
    """Left to the interpreter, five of six such exits had code -6 (seen with torch 2.14)."""
    done = run_python("python", "-c", BUSY + "dist.leave(5, together=False)", tmp_path / "store")
    assert done.returncode == 5, done.stderr
    assert done.stdout == "at the end\nan exit function ran\n"
