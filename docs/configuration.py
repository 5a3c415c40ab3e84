"""Writes docs/configuration.md from the dataclasses of hyperpelt_ds/config.py, which say everything that is on it.

It must not know any field by name.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

from hyperpelt_ds import config
from hyperpelt_ds.config import Config

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Configuration: every field of a run

Generated from `hyperpelt_ds/config.py` by `make docs`. Do not edit.

A recipe ([recipes.md](recipes.md)) sets these fields; `section.key=value` behind a command of `launch/train.py`
replaces a value: `train.steps=200 data.tasks=a,b model.dropout=null`. Values are JSON or plain text; a list may also be
written with commas (`modules.kinds=` is the empty one), a table is JSON in quotes (`'data.loss_weights={"a": 0.5}'`). A
wrong name, type or value is an error that says what is allowed. None below is `null`. `config.json` in a run's folder
holds them all. Precision, ZeRO, buckets and offload are not here: they are the DeepSpeed JSON's (`ds_configs/`).
"""
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}


def page() -> str:
    """The page as Markdown."""
    hints = typing.get_type_hints(Config)
    sections = [_section(name, hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    return "\n".join([HEAD, *sections])


def descriptions(section: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line; no entry for a field without one."""
    tree = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            found[node.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def _section(name: str, section: Any) -> str:
    hints, said = typing.get_type_hints(section), descriptions(section)
    rows = [
        (f"`{name}.{key}`", _kind(hint), f"`{_default(section, key)}`", _allowed(f"{name}.{key}", hint), said[key])
        for key, hint in hints.items()
    ]
    about = " ".join((inspect.getdoc(section) or "").split())
    table = [("field", "type", "default", "allowed", "what it does"), ("---",) * 5, *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([f"## `{name}`", "", about, "", *lines, ""])


def _default(section: Any, key: str) -> str:
    return json.dumps(getattr(section(), key))


def _kind(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _kind(part) for part in arguments)
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"table of {_kind(arguments[1])} by name"
    return _kind(type(arguments[0])) if origin is Literal else _WORDS[hint]


def _allowed(name: str, hint: Any) -> str:
    """The choices of a field, or the range of its numbers; "" where only the type counts."""
    choices = [hint, *typing.get_args(hint)]
    found = next((typing.get_args(choice) for choice in choices if typing.get_origin(choice) is Literal), ())
    if found:
        return ", ".join(f"`{choice}`" for choice in found)
    ranges = {"more than 0": config.POSITIVE, "0 or more": config.NOT_NEGATIVE, "0 to less than 1": config.SHARES}
    return next((words for words, names in ranges.items() if name in names), "")


if __name__ == "__main__":
    PAGE.write_text(page())
