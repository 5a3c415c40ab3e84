"""The rules that keep the structure: imports run one way, and each outside library has one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hyperpelt_ds"
RANKS = {
    "contracts": 0,
    "config": 0,
    "dist": 0,
    "lines": 0,
    "terminal": 0,
    "kernels": 1,
    "tasks": 1,
    "recipes": 1,
    "hypernet": 2,
    "backbones": 2,
    "data": 2,
    "vision": 2,
    "task_file": 2,
    "model": 3,
    "export": 3,
    "counts": 4,
    "train": 4,
    "study": 5,
    "report": 5,
    "forecast": 5,
    "launch": 6,
    "data_prep": 6,
}
# vision.load_encoder reaches for CLIP, which is a transformers model, inside the function that needs it.
# export is a use of the whole model, as training is, but one that training must not know.
ALLOWED_EDGES = {("vision", "backbones"), ("export", "model")}
ONLY_IN = {
    "transformers": ("hyperpelt_ds/backbones/", "data_prep/", "launch/bench_data.py", "launch/bench_adapters.py"),
    "deepspeed": ("hyperpelt_ds/train/engine.py", "hyperpelt_ds/train/partitions.py"),
    "triton": ("hyperpelt_ds/kernels/",),
    "webdataset": ("hyperpelt_ds/data/", "launch/bench_data.py"),
    "datasets": ("data_prep/",),
    "fsspec": ("hyperpelt_ds/data/",),
    "fire": ("launch/", "data_prep/"),
    "tensorboard": ("hyperpelt_ds/train/metrics.py",),
    "torch.utils.tensorboard": ("hyperpelt_ds/train/metrics.py",),
    "PIL": (
        *("hyperpelt_ds/vision/", "hyperpelt_ds/report/observed.py", "data_prep/"),
        *("hyperpelt_ds/train/figures.py", "hyperpelt_ds/train/samples.py"),
    ),
    "peft": ("launch/bench_step.py", "launch/kernel_peers.py"),
    "adapters": ("launch/bench_adapters.py",),
    "sklearn": ("hyperpelt_ds/tasks/metrics.py",),
    "scipy": ("hyperpelt_ds/tasks/metrics.py",),
    "sacrebleu": ("hyperpelt_ds/tasks/metrics.py",),
    "pycocoevalcap": ("hyperpelt_ds/tasks/metrics.py",),
}


def _files() -> list[Path]:
    return sorted(file for folder in ("hyperpelt_ds", "launch", "data_prep") for file in (ROOT / folder).rglob("*.py"))


def _imports(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if relative.parts[0] != "hyperpelt_ds" else relative.with_suffix("").parts[1]


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way_and_outside_libraries_have_one_place(file):
    relative = str(file.relative_to(ROOT))
    here = _part(file)
    for name in _imports(file):
        if name.startswith("hyperpelt_ds.") and here != "__init__":
            there = name.split(".")[1]
            if there in RANKS and there != here and (here, there) not in ALLOWED_EDGES:
                assert RANKS[there] < RANKS[here], f"{relative} imports {name}: {there} is not below {here}"
        for library, places in ONLY_IN.items():
            if name == library or name.startswith(library + "."):
                assert relative.startswith(places), f"{relative} imports {name}; only {places} may"


def test_every_part_of_the_package_has_a_rank():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} <= set(RANKS)


@pytest.mark.parametrize("file", _files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(file):
    tree = ast.parse(file.read_text())
    assert not tree.body or ast.get_docstring(tree), f"{file} has no module docstring"
