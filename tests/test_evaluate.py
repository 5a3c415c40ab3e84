"""Scoring a run: what is asked of it, what the table says, and what it refuses to score."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import test_launch
import torch
from conftest import tiny_samples
from damage import damage
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from untrained import save_samples, untrained_run

from hyperpelt_ds import task_file, tasks
from hyperpelt_ds.config import Config
from hyperpelt_ds.contracts import Sample, StreamState
from hyperpelt_ds.data.index import read_index
from hyperpelt_ds.data.manifest import MANIFEST, Manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.model import beside, description_sample, load
from hyperpelt_ds.tasks import glue, metrics
from hyperpelt_ds.train import checkpoint, evaluate, steps
from hyperpelt_ds.train.answering import answers, asker, split_samples
from hyperpelt_ds.train.control import Control
from hyperpelt_ds.train.controls import CONTROLS, other_image, other_task
from hyperpelt_ds.train.watchdog import Watchdog

call = test_launch.call  # the fixture that runs an entry point in this process
TASKS = ("movie_sentiment", "easy_vqa", "glue_rte", "vqa_v2", "coco_caption")
LONG = "the film is not a very good story " * 3  # 24 words, of which a run with 16 tokens keeps 15


def _samples(split: str, n: int) -> dict[str, list[Sample]]:
    """`n` samples of each task; two long texts in movie_sentiment, several references in the last two."""
    own = tiny_samples(split, n)
    texts, questions, captions = own["movie_sentiment"], own["easy_vqa"], own["shape_caption"]
    long = [sample._replace(source=LONG) for sample in texts[:2]]
    made = {
        "movie_sentiment": long + texts[2:],
        "easy_vqa": questions,
        "glue_rte": [sample._replace(target=str(i % 2)) for i, sample in enumerate(texts)],
        "vqa_v2": [s._replace(group=None, references=(s.target,) * 7 + ("no",) * 3) for s in questions],
        "coco_caption": [s._replace(source="", references=(s.target, "a shape")) for s in captions],
    }
    return {task: [sample._replace(task=task) for sample in made[task]] for task in made}


@pytest.fixture(scope="module")
def settings(config: Config, tmp_path_factory) -> Config:
    """Five tasks; glue_rte has no validation split."""
    splits = {split: _samples(split, n) for split, n in (("train", 12), ("validation", 6), ("test", 12))}
    by_task = {task: {split: splits[split][task] for split in splits} for task in TASKS}
    del by_task["glue_rte"]["validation"]
    manifest = save_samples(tmp_path_factory.mktemp("data"), by_task)
    return config.override([f"data.manifest={manifest}", f"data.tasks={','.join(TASKS)}"])


@pytest.fixture(scope="module")
def run_dir(settings: Config, tmp_path_factory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("untrained") / "run", settings)


@pytest.fixture(scope="module")
def results(run_dir: Path) -> dict:
    return evaluate.evaluate(run_dir, out=run_dir / "all.json")


def _answers(run_dir: Path, task: str) -> tuple[list[str], list[Sample]]:
    run = load(run_dir)
    manifest = Manifest.load(run.config.data.manifest)
    samples, _ = split_samples(manifest, task, "test")
    return answers(samples, asker(run, Reader(manifest)), 100), samples


def test_every_metric_of_a_task_is_in_its_row_and_the_score_is_their_mean(run_dir, results):
    assert json.loads((run_dir / "all.json").read_text()) == results
    assert list(results["tasks"]) == list(TASKS) and results["glue_mean"] is None
    for name, row in results["tasks"].items():
        assert tuple(row["metrics"]) == tasks.get(name).metrics
        assert row["score"] == pytest.approx(np.mean([figure["score"] for figure in row["metrics"].values()]))
        assert row["low"] <= row["score"] <= row["high"] and row["n"] == 12
        predictions, samples = _answers(run_dir, name)
        found = metrics.score(tasks.get(name), predictions, samples)
        assert {metric: figure["score"] for metric, figure in row["metrics"].items()} == pytest.approx(found)
    groups = results["tasks"]["easy_vqa"]["groups"]
    assert {name: part["n"] for name, part in groups.items()} == {"color": 6, "shape": 6}


def test_baselines_need_no_model(results):
    rows = results["tasks"]
    assert rows["glue_rte"]["baseline"] == pytest.approx(1 / 2), "half of the targets are 1"
    assert rows["glue_rte"]["bag_of_words"] is not None and rows["movie_sentiment"]["bag_of_words"] is not None
    assert rows["easy_vqa"]["bag_of_words"] is None, "words do not show the image"
    assert rows["coco_caption"]["baseline"] > 0


def test_cut_sources_are_counted_by_task(results):
    assert {name: row["truncated"] for name, row in results["tasks"].items()} == {**dict.fromkeys(TASKS, 0),
                                                                                 "movie_sentiment": 2}  # fmt: skip
    assert "sources cut at 16 tokens: 2 of 12 in movie_sentiment\n" in evaluate.table(results)


def test_the_table_has_a_line_for_each_task_metric_and_group(results):
    lines = evaluate.table(results).splitlines()
    assert lines[0].split()[:3] == ["task", "metric", "score"] and "shuffled image" in lines[0]
    start = [line.split()[0] for line in lines[1:]]
    assert start == ["movie_sentiment", "easy_vqa", "color", "shape", "glue_rte", "vqa_v2",
                     "coco_caption", "bleu4", "cider", "sources", start[-1]]  # fmt: skip
    assert len({len(line.rstrip()) for line in lines[1:3]}) == 1, "columns are aligned"
    assert not any("GLUE" in line for line in lines)


def test_the_glue_mean_is_printed_when_there_is_one(results):
    assert "GLUE, mean of 11 numbers: 0.8709\n" in evaluate.table({**results, "glue_mean": 0.87089})


@pytest.mark.slow
def test_all_of_glue_gets_its_mean(config, tmp_path):
    samples = {}
    for task in glue.GLUE:
        sources = [f"sentence: {word} film" for word in ("good", "bad", "dull", "funny")]
        targets = [task.labels[i % len(task.labels)] for i in range(4)]
        own = [Sample(f"k{i}", task.name, *pair) for i, pair in enumerate(zip(sources, targets, strict=True))]
        samples[task.name] = {"train": own, "validation": own, "test": own}
    names = ",".join(samples)
    settings = config.override(
        [f"data.manifest={save_samples(tmp_path / 'data', samples)}", f"data.tasks={names}", "vision.encoder=null"]
    )
    results = evaluate.evaluate(untrained_run(tmp_path / "run", settings), shuffle=())
    found = [figure["score"] for row in results["tasks"].values() for figure in row["metrics"].values()]
    assert len(found) == 11 and results["glue_mean"] == pytest.approx(np.mean(found))
    assert "GLUE, mean of 11 numbers" in evaluate.table(results)


@pytest.mark.parametrize(
    ("flag", "columns"),
    [("image", {"shuffled_image", "shuffled_n"}), ("task,image", {"shuffled_task", "shuffled_image", "shuffled_n"}),
     ("none", set())],
)  # fmt: skip
def test_only_the_controls_that_are_asked_for_are_run(call, run_dir, tmp_path, flag, columns):
    flags = ("--tasks", "easy_vqa", "--shuffle", flag, "--out", tmp_path / "r.json")
    code, out, err = call(test_launch.script("evaluate").evaluate, "--run_dir", run_dir, *flags)
    assert code == 0, err
    row = json.loads((tmp_path / "r.json").read_text())["tasks"]["easy_vqa"]
    assert {name for name in row if name.startswith("shuffled")} == columns
    assert ("shuffled" in out) == bool(columns)


def test_an_unknown_control_is_refused(call, run_dir):
    code, _, err = call(test_launch.script("evaluate").evaluate, "--run_dir", run_dir, "--shuffle", "layers")
    assert code == 2 and "--shuffle: unknown control 'layers'; there are task, image, layer, description," in err


def test_shuffled_samples_never_keep_their_task_or_image(run_dir):
    run = load(run_dir)
    samples = [Sample(str(i), "vqa_v2", "", "", image=f"image{i % 7}") for i in range(40)]
    with other_task(run, samples) as changed:
        assert {sample.task for sample in changed} == set(TASKS) - {"vqa_v2"}
    with other_image(run, samples) as changed:
        pairs = {(old.image, new.image) for old, new in zip(samples, changed, strict=True)}
    assert len(pairs) == 7 and all(old != new for old, new in pairs)
    assert {new for _, new in pairs} == {old for old, _ in pairs}


def test_a_control_that_does_not_apply_asks_nothing(run_dir, results):
    run = load(run_dir)
    with other_image(run, [Sample("0", "vqa_v2", "", "", image="the only one")]) as changed:
        assert changed == []
    run.config = run.config.override(["data.tasks=vqa_v2"])
    with other_task(run, [Sample("0", "vqa_v2", "", "")]) as changed:
        assert changed == []
    assert results["tasks"]["movie_sentiment"]["shuffled_image"] is None
    assert all(row["shuffled_task"] is not None for row in results["tasks"].values())
    assert {key for row in results["tasks"].values() for key in row if key.startswith("shuffled")} == {
        "shuffled_task",
        "shuffled_image",
        "shuffled_n",
    }


def test_answers_come_in_order_whatever_is_asked_together():
    asked: list[list[int]] = []

    def ask(samples: list[Sample]) -> list[str]:
        asked.append([len(sample.source) for sample in samples])
        return [sample.source.upper() for sample in samples]

    samples = [Sample("k", "t", "ab" * (7 * i % 11), "") for i in range(11)]
    assert answers(samples, ask, 4) == [sample.source.upper() for sample in samples]
    lengths = [length for together in asked for length in together]
    assert list(map(len, asked)) == [4, 4, 3] and lengths == sorted(lengths), "like lengths together"
    assert answers([], ask, 4) == []


def test_validation_scores_what_it_answers_and_says_what_it_leaves_out(run_dir):
    run = load(run_dir)
    manifest = Manifest.load(run.config.data.manifest)
    with pytest.warns(UserWarning, match="not scored, without samples of split 'validation': glue_rte"):
        scores, answered = evaluate.validate(run.model, manifest, run.config, "validation", 0)
    assert list(scores) == [task for task in TASKS if task != "glue_rte"]
    assert all(tuple(table) == tasks.get(name).metrics for name, table in scores.items())
    samples, _ = split_samples(manifest, "vqa_v2", "validation")
    texts = answers(samples, asker(run, Reader(manifest)), 100)
    found = {sample.key: text for sample, text in answered if sample.task == "vqa_v2"}
    assert found == {sample.key: text for sample, text in zip(samples, texts, strict=True)}
    assert scores["vqa_v2"] == pytest.approx(metrics.score(tasks.get("vqa_v2"), texts, samples))
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert len(evaluate.validate(run.model, manifest, run.config, "test", 3).scores) == len(TASKS)
    with pytest.raises(ValueError, match=r"no task of the run has samples of split 'dev' in .*manifest\.json"):
        evaluate.validate(run.model, manifest, run.config, "dev", 0)


def test_the_mean_score_counts_tasks_alike_however_many_metrics_they_have():
    assert evaluate.mean_score({"a": {"x": 1.0, "y": 0.0}, "b": {"z": 1.0}}) == 0.75


def test_an_empty_or_unknown_split_is_refused_by_name(settings, run_dir, tmp_path):
    with pytest.raises(ValueError, match=r"'glue_rte' has no split 'validation' in .*; its splits: train \(12\), test"):
        evaluate.evaluate(run_dir, ["glue_rte"], "validation")
    data = Path(settings.data.manifest).parent
    shutil.copytree(data, tmp_path / "data")
    tree = json.loads((data / MANIFEST).read_text())
    tree["tasks"]["glue_rte"]["validation"] = []
    (tmp_path / "data" / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="'glue_rte' has no samples in its split 'validation'"):
        split_samples(Manifest.load(tmp_path / "data" / MANIFEST), "glue_rte", "validation")


def test_what_cannot_be_scored_is_known_before_anything_is_answered(config, tmp_path, monkeypatch):
    own = [Sample("k0", "glue_rte", "good film", "0"), Sample("k1", "glue_rte", "bad film", "")]
    manifest = save_samples(tmp_path / "data", {"glue_rte": {"train": own[:1], "validation": own[:1], "official": own}})
    settings = config.override([f"data.manifest={manifest}", "data.tasks=glue_rte", "vision.encoder=null"])
    run = untrained_run(tmp_path / "run", settings)
    monkeypatch.setattr(evaluate, "answers", None)
    with pytest.raises(ValueError, match=r"sample 'k1': split 'official' has no answers to compare with; .*predict"):
        evaluate.evaluate(run, split="official")


def test_a_stored_target_outside_the_labels_stops_the_scoring_by_name(config, tmp_path):
    own = [Sample("k0", "glue_rte", "good film", "0"), Sample("k1", "glue_rte", "bad film", "entailment")]
    manifest = save_samples(tmp_path / "data", {"glue_rte": {"train": own, "validation": own, "test": own}})
    settings = config.override([f"data.manifest={manifest}", "data.tasks=glue_rte", "vision.encoder=null"])
    run = untrained_run(tmp_path / "run", settings)
    with pytest.raises(ValueError, match="task 'glue_rte', sample 'k1': its target 'entailment' is not one of 0, 1"):
        evaluate.evaluate(run)


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory) -> Path:
    """A tiny random BERT that knows the words of what is said about the tasks."""
    folder = tmp_path_factory.mktemp("sentences")
    said = " ".join(" ".join((task.description, *task.paraphrases)) for task in tasks.TASKS.values())
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *sorted(set(re.findall(r"\w+", said)))])}
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.5, **sizes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def described(settings: Config, sentence_encoder: Path, tmp_path_factory) -> Path:
    """A run on two of the tasks that knows them by what is said about them alone."""
    told = [f"hypernet.sentence_encoder={sentence_encoder}", "hypernet.conditions=description,image"]
    return untrained_run(
        tmp_path_factory.mktemp("run") / "run", settings.override([*told, "data.tasks=movie_sentiment,easy_vqa"])
    )


@pytest.mark.parametrize("control", ["layer", "description", "paraphrase", "unrelated"])
def test_a_control_changes_the_answers_while_it_lasts(described, settings, control):
    run, manifest = load(described), Manifest.load(settings.data.manifest)
    (samples, _), ask = split_samples(manifest, "easy_vqa", "test"), asker(run, Reader(manifest))
    before = _logits(run, samples, manifest)
    with CONTROLS[control](run, samples) as asked:
        assert asked == samples
        assert not torch.allclose(_logits(run, asked, manifest), before, atol=1e-3)
    assert torch.equal(_logits(run, samples, manifest), before)
    assert len(answers(samples, ask, 8)) == len(samples)


@pytest.mark.parametrize("control", ["description", "paraphrase", "unrelated"])
def test_what_is_said_is_no_control_where_nothing_is_said(run_dir, settings, control):
    run, (samples, _) = load(run_dir), split_samples(Manifest.load(settings.data.manifest), "easy_vqa", "test")
    with CONTROLS[control](run, samples) as asked:
        assert asked == []


def test_layers_are_no_control_where_nothing_is_generated(settings, tmp_path):
    plain = ["hypernet.conditions=", "hypernet.parameters=task", "data.tasks=movie_sentiment,easy_vqa"]
    run = load(untrained_run(tmp_path / "run", settings.override(plain)))
    samples, _ = split_samples(Manifest.load(settings.data.manifest), "easy_vqa", "test")
    with CONTROLS["layer"](run, samples) as asked:
        assert asked == []


def test_a_task_that_was_never_trained_is_scored_by_its_description(described, tmp_path):
    results = evaluate.evaluate(described, ["glue_rte"], out=tmp_path / "r.json", shuffle=["description", "unrelated"])
    row = results["tasks"]["glue_rte"]
    assert row["n"] == 12 and 0 <= row["score"] <= 1
    assert row["shuffled_description"] is not None and row["shuffled_unrelated"] is not None


def test_a_new_task_is_asked_by_a_description_of_ones_own(described, call):
    run = load(described)
    with pytest.raises(ValueError, match="unknown task 'mine'"):
        run.generate("mine", ["the film"])
    run.describe_task("mine", "Say whether the film is good.")
    assert len(run.generate(["mine", "movie_sentiment"], ["the film", "the film"])) == 2
    with pytest.raises(ValueError, match="task 'mine' is already there"):
        run.describe_task("mine", "Say it again.")
    ask = ["--run_dir", described, "--task", "other", "--text", "the film"]
    code, _, error = call(test_launch.script("generate").generate, *ask, "--description", "Say something.")
    assert code == 0, error


def test_a_run_with_task_embeddings_cannot_be_told_of_new_tasks(run_dir):
    with pytest.raises(ValueError, match=r"task 'mine' cannot be described: .*hypernet.conditions=\['task', 'image'\]"):
        load(run_dir).describe_task("mine", "Say whether the film is good.")


def _logits(run, samples, manifest) -> torch.Tensor:
    batch = run.collator(samples, Reader(manifest).images(samples), [1.0] * len(samples))
    with torch.no_grad():
        return run.model.backbone.forward(
            run.model.hypernet(batch), batch.input_ids, batch.attention_mask, batch.labels
        )


def test_data_without_training_samples_is_scored_without_priors(run_dir, settings, tmp_path):
    own = {"test": _samples("test", 12)["glue_rte"]}
    manifest = save_samples(tmp_path / "data", {"glue_rte": own})
    results = evaluate.evaluate(run_dir, out=tmp_path / "r.json", shuffle=[], manifest_path=manifest)
    assert list(results["tasks"]) == ["glue_rte"]  # of the run's tasks, those that the data has
    row = results["tasks"]["glue_rte"]
    assert row["n"] == 12 and row["baseline"] is None and row["bag_of_words"] is None
    assert "glue_rte" in evaluate.table(results)


def test_features_of_another_encoder_are_refused_wherever_they_come_from(run_dir, settings, tmp_path):
    manifest = Path(shutil.copytree(Path(settings.data.manifest).parent, tmp_path / "data")) / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["features"]["encoder"]["sha256"] = "another"
    manifest.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"holds features of .*another.*, .* was trained on"):
        evaluate.evaluate(run_dir, out=tmp_path / "r.json", manifest_path=manifest)


def test_a_run_whose_tasks_are_described_otherwise_now_is_refused(described, tmp_path):
    changed = Path(shutil.copytree(described, tmp_path / "run"))
    identity = json.loads((changed / "identity.json").read_text())
    sample = description_sample(load(described).model)
    (changed / "identity.json").write_text(json.dumps({**identity, "descriptions": sample}))
    load(changed)
    (changed / "identity.json").write_text(json.dumps({**identity, "descriptions": [x + 0.5 for x in sample]}))
    with pytest.raises(ValueError, match="was trained with other vectors of its tasks' descriptions"):
        load(changed)


def test_a_task_file_fits_a_run_with_embeddings_and_descriptions(settings, sentence_encoder, tmp_path):
    both = [f"hypernet.sentence_encoder={sentence_encoder}", "hypernet.conditions=task,description"]
    folder = untrained_run(tmp_path / "run", settings.override([*both, "data.tasks=movie_sentiment,easy_vqa"]))
    run = load(folder)
    weights = {name: parameter.detach() for name, parameter in run.model.named_parameters()}
    where = beside(run.config, run.backbone)
    task_file.write(tmp_path / "t.safetensors", "glue_rte", weights, run.model.per_task, 0, where)
    more = load(folder, tasks=[tmp_path / "t.safetensors"])
    assert more.model.tasks == ("movie_sentiment", "easy_vqa", "glue_rte")
    asked = ["glue_rte", "movie_sentiment"], ["the film", "the film"]
    assert more.generate(*asked)[1] == run.generate("movie_sentiment", ["the film"])[0]


@pytest.fixture
def copied(settings: Config, tmp_path: Path) -> Path:
    """The manifest of a copy of the data, to be damaged."""
    return Path(shutil.copytree(Path(settings.data.manifest).parent, tmp_path / "data")) / MANIFEST


def _hurt(path: Path, task: str, split: str) -> None:
    """Damages every text of a task's split."""
    for shard in Manifest.load(path).shards(task, split):
        for position in range(shard.samples):
            damage(path.parent, shard.path, "flipped data byte", position)


