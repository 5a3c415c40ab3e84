"""The weights that a trained run makes for one task, or for one image under a task, as files of their own.

Two formats: `safetensors` holds every kind of module and carries its loader (backbones/static.py), `peft` holds
low-rank deltas as PEFT names them. Each export is loaded into a stock backbone and compared with the live model before
it is kept. This file must not know how weights are made, nor what modules a backbone has.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperpelt_ds import dist
from hyperpelt_ds.backbones import static
from hyperpelt_ds.backbones.stock import places, static_tensors, stock_logits
from hyperpelt_ds.contracts import Batch, Sample
from hyperpelt_ds.data.collate import UnusableSample, source_start
from hyperpelt_ds.data.manifest import Manifest
from hyperpelt_ds.data.reader import Reader
from hyperpelt_ds.model import Predictor, identity_of, load
from hyperpelt_ds.tasks import needs_image

log = dist.logger(__name__)

FORMATS = ("safetensors", "peft")
CHECKED = 8
"""Samples of the task that both models are asked."""
SENTENCE = "The quick brown fox jumps over the lazy dog."
TOLERANCE = 2e-6
"""The largest difference of a logit that is kept, as a share of the largest change that the weights make to one.

Both models compute in float64, whatever the run's type, so that rounding hides no mistake. What is left are the scales
that merging folds into float32 weights: 1e-8 of that change for the demo's tasks, up to 3e-7 for random weights whose
attention is so sharp that rounding grows. One vector of zeros in the demo's weights makes 7e-6 or more.
"""
_PEFT = "base_model.model."


class Live(NamedTuple):
    """What is kept of the live model, which may leave memory before the stock one is loaded."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    generation: Any
    model_class: Any
    batch: Batch
    logits: Tensor
    asked: str


def export(
    run_dir: str | Path,
    task: str,
    image: str | Path | None = None,
    *,
    out: str | Path,
    format: str = "safetensors",
    task_file: str | Path | None = None,
) -> Path:
    """Writes the weights of `task`, or of the image file `image` under it, into the new folder `out`; returns it.

    `task_file` adds a task that was trained on top of the run.

    Raises ValueError for a request that the run or the format cannot meet, and where the written weights do not make a
    stock backbone answer as the live model does; nothing is left in `out` then.
    """
    folder = Path(out)
    if format not in FORMATS:
        raise ValueError(f"--format {format!r}: allowed are {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {out}: is there already and not empty; name a new folder")
    live = _live(Path(run_dir), task, image, format, [task_file] if task_file else [])
    gc.collect()  # the live model hangs in cycles with its own hooks, and a second one is about to be loaded
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        made = Path(temporary) / "export"
        made.mkdir()
        live.generation.save_pretrained(made)
        _write_peft(live, made) if format == "peft" else _write_static(live, made)
        said = _compare(live, made, format)
        (made / "README.md").write_text(_card(live, Path(run_dir), format, said))
        made.rename(folder)
    log.info("%s: %s", folder, said)
    return folder


def _live(run_dir: Path, task: str, image: str | Path | None, format: str, task_files: Sequence[str | Path]) -> Live:
    run = load(run_dir, tasks=task_files)
    _check(run, run_dir, task, image, format)
    config, backbone, (batch, asked) = run.config, run.model.backbone, _questions(run, task, image)
    backbone.model.double()
    backbone.initial_norms = backbone.initial_norms.double()
    with torch.no_grad():
        weights = run.model.hypernet(batch)
        logits = backbone.forward(weights, batch.input_ids, batch.attention_mask, batch.labels, batch.targets)
    tensors = static_tensors(backbone, weights, 0)
    if not tensors or (format == "peft" and not any(name.endswith(".lora_down") for name in tensors)):
        raise ValueError(f"task {task!r}: {run_dir} makes no weights for it without an image")
    generation = copy.deepcopy(backbone.model.generation_config)
    generation.max_new_tokens = config.data.max_target_length
    generation.num_beams = config.eval.num_beams
    generation.suppress_tokens = backbone.forbidden or None
    facts = _facts(run, run_dir, task, image)
    return Live(tensors, facts, generation, type(backbone.model), batch, logits, asked)


