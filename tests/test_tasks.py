"""Tasks, metrics and baselines: what each example becomes, and how answers are judged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hyperpelt_ds import tasks
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.tasks import baselines, metrics
from hyperpelt_ds.tasks.demo import COLOURS, LEAD_CHARACTERS, RATINGS, SHAPES, kind_of_answer
from hyperpelt_ds.tasks.task import normalise

MOVIE = {"text": "A film of rare wit.", "rating": 2.6}
ARTICLE = {"extract": "A hat is a head covering. " * 20, "topic": "Everyday life", "description": "Head covering"}
QUESTION = {"question": "what shape is present?", "answer": "circle"}
CAPTION = {"question": "what shape is present?", "colour": "red", "shape": "circle"}
EXAMPLES = {
    "movie_sentiment": MOVIE,
    "movie_rating": MOVIE,
    "wikipedia_topic": ARTICLE,
    "wikipedia_description": ARTICLE,
    "easy_vqa": QUESTION,
    "shape_caption": CAPTION,
}


def _sample(target: str, task: str = "movie_sentiment") -> Sample:
    return Sample("k", task, "", target)


def test_every_task_has_an_example_here_and_a_unique_name():
    assert list(EXAMPLES) == list(tasks.TASKS)
    assert all(tasks.get(name).name == name for name in EXAMPLES)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("movie_sentiment", "positive"),
        ("movie_rating", "great"),
        ("wikipedia_topic", "Everyday life"),
        ("wikipedia_description", "Head covering"),
        ("easy_vqa", "circle"),
        ("shape_caption", "a red circle"),
    ],
)
def test_an_example_becomes_its_target(name, target):
    assert tasks.get(name).render(EXAMPLES[name])[1] == target


@pytest.mark.parametrize("pair", zip(list(EXAMPLES)[::2], list(EXAMPLES)[1::2], strict=True))
def test_sister_tasks_ask_with_the_very_same_source(pair):
    (first, _), (second, _) = (tasks.get(name).render(EXAMPLES[name]) for name in pair)
    assert first == second


def test_no_source_names_its_task():
    for name, example in EXAMPLES.items():
        source, target = tasks.get(name).render(example)
        for word in [*name.split("_"), "sentiment", "rate", "topic", "describe", "caption", "answer", target]:
            if word not in ("shape", "easy", "vqa"):  # "shape" is a word of easy-VQA's own questions
                assert word.casefold() not in normalise(source).split()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("movie_sentiment", {"rating": 0.0}),
        ("wikipedia_topic", {"topic": "Uncategorized"}),
        ("wikipedia_description", {"description": ""}),
        ("shape_caption", {"colour": ""}),
        ("shape_caption", {"shape": ""}),
    ],
)
def test_an_example_without_a_label_gives_nothing(name, change):
    assert tasks.get(name).render({**EXAMPLES[name], **change}) is None


def test_ratings_from_worst_to_best_are_nine_different_words():
    render = tasks.get("movie_rating").render
    words = [render({"text": "", "rating": float(rating)})[1] for rating in range(-4, 5)]
    assert words == list(RATINGS) and len(set(words)) == 9
    assert render({"text": "", "rating": -2.8})[1] == RATINGS[1]


def test_a_lead_ends_at_a_word_within_its_length():
    source, _ = tasks.get("wikipedia_topic").render(ARTICLE)
    assert len(source) <= LEAD_CHARACTERS
    assert ARTICLE["extract"].startswith(source + " ")


def test_answers_fall_into_three_kinds():
    kinds = {kind_of_answer(answer) for answer in (*COLOURS, *SHAPES, "yes", "no")}
    assert kinds == {"colour", "shape", "yes_no"}
    assert (
        kind_of_answer("teal") == "colour" and kind_of_answer("circle") == "shape" and kind_of_answer("no") == "yes_no"
    )


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"'movie_sentimnt'.*movie_sentiment"):
        tasks.get("movie_sentimnt")
    with pytest.raises(ValueError, match="wikipedia_topic"):
        tasks.get("qqqq")


def test_exact_match_overlooks_case_spaces_and_punctuation_only():
    task = tasks.get("shape_caption")
    found = metrics.score(task, ["A red  circle.", "a red", ""], [_sample("a red circle")] * 3)
    assert found == [1.0, 0.0, 0.0]


def test_token_f1_counts_common_words_with_their_number():
    task = tasks.get("wikipedia_description")
    targets = ["Family of birds", "birds birds", "Family of birds", ""]
    found = metrics.score(task, ["family of fishes", "birds", "", ""], [_sample(target) for target in targets])
    assert found == pytest.approx([2 / 3, 2 / 3, 0.0, 1.0])


def test_answers_and_samples_must_be_equally_many():
    with pytest.raises(ValueError, match="zip"):
        metrics.score(tasks.get("easy_vqa"), ["yes"], [])


def test_the_interval_is_that_of_a_proportion_and_repeats_itself():
    scores = [1.0] * 300 + [0.0] * 100
    items = [str(i) for i in range(400)]
    low, high = metrics.interval(scores, items)
    width = 1.96 * (0.75 * 0.25 / 400) ** 0.5  # the normal approximation
    assert low == pytest.approx(0.75 - width, abs=0.006) and high == pytest.approx(0.75 + width, abs=0.006)
    assert metrics.interval(scores, items) == (low, high)


def test_questions_about_one_image_widen_the_interval():
    scores = list(np.repeat([1.0, 0.0], 50)) * 4  # 8 items of 50 answers, all right or all wrong
    items = [str(i // 50) for i in range(400)]
    low, high = metrics.interval(scores, items)
    alone_low, alone_high = metrics.interval(scores, [str(i) for i in range(400)])
    assert high - low > 4 * (alone_high - alone_low)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no scores"):
        metrics.interval([], [])


def test_majority_answers_the_most_frequent_target_and_breaks_ties_by_name():
    assert baselines.majority(["a", "b", "c"], ["x", "y", "y"], ["a", "z"]) == ["y", "y"]
    assert baselines.majority(["a", "b"], ["y", "x"], ["a"]) == ["x"]


def test_source_prior_answers_by_the_question_and_falls_back_to_all():
    sources = ["is it red?"] * 3 + ["what is it?"] * 2
    targets = ["no", "no", "yes", "circle", "circle"]
    assert baselines.source_prior(sources, targets, ["is it red?", "what is it?", "new"]) == ["no", "circle", "circle"]


def test_bag_of_words_learns_which_words_decide_whatever_their_order():
    rng = np.random.default_rng(0)
    fillers = ["the", "a", "film", "plot", "actor", "scene"]

    def sentence(word: str) -> str:
        return " ".join(rng.permutation([word, *rng.choice(fillers, 4)]))

    words = {"superb": "positive", "moving": "positive", "dull": "negative", "clumsy": "negative"}
    sources, targets = zip(*[(sentence(word), label) for word, label in words.items() for _ in range(20)], strict=True)
    queries = [sentence(word) for word in words]
    assert baselines.bag_of_words(sources, targets, queries) == list(words.values())
    assert baselines.bag_of_words(sources, targets, ["", "unheard"])[0] in words.values()  # no known word at all


def test_baselines_need_training_targets():
    with pytest.raises(ValueError, match="at least one"):
        baselines.majority([], [], ["a"])


def test_task_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tasks.get("easy_vqa").name = "other"