def test_validation_leaves_out_a_task_of_which_nothing_can_be_used(run_dir, copied):
    run = load(run_dir)
    _hurt(copied, "vqa_v2", "validation")
    with pytest.warns(UserWarning, match="no sample of split 'validation' can be used: vqa_v2$"):
        scores = evaluate.validate(run.model, Manifest.load(copied), run.config, "validation", 0).scores
    assert list(scores) == ["movie_sentiment", "easy_vqa", "coco_caption"]
    for task in scores:
        _hurt(copied, task, "validation")
    with pytest.raises(ValueError, match=r"no sample of split 'validation' can be used in .*, of movie_sentiment, "):
        evaluate.validate(run.model, Manifest.load(copied), run.config, "validation", 0)


def test_a_validation_without_a_damaged_task_never_replaces_the_best(run_dir, copied, tmp_path):
    _hurt(copied, "vqa_v2", "validation")
    predictor = load(run_dir)
    # neither the engine nor the stream is used where no weights are saved
    config, model, watchdog = predictor.config, predictor.model, Watchdog(tmp_path, predictor.config.train)
    run = steps.Run(config, tmp_path, Manifest.load(copied), model, None, None, None, watchdog)
    before = checkpoint.Progress(3, StreamState(0, {}, 1, 8, 24, {}), best_score=-1.0, stale=1)
    taken = steps._Steps(run, before, Control())
    with pytest.warns(UserWarning, match="can be used: vqa_v2"):
        taken._validate()
    assert taken.progress == before
    taken.writer.close()
    assert not (tmp_path / "best").exists()


