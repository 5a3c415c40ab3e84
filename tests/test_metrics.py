"""Metrics against figures worked out by hand, their intervals, and what they refuse to score."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from hyperpelt_ds import tasks
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.tasks import glue, metrics, table
from hyperpelt_ds.tasks.task import Task
from hyperpelt_ds.tasks.vqa_accuracy import normalise_answer, vqa_accuracy


def samples(task: str, targets: list[str], references: list[tuple[str, ...]] | None = None) -> list[Sample]:
    given = references or [()] * len(targets)
    pairs = enumerate(zip(targets, given, strict=True))
    return [Sample(f"k{i}", task, "", target, f"item{i}", references=own) for i, (target, own) in pairs]


def score(task: str, predictions: list[str], targets: list[str], references: list[tuple[str, ...]] | None = None):
    return metrics.score(tasks.get(task), predictions, samples(task, targets, references))


def each(task: str, predictions: list[str], targets: list[str], references: list[tuple[str, ...]] | None = None):
    """What each sample contributes to the task's only metric."""
    [rows] = metrics.measure(tasks.get(task), predictions, samples(task, targets, references)).values()
    return rows[:, 0].tolist()


def test_exact_match_overlooks_case_spaces_and_punctuation_only():
    assert each("shape_caption", ["A red  circle.", "a red", ""], ["a red circle"] * 3) == [1.0, 0.0, 0.0]


def test_token_f1_counts_common_words_with_their_number():
    targets = ["Family of birds", "birds birds", "Family of birds", ""]
    found = each("wikipedia_description", ["family of fishes", "birds", "", ""], targets)
    assert found == pytest.approx([2 / 3, 2 / 3, 0.0, 1.0])


def test_accuracy_and_f1_of_the_second_label():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    targets = list("1110110000")
    found = score("glue_mrpc", list("1111000000"), targets)
    assert found == pytest.approx({"accuracy": 7 / 10, "f1": 2 * 3 / (2 * 3 + 1 + 2)})


def test_an_unreadable_answer_is_a_wrong_one_for_accuracy_and_f1():
    # 1 true positive; "maybe" for a 1 is a false negative, for a 0 a false positive
    found = score("glue_qqp", ["1", "maybe", "", "0"], ["1", "1", "0", "0"])
    assert found == pytest.approx({"accuracy": 2 / 4, "f1": 2 / (2 + 1 + 1)})


def test_f1_without_any_positive_is_zero():
    assert score("glue_mrpc", ["0", "0"], ["0", "0"]) == {"accuracy": 1.0, "f1": 0.0}


def test_matthews_correlation_by_its_formula():
    tp, tn, fp, fn = 3, 4, 1, 2
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = score("glue_cola", ["1"] * 3 + ["0"] * 4 + ["1"] + ["0"] * 2, ["1"] * 3 + ["0"] * 4 + ["0"] + ["1"] * 2)
    assert found["mcc"] == pytest.approx(expected)
    assert score("glue_cola", ["0", "1"], ["1", "0"]) == {"mcc": pytest.approx(-1.0)}
    assert score("glue_cola", ["1", "1"], ["1", "0"]) == {"mcc": 0.0}


def test_correlations_of_numbers_and_of_their_ranks():
    # (1, 2), (2, 1), (3, 5) around 2 and 8/3: sum of products 3, of squares 2 and 26/3; ranks (1, 2), (2, 1), (3, 3)
    found = score("glue_stsb", ["1.0", "2", " 3.00"], ["2.0", "1.0", "5.0"])
    assert found["pearson"] == pytest.approx(3 / math.sqrt(2 * 26 / 3))
    assert found["spearman"] == pytest.approx(1 - 6 * (1 + 1 + 0) / (3 * (9 - 1)))


def test_a_text_that_is_no_number_counts_as_minus_one():
    targets = ["0.0", "1.0", "5.0"]
    wanted = score("glue_stsb", ["0", "1", "-1"], targets)
    for text in ("five", "", "nan", "inf", "1 2"):
        assert score("glue_stsb", ["0", "1", text], targets) == wanted


