"""Prints the oldest versions that pyproject.toml allows, optional groups included, as constraints for pip.

One NAME==FLOOR a line. For a floor that was never released, or that another requirement excludes, pip ends with an
error.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def oldest(requirements: list[str]) -> list[str]:
    """NAME==FLOOR of each NAME>=FLOOR; raises ValueError for a requirement of another form."""
    found = []
    for requirement in requirements:
        match = re.match(r"([\w.-]+)>=([\w.]+)(,|$)", requirement)
        if match is None:
            raise ValueError(f"pyproject.toml: {requirement!r}: expected NAME>=FLOOR")
        found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    optional = [line for group in project["optional-dependencies"].values() for line in group]
    print(*oldest(project["dependencies"] + optional), sep="\n")
