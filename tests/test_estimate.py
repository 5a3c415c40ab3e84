"""Counted sizes: against published ones and formulas, and what the command and docs/recipes.md say of them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT
from test_launch import script

from hyperpelt_ds import counts, recipes
from hyperpelt_ds.counts import Estimate

DOCS = (ROOT / "docs" / "recipes.md").read_text()
T5_BASE = 222_903_552
CLIP_RN101 = ["vision.encoder=clip", "vision.weights=any", "vision.channels=2048", "vision.tokens=true"]
PUBLISHED = {
    "google-t5/t5-small": 60_506_624,
    "google-t5/t5-base": T5_BASE,
    "google-t5/t5-large": 737_668_096,
    "google-t5/t5-3b": 2_851_598_336,
    "google-t5/t5-11b": 11_307_321_344,
    "google/t5-v1_1-small": 76_961_152,
    "google/flan-t5-base": 247_577_856,
    "google/flan-t5-large": 783_150_080,
    "google/t5-v1_1-xl": 2_849_757_184,
    "google/t5-v1_1-xxl": 11_135_332_352,
    "facebook/bart-base": 139_420_416,
    "facebook/bart-large": 406_291_456,
}


def count(recipe: str, *overrides: str, tasks: int = 0) -> Estimate:
    return counts.estimate(recipes.get(recipe).override(overrides), tasks)


def vl_rows() -> dict[str, list[str]]:
    """Name -> overrides, from the list in the docstring of vl_t5_base."""
    lines = inspect.getdoc(recipes.RECIPES["vl_t5_base"]).splitlines()
    listed = [line for line in lines if line.startswith("    ") and "=" in line and "launch/" not in line]
    name, rows = "HyperPELT", {"HyperPELT": []}
    for line in listed:
        name = line[:23].strip() or name
        rows.setdefault(name, []).extend(line[23:].split())
    return rows


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_shape_has_as_many_parameters_as_the_published_model(name):
    assert count("glue_t5_base", f"model.backbone={name}").backbone_parameters == PUBLISHED[name]


def test_hyperformer_and_adapters_count_what_their_authors_publish():
    hyperformer = count("hyperformer_pp_t5_base")
    assert hyperformer.trainable == 5_211_056
    assert f"{100 * hyperformer.trainable_a_task:.2f} {hyperformer.times_backbone:.2f}" == "0.29 1.02"
    assert count("adapters_t5_base", tasks=1).trainable == 1_928_832
    eight = count("adapters_t5_base")
    assert eight.trainable == 8 * 48 * (768 * 24 * 2 + 24 + 768 + 2 * 768) + 62 * 768


@pytest.mark.parametrize("rows, d, hidden, e, narrow, tasks", [(49, 768, 640, 64, 16, 8), (30, 64, 128, 32, 48, 3)])
def test_hyperpelt_counts_what_the_formula_gives(rows, d, hidden, e, narrow, tasks):
    found = count(
        "glue_t5_base",
        *(f"modules.prefix_length={rows}", f"modules.bottleneck={narrow}", f"hypernet.embedding_size={d}"),
        *(f"hypernet.hidden_size={hidden}", f"hypernet.hyper_size={e}"),
        tasks=tasks,
    )
    assert found.trainable_parts == {
        "task/embedding": rows * d * tasks,
        "task/layers_and_blocks": rows * d * (12 + 5),
        "task/projector": 3 * d * hidden + hidden + hidden * e + e + 2 * e,
        "task/prefix_head": (e + 1) * 2 * 768,
        "task/adapter_head": (e + 1) * (2 * 768 * narrow + 768 + narrow),
        "task/adapter_scale": 24,
        "norms": 62 * 768,
    }
    assert found.weights_bytes == {"task": 4 * (36 * rows * 2 * 768 + 24 * (2 * 768 * narrow + 768 + narrow + 1))}


@pytest.mark.parametrize("hidden, share", [(512, 13.3), (800, 20.7)])
def test_prefix_tuning_counts_three_mlps(hidden, share):
    found = count("prefix_t5_base", f"hypernet.prefix_mlp={hidden}", "modules.train_norms=false")
    assert found.trainable == 3 * (49 * 768 + 768 * hidden + hidden + hidden * 2 * 12 * 768 + 2 * 12 * 768)
    assert round(100 * (found.times_backbone - 1), 1) == share


@pytest.mark.parametrize("backbone, bottleneck, published", [
    ("google-t5/t5-base", 192, 8.00), ("facebook/bart-base", 96, 4.18),
])  # fmt: skip
def test_a_shared_adapter_on_images_has_vl_adapters_share_of_the_model(backbone, bottleneck, published):
    found = count(
        "vl_t5_base", *vl_rows()["adapters"], *CLIP_RN101, f"modules.bottleneck={bottleneck}",
        f"model.backbone={backbone}",
    )  # fmt: skip
    assert 100 * found.trainable_of_total == pytest.approx(published, abs=0.005)
    assert found.trainable_parts["image_tokens"] == 2048 * 768 + 768 + 2 * 768


def test_a_trained_backbone_is_counted_once():
    found = count("full_t5_base")
    assert found.trainable == found.total == T5_BASE
    assert (found.times_backbone, found.trainable_a_task, found.trainable_of_total) == (1.0, 1 / 8, 1.0)


def test_both_conventions_and_bytes_follow_from_the_counts():
    found = count("vl_t5_base")
    assert sum(found.trainable_parts.values()) == found.trainable
    assert found.total == T5_BASE + found.trainable - found.trainable_parts["norms"], "norms are counted once"
    assert found.times_backbone == 1 + found.trainable / T5_BASE
    assert found.trainable_a_task == found.trainable / (3 * T5_BASE)
    assert found.trainable_of_total == found.trainable / found.total
    assert found.trainable_bytes == 4 * found.trainable
    assert found.weights_bytes.keys() == {"task", "image"}


def test_a_description_is_counted_with_the_size_of_its_encoder():
    encoder = "sentence-transformers/all-MiniLM-L6-v2"
    overrides = ["hypernet.conditions=description", f"hypernet.sentence_encoder={encoder}"]
    found = count("glue_t5_base", *overrides)
    assert found.trainable_parts["description/embedding"] == (384 + 1) * 768 + 49 * 768


def test_a_shape_that_is_not_known_and_tasks_that_are_not_named_are_refused():
    with pytest.raises(ValueError, match=r"model.backbone: cannot read the shape of 'nowhere/none'.*google-t5/t5-base"):
        count("glue_t5_base", "model.backbone=nowhere/none")
    for tasks in (0, -3):
        with pytest.raises(ValueError, match=f"number of tasks must be at least 1, got {tasks}: .*give --tasks"):
            count("glue_t5_base", "data.tasks=", tasks=tasks)
    with pytest.raises(ValueError, match=r"hypernet\.sentence_encoder: cannot read the shape"):
        count("glue_t5_base", "hypernet.conditions=description", "hypernet.sentence_encoder=nowhere/none")


def command(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["launch/estimate.py", *arguments])
    script("command").run(script("estimate").estimate)
    return capsys.readouterr().out


def test_the_command_prints_json_that_agrees_and_a_table_of_every_part(monkeypatch, capsys):
    arguments = ("--recipe", "vl_t5_base", "--tasks", "5", "modules.bottleneck=8")
    found = count("vl_t5_base", "modules.bottleneck=8", tasks=5)
    printed = json.loads(command(monkeypatch, capsys, *arguments, "--json"))
    assert printed == {"recipe": "vl_t5_base", **dataclasses.asdict(found)} and printed["tasks"] == 5
    table = command(monkeypatch, capsys, *arguments)
    assert all(name in table and f"{size:,}" in table for name, size in found.trainable_parts.items())
    assert f"{100 * found.trainable_a_task:.3f} %" in table and f"{100 * found.trainable_of_total:.3f} %" in table


def test_every_row_of_the_docs_is_what_is_counted():
    text = re.findall(r"^\| `(\S+) ?(.*?)` \| (.*) \|$", DOCS, re.M)
    assert {recipe for recipe, _, _ in text} | {"demo", "vl_t5_base"} == recipes.RECIPES.keys()
    for recipe, overrides, figures in text:
        found = count(recipe, *overrides.split())
        one = [counts.amount(size) for size in found.weights_bytes.values()]
        assert [figure.strip() for figure in figures.split("|")] == [
            f"{found.trainable:,}", f"{found.times_backbone:.3f}x", f"{100 * found.trainable_a_task:.3f} %",
            counts.amount(found.trainable_bytes), *(one or [""]),
        ], f"{recipe} {overrides}"  # fmt: skip


def test_every_vision_row_of_the_docs_is_what_is_counted():
    rows = vl_rows()
    listed = re.findall(r"^\| ([^`|]+) \| ([\d,]+) \| (\S+ %) \| (.*) \|$", DOCS, re.M)
    assert [name for name, *_ in listed if name not in rows] == [] and len(listed) == len(rows) == 8
    for name, *figures in listed:
        found = count("vl_t5_base", *rows[name])
        share = f"{100 * found.trainable_of_total:.3f} %"
        assert figures == [f"{found.trainable:,}", share, counts.amount(found.trainable_bytes)], name


def test_no_baseline_on_images_is_blind():
    for name, overrides in vl_rows().items():
        config = recipes.get("vl_t5_base").override(overrides)
        assert config.vision.tokens or "image" in config.hypernet.conditions, name


def test_the_commands_of_the_docs_have_flags_recipes_and_overrides_that_exist():
    lines = [line.strip() for block in re.findall(r"```bash\n(.*?)```", DOCS, re.S) for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if "launch/" in line]
    loop = next(line for line in lines if line.startswith("for recipe in"))
    names = loop.removeprefix("for recipe in").removesuffix("; do").split()
    for words in commands:
        name = next(re.fullmatch(r"launch/(\w+)\.py", word)[1] for word in words if word.startswith("launch/"))
        arguments = words[words.index(f"launch/{name}.py") + 1 :]
        script("command")._checked(getattr(script(name), name), arguments)
        chosen = arguments[arguments.index("--recipe") + 1] if "--recipe" in arguments else "glue_t5_base"
        for recipe in names if chosen == "$recipe" else [chosen]:
            recipes.get(recipe).override(word for word in arguments if re.match(r"\w+\.\w+=", word))
        if "--ds_config" in arguments:
            assert (ROOT / arguments[arguments.index("--ds_config") + 1]).is_file()
    assert len(commands) >= 8