def _facts(run: Predictor, run_dir: Path, task: str, image: str | Path | None) -> dict[str, Any]:
    """What config.json says: all that a loader needs beside the tensors, and where they come from."""
    config, backbone = run.config, run.model.backbone
    sites, adapted = places(backbone)
    return {
        "format": "static weights of hyperpelt_ds",
        "version": static.VERSION,
        "task": task,
        "image": Path(image).name if image is not None else None,
        "backbone": {
            "id": config.model.backbone,
            "model_type": backbone.model.config.model_type,
            "is_encoder_decoder": backbone.model.config.is_encoder_decoder,
            "dtype": config.model.dtype,
            "fingerprint": identity_of(run_dir)["backbone"],
            "sample": static.sample(backbone.model).tolist(),
        },
        "geometry": {
            "model_size": backbone.geometry.model_size,
            "prefix_size": backbone.geometry.prefix_size,
            "sites": sites,
        },
        "adapter": {
            "activation": config.modules.adapter_activation,
            "placement": config.modules.adapter_placement,
            "places": adapted,
        },
        "max_source_length": config.data.max_source_length,
        "source_begins_with": source_start(task) if config.data.name_task else "",
    }


def _check(run: Predictor, run_dir: Path, task: str, image: str | Path | None, format: str) -> None:
    model, kinds = run.model, run.config.modules.kinds
    if task not in model.tasks:
        raise ValueError(f"unknown task {task!r}; this run was trained on {', '.join(model.tasks)}")
    if run.config.model.train_backbone:
        raise ValueError(
            f"{run_dir} trained the backbone itself (model.train_backbone), so that there are no weights beside it to "
            f"export; save the model: hyperpelt_ds.load(run_dir).model.backbone.model.save_pretrained(folder)"
        )
    if run.config.model.quantize != "none":
        raise ValueError(
            f"{run_dir} was trained beside {run.config.model.quantize} weights (model.quantize); what is exported is "
            f"for the model as it was published, which would not answer as the run does"
        )
    if format == "peft" and kinds != ("lora",):
        raise ValueError(
            f"--format peft holds low-rank deltas alone (modules.kinds=['lora']), this run has {list(kinds)}: "
            f"take --format safetensors"
        )
    has_tokens = model.hypernet.image_tokens is not None
    if not has_tokens and "image" not in model.hypernet.branch_names:
        if image is not None:
            raise ValueError(f"--image {image}: {run_dir} makes nothing from images")
    elif image is None and needs_image(task):
        raise ValueError(f"task {task!r}: its weights are made for one image; give it with --image")
    if has_tokens and image is not None and format == "peft":
        raise ValueError("--format peft cannot hold the image tokens of vision.tokens: take --format safetensors")
    if has_tokens and image is not None and not model.backbone.model.config.is_encoder_decoder:
        raise ValueError(
            "vision.tokens: a model without an encoder has its image tokens between source and answer; no format has "
            "room for them there"
        )


def _questions(run: Predictor, task: str, image: str | Path | None) -> tuple[Batch, str]:
    """Samples of the task, each with the image; where the run's data cannot be read, one sentence. And what was taken,
    in words."""
    samples, asked = [Sample("0", task, SENTENCE, "yes")], "one built-in sentence"
    try:
        reader = Reader(Manifest.of(run.config.data))
        split = "test" if reader.manifest.count(task, "test") else "validation"
        count = min(reader.manifest.count(task, split), CHECKED)
        if count:
            samples = [reader.sample(task, split, i) for i in range(count)]
            asked = f"{count} samples of the {split} split"
    except (OSError, ValueError) as error:  # a run may be used where its data is not
        log.info("the check asks a built-in sentence: %s", error)
    name = None if image is None else "image"
    features = {} if image is None else {"image": run.features([image])[0].numpy()}
    samples = [sample._replace(image=name, target=_short(run, sample)) for sample in samples]
    return run.collator(samples, features, [1.0] * len(samples)), asked


def _short(run: Predictor, sample: Sample) -> str:
    """The sample's target, or if it is too long to train on, which stored ones of a test split may be, a short one."""
    try:
        run.collator.targets([sample])
    except UnusableSample:
        return "yes"
    return sample.target


