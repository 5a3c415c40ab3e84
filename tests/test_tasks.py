"""Task records and baselines: what each example becomes, and what can be answered without a model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hyperpelt_ds import tasks
from hyperpelt_ds.tasks import baselines, metrics
from hyperpelt_ds.tasks.demo import COLOURS, DEMO, LEAD_CHARACTERS, RATINGS, SHAPES, TOPICS, kind_of_answer
from hyperpelt_ds.tasks.glue import GLUE, LEADERBOARD, leaderboard_file
from hyperpelt_ds.tasks.task import normalise
from hyperpelt_ds.tasks.transfer import TRANSFER

MOVIE = {"text": "A film of rare wit.", "rating": 2.6}
ARTICLE = {"extract": "A hat is a head covering. " * 20, "topic": "Everyday life", "description": "Head covering"}
QUESTION = {"question": "what shape is present?", "answer": "circle"}
CAPTION = {"question": "what shape is present?", "colour": "red", "shape": "circle"}
DEMO_EXAMPLES = {
    "movie_sentiment": MOVIE,
    "movie_rating": MOVIE,
    "wikipedia_topic": ARTICLE,
    "wikipedia_description": ARTICLE,
    "easy_vqa": QUESTION,
    "shape_caption": CAPTION,
}

PAIR = {"sentence1": "A man sleeps.", "sentence2": "A man is awake.", "idx": 7}
NLI = {"premise": "A man sleeps.", "hypothesis": "A man is awake."}
# task -> example, source, target
RENDERED = {
    "movie_sentiment": (MOVIE, "A film of rare wit.", "positive"),
    "movie_rating": (MOVIE, "A film of rare wit.", "great"),
    "wikipedia_topic": (ARTICLE, None, "Everyday life"),
    "wikipedia_description": (ARTICLE, None, "Head covering"),
    "easy_vqa": (QUESTION, "what shape is present?", "circle"),
    "shape_caption": (CAPTION, "what shape is present?", "a red circle"),
    "glue_cola": ({"sentence": "He slept.", "label": 1}, "sentence: He slept.", "1"),
    "glue_sst2": ({"sentence": "a fine film", "label": 0}, "sentence: a fine film", "0"),
    "glue_mrpc": ({**PAIR, "label": 0}, "sentence1: A man sleeps. sentence2: A man is awake.", "0"),
    "glue_qqp": (
        {"question1": "Who?", "question2": "Which one?", "label": 1},
        "question1: Who? question2: Which one?",
        "1",
    ),
    "glue_stsb": (
        {**PAIR, "label": 3.799999952316284},
        "sentence1: A man sleeps. sentence2: A man is awake.",
        "3.8",
    ),
    "glue_mnli": ({**NLI, "label": 2}, "premise: A man sleeps. hypothesis: A man is awake.", "2"),
    "glue_qnli": (
        {"question": "Who?", "sentence": "It was he.", "label": 0},
        "question: Who? sentence: It was he.",
        "0",
    ),
    "glue_rte": ({**PAIR, "label": 1}, "sentence1: A man sleeps. sentence2: A man is awake.", "1"),
    "cb": ({**NLI, "label": 1}, "premise: A man sleeps. hypothesis: A man is awake.", "1"),
    "boolq": (
        {"question": "is it so", "passage": "It is so.", "label": 1},
        "question: is it so passage: It is so.",
        "1",
    ),
    "imdb": ({"text": "A fine film.", "label": 1}, "A fine film.", "1"),
    "paws": ({**PAIR, "label": 0}, "sentence1: A man sleeps. sentence2: A man is awake.", "0"),
    "trec": ({"text": "Who was it ?", "coarse_label": 3, "fine_label": 20}, "sentence: Who was it ?", "3"),
    "scitail": ({**PAIR, "gold_label": "neutral"}, "sentence1: A man sleeps. sentence2: A man is awake.", "1"),
    "yelp_polarity": ({"text": "Never again.", "label": 0}, "sentence: Never again.", "0"),
    "vqa_v2": ({"question": "What is it?", "answer": "a dog", "answers": ["a dog"] * 10}, "What is it?", "a dog"),
    "gqa": ({"question": "Is it red?", "answer": "no"}, "Is it red?", "no"),
    "coco_caption": ({"caption": "A dog on a mat."}, "", "A dog on a mat."),
    "okvqa": ({"question": "Who made it?", "answer": "ford"}, "Who made it?", "ford"),
    "snli_ve": ({"hypothesis": "A dog runs.", "label": 0}, "hypothesis: A dog runs.", "0"),
    "nlvr2": ({"sentence": "Both dogs sit.", "label": "True"}, "Both dogs sit.", "true"),
}


def test_every_task_has_an_example_here_and_a_unique_name():
    assert list(RENDERED) == list(tasks.TASKS)
    assert all(tasks.get(name).name == name for name in RENDERED)


@pytest.mark.parametrize("name", RENDERED)
def test_an_example_becomes_its_source_and_target(name):
    example, source, target = RENDERED[name]
    found = tasks.get(name).render(example)
    assert found[1] == target
    assert found[0] == source or source is None


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_a_record_says_all_that_is_asked_of_it(task):
    assert task.metrics and set(task.metrics) <= set(metrics.METRICS)
    for sentence in (task.description, *task.paraphrases):
        assert sentence.endswith(".") and sentence[0].isupper() and sentence.count(". ") == 0
    if task in DEMO:
        assert len({task.description, *task.paraphrases}) == 3
    classes = {"accuracy", "f1", "mcc"} & set(task.metrics)
    assert task.labels or not classes
    assert "f1" not in task.metrics or len(task.labels) == 2
    assert not task.labels or task.parse(RENDERED[task.name][2]) in map(task.parse, task.labels)


def test_no_two_tasks_are_described_alike():
    sentences = [text for task in tasks.TASKS.values() for text in (task.description, *task.paraphrases)]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("pair", zip(list(DEMO_EXAMPLES)[::2], list(DEMO_EXAMPLES)[1::2], strict=True))
def test_sister_tasks_ask_with_the_very_same_source(pair):
    (first, _), (second, _) = (tasks.get(name).render(DEMO_EXAMPLES[name]) for name in pair)
    assert first == second


def test_no_source_names_its_task():
    for name, example in DEMO_EXAMPLES.items():
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
        *[(task.name, {"label": -1}) for task in GLUE],
        *[(task.name, {"label": -1}) for task in TRANSFER if task.name not in ("trec", "scitail")],
        ("trec", {"coarse_label": -1}),
        ("vqa_v2", {"answer": ""}),
        ("gqa", {"answer": ""}),
        ("coco_caption", {"caption": ""}),
        ("okvqa", {"answer": ""}),
        ("snli_ve", {"label": -1}),
    ],
)
def test_an_example_without_a_label_gives_nothing(name, change):
    assert tasks.get(name).render({**RENDERED[name][0], **change}) is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("glue_rte", {"label": 2}, "label 2 is not one of 0 to 1, or -1 for none"),
        ("glue_mnli", {"label": 3}, "label 3 is not one of 0 to 2"),
        ("glue_stsb", {"label": 5.2}, r"label 5\.2 is not between 0 and 5"),
        ("trec", {"coarse_label": 6}, "label 6 is not one of 0 to 5"),
        ("scitail", {"gold_label": "contradiction"}, "gold_label 'contradiction' is not one of entailment, neutral"),
    ],
)
def test_a_label_that_is_none_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        tasks.get(name).render({**RENDERED[name][0], **change})


def test_similarities_are_rounded_to_fifths():
    task = tasks.get("glue_stsb")
    found = [task.render({**PAIR, "label": label})[1] for label in (0.0, 0.25, 1.909, 2.75, 4.95, 5.0)]
    assert found == ["0.0", "0.2", "2.0", "2.8", "5.0", "5.0"]
    assert len(task.labels) == 26 and task.labels[13] == "2.6"


def test_every_glue_task_has_its_file_and_words_on_the_leaderboard():
    assert list(LEADERBOARD) == [task.name for task in GLUE]
    for task in GLUE:
        assert len(LEADERBOARD[task.name].words) in (len(task.labels), 0)
    assert leaderboard_file("glue_sst2", "test") == "SST-2"
    assert leaderboard_file("glue_mnli", "test_matched") == "MNLI-m"
    assert leaderboard_file("glue_mnli", "test_mismatched") == "MNLI-mm"


def test_topics_are_those_of_the_demo():
    assert tasks.get("wikipedia_topic").labels == TOPICS == tuple(sorted(TOPICS)) and len(TOPICS) == 11


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
