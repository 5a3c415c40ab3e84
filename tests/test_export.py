"""Static weights: what is exported answers as the run it comes from, in stock models, without this package."""

from __future__ import annotations

import json
import logging
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import IMAGE_TASKS, ROOT, TEXT_TASKS, save_backbone
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import KINDS, plain_logits
from transformers import GenerationConfig, PreTrainedModel

from hyperpelt_ds import export as exports
from hyperpelt_ds.backbones import static
from hyperpelt_ds.config import Config, save
from hyperpelt_ds.contracts import Batch, Sample
from hyperpelt_ds.export import export
from hyperpelt_ds.model import IDENTITY, Predictor, build, load
from hyperpelt_ds.train.evaluate import evaluate

TEXTS = ["what color is the shape", "red", "what does the image contain not there"]
LINEARS = "modules.lora_targets=query,key,value,output,up,down"
WHOLE = ("modules.kinds=prefix,adapter,lora", LINEARS, "modules.prefix_weighting=offset", "hypernet.parameters=task",
         "modules.adapter_activation=gelu_new",
         "modules.adapter_blocks=encoder_self,decoder_self,encoder_ffn,decoder_ffn")  # fmt: skip
AROUND = ("modules.kinds=adapter,lora", LINEARS, "modules.adapter_placement=sequential", "modules.adapter_norm=true",
          "modules.adapter_blocks=encoder_self,decoder_self,decoder_cross,encoder_ffn,decoder_ffn",
          "hypernet.copies=2", "model.dtype=bfloat16")  # fmt: skip
LORA = ("modules.kinds=lora", LINEARS, "hypernet.parameters=shared")


def whole(kind: str) -> tuple[str, ...]:
    """Every kind of module at once, with image tokens where there is an encoder to read them."""
    return WHOLE if kind in ("llama", "mistral", "qwen2") else (*WHOLE, "vision.tokens=true")


