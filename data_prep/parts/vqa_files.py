"""Questions and annotations in the format of the VQA challenge, which VQA v2 and OK-VQA share, as entries.

A questions file has `questions` (question_id, image_id, question), an annotations file `annotations` (question_id,
image_id, answer_type, question_type, answers: ten objects with `answer`). How answers are compared, and what one is
worth, is the business of hyperpelt_ds/tasks/vqa_accuracy.py.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperpelt_ds.tasks.vqa_accuracy import PEOPLE_FOR_CERTAIN, normalise_answer, vqa_accuracy
from parts import official
from parts.building import NO_LABEL, Entry, LeftOut, share
from parts.coco_files import image_file, image_id

_FIELDS = ("question_id", "image_id", "question", "answer_type", "question_type", "answers")
_SHOWN = 5  # question ids named in an error


@dataclass(frozen=True, slots=True)
class Annotation:
    """What people said to one question: the ten answers, and the kinds of answer and question."""

    image: int
    answers: tuple[str, ...]
    answer_type: str
    question_type: str


@dataclass(frozen=True, slots=True)
class Question:
    """One question on COCO image `image` of `folder` (train2014, ...)."""

    number: int
    image: int
    folder: str
    text: str
    annotation: Annotation | None


def read(questions: Path, annotations: Path | None, folder: str) -> Iterator[Question]:
    """The questions of an official pair of files, or of a questions file without answers, in their order.

    Raises ValueError naming file and question for a field that is missing or of the wrong kind, questions that have no
    annotation or that come twice, and an annotation of another image.
    """
    known = _annotations(annotations) if annotations else {}
    rows = list(official.objects(official.load(questions, dict, _slim), "questions", str(questions)))
    numbers = Counter(official.get(fields, "question_id", int, where) for where, fields in rows)
    if len(numbers) < len(rows):
        raise ValueError(f"{questions}: question {numbers.most_common(1)[0][0]} comes twice")
    missing = [number for number in numbers if annotations and number not in known]
    if missing:
        some = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        raise ValueError(f"{questions}: {len(missing)} questions have no annotation in {annotations}: {some}")
    for number, (_, fields) in zip(numbers, rows, strict=True):
        where = f"{questions}, question {number}"
        image, text = official.get(fields, "image_id", int, where), official.get(fields, "question", str, where)
        annotation = known.get(number)
        if annotation and annotation.image != image:
            raise ValueError(f"{where}: is on image {image}, and on image {annotation.image} in {annotations}")
        yield Question(number, image, folder, " ".join(text.split()), annotation)


def entry(question: Question, seed: int | None, group: str | None = None) -> Entry | LeftOut:
    """With a seed, for training, the target is drawn in proportion to the answers' soft scores; without, it is the
    commonest answer.

    A question without annotation becomes an unlabelled entry; one to which nobody gave an answer with a word in it is
    left out.
    """
    found, answer = question.annotation, "unknown"
    if found:
        counts = answer_counts(found.answers)
        if not counts:
            return NO_LABEL
        if seed is None:
            answer = max(counts, key=lambda choice: choice[1])[0]
        else:
            answer = _draw(counts, len(found.answers), share(f"{seed} {question.number}"))
    image = image_id(question.image)
    return Entry(
        str(question.number),
        image,
        {"question": question.text, "answer": answer},
        image,
        group,
        found.answers if found else (),
        (image_file(question.folder, question.image),),
        labelled=found is not None,
    )


def answer_counts(answers: Sequence[str]) -> list[tuple[str, int]]:
    """(answer, how often it was given) for all that differ as VQA compares them, in the order of their first use, each
    in its commonest spelling. What has no word, such as "?", is no answer."""
    spellings: dict[str, Counter[str]] = {}
    for answer in answers:
        spellings.setdefault(_normalise(answer), Counter())[answer.strip()] += 1
    return [(own.most_common(1)[0][0], own.total()) for words, own in spellings.items() if words]


def _draw(counts: Sequence[tuple[str, int]], people: int, share: float) -> str:
    """The answer at place `share` (0..1) of a line on which each takes the length of its soft score."""
    scores = [soft_score(times, people) for _, times in counts]
    place = share * sum(scores)
    for (answer, _), score in zip(counts, scores, strict=True):
        if place < score:
            return answer
        place -= score
    return counts[-1][0]  # reached by rounding alone


_normalise = functools.cache(normalise_answer)  # VQA v2 has 6.6 million answers, of which few differ


@functools.cache
def soft_score(times: int, people: int) -> float:
    """VQA's accuracy of an answer that so many of the people gave."""
    return vqa_accuracy("yes", ["yes"] * times + ["no"] * (people - times))


def _annotations(path: Path) -> dict[int, Annotation]:
    """The annotations by question id."""
    found = {}
    for where, fields in official.objects(official.load(path, dict, _slim), "annotations", str(path)):
        number = official.get(fields, "question_id", int, where)
        where = f"{path}, question {number}"
        answers = official.get(fields, "answers", list, where)
        if len(answers) <= PEOPLE_FOR_CERTAIN or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{where}: field 'answers' must list ten objects with a text 'answer', got {answers!r}")
        found[number] = Annotation(
            official.get(fields, "image_id", int, where),
            tuple(answers),
            official.get(fields, "answer_type", str, where),
            official.get(fields, "question_type", str, where),
        )
    return found


def _slim(fields: dict[str, Any]) -> Any:
    """Of an answer, its text alone; of a question or an annotation, what is used here."""
    if "answer_id" in fields:
        answer = fields.get("answer")
        return sys.intern(answer) if isinstance(answer, str) else answer
    if "question_id" in fields:
        return {name: fields[name] for name in _FIELDS if name in fields}
    return fields