def test_correlation_with_a_constant_is_zero_and_says_so():
    with pytest.warns(UserWarning, match="'glue_stsb': all 3 predictions are the same number"):
        found = score("glue_stsb", ["2.0"] * 3, ["1.0", "2.0", "3.0"])
    assert found == {"pearson": 0.0, "spearman": 0.0}
    with pytest.warns(UserWarning, match="all 2 targets"):
        score("glue_stsb", ["1", "2"], ["2.0", "2.0"])


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_averages_over_the_sets_of_nine(matches, expected):
    """3 of 10, say: seven of the sets have 3 matches, the other three have 2, and (7 + 3 x 2/3) / 10 = 0.9."""
    answers = ("red",) * matches + ("blue",) * (10 - matches)
    assert each("vqa_v2", ["Red."], ["blue"], [answers]) == pytest.approx([expected])
    assert each("okvqa", ["Red."], ["blue"], [answers]) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog", "dog"),
        ("two\n", "2"),
        ("none", "0"),
        ("a an the", ""),
        ("dont know", "don't know"),
        ("Thats it", "that's it"),
        ("its", "its"),
        ("they're", "they're"),
        ("girl's", "girl's"),
        ("2:50 p.m.", "2:50 pm"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("t-shirt", "t shirt"),
        ("black/white?", "black white"),
        ("50%", "50%"),
        ("eleven", "eleven"),
    ],
)
def test_vqa_answers_are_normalised_by_the_published_rules(text, expected):
    assert normalise_answer(text) == expected
    assert normalise_answer(expected) == expected


def test_vqa_normalises_the_answers_of_people_too():
    assert vqa_accuracy("2 dogs", ["Two dogs", "two Dogs!", "2 dogs", "the two dogs", "cat"]) == pytest.approx(1.0)


def test_gqa_accuracy_is_by_the_very_words():
    assert each("gqa", ["T-shirt ", "t shirt", "yes."], ["t-shirt", "t-shirt", "yes"]) == [1.0, 0.0, 0.0]


def captions(*pairs: tuple[str, ...]) -> dict[str, float]:
    """Each pair is a prediction and its references."""
    return score("coco_caption", [p for p, *_ in pairs], [r for _, r, *_ in pairs], [tuple(r) for _, *r in pairs])


def test_bleu_is_the_geometric_mean_of_the_corpus_precisions():
    found = captions(
        # matches of 1- to 4-grams: 5 of 6, 3 of 5, 2 of 4, 1 of 3; then all of 4, 3, 2, 1
        ("A man rides a brown horse.", "a man rides a horse today"),
        ("two dogs run fast", "two dogs run fast"),
    )
    assert found["bleu4"] == pytest.approx((9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** (1 / 4))


def test_bleu_counts_a_word_as_often_as_one_reference_has_it_and_punishes_what_is_too_short():
    # "the" is twice in the second reference: 2 of 4 words match, and no 2-gram does
    assert captions(("the the the the", "the cat", "the dog and the cat"))["bleu4"] == 0.0
    # every 4-gram matches; 4 words against the nearer reference's 5
    found = captions(("a b c d", "a b c d e", "a b c d e f g h i"))
    assert found["bleu4"] == pytest.approx(math.exp(1 - 5 / 4))


def test_cider_is_ten_times_the_mean_cosine_of_weighted_n_grams():
    # two images: every word is of one of them, so each n-gram weighs log 2, and the weights cancel
    same = captions(("red fox jumps over", "red fox jumps over"), ("two dogs sit here", "two dogs sit here"))
    assert same["cider"] == pytest.approx(10.0)
    # half of the words and no pair of them: cosines 1/2, 0, 0, 0 and 0, 0, 0, 0
    half = captions(("red dog", "red fox"), ("blue", "one cat"))
    assert half["cider"] == pytest.approx(10 * (1 / 2) / 4 / 2)
    # a word fewer: cosine 1 / sqrt 2 times the penalty exp(-1 / (2 x 6^2)), and a mean over two references
    short = captions(("red", "red fox", "grey wolf"), ("blue", "one cat"))
    assert short["cider"] == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(2) / 4 / 2 / 2)
    # a word of every image weighs nothing
    assert captions(("the", "the fox"), ("the", "the cat"))["cider"] == 0.0


