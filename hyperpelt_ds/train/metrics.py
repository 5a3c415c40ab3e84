"""What a run reports: figures gathered on the device, read at log steps, written to TensorBoard and to lines of JSON.

The only file that writes TensorBoard events. Scalars have the same names in TensorBoard, in metrics.jsonl and in the
monitors that the DeepSpeed JSON asks for. It must not know when a log step is, nor what is in a look at the model.

    train/loss, train/<task>/loss       mean over the samples since the last log step, over all ranks, without those of
                                        skipped steps
    train/learning_rate                 of the last step
    train/gradient_norm                 of the last step, before clipping, if it was applied
    train/skipped_steps                 steps of the run that changed no weight
    perf/samples_per_second, perf/tokens_per_second   over all ranks; tokens are real source and target tokens
    perf/memory_gib                     peak of the busiest rank: device memory, or the process's on a CPU
    perf/sent_mib_by_formula            what a rank sends in a step (train/traffic.py): told, not measured
    data/padding_share                  share of the batches' token places that were padding
    data/truncated                      sources cut at data.max_source_length since this process began, over all ranks
    data/holes                          samples that were drawn and could not be used, since the run's first step
    data/wait_fraction                  share of the time spent waiting for batches
    eval/<task>/<metric>, eval/mean     on the validation split

and of a look at the model (train/observation.py; docs/monitoring.md says what each is):

    gradient_norm/<group>               parts of train/gradient_norm
    gradient_cosine/<kind>, gradient_conflict/<kind>   between tasks, of the gradients of what is generated for each
    weights/<condition>/<block>/<kind>  norm of what is generated for one condition at one site
    prefix_share/<block>                share of attention that prefixes get
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from hyperpelt_ds import dist, lines
from hyperpelt_ds.contracts import Batch
from hyperpelt_ds.train.engine import Monitor

TENSORBOARD = "tensorboard"
LINES = "metrics.jsonl"
OBSERVATIONS, SAMPLES = "observations.jsonl", "samples.jsonl"
PROJECTOR = "projector"

log = dist.logger(__name__)


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
    """Appends to run_dir/tensorboard and to the lines of JSON in run_dir; silent on every rank but 0.

    A run that goes on from `step` drops what an interrupted one wrote after it. `monitor` gets the scalars as well.
    """

    def __init__(self, run_dir: Path, step: int, monitor: Monitor | None = None):
        self._board: SummaryWriter | None = None
        self._folder, self._monitor = run_dir, monitor
        self._full: set[str] = set()
        self.validated = 0
        """The last step whose validation was written; on rank 0."""
        if dist.rank() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            for name in (LINES, OBSERVATIONS, SAMPLES):
                lines.drop_after(run_dir / name, step)
            if (run_dir / LINES).is_file():
                with (run_dir / LINES).open("rb") as written:
                    validated = (json.loads(line)["step"] for line in written if b'"eval/mean"' in line)
                    self.validated = max(validated, default=0)
            self._board = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Scalars by their names."""
        if self._board is None:
            return
        with self._room_for(TENSORBOARD):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        self.append(LINES, [{"step": step, "time": time.time(), **values}])
        if self._monitor is not None:
            self._monitor(step, values)

    def append(self, name: str, added: Sequence[Mapping[str, Any]]) -> None:
        """Lines for one of the run's files of lines; each has its step."""
        if self._board is not None:
            with self._room_for(name), (self._folder / name).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in added))

    def show(
        self,
        step: int,
        histograms: Mapping[str, np.ndarray] | None = None,
        images: Mapping[str, np.ndarray] | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Numbers (any shape) as histograms, images (height, width, 3) uint8, and texts in Markdown."""
        if self._board is None:
            return
        with self._room_for(TENSORBOARD):
            for name, numbers in (histograms or {}).items():
                self._board.add_histogram(name, numbers, step)
            for name, image in (images or {}).items():
                self._board.add_image(name, image, step, dataformats="HWC")
            for name, text in (texts or {}).items():
                self._board.add_text(name, text, step)
            self._board.flush()

    def project(self, name: str, columns: Sequence[str], labels: Sequence[Sequence[str]], points: np.ndarray) -> None:
        """Points (N, d) for the embedding projector, each with words under `columns`, in place of those of this name.

        Written here since SummaryWriter only ever adds points, in a new folder for each step.
        """
        if self._board is None:
            return
        with self._room_for(TENSORBOARD):
            board = self._folder / TENSORBOARD
            (board / PROJECTOR).mkdir(exist_ok=True)
            (board / PROJECTOR / f"{name}.tsv").write_text(_tsv(points.tolist()))
            # the projector takes a single column's first line for a label
            header = [columns] if len(columns) > 1 else []
            (board / PROJECTOR / f"{name}_labels.tsv").write_text(_tsv([*header, *labels]))
            names = sorted(path.stem for path in (board / PROJECTOR).glob("*.tsv") if not path.stem.endswith("_labels"))
            (board / "projector_config.pbtxt").write_text("".join(_PROJECTED.format(name=name) for name in names))

    def close(self) -> None:
        if self._board is not None:
            with self._room_for(TENSORBOARD):
                self._board.close()

    @contextmanager
    def _room_for(self, what: str) -> Iterator[None]:
        """Around writing, which a full disk does not let end the run; it is said once."""
        try:
            yield
        except OSError as error:
            if what not in self._full:
                log.warning("%s: %s lacks figures from here on: %s", self._folder, what, error)
            self._full.add(what)


_PROJECTED = """embeddings {{
  tensor_name: "{name}"
  tensor_path: "projector/{name}.tsv"
  metadata_path: "projector/{name}_labels.tsv"
}}
"""


def _tsv(rows: Sequence[Sequence[object]]) -> str:
    return "".join("\t".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row) + "\n" for row in rows)


def _memory() -> float:
    if dist.has_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
