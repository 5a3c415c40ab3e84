"""Controls: what a run answers when something that it should depend on is exchanged for another.

A score that stays where it was shows that the model does without it. Each control is one function: it is given the run
and the samples of one task, changes samples or model for as long as its context lasts, and yields the samples to ask
instead, or none where it does not apply. Draws are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from hyperpelt_ds import tasks
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.model import Predictor

Control = Callable[[Predictor, Sequence[Sample]], AbstractContextManager[list[Sample]]]


@contextmanager
def other_task(run: Predictor, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Every sample under another task, drawn uniformly from the run's; none if there is no other."""
    others = [name for name in run.config.data.tasks if name != samples[0].task]
    if not others:
        yield []
        return
    draws = np.random.default_rng(0).integers(len(others), size=len(samples))
    yield [sample._replace(task=others[draw]) for sample, draw in zip(samples, draws, strict=True)]


@contextmanager
def other_image(run: Predictor, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Every sample with another image: one cycle through all of them, so that none keeps its own; none without two."""
    images = sorted({sample.image for sample in samples if sample.image is not None})
    if len(images) < 2:
        yield []
        return
    cycle = np.random.default_rng(0).permutation(images).tolist()
    following = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    yield [s._replace(image=following[s.image]) if s.image is not None else s for s in samples]


@contextmanager
def other_layer(run: Predictor, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """What is generated for a layer goes to the one before it; none where nothing is generated."""
    if not len(run.model.hypernet.controllers):
        yield []
        return
    with run.model.hypernet.shifted_layers():
        yield list(samples)


def _told(say: Callable[[Predictor, str], str | None]) -> Control:
    """A control that tells the run something else about the task; none if it is told nothing, or `say` has nothing."""

    @contextmanager
    def told(run: Predictor, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        task = samples[0].task
        sentence = say(run, task) if "description" in run.model.hypernet.conditions else None
        if sentence is None:
            yield []
            return
        with run.described(task, sentence):
            yield list(samples)

    return told


def _next_task(run: Predictor, task: str) -> str | None:
    """What is said about the next task of the run that has other things said about it."""
    names, own = run.model.tasks, tasks.get(task).description
    place = names.index(task)
    others = [tasks.get(name).description for name in (*names[place + 1 :], *names[:place])]
    return next((said for said in others if said != own), None)


def _other_words(run: Predictor, task: str) -> str | None:
    return next(iter(tasks.get(task).paraphrases), None)


CONTROLS: dict[str, Control] = {
    "task": other_task,
    "image": other_image,
    "layer": other_layer,
    "description": _told(_next_task),
    "paraphrase": _told(_other_words),
    "unrelated": _told(lambda run, task: "The harbour was quiet, and a mild wind came from the west."),
}
DEFAULT = ("task", "image")