@pytest.mark.parametrize(
    ("caption", "words"),  # what pycocoevalcap's Java tokenizer gave for them
    [
        ("A man's dog ... T-shirt, on a double-decker bus", "a man 's dog t-shirt on a double-decker bus"),
        ('She said "hello" to the boys\' team at 7:30.', "she said hello to the boys team at 7:30"),
        ("can't won\u2019t they're I'd we've", "ca n't wo n't they 're i 'd we 've"),
        ("it's 1,000 years old; a half-eaten apple/pear", "it 's 1,000 years old a half-eaten apple/pear"),
    ],
)
def test_captions_are_cut_into_words_as_cocos_tools_do(caption, words):
    assert metrics.caption_words(caption) == words


def test_an_answer_is_compared_with_every_reference_where_there_are_any():
    task = table.task("mine", ["exact_match", "token_f1"])
    asked = [Sample("k", "mine", "", "United States", references=references) for references in ((), ("x", "USA"))]
    assert metrics.score(task, ["usa", "usa"], asked) == {"exact_match": 0.5, "token_f1": 0.5}


def test_captions_without_a_word_score_zero():
    assert captions(("", "red fox"), ("!", "one cat")) == {"bleu4": 0.0, "cider": 0.0}


def test_glue_mean_counts_three_tasks_twice():
    scores = {task.name: dict.fromkeys(task.metrics, 0.5) for task in glue.GLUE}
    assert sum(map(len, scores.values())) == 11
    scores["glue_mrpc"] = {"accuracy": 1.0, "f1": 0.8}
    scores["glue_rte"] = {"accuracy": 0.6}
    assert glue.mean({**scores, "cb": {"accuracy": 0.0}}) == pytest.approx((8 * 0.5 + 1.0 + 0.8 + 0.6) / 11)
    del scores["glue_cola"]
    assert glue.mean(scores) is None


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_every_task_gives_its_own_targets_full_marks(task: Task):
    targets = list(task.labels) or ["red fox jumps over", "two dogs sit here"]
    own = samples(task.name, targets, [(target,) * 10 for target in targets])
    found = metrics.score(task, targets, own)
    assert found == pytest.approx({metric: 10.0 if metric == "cider" else 1.0 for metric in task.metrics})
    wrong = metrics.score(task, [*targets[1:], targets[0]], own)
    assert all(wrong[metric] < 0.99 for metric in task.metrics)


@pytest.mark.parametrize(("task", "target"), [("movie_sentiment", "mixed"), ("glue_rte", "2"), ("glue_stsb", "3.3")])
def test_a_target_outside_the_labels_is_refused_by_name(task, target):
    first = tasks.get(task).labels[0]
    with pytest.raises(ValueError, match=rf"task '{task}', sample 'k1': its target '{target}' is not one of {first}, "):
        score(task, [first, first], [first, target])


@pytest.mark.parametrize(
    ("task", "target", "references", "message"),
    [
        ("vqa_v2", "red", (), "'vqa_accuracy' of task 'vqa_v2' .* sample 'k0' has 0 references"),
        ("okvqa", "red", ("red",) * 3, "sample 'k0' has 3 references"),
        ("coco_caption", "", (), "'bleu4' of task 'coco_caption': sample 'k0' has no references"),
    ],
)
def test_a_metric_without_references_is_refused_by_name(task, target, references, message):
    with pytest.raises(ValueError, match=message):
        score(task, ["red"], [target], [references])


