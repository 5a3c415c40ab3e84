"""Folders that are on the disk whole or not at all, and whether one still is what was written.

A folder is filled under another name, flushed, listed with hashes in a manifest, and renamed. A process that is killed
meanwhile leaves names that end in .partial or .trash. This file must not know what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

MANIFEST = "MANIFEST.json"


def write_folder(folder: Path, contents: Mapping[str, Any], about: dict[str, Any] | None) -> None:
    """Writes `contents`, in place of what there is: file name -> tensors for .safetensors, else a JSON-able tree.

    With `about`, a manifest holds it and every file's size and sha256. On OSError the half-written folder is removed.
    """
    partial = folder.with_name(folder.name + ".partial")
    for remains in (partial, _trash(folder)):
        shutil.rmtree(remains, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, content in contents.items():
            _write(partial / name, content)
        if about is not None:
            _write(partial / MANIFEST, {**about, "files": {name: _sum(partial / name) for name in contents}})
        _flush(partial)
        if folder.exists():
            folder.rename(_trash(folder))
        partial.rename(folder)
        _flush(folder.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        recover(folder)
        raise
    shutil.rmtree(_trash(folder), ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Makes `text` the one line of a file; a reader sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n")
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def recover(folder: Path) -> None:
    """Gives a folder its name back, if its replacement was interrupted between the two renames."""
    if _trash(folder).exists() and not folder.exists():
        _trash(folder).rename(folder)


def tidy(parent: Path) -> None:
    """Removes the folders that a killed process was writing or removing; nobody may be doing so now."""
    for remains in (*parent.glob("*.partial/"), *parent.glob("*.trash/")):
        shutil.rmtree(remains, ignore_errors=True)  # on NFS a file that somebody reads keeps its folder


def remove(folder: Path) -> None:
    """Takes the name first, so that what is half removed has none."""
    folder.rename(_trash(folder))
    shutil.rmtree(_trash(folder), ignore_errors=True)  # what is left, `tidy` takes


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_folder` was told about a folder, with its `files`.

    Raises OSError or ValueError for one that cannot be read.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict):
        raise ValueError(f"expected an object, got {type(manifest).__name__}")
    return manifest


def fault(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """How a folder differs from the `files` of its manifest, or None. Sizes first: they cost nothing."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected['size']}"
    for name, expected in files.items():
        if _sum(folder / name) != expected:
            return f"{name} has another sha256"
    return None


def _trash(folder: Path) -> Path:
    return folder.with_name(folder.name + ".trash")


def _sum(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _write(path: Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        try:
            save_file(content, path)
        except SafetensorError as error:  # also what the disk says
            raise OSError(str(error)) from error
    else:
        path.write_text(json.dumps(content, indent=1) + "\n")
    _flush(path)


def _flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
