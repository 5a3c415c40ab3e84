"""Reads emoji and WordNet out of their packages, as rows of tables: what a user's own table would hold.

Rows are plain values by column; what becomes of them is the business of `table.py`.
"""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from parts.building import share

Row = dict[str, Any]
MOST_WORDS = 14
"""Of a definition: longer ones are left out."""

_EMOJI, _IMAGES = "package/emoji.json", "package/img/google/64"
_NOUNS = "package/dict/data.noun"


def emoji(archive: Path, folder: Path) -> list[Row]:
    """Columns image (a file that is written into `folder`), category, name. Without parts such as skin tones alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, wanted = [], {}
    with tarfile.open(archive) as tar:
        described = tar.extractfile(_EMOJI)
        assert described is not None
        for entry in json.loads(described.read()):
            if entry["category"] == "Component":
                continue
            wanted[f"{_IMAGES}/{entry['image']}"] = entry["image"]
            name = (entry["name"] or entry["short_name"]).lower().replace("_", " ")
            rows.append({"image": entry["image"], "category": entry["category"].lower(), "name": name})
        for member in tar:
            if member.name in wanted:
                content = tar.extractfile(member)
                assert content is not None
                (folder / wanted[member.name]).write_bytes(content.read())
    return rows


def wordnet(archive: Path, limit: int) -> list[Row]:
    """Columns source, target, noun: is a noun, of which the definition is told, a kind of another?

    Half are answered yes: the other is what WordNet has right above it. The rest are asked for a neighbour of that,
    another child of the same parent, which is the hardest wrong answer there is. Pairs that a word gives away are left
    out: one of either answer in the noun or its definition. `limit` of all, drawn by name.
    """
    with tarfile.open(archive) as tar:
        content = tar.extractfile(_NOUNS)
        assert content is not None
        nouns = _nouns(content.read().decode().splitlines())
    children = defaultdict(list)
    for noun, (_, _, above) in nouns.items():
        for parent in above:
            children[parent].append(noun)
    rows = []
    for noun in sorted(nouns, key=lambda noun: share(f"wordnet {noun}")):
        word, definition, above = nouns[noun]
        if len(above) != 1 or len(definition.split()) > MOST_WORDS or above[0] not in nouns:
            continue
        parent = above[0]
        beside = [other for top in nouns[parent][2] for other in children[top] if other != parent and children[other]]
        if not beside:
            continue
        place = share(f"wordnet pair {noun}")
        asked = parent if place < 0.5 else beside[int(2 * (place - 0.5) * len(beside))]
        words = set(f"{word} {definition}".split())
        if words & set(nouns[parent][0].split()) or words & set(nouns[asked][0].split()):
            continue
        source = f"{word}: {definition}. Is it a kind of {nouns[asked][0]}?"
        rows.append({"source": source, "target": "yes" if asked == parent else "no", "noun": noun})
        if len(rows) == limit:
            break
    return rows


def _nouns(lines: Iterable[str]) -> dict[str, tuple[str, str, list[str]]]:
    """Number of a noun's sense -> its first word, its definition without examples, the numbers of what is above it.

    The columns are those of WordNet's data files (manual page wndb(5)).
    """
    nouns = {}
    for line in lines:
        if line.startswith(" "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        parts = fields.split()
        words = int(parts[3], 16)
        pointers = parts[5 + 2 * words :]
        above = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] == "@"]
        word = parts[4].replace("_", " ")
        if word == word.lower():
            nouns[parts[0]] = word, gloss.split(";")[0].strip(), above
    return nouns
