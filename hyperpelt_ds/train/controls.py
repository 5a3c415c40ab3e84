"""Controls: what a run answers when something that it should depend on is exchanged for another.

A score that stays where it was shows that the model does without it. Each control is one function: it is given the run
and the samples of one task, changes samples or model for as long as its context lasts, and yields the samples to ask
instead, or none where it does not apply. Draws are the same every time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.model import Predictor


@contextmanager
def other_task(run: Predictor, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Every sample under another task, drawn uniformly from the run's; none if there is no other."""
    others = [name for name in run.config.data.tasks if name != samples[0].task]
    if not others:
        yield []
        return
    draws = np.random.default_rng(0).integers(len(others), size=len(samples))
    yield [dataclasses.replace(sample, task=others[draw]) for sample, draw in zip(samples, draws, strict=True)]


@contextmanager
def other_image(run: Predictor, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Every sample with another image: one cycle through all of them, so that none keeps its own; none without two."""
    images = sorted({sample.image for sample in samples if sample.image is not None})
    if len(images) < 2:
        yield []
        return
    cycle = np.random.default_rng(0).permutation(images).tolist()
    following = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    yield [dataclasses.replace(s, image=following[s.image]) if s.image is not None else s for s in samples]


Control = Callable[[Predictor, Sequence[Sample]], AbstractContextManager[list[Sample]]]
CONTROLS: dict[str, Control] = {"task": other_task, "image": other_image}