def _write_static(live: Live, folder: Path) -> None:
    save_file(live.tensors, folder / "weights.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(live.config, indent=1) + "\n")
    shutil.copyfile(static.__file__, folder / "static.py")


def _write_peft(live: Live, folder: Path) -> None:
    """A (r, I) and B (O, r) for every target, and trained norms among the modules that PEFT saves whole."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in live.tensors.items():
        module, _, field = name.rpartition(".")
        own = {"lora_down": f"{module}.lora_A.weight", "lora_up": f"{module}.lora_B.weight"}.get(field)
        tensors[f"{_PEFT}{own or name}"] = tensor.T.contiguous() if own else tensor
    targets = {name.rpartition(".")[0]: tensor for name, tensor in live.tensors.items() if name.endswith(".lora_down")}
    norms = dict.fromkeys(name.rpartition(".")[0] for name in live.tensors)
    rank = next(iter(targets.values())).shape[1]
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if live.config["backbone"]["is_encoder_decoder"] else "CAUSAL_LM",
        "base_model_name_or_path": live.config["backbone"]["id"],
        "r": rank,
        "lora_alpha": rank,  # their quotient is the factor: 1, because B holds the run's own
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(targets),
        "modules_to_save": [name for name in norms if name not in targets] or None,
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def _merge_peft(model: Any, folder: Path) -> None:
    """What PEFT makes of the folder, in the model's own weights: W + alpha / r B A, and norms in place of its own."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        parameter = name.removeprefix(_PEFT).replace(".lora_A.", ".")
        if ".lora_A." in name:
            delta = tensors[name.replace(".lora_A.", ".lora_B.")].double() @ tensor.double()
            model.get_parameter(parameter).data += config["lora_alpha"] / config["r"] * delta
        elif ".lora_B." not in name:
            model.get_parameter(parameter).data = tensor.double()


def _compare(live: Live, folder: Path, format: str) -> str:
    """Asks a stock model with what was written in `folder`; how far its logits are from the live model's, in words.

    Raises ValueError if that is further than rounding can take them.
    """
    backbone = live.config["backbone"]
    model = live.model_class.from_pretrained(backbone["id"], dtype=getattr(torch, backbone["dtype"])).double().eval()
    changed = float((stock_logits(model, live.batch) - live.logits).abs().max())
    _merge_peft(model, folder) if format == "peft" else static.attach(model, folder)
    difference = float((stock_logits(model, live.batch) - live.logits).abs().max())
    said = (
        f"largest difference of a logit {difference:.1e}, where the weights change them by up to {changed:.1f} "
        f"(float64, {live.asked})"
    )
    if not difference <= TOLERANCE * max(1.0, changed):  # so that NaN is refused as well
        raise ValueError(f"the exported weights do not answer as the run does, so nothing was kept: {said}")
    return said


def _card(live: Live, run_dir: Path, format: str, said: str) -> str:
    task, image, backbone = live.config["task"], live.config["image"], live.config["backbone"]
    begins = live.config["source_begins_with"]
    new = "answer" if backbone["is_encoder_decoder"] else "answer[:, tokens.input_ids.shape[1] :]"
    return f"""---
library_name: {"peft" if format == "peft" else "transformers"}
tags: [hyperpelt]
---
# {task}{f", image {image}" if image else ""}

What a trained run of hyperpelt_ds makes for `{task}`{f" and `{image}`" if image else ""}, as static weights that are
put beside the frozen model `{backbone["id"]}` (fingerprint {backbone["fingerprint"][:12]}).

{_scores(run_dir, task)}

Checked against the run when written: {said}.

```python
{_USE[format].format(model_class=live.model_class.__name__, backbone=backbone["id"])}
tokenizer = AutoTokenizer.from_pretrained("{backbone["id"]}")
{"" if backbone["is_encoder_decoder"] else "tokenizer.add_eos_token = False  # a question goes on with its answer"}
tokens = tokenizer(["{begins}..."], truncation=True, max_length={live.config["max_source_length"]}, return_tensors="pt")
answer = model.generate(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
print(tokenizer.batch_decode({new}, skip_special_tokens=True))
```

Answers are decoded by generation_config.json, as the run does it: the settings that the model was published with
(length penalties, forced tokens) are left out.

The weights were learned beside the frozen model from the run's data; the terms of both apply to them. NOTICE of
hyperpelt_ds names those of its demo. {"" if format == "peft" else "static.py is under the Apache License 2.0."}
"""


def _scores(run_dir: Path, task: str) -> str:
    """The run's scores on the task, from what launch/evaluate.py wrote into its folder."""
    file = run_dir / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {"tasks": {}}
    if task not in results["tasks"]:
        return "The run was not scored on this task."
    metrics = results["tasks"][task]["metrics"]
    figures = ", ".join(f"{metric} {figure['score']:.3f}" for metric, figure in metrics.items())
    return f"Scores of the run on this task, {results['split']} split: {figures}."


_USE = {
    "safetensors": """import sys

from transformers import AutoTokenizer, {model_class}

folder = "."  # where this file lies
sys.path.insert(0, folder)
from static import attach

model = {model_class}.from_pretrained("{backbone}")
detach = attach(model, folder)  # detach() takes the weights out again""",
    "peft": """from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, {model_class}

folder = "."  # where this file lies
model = {model_class}.from_pretrained("{backbone}")
model.generation_config = GenerationConfig.from_pretrained(folder)
model = PeftModel.from_pretrained(model, folder)""",
}
