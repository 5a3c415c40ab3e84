"""The oldest versions that `make test-oldest` installs are the floors of pyproject.toml, all of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

HIGHEST = {"torch": (2, 11), "torchvision": (0, 26), "transformers": (5, 17)}
"""No floor may be above these."""


def constraints() -> dict[str, str]:
    done = subprocess.run([sys.executable, ROOT / ".ci" / "oldest.py"], capture_output=True, text=True, check=True)
    return dict(line.split("==") for line in done.stdout.split())


def test_every_requirement_is_held_at_its_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for own in project["optional-dependencies"].values() for line in own]
    assert {f"{name}>={version}" for name, version in constraints().items()} == {line.split(",")[0] for line in lines}


@pytest.mark.parametrize("name", HIGHEST)
def test_no_floor_is_above_what_is_promised(name):
    assert tuple(map(int, constraints()[name].split("."))) <= HIGHEST[name]


def test_a_requirement_without_a_floor_is_refused():
    spec = importlib.util.spec_from_file_location("oldest", ROOT / ".ci" / "oldest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"'torch': expected NAME>=FLOOR"):
        module.oldest(["torch"])
