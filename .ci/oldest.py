"""Prints what pip's --constraint needs to install the oldest versions that pyproject.toml allows, dependencies of its own
included: one NAME==FLOOR a line. A requirement without a floor, or with one that was never released, is an error (pip's).
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
