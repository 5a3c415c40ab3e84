"""What a run reports: figures gathered on the device, read at log steps, written to TensorBoard and metrics.jsonl.

The only file that writes TensorBoard events. Both files get the same names. It must not know when a log step is.

    train/loss, train/<task>/loss       mean over the samples since the last log step, over all ranks, without those of
                                        skipped steps
    train/learning_rate                 of the last step
    train/gradient_norm                 of the last step, before clipping, if it was applied
    train/skipped_steps                 steps of the run that changed no weight
    perf/samples_per_second, perf/tokens_per_second   over all ranks; tokens are real source and target tokens
    perf/memory_gib                     peak of the busiest rank: device memory, or the process's on a CPU
    data/padding_share                  share of the batches' token places that were padding
    data/truncated                      sources cut at data.max_source_length since this process began, over all ranks
    data/holes                          samples that were drawn and could not be used, since the run's first step
    data/wait_fraction                  share of the time spent waiting for batches
    eval/<task>/<metric>, eval/mean     on the validation split
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from hyperpelt_ds import dist
from hyperpelt_ds.contracts import Batch

TENSORBOARD = "tensorboard"
LINES = "metrics.jsonl"


class Window:
    """Sums over the micro-batches since the last `read`. Nothing leaves the device before that."""

    def __init__(self, tasks: Sequence[str], device: torch.device):
        self.tasks, self.device = tuple(tasks), device
        self._step: list[tuple[Batch, Tensor]] = []
        self._clear()

    def add(self, batch: Batch, sample_losses: Tensor) -> None:
        """A micro-batch on the device and its sample_losses (B,), to be kept or dropped with the step."""
        self._step.append((batch._replace(images=None), sample_losses.detach()))

    def keep(self) -> None:
        """The step that was added counts; samples of weight 0 do not."""
        for batch, sample_losses in self._step:
            count = (batch.loss_weights > 0).double()
            rows = batch.tasks[batch.task_rows]
            self._losses.index_add_(0, rows, sample_losses.double() * count)
            self._counts.index_add_(0, rows, count)
            self._tokens += batch.attention_mask.sum() + (batch.labels != -100).sum()
            self._places += batch.attention_mask.numel() + batch.labels.numel()
        self._step.clear()

    def drop(self) -> list[str]:
        """The step that was added does not count; names its samples whose loss is not finite. Waits for the device."""
        names = [
            f"{sample.task}/{sample.key}"
            for batch, sample_losses in self._step
            for sample, loss, weight in zip(
                batch.samples, sample_losses.tolist(), batch.loss_weights.tolist(), strict=True
            )
            if weight and not math.isfinite(loss)
        ]
        self._step.clear()
        return names

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the code that waits for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of training (validation, saving) and shall not count in the rates."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """The window's figures over all ranks, then a new window begins. Waits for the device; every rank calls it."""
        numbers = torch.cat([self._losses, self._counts, self._tokens.double()[None]]).tolist()
        elapsed = time.perf_counter() - self._start
        mine = [*numbers, float(self._places), self._waited / elapsed, elapsed]
        ranks = dist.gather((mine, _memory()))
        *sums, tokens, places, waited, elapsed = (sum(column) for column in zip(*(r[0] for r in ranks), strict=True))
        losses, counts = sums[: len(self.tasks)], sums[len(self.tasks) :]
        self._clear()
        seconds = elapsed / len(ranks)
        means = {f"train/{t}/loss": x / n for t, x, n in zip(self.tasks, losses, counts, strict=True) if n}
        return {
            **({"train/loss": sum(losses) / sum(counts)} if any(counts) else {}),
            **means,
            "perf/samples_per_second": sum(counts) / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/memory_gib": max(r[1] for r in ranks),
            **({"data/padding_share": 1.0 - tokens / places} if places else {}),
            "data/wait_fraction": waited / len(ranks),
        }

    def _clear(self) -> None:
        self._losses = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.device)
        self._counts = torch.zeros_like(self._losses)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        self._places, self._waited, self._start = 0, 0.0, time.perf_counter()


class Writer:
    """Appends figures to run_dir/tensorboard and run_dir/metrics.jsonl; silent on every rank but 0.

    A run that goes on from `step` drops what an interrupted one wrote after it.
    """

    def __init__(self, run_dir: Path, step: int):
        self._board: SummaryWriter | None = None
        self._lines = run_dir / LINES
        self.validated = 0
        """The last step whose validation was written; on rank 0."""
        if dist.rank() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            drop_after(self._lines, step)
            if self._lines.is_file():
                lines = map(json.loads, self._lines.read_text().splitlines())
                self.validated = max((line["step"] for line in lines if "eval/mean" in line), default=0)
            self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._board is None:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def drop_after(lines: Path, step: int) -> None:
    """Keeps the lines up to `step`; a half-written last line goes as well."""
    if not lines.is_file():
        return
    kept = []
    for line in lines.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    lines.write_text("".join(kept))


def _memory() -> float:
    if dist.has_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
