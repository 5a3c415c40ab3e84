"""Samples to a Batch: tokens, padding, and every task and image of the batch named once.

The tokenizer is any fast tokenizer of Hugging Face, handed in. This file must not know shards, order or ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Batch, Sample

IGNORED = -100  # the label that a loss leaves out
Stack = Callable[[Sequence[np.ndarray]], Tensor]
"""Makes one tensor (C', V, F) of the features (V, F) of images."""


class UnusableSample(ValueError):
    """A sample that no batch can hold, found while making one."""

    def __init__(self, sample: Sample, reason: str) -> None:
        super().__init__(f"sample {sample.key!r} of task {sample.task!r}: {reason}")
        self.sample, self.reason = sample, reason


class Row(NamedTuple):
    """One sample of a batch as token ids."""

    sample: Sample
    source: list[int]
    target: list[int]
    loss_weight: float


class Collator:
    """Makes batches for one run. `tasks` in order: a task's place is its row in the task embedding table.

    Targets end with the tokenizer's end-of-text token: it is added where the tokenizer does not do so itself, and then
    nothing else is (a target that continues its source has no token for a beginning).
    With `name_task` every source begins with its task's name. With `cells` and `channels` None the run has no visual
    branch, and the samples' images are left out. `truncated` counts the sources cut at `max_source_length` tokens since
    this object was made (in this process).
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: Sequence[str],
        max_source_length: int,
        max_target_length: int,
        cells: int | None,
        channels: int | None,
        name_task: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "model.backbone: its tokenizer has no end-of-text token, so that no model could learn to end a "
                "target; set one in its tokenizer_config.json"
            )
        if tokenizer.pad_token_id is None:
            raise ValueError("model.backbone: its tokenizer has no pad token; set one in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.ends_targets = tokenizer(text_target="a")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self._rows = {task: row for row, task in enumerate(tasks)}
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.name_task = name_task
        self.grid = None if cells is None or channels is None else (cells, channels)
        self.truncated = 0

    def __call__(
        self, samples: Sequence[Sample], features: Mapping[str, np.ndarray], loss_weights: Sequence[float]
    ) -> Batch:
        """One micro-batch: `rows` and `batch` together, with the errors of both."""
        return self.batch(self.rows(samples, loss_weights), features)

    def rows(self, samples: Sequence[Sample], loss_weights: Sequence[float]) -> list[Row]:
        """The samples as token ids, one loss weight a sample.

        Raises UnusableSample for a target of more than `max_target_length` tokens, and ValueError naming the sample for
        a task that the run does not have.
        """
        for sample in samples:
            if sample.task not in self._rows:
                raise ValueError(f"sample {sample.key!r}: task {sample.task!r} is not one of {', '.join(self._rows)}")
        targets = self.targets(samples)
        return [Row(*row) for row in zip(samples, self._sources(samples), targets, loss_weights, strict=True)]

    def batch(self, rows: Sequence[Row], features: Mapping[str, np.ndarray], stack: Stack | None = None) -> Batch:
        """Rows as one padded micro-batch, sorted by condition. features: image id -> (V, F). The batch's images are
        what `stack` makes of them, float32 if there is none.

        Raises ValueError naming the image for missing features or features of another shape.
        """
        rows = sorted(rows, key=lambda row: (self._rows[row.sample.task], row.sample.image or ""))
        samples = [row.sample for row in rows]
        tasks, task_rows = _distinct([self._rows[sample.task] for sample in samples])
        images, image_rows = self._images(samples, features, stack or _stacked) if self.grid else (None, None)
        input_ids = _padded([row.source for row in rows], self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row.source) for row in rows])
        labels = _padded([row.target for row in rows], IGNORED)
        return Batch(
            input_ids=input_ids,
            attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            labels=labels,
            targets=(labels.flatten() != IGNORED).nonzero().squeeze(1),
            tasks=torch.tensor(tasks),
            task_rows=torch.tensor(task_rows),
            images=images,
            image_rows=image_rows,
            loss_weights=torch.tensor([row.loss_weight for row in rows], dtype=torch.float32),
            samples=tuple(samples),
        )

    def _sources(self, samples: Sequence[Sample]) -> list[list[int]]:
        texts = [sample.source for sample in samples]
        if self.name_task:
            texts = [source_start(sample.task) + text for sample, text in zip(samples, texts, strict=True)]
        rows = self._ids(texts, truncation=True, max_length=self.max_source_length)
        # only a source that fills the limit can have been cut; slow tokenizers do not say, so these are made again
        full = [text for text, row in zip(texts, rows, strict=True) if len(row) == self.max_source_length]
        if full:
            whole = self._ids(full, truncation=False, verbose=False)
            self.truncated += sum(len(row) > self.max_source_length for row in whole)
        return [row or [self.tokenizer.eos_token_id] for row in rows]  # a first target token must follow something

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of all the texts together, uncut."""
        return sum(map(len, self.tokenizer(list(texts), verbose=False)["input_ids"])) if texts else 0

    def _ids(self, *texts: Any, **options: Any) -> list[list[int]]:
        """Token ids alone: what a tokenizer gives beside them takes a fifth of its time."""
        return self.tokenizer(*texts, return_attention_mask=False, return_token_type_ids=False, **options)["input_ids"]

    def targets(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Token ids of the samples' targets; raises UnusableSample for one whose target is too long."""
        texts, places = _distinct([sample.target for sample in samples])
        found = self._ids(text_target=texts, add_special_tokens=self.ends_targets)
        if not self.ends_targets:
            found = [[*tokens, self.tokenizer.eos_token_id] for tokens in found]
        targets = [found[place] for place in places]
        for sample, tokens in zip(samples, targets, strict=True):
            if len(tokens) > self.max_target_length:
                reason = f"its target has {len(tokens)} tokens, data.max_target_length is {self.max_target_length}"
                raise UnusableSample(sample, reason)
        return targets

    def _images(
        self, samples: Sequence[Sample], features: Mapping[str, np.ndarray], stack: Stack
    ) -> tuple[Tensor, Tensor]:
        names, rows = _distinct([sample.image for sample in samples if sample.image is not None])
        for name in names:
            if name not in features:
                user = next(sample for sample in samples if sample.image == name)
                raise ValueError(f"sample {user.key!r} of task {user.task!r}: no features for its image {name!r}")
            if features[name].shape != self.grid:
                raise ValueError(f"image {name!r}: features of shape {features[name].shape}, expected {self.grid}")
        assert self.grid is not None
        grids = [features[name] for name in names] or [np.zeros(self.grid, dtype=np.float32)]
        found = iter(rows)
        image_rows = [-1 if sample.image is None else next(found) for sample in samples]
        return stack(grids), torch.tensor(image_rows)


def source_start(task: str) -> str:
    """What a source begins with where it names its task."""
    return f"{task.replace('_', ' ')}: "


def collator_for(config: Config, tasks: Sequence[str], tokenizer: Any) -> Collator:
    """The collator of a run: lengths from `config.data`; images only if `config.vision` names an encoder."""
    vision = config.vision if config.vision.encoder else None
    return Collator(
        tokenizer,
        tasks,
        config.data.max_source_length,
        config.data.max_target_length,
        vision.cells if vision else None,
        vision.channels if vision else None,
        config.data.name_task,
    )


def _stacked(grids: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(grids)).float()


def _distinct(items: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The distinct items in order of first appearance, and each item's place among them."""
    places: dict[Any, int] = {}
    rows = [places.setdefault(item, len(places)) for item in items]
    return list(places), rows


def _padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    """(B, T) int64, T the longest row, filled with `padding` on the right."""
    table = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)