@pytest.fixture(scope="module")
def make_run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run that was never trained: `make_run(kind, *overrides)`; made once, only to be read.

    Its weights are random, large enough to matter and small enough that no attention looks at one place alone.
    """
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(kind: str, *overrides: str) -> Path:
        if not (folder / kind).exists():
            save_backbone(folder / kind, kind)
        if (kind, overrides) not in made:
            tasks = f"data.tasks={','.join(TEXT_TASKS + IMAGE_TASKS)}"
            settings = config.override([f"model.backbone={folder / kind}", tasks, *overrides])
            made[kind, overrides] = save_run(folder / f"run{len(made)}", settings)
        return made[kind, overrides]

    return run


def save_run(folder: Path, config: Config) -> Path:
    (folder / "best").mkdir(parents=True)
    model, generator = build(config, config.data.tasks), torch.Generator().manual_seed(0)
    drawn = {n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    save_file(drawn, folder / "best" / "weights.safetensors")
    save(config, folder / "config.json")
    identity = {"backbone": model.backbone.fingerprint(), "manifest": None, "encoder": None}
    (folder / IDENTITY).write_text(json.dumps(identity))
    return folder


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("image") / "red.png"
    Image.new("RGB", (8, 8), "red").save(file)
    return file


def questions(run: Predictor, task: str, image: Path | None = None) -> Batch:
    """Texts of different lengths, each with the image."""
    features = {} if image is None else {"image": run.features([image])[0].numpy()}
    samples = [Sample(str(i), task, text, "red", image="image" if image else None) for i, text in enumerate(TEXTS)]
    return run.collator(samples, features, [1.0] * len(samples))


def stock(run: Predictor) -> PreTrainedModel:
    return type(run.model.backbone.model).from_pretrained(run.config.model.backbone).eval()


def answers(model: Any, batch: Batch, beams: int, **settings: object) -> list[list[int]]:
    """What a model without this package generates, told only ids and mask; with an encoder or without one."""
    ids, mask = batch.input_ids, batch.attention_mask
    if model.config.is_encoder_decoder:
        return model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, **settings)[:, 1:].tolist()
    left = mask.argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, left), mask.gather(1, left)
    return model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, **settings)[:, ids.shape[1] :].tolist()


def live_answers(run: Predictor, batch: Batch, beams: int) -> list[list[int]]:
    ids = run.model.generate(batch, run.config.data.max_target_length, beams)
    return ids[:, int(run.model.backbone.model.config.is_encoder_decoder) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_made_once_answer_as_weights_made_on_the_fly_with_beams_and_cache(kind, make_run, red, tmp_path):
    run_dir = make_run(kind, *whole(kind))
    run = load(run_dir)
    export(run_dir, "easy_vqa", red, out=tmp_path / "out")
    model, batch = stock(run), questions(run, "easy_vqa", red)
    before = answers(model, batch, 1, max_new_tokens=8)
    detach = static.attach(model, tmp_path / "out")
    live = live_answers(run, batch, 1)
    assert answers(model, batch, 1) == answers(model, batch, 1, use_cache=False) == live != before
    assert answers(model, batch, 3) == live_answers(run, batch, 3)
    detach()
    assert answers(model, batch, 1, max_new_tokens=8) == before


@pytest.mark.parametrize("kind", ["bart", "t5v1.1", "llama"])
def test_sequential_adapters_with_norms_stay_apart_and_a_half_precision_run_is_checked_in_full(
    kind, make_run, red, tmp_path
):
    folder = export(make_run(kind, *AROUND), "easy_vqa", red, out=tmp_path / "out")
    tensors = load_file(folder / "weights.safetensors")
    fields = ("down", "down_bias", "up", "up_bias", "gain", "shift")
    apart = {f"adapter_{branch}_{field}" for branch in (0, 1) for field in fields}
    assert {name.rpartition(".")[2] for name in tensors if "adapter" in name} == apart
    assert json.loads((folder / "config.json").read_text())["backbone"]["dtype"] == "bfloat16"
    difference = re.search(r"largest difference of a logit (\S+), where", (folder / "README.md").read_text())[1]
    assert float(difference) < 1e-4, "in bfloat16 the difference would be some 1e-1"


@pytest.mark.parametrize("kind", ["bart", "marian", "t5v1.1", "mt5", "llama"])
def test_low_rank_deltas_and_norms_load_as_a_peft_model_that_answers_as_the_run_does(kind, make_run, tmp_path):
    run = load(make_run(kind, *LORA))
    folder = export(make_run(kind, *LORA), "movie_rating", out=tmp_path / "out", format="peft")
    base, batch = stock(run), questions(run, "movie_rating")
    base.generation_config = GenerationConfig.from_pretrained(folder)
    without = answers(base, batch, 1)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    assert answers(model, batch, 1) == live_answers(run, batch, 1) != without
    assert answers(model, batch, 3) == live_answers(run, batch, 3)
    weights = run.model.hypernet(batch)
    expected = run.model.backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels)
    assert torch.allclose(plain_logits(model, batch), expected, atol=1e-3)
    wrapped = sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules())
    assert wrapped == sum(len(target.sites) for target in run.model.backbone.geometry.projections)
    kept = [n for n, m in model.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    assert len(kept) == len({id(module) for module, _ in run.model.backbone._norms})


@pytest.mark.slow
def test_the_code_of_a_card_answers_where_this_package_is_not_installed(make_run, red, run_python, tmp_path):
    run_dir = make_run("marian", *whole("marian"))
    folder = export(run_dir, "easy_vqa", red, out=tmp_path / "out")
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1).replace('"..."', repr(TEXTS[0]))
    (tmp_path / "alone.py").write_text(f"import sys\nsys.modules['hyperpelt_ds'] = None\n{code}")
    done = run_python("python", tmp_path / "alone.py", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (expected,) = load(run_dir).generate("easy_vqa", [TEXTS[0]], [red])
    assert done.stdout.strip() == str([expected]) and expected


def test_the_command_exports_a_trained_run_and_its_card_has_scores_and_difference(
    finished_run, tmp_path, monkeypatch, caplog
):
    run_dir = shutil.copytree(finished_run(2), tmp_path / "run")
    score = evaluate(run_dir, ["movie_rating"], shuffle=())["tasks"]["movie_rating"]["score"]
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    words = ["export.py", "--run_dir", run_dir, "--task", "movie_rating", "--out", tmp_path / "new" / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with caplog.at_level(logging.INFO):
        runpy.run_path(str(ROOT / "launch" / "export.py"), run_name="__main__")
    folder = tmp_path / "new" / "out"
    said = re.search("largest difference of a logit .*", caplog.text)[0]
    card = (folder / "README.md").read_text()
    assert said in card and "8 samples of the test split" in said
    assert f"exact_match {score:.3f}" in card
    files = {"README.md", "config.json", "generation_config.json", "static.py", "weights.safetensors"}
    assert {file.name for file in folder.iterdir()} == files and list(folder.parent.iterdir()) == [folder]
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone"]["fingerprint"] == json.loads((run_dir / "identity.json").read_text())["backbone"]
    assert set(load_file(folder / "weights.safetensors")) >= {
        f"{config['geometry']['sites']['decoder_cross.1']}.prefix_keys", "model.encoder.layers.0.fc2.adapter_0_up"
    }  # fmt: skip


def test_a_run_without_its_data_is_checked_on_a_sentence(make_run, tmp_path):
    run_dir = shutil.copytree(make_run("bart", *LORA), tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["manifest"] = "gone/manifest.json"
    (run_dir / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    folder = export(run_dir, "movie_rating", out=tmp_path / "out")
    assert "one built-in sentence" in (folder / "README.md").read_text()


def test_a_test_target_too_long_to_train_on_does_not_matter(make_run, tmp_path):
    run_dir = shutil.copytree(make_run("bart", *LORA), tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["max_target_length"] = 2
    (run_dir / "config.json").write_text(json.dumps(config))
    folder = export(run_dir, "movie_sentiment", out=tmp_path / "out")
    assert "samples of the" in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def written(make_run, red, tmp_path_factory) -> tuple[Any, Path]:
    live = exports._live(make_run("bart", *whole("bart")), "easy_vqa", red, "safetensors", [])
    folder = tmp_path_factory.mktemp("written")
    live.generation.save_pretrained(folder)
    exports._write_static(live, folder)
    return live, folder


@pytest.mark.parametrize("name", [
    "model.encoder.layers.0.self_attn.prefix_values", "model.decoder.layers.1.self_attn.prefix_keys",
    "model.decoder.layers.1.encoder_attn.prefix_offset", "model.encoder.layers.1.fc2.adapter_0_up_bias",
    "model.decoder.layers.0.encoder_attn.k_proj.lora_up", "model.decoder.layers.1.final_layer_norm.bias",
    "model.encoder.image_tokens", "activation",
])  # fmt: skip
def test_weights_of_which_one_vector_is_wrong_are_refused(name, written, tmp_path):
    live, whole_folder = written
    folder = shutil.copytree(whole_folder, tmp_path / "folder")
    assert "largest difference" in exports._compare(live, folder, "safetensors")
    tensors, config = load_file(folder / "weights.safetensors"), json.loads((folder / "config.json").read_text())
    if name == "activation":
        config["adapter"]["activation"] = "relu"
        (folder / "config.json").write_text(json.dumps(config))
    else:
        vector = tensors[name] if tensors[name].ndim == 1 else tensors[name][0]
        vector.zero_()
        save_file(tensors, folder / "weights.safetensors")
    with pytest.raises(ValueError, match="do not answer as the run does"):
        exports._compare(live, folder, "safetensors")


def test_a_refused_export_leaves_nothing(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="do not answer as the run does, so nothing was kept: largest difference"):
        export(make_run("bart", *LORA), "movie_rating", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_are_refused_by_another_model_and_by_one_that_has_some(make_run, tmp_path):
    run_dir = make_run("bart", *LORA)
    folder = export(run_dir, "movie_rating", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"were made for bart .*, this model is t5"):
        static.attach(stock(load(make_run("t5", *LORA))), folder)
    model = stock(load(run_dir))
    model.get_input_embeddings().weight.data *= 1.1
    with pytest.raises(ValueError, match="this bart model has other embeddings"):
        static.attach(model, folder)
    model = stock(load(run_dir))
    static.attach(model, folder)
    with pytest.raises(ValueError, match="has static weights already"):
        static.attach(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": 2}))
    with pytest.raises(ValueError, match="has version 2 of the format, this loader reads 1"):
        static.attach(stock(load(run_dir)), folder)


FEWER = ("modules.kinds=lora", "modules.train_norms=false")


@pytest.mark.parametrize("kind, overrides, arguments, message", [
    ("bart", LORA, dict(task="movie_ratin"), "unknown task 'movie_ratin'; this run was trained on movie_sentiment"),
    ("bart", LORA, dict(task="easy_vqa"), "task 'easy_vqa': its weights are made for one image; give it with --image"),
    ("bart", (*LORA, "hypernet.conditions=task"), dict(task="easy_vqa", image="red"), "makes nothing from images"),
    ("bart", (*FEWER, "hypernet.conditions=image"), dict(task="movie_rating"), "makes no weights for it without an im"),
    ("bart", (FEWER[0], "hypernet.conditions=image"), dict(task="movie_rating", format="peft"), "no weights for it wi"),
    ("bart", LORA, dict(task="movie_rating", format="zip"), "--format 'zip': allowed are safetensors, peft"),
    ("bart", WHOLE, dict(task="movie_rating", format="peft"), r"has \['prefix', 'adapter', 'lora'\]: take --f"),
    ("bart", (*FEWER, "vision.tokens=true"), dict(task="easy_vqa", image="red", format="peft"), "cannot hold the ima"),
    ("llama", (*FEWER, "vision.tokens=true"), dict(task="easy_vqa", image="red"), "a model without an encoder has its"),
    ("bart", LORA, dict(task="movie_rating", out="runs"), "--out .*runs: is there already and not empty"),
    ("bart", ("model.train_backbone=true", "modules.kinds=[]"), dict(task="movie_rating"), r"save_pretrained\(fold"),
])  # fmt: skip
def test_a_request_that_cannot_be_met_says_why(kind, overrides, arguments, message, make_run, red, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "file").touch()
    arguments["image"] = red if "image" in arguments else None
    arguments["out"] = tmp_path / arguments.get("out", "out")
    with pytest.raises(ValueError, match=message):
        export(make_run(kind, *overrides), **arguments)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_refused(make_run, tmp_path):
    run_dir = shutil.copytree(make_run("bart", *LORA), tmp_path / "run", ignore=shutil.ignore_patterns("best"))
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        export(run_dir, "movie_rating", out=tmp_path / "out")


def test_a_model_that_was_itself_trained_is_saved_as_the_error_says(make_run, tmp_path):
    run = load(make_run("bart", "model.train_backbone=true", "modules.kinds=[]"))
    run.model.backbone.model.save_pretrained(tmp_path)
    model, batch = type(run.model.backbone.model).from_pretrained(tmp_path).eval(), questions(run, "movie_rating")
    expected = run.model.backbone.forward(None, batch.input_ids, batch.attention_mask, batch.labels)
    assert torch.allclose(plain_logits(model, batch), expected, atol=1e-4)