def test_an_unreadable_image_counts_as_wrong_and_a_damaged_text_is_left_out(run_dir, copied, tmp_path, caplog, capsys):
    manifest = Manifest.load(copied)
    [features], [shard] = manifest.features.shards, manifest.shards("easy_vqa", "test")
    image = Reader(manifest).sample("easy_vqa", "test", 0).image
    index = read_index(copied.parent / features.path)
    [place] = [i for i in range(len(index)) if index.key(i) == image]
    damage(copied.parent, features.path, "flipped data byte", place)
    damage(copied.parent, shard.path, "flipped data byte", 1)
    results = evaluate.evaluate(run_dir, ["easy_vqa", "glue_rte"], out=tmp_path / "r.json", manifest_path=copied)
    row, sound = results["tasks"]["easy_vqa"], results["tasks"]["glue_rte"]
    assert (row["n"], row["unreadable"], row["left_out"]) == (11, 2, 1)
    assert (sound["n"], sound["unreadable"], sound["left_out"]) == (12, 0, 0)
    line = "unreadable images, counted as wrong: 2 of 11 in easy_vqa; texts, left out: 1 in easy_vqa\n"
    assert line in capsys.readouterr().out
    assert f"of sample '{tiny_samples('test', 12)['easy_vqa'][0].key}' of task 'easy_vqa'" in caplog.text
    run, (samples, damaged) = load(run_dir), split_samples(manifest, "easy_vqa", "test")
    texts = answers(samples, asker(run, Reader(manifest)), 4)
    assert [text is None for text in texts] == [sample.image == image for sample in samples]
    before = dict(zip((s.key for s in _answers(run_dir, "easy_vqa")[1]), _answers(run_dir, "easy_vqa")[0], strict=True))
    assert all(text in (None, before[s.key]) for s, text in zip(samples, texts, strict=True)), "nothing else moves"
    assert [error.key for error in damaged] == [tiny_samples("test", 12)["easy_vqa"][1].key]


def test_a_split_of_which_nothing_can_be_read_is_refused_by_name(copied):
    _hurt(copied, "glue_rte", "test")
    with pytest.raises(ValueError, match="no sample of split 'test' of task 'glue_rte' can be read, the first: shard"):
        split_samples(Manifest.load(copied), "glue_rte", "test")


def test_a_target_too_long_to_train_on_does_not_stop_the_scoring(config, tmp_path):
    own = [Sample(f"k{i}", "movie_rating", "good film", "good film " * 20) for i in range(2)]
    manifest = save_samples(tmp_path / "data", {"movie_rating": {"test": own}})
    run = load(untrained_run(tmp_path / "run", config))
    assert None not in answers(own, asker(run, Reader(Manifest.load(manifest))), 2)
