"""Starting from another run: a new task's embedding alone leaves every other task as it is, and ships as a file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import test_launch
import torch
from conftest import free_port, save_manifest
from damage import damage
from safetensors.torch import load_file
from transformers import AutoTokenizer
from untrained import untrained_run

from hyperpelt_ds import config as configuration
from hyperpelt_ds.config import Config, TransferConfig
from hyperpelt_ds.contracts import Sample
from hyperpelt_ds.data.loader import TrainStream
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.export import export
from hyperpelt_ds.model import beside, build, load, weights_file
from hyperpelt_ds.train import deepspeed_json, transfer

OLD, NEW = ("movie_sentiment", "easy_vqa", "shape_caption"), "movie_rating"
call, script = test_launch.call, test_launch.script
SAMPLE = Sample("1", NEW, "the film is very good", "good")
SOURCES = ["the film is very good", "a dull moving story", "the is was bad"]


@pytest.fixture(scope="module")
def runs(config: Config, train_many, tmp_path_factory) -> dict[str, Path]:
    """A base on three tasks, and what was trained from it: by name."""
    folder = tmp_path_factory.mktemp("transfer")
    base = config.override([f"data.tasks={','.join(OLD)}", "train.steps=4", "train.eval_every=4", "train.save_every=4"])
    own = base.override(["modules.kinds=adapter", "hypernet.conditions=[]", "hypernet.parameters=task"])

    def after(run: str, train: str, *overrides: str) -> Config:
        tree = configuration.to_dict({"base": base, "own": own}[run])
        tree["data"].update(tasks=[*OLD, NEW], train_tasks=[NEW])
        tree["transfer"] = {"init_from": str(folder / run), "train": train}
        return configuration.from_dict(tree).override(["train.learning_rate=0.1", "data.shots=6", *overrides])

    jobs = {
        "base": (base, 2),
        "own": (own, 2),
        "embeddings": (after("base", "embeddings", "train.weight_decay=0.1"), 2),
        "embeddings3": (after("base", "embeddings"), 3),
        "all": (after("base", "all", f'transfer.like={{"{NEW}": "easy_vqa"}}'), 2),
        "own_embeddings": (after("own", "embeddings"), 2),
    }
    train_many({name: (job, f"ds_configs/zero{stage}_cpu.json", folder / name) for name, (job, stage) in jobs.items()})
    return {name: folder / name for name in jobs}


def _logits(run: Path, task: str, files: tuple[Path, ...] = ()) -> torch.Tensor:
    """Logits of a fixed text and answer of a task."""
    predictor = load(run, tasks=files)
    sample = SAMPLE._replace(task=task)
    image = {"x": torch.ones(4, 16).numpy()}
    batch = predictor.collator([sample, sample._replace(image="x", key="2")], image, [1.0, 1.0])
    with torch.no_grad():
        weights = predictor.model.hypernet(batch)
        return predictor.model.backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)


@pytest.mark.parametrize("base,run", [("base", "embeddings"), ("base", "embeddings3"), ("own", "own_embeddings")])
def test_training_a_new_tasks_embedding_leaves_every_other_task_bit_equal(runs, base, run):
    for task in OLD:
        assert torch.equal(_logits(runs[base], task), _logits(runs[run], task))
    old, new = load_file(weights_file(runs[base])), load_file(weights_file(runs[run]))
    model = load(runs[run]).model
    started_from = json.loads((runs[run] / "transfer.json").read_text())[NEW]["from"]
    for name, dim in model.per_task.items():
        assert torch.equal(old[name], new[name].narrow(dim, 0, 3)), name
        before = old[name].select(dim, OLD.index(started_from))
        assert not torch.equal(before, new[name].select(dim, 3)), name  # it did train
    assert all(torch.equal(old[name], new[name]) for name in old if name not in model.per_task)


def test_training_everything_changes_the_other_tasks_too(runs):
    assert not torch.equal(_logits(runs["base"], OLD[0]), _logits(runs["all"], OLD[0]))


@pytest.mark.parametrize("base,run", [("base", "embeddings"), ("own", "own_embeddings")])
def test_a_task_ships_as_a_small_file_that_load_adds(runs, base, run):
    file = runs[run] / "tasks" / f"{NEW}.safetensors"
    weights = weights_file(runs[base])
    assert file.stat().st_size < weights.stat().st_size / 2
    assert torch.equal(_logits(runs[base], NEW, (file,)), _logits(runs[run], NEW))
    assert torch.equal(_logits(runs[base], OLD[0], (file,)), _logits(runs[base], OLD[0]))
    predictor = load(runs[base], tasks=[file])
    answers = predictor.generate([NEW, OLD[0], NEW], SOURCES)
    assert answers == load(runs[run]).generate([NEW, OLD[0], NEW], SOURCES)


def test_a_task_that_came_as_a_file_can_be_exported(runs, tmp_path):
    file = runs["embeddings"] / "tasks" / f"{NEW}.safetensors"
    by_file = export(runs["base"], NEW, out=tmp_path / "file", task_file=file)
    whole = export(runs["embeddings"], NEW, out=tmp_path / "whole")
    exported = [load_file(folder / "weights.safetensors") for folder in (by_file, whole)]
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_a_task_file_is_refused_where_it_does_not_belong(runs, tmp_path):
    file = runs["embeddings"] / "tasks" / f"{NEW}.safetensors"
    with pytest.raises(ValueError, match=r"was trained beside weights with fingerprint .*, this run has"):
        load(runs["own"], tasks=[file])
    with pytest.raises(ValueError, match=f"task '{NEW}' is already there"):
        load(runs["embeddings"], tasks=[file])
    with pytest.raises(ValueError, match="is no task file"):
        load(runs["base"], tasks=[weights_file(runs["base"])])
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read"):
        load(runs["base"], tasks=[tmp_path / "cut.safetensors"])


def test_a_new_task_starts_from_the_task_that_answers_it_best_or_a_named_one(runs):
    decided = json.loads((runs["embeddings"] / "transfer.json").read_text())[NEW]
    assert set(decided["losses"]) == set(OLD)
    assert decided["from"] == min(decided["losses"], key=decided["losses"].get)
    assert json.loads((runs["all"] / "transfer.json").read_text())[NEW]["from"] == "easy_vqa"


def test_what_cannot_be_read_does_not_decide_what_a_new_task_is_like(config, tmp_path, caplog):
    path = save_manifest(tmp_path / "data", 8, 4)
    settings = config.override([f"data.manifest={path}"])
    run, manifest = load(untrained_run(tmp_path / "run", settings)), Manifest.load(path)
    shards = manifest.features.shards
    damage(path.parent, shards[0].path, "flipped data byte", 0)
    losses = transfer._losses(run.model, run.config, manifest, "easy_vqa", OLD[:1])
    assert 0 < losses[OLD[0]] < float("inf") and "not asked which task easy_vqa is like: shard" in caplog.text
    for shard in shards:
        for position in range(shard.samples):
            if (shard, position) != (shards[0], 0):
                damage(path.parent, shard.path, "flipped data byte", position)
    with pytest.raises(ValueError, match="task 'easy_vqa': no training sample that was drawn can be used in "):
        transfer._losses(run.model, run.config, manifest, "easy_vqa", OLD[:1])


def test_only_the_shots_are_drawn_and_other_seeds_draw_others(config, manifest_path):
    def drawn(seed: int) -> set[str]:
        few = config.override([f"data.tasks={','.join(OLD)},{NEW}", f"data.train_tasks={NEW}", "data.shots=6"])
        few = few.override([f"train.seed={seed}"])
        tokenizer = AutoTokenizer.from_pretrained(config.model.backbone)
        stream = TrainStream(Manifest.load(manifest_path), few, few.data.tasks, tokenizer, 0, 1)
        steps = iter(stream)
        return {(s.task, s.key) for _ in range(4) for batch in next(steps) for s in batch.samples}

    assert len(drawn(0)) == len(drawn(1)) == 6 and drawn(0) != drawn(1)
    assert drawn(0) == drawn(0) and {task for task, _ in drawn(0)} == {NEW}


def test_what_does_not_fit_is_named(runs, config, tmp_path, backbone_folder):
    with pytest.raises(ValueError, match=f"--new_task '{OLD[1]}': .* was already trained on it"):
        transfer.from_run(runs["base"], [OLD[1]], None, "all")
    with pytest.raises(ValueError, match=f"--like 'nothing' is not one of the tasks of .*: {', '.join(OLD)}"):
        transfer.from_run(runs["base"], [NEW], "nothing", "all")
    with pytest.raises(ValueError, match=r"--init_from .*: no run"):
        transfer.from_run(tmp_path, [NEW], None, "all")
    with pytest.raises(ValueError, match=r"transfer.train='embeddings' needs transfer.init_from and data.train_tasks"):
        Config().override(["transfer.train=embeddings"])
    started = transfer.from_run(runs["base"], [NEW], "movie_sentiment", "embeddings")
    assert started.data.tasks == (*OLD, NEW) and started.trained_tasks == (NEW,)
    other = started.override(["modules.bottleneck=5"])
    model = load(runs["base"]).model
    with pytest.raises(ValueError, match=r"does not fit this run: modules.bottleneck was 4, is 5"):
        transfer._check(runs["base"], configuration.load(runs["base"] / "config.json"), other, model)
    fewer = started.override([f"data.tasks={NEW}"])
    with pytest.raises(ValueError, match=r"leave out \['movie_sentiment', 'easy_vqa', 'shape_caption'\]"):
        transfer._check(runs["base"], configuration.load(runs["base"] / "config.json"), fewer, model)
    changed = tmp_path / "changed"
    shutil.copytree(runs["base"], changed)
    identity = json.loads((changed / "identity.json").read_text())
    (changed / "identity.json").write_text(json.dumps({**identity, "backbone": "0" * 64}))
    with pytest.raises(ValueError, match=r"was trained on a backbone with fingerprint 000000000000, but .* the frozen"):
        transfer._check(changed, configuration.load(runs["base"] / "config.json"), started, model)
    (changed / "identity.json").write_text(json.dumps({**identity, "encoder": {"encoder": "another"}}))
    moved = dataclasses.replace(started, transfer=TransferConfig(str(changed)))
    with pytest.raises(ValueError, match=r"holds features of .*, .*/changed was trained on {'encoder': 'another'}"):
        transfer.start(model, moved, Manifest.load(started.data.manifest))


@pytest.mark.slow
def test_one_command_trains_shots_times_seeds_and_goes_on_where_it_stopped(runs, run_python, tmp_path):
    few = ("--shots", "4,8", "--seeds", 2, "--train", "embeddings", "train.steps=2", "train.warmup_steps=0")
    where = ("--run_dir", runs["base"], "--new_task", NEW, "--out", tmp_path / "few")
    command = ("python", "launch/transfer.py", *where, "--ds_config", "ds_configs/zero2_cpu.json", *few)
    done = run_python(*command, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = json.loads((tmp_path / "few/transfer.json").read_text())
    assert [row["shots"] for row in table["rows"]] == [4, 8]
    for row in table["rows"]:
        own = [
            json.loads((tmp_path / f"few/{row['shots']}_shots_seed_{seed}/results.json").read_text()) for seed in (0, 1)
        ]
        assert row["scores"] == [results["tasks"][NEW]["score"] for results in own]
        assert row["mean"] == sum(row["scores"]) / 2
        assert row["standard_error"] == pytest.approx(abs(row["scores"][0] - row["scores"][1]) / 2)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "few").rglob("results.json")}
    again = run_python(*command)
    results = json.loads(next(iter(files)).read_text())  # the cell's baselines know no more than its model did
    assert results["tasks"][NEW]["baseline"] is not None
    assert again.returncode == 0 and {file: file.stat().st_mtime_ns for file in files} == files
    assert "standard error" in again.stdout


def test_transfer_refuses_what_it_cannot_count(call):
    common = ("--run_dir", "r", "--new_task", NEW, "--out", "o", "--ds_config", "d")
    for wrong in ("train.seed=5", "data.shots=9", "train.eval_every=10"):
        code, _, error = call(script("transfer").transfer, *common, wrong)
        assert code == 2 and f"{wrong}: every cell has its own" in error
    for wrong in (("--shots", "many"), ("--shots", "0"), ("--seeds", "0")):
        code, _, error = call(script("transfer").transfer, *common, *wrong)
        assert code == 2 and "expected numbers above 0" in error
    train = ("--ds_config", "d", "--run_dir", "r")
    for wrong, said in (
        ((), "give either --recipe NAME, to start anew, or --init_from RUN_DIR"),
        (("--recipe", "demo", "--init_from", "x"), "give either --recipe NAME, to start anew, or --init_from RUN_DIR"),
        (("--recipe", "demo", "--new_task", NEW), "--new_task, --like and --train need --init_from"),
        (("--init_from", "nowhere", "--new_task", NEW), "--init_from nowhere: no run"),
        (("--recipe", "demo", "--train", "some"), "--train some: allowed are all and embeddings"),
    ):
        code, _, error = call(script("train").train, *train, *wrong)
        assert code == 2 and said in error


@pytest.mark.slow
def test_a_resumed_transfer_needs_its_base_no_more(runs, call, run_python, tmp_path):
    own, gone = tmp_path / "own", tmp_path / "gone"
    shutil.copytree(runs["embeddings"], own)
    tree = configuration.to_dict(configuration.load(own / "config.json"))
    tree["transfer"]["init_from"] = str(gone)
    (own / "config.json").write_text(json.dumps(tree))
    decided = (own / "transfer.json").read_text()
    common = ("--ds_config", "ds_configs/zero2_cpu.json", "--run_dir", own, "--resume", "--init_from", gone)
    launcher = ("deepspeed", "--master_port", free_port(), "--num_accelerators", 2, "launch/train.py")
    done = run_python(*launcher, *common, "--new_task", NEW, "--train", "embeddings")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "resuming from" in done.stdout and (own / "transfer.json").read_text() == decided
    code, _, error = call(script("train").train, *common, "--new_task", "easy_vqa")
    assert code == 2 and f"--new_task easy_vqa: {own} was started with {NEW}" in error


def test_a_transfer_whose_trained_tasks_were_chosen_is_resumed_by_the_same_command(runs, tmp_path):
    started = transfer.from_run(runs["base"], [NEW], None, "all").override([f"data.train_tasks={NEW},easy_vqa"])
    (tmp_path / "run").mkdir()
    configuration.save(started, tmp_path / "run" / "config.json")
    assert transfer.requested(runs["base"], [NEW], None, "all", tmp_path / "run", True) == started
    assert transfer.requested(runs["base"], [], None, "all", tmp_path / "run", True) == started
    for run, like, train, said in (
        (runs["own"], None, "all", "--init_from .*/own: .* was started with .*/base"),
        (runs["base"], "easy_vqa", "all", "--like easy_vqa: .* was started with none"),
        (runs["base"], None, "embeddings", "--train embeddings: .* was started with all"),
    ):
        with pytest.raises(ValueError, match=said):
            transfer.requested(run, [NEW], like, train, tmp_path / "run", True)


@pytest.mark.slow
def test_a_run_on_a_users_own_task_is_transferred_to_other_data(runs, run_python, tmp_path):
    """Whose manifest knows nothing of the task."""
    base = tmp_path / "base"
    shutil.copytree(runs["base"], base)
    for file in ("config.json", "identity.json"):
        (base / file).write_text((base / file).read_text().replace("movie_sentiment", "my_own_task"))
    identity = json.loads((base / "identity.json").read_text())
    identity["records"] = {"my_own_task": {"metrics": ["exact_match"]}}
    (base / "identity.json").write_text(json.dumps(identity))
    given = ("--init_from", base, "--new_task", NEW, "--run_dir", tmp_path / "run", "train.steps=1", "data.shots=6")
    done = run_python("python", "launch/train.py", "--ds_config", "ds_configs/zero2_cpu.json", *given)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["records"].keys() == {"my_own_task"}


def test_names_that_say_where_a_new_task_starts_are_checked(runs):
    base = load(runs["base"])
    for like, said in (({"typo": "easy_vqa"}, "'typo' is no new task"), ({NEW: "typo"}, "names tasks that")):
        started = transfer.from_run(runs["base"], [NEW], None, "all").override([f"transfer.like={json.dumps(like)}"])
        model = build(started, started.data.tasks)
        with pytest.raises(ValueError, match=rf"transfer.like: .*{said}"):
            transfer.start(model, started, Manifest.load(base.config.data.manifest))


def test_cells_of_another_request_are_not_taken_for_this_ones(call, tmp_path):
    (tmp_path / "request.json").write_text(json.dumps({"train": "all"}))
    given = ("--run_dir", "r", "--new_task", NEW, "--out", tmp_path, "--ds_config", "d")
    code, _, error = call(script("transfer").transfer, *given)
    assert code == 2 and "holds runs of another request: {'train': 'all'}, now {" in error


@pytest.mark.parametrize(
    "changed", ["modules.lora_alpha=1.0", "modules.adapter_placement=sequential", "data.name_task=true"]
)
def test_a_task_file_knows_what_it_was_trained_beside(config, changed):
    assert beside(config, "a") == beside(config.override(["train.steps=3", "hypernet.head_std=0.5"]), "a")
    assert beside(config, "a") != beside(config.override([changed]), "a")
    assert beside(config, "a") != beside(config, "b")


def test_only_what_is_trained_is_counted_as_trainable(runs):
    run = load(runs["embeddings"])
    everything = run.model.parameter_counts()
    transfer.freeze(run.model, configuration.load(runs["embeddings"] / "config.json"))
    left = run.model.parameter_counts()
    assert left["total"] == everything["total"]
    assert left["trainable"] == run.model.hypernet.conditions["task"].embedding.table.weight.numel()


def test_rounding_by_the_engine_is_refused_where_other_tasks_must_not_change(runs, tmp_path):
    json_file = tmp_path / "bf16.json"
    json_file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    only = transfer.from_run(runs["base"], [NEW], None, "embeddings")
    with pytest.raises(ValueError, match=r"bf16 rounds frozen weights too.*; use torch_autocast"):
        deepspeed_json.merge(json_file, only, 1)
    assert deepspeed_json.merge(json_file, dataclasses.replace(only, transfer=TransferConfig()), 1)["bf16"]["enabled"]


def test_transfer_flags_that_need_a_new_task_say_so(runs):
    for like, train in (("movie_sentiment", "all"), (None, "embeddings")):
        with pytest.raises(ValueError, match="--like and --train embeddings need --new_task"):
            transfer.from_run(runs["base"], [], like, train)
    base = configuration.load(runs["base"] / "config.json")
    other = base.override(["model.train_backbone=true"])
    with pytest.raises(ValueError, match=r"has model.train_backbone False, this run has True"):
        transfer._check(runs["base"], base, other, load(runs["base"]).model)
