"""Text tasks that a trained run is transferred to, few-shot, on the examples of their Hugging Face data sets.

`label` is a number, and -1 (IMDB's unlabelled part, SuperGLUE's test sets) gives no sample. Sources are as in
HyperFormer's code.
"""

from __future__ import annotations

from hyperpelt_ds.tasks.task import Example, Task, classify, digit

SCITAIL = ("entailment", "neutral")  # the numbers of its gold labels


def _text(example: Example) -> tuple[str, str] | None:
    """text, label (0 or 1): the text as it is."""
    target = digit(example["label"], 2)
    return None if target is None else (example["text"], target)


def _review(example: Example) -> tuple[str, str] | None:
    """text, label (0 or 1)."""
    target = digit(example["label"], 2)
    return None if target is None else (f"sentence: {example['text']}", target)


def _question(example: Example) -> tuple[str, str] | None:
    """text, coarse_label (0..5)."""
    target = digit(example["coarse_label"], 6)
    return None if target is None else (f"sentence: {example['text']}", target)


def _science(example: Example) -> tuple[str, str]:
    """sentence1, sentence2, gold_label ("entailment" or "neutral"), as in the configuration `snli_format`."""
    label = example["gold_label"]
    if label not in SCITAIL:
        raise ValueError(f"gold_label {label!r} is not one of {', '.join(SCITAIL)}")
    return f"sentence1: {example['sentence1']} sentence2: {example['sentence2']}", str(SCITAIL.index(label))


TRANSFER = (
    Task(
        "cb",
        "text",
        ("accuracy",),
        "is the speaker of the premise committed to the hypothesis; CommitmentBank, SuperGLUE, under its own terms",
        "Decide whether the premise entails the hypothesis (0), contradicts it (1) or leaves it open (2).",
        classify("premise", "hypothesis", classes=3),
        labels=("0", "1", "2"),
    ),
    Task(
        "boolq",
        "text",
        ("accuracy",),
        "yes or no to a question about a passage; BoolQ, SuperGLUE, CC BY-SA 3.0",
        "Answer the question about the passage: 1 for yes, 0 for no.",
        classify("question", "passage", classes=2),
        labels=("0", "1"),
    ),
    Task(
        "imdb",
        "text",
        ("accuracy",),
        "positive or negative film review; IMDB, Maas et al. 2011, under its own terms",
        "Decide whether the film review is positive: 1 if it is positive, 0 if it is negative.",
        _text,
        labels=("0", "1"),
    ),
    Task(
        "paws",
        "text",
        ("accuracy",),
        "do two sentences with the same words say the same; PAWS labeled_final, Zhang et al. 2019, under its own terms",
        "Decide whether the two sentences say the same although their word order differs: 1 if they do, 0 if not.",
        classify("sentence1", "sentence2", classes=2),
        labels=("0", "1"),
    ),
    Task(
        "trec",
        "text",
        ("accuracy",),
        "what kind of answer a question asks for; TREC, Li & Roth 2002, under its own terms",
        "Say what the question asks for: an abbreviation (0), a thing (1), a description (2), a person (3), "
        "a place (4) or a number (5).",
        _question,
        labels=("0", "1", "2", "3", "4", "5"),
    ),
    Task(
        "scitail",
        "text",
        ("accuracy",),
        "does a sentence support a statement of science; SciTail, Khot et al. 2018, under its own terms",
        "Decide whether the first sentence supports the statement of science: 0 if it does, 1 if it does not.",
        _science,
        labels=("0", "1"),
    ),
    Task(
        "yelp_polarity",
        "text",
        ("accuracy",),
        "positive or negative review of a business; Yelp polarity, Zhang et al. 2015, under its own terms",
        "Decide whether the customer's review of a business is positive: 1 if it is positive, 0 if it is negative.",
        _review,
        labels=("0", "1"),
    ),
)