def test_nothing_to_score_and_answers_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="task 'easy_vqa': no samples to score"):
        metrics.score(tasks.get("easy_vqa"), [], [])
    with pytest.raises(ValueError, match="task 'easy_vqa': 1 predictions for 2 samples"):
        score("easy_vqa", ["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="no scores"):
        metrics.figures({"exact_match": np.zeros((0, 1))}, [])


def mean_interval(scores: list[float], items: list[str]) -> tuple[float, float]:
    [figure] = metrics.figures({"exact_match": np.array(scores).reshape(-1, 1)}, items)[1].values()
    assert figure.score == pytest.approx(np.mean(scores))
    return figure.low, figure.high


def test_the_interval_is_that_of_a_proportion_and_repeats_itself():
    scores, items = [1.0] * 300 + [0.0] * 100, [str(i) for i in range(400)]
    low, high = mean_interval(scores, items)
    width = 1.96 * (0.75 * 0.25 / 400) ** 0.5  # the normal approximation
    assert low == pytest.approx(0.75 - width, abs=0.006) and high == pytest.approx(0.75 + width, abs=0.006)
    assert mean_interval(scores, items) == (low, high)


def test_questions_about_one_image_widen_the_interval():
    scores = list(np.repeat([1.0, 0.0], 50)) * 4  # 8 items of 50 answers, all right or all wrong
    low, high = mean_interval(scores, [str(i // 50) for i in range(400)])
    alone_low, alone_high = mean_interval(scores, [str(i) for i in range(400)])
    assert high - low > 4 * (alone_high - alone_low)


@pytest.mark.parametrize("task", ["glue_cola", "glue_mrpc", "glue_stsb", "coco_caption"])
def test_corpus_metrics_are_computed_anew_for_every_draw(task):
    """Against the plain way: draw items, score their samples from the start."""
    random = np.random.default_rng(0)
    labels = tasks.get(task).labels or ("red fox jumps over", "two red dogs sit here", "a dog jumps over a fox")
    targets = [str(random.choice(labels)) for _ in range(30)]
    predictions = [target if random.random() < 0.6 else str(random.choice(labels)) for target in targets]
    own = [s._replace(item=f"item{i // 2}") for i, s in enumerate(samples(task, targets))]
    record = replace(tasks.get(task), metrics=tuple(m for m in tasks.get(task).metrics if m != "cider"))
    mean, each = metrics.figures(metrics.measure(record, predictions, own), [s.item for s in own], draws=20, seed=3)

    random, scores = np.random.default_rng(3), []
    for _ in range(20):
        times = random.multinomial(15, np.full(15, 1 / 15))
        drawn = [i for i in range(30) for _ in range(times[i // 2])]
        scores.append(metrics.score(record, [predictions[i] for i in drawn], [own[i] for i in drawn]))
    for metric in record.metrics:
        expected = np.percentile([score[metric] for score in scores], [2.5, 97.5])
        assert (each[metric].low, each[metric].high) == pytest.approx(tuple(expected))
        assert each[metric].low < each[metric].score < each[metric].high
    means = [np.mean(list(score.values())) for score in scores]
    assert (mean.low, mean.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert mean.score == pytest.approx(np.mean([figure.score for figure in each.values()]))


def test_draws_without_spread_make_no_noise():
    """One item in two draws is drawn alone: its correlation is undefined, and counts as 0."""
    own = samples("glue_stsb", ["1.0", "2.0"])
    rows = metrics.measure(tasks.get("glue_stsb"), ["1", "2"], own)
    with warnings.catch_warnings(action="error"):
        mean, _ = metrics.figures(rows, ["a", "b"])
    assert mean == (pytest.approx(1.0), 0.0, pytest.approx(1.0))


@pytest.mark.parametrize(
    "development, validation, test", [(1043, 521, 522), (408, 204, 204), (1500, 750, 750), (277, 138, 139)]
)
def test_development_sets_are_halved_as_in_the_paper(development, validation, test):
    first, second = glue.halves(development)
    assert (len(first), len(second)) == (validation, test)
    assert sorted(first + second) == list(range(development))
    assert glue.halves(development) == (first, second) != glue.halves(development, seed=1)
    drawn = torch.randperm(development, generator=torch.Generator().manual_seed(42))  # HyperFormer's
    assert set(first) == set(drawn[:validation].tolist())
    assert np.corrcoef(np.isin(range(development), first), range(development))[0, 1] ** 2 < 0.05  # in no order
