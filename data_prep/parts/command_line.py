"""The command line of the builders: flags by fire, every one known and of its type, one line for a bad request.

This file must not know what any builder does.
"""

from __future__ import annotations

import difflib
import inspect
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import fire

_OWN = tuple(str(Path(__file__).resolve().parents[2] / folder) for folder in ("hyperpelt_ds", "data_prep"))
_WHOLE = ("int", "float", "bool")  # annotations whose values fire may read; all others are texts, taken as they are


def run(function: Callable[..., None]) -> None:
    """Calls `function` with the command line's flags; exits with 2 after one line `error: ...` for a bad request, and
    with 1 after one for what the machine refused.

    A ValueError raised by this project is the user's to mend; one raised by a library is a bug and keeps its traceback.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):  # a text that the terminal has no signs for must not end a build
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        fire.Fire(function, command=_checked(function, sys.argv[1:]))
    except ValueError as error:
        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_OWN):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that is none or not ours
        if error.strerror is None:
            raise
        print(f"error: {error.strerror}{f': {error.filename}' if error.filename else ''}", file=sys.stderr, flush=True)
        sys.exit(1)


def at_least(least: int, **values: int) -> None:
    """Raises ValueError naming the flag for a value that is no whole number, or less than `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"--{name} must be a whole number, at least {least}, got {value!r}")


def chosen(flag: str, value: str, allowed: Sequence[str]) -> list[str]:
    """The names in `value`, separated by commas, in the order of `allowed`; all for "". ValueError for another name."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 3, 0.4) or allowed
            raise ValueError(f"--{flag}: unknown {name!r}; did you mean {', '.join(near)}?")
    return [name for name in allowed if name in names or not names]


def _checked(function: Callable[..., None], arguments: list[str]) -> list[str]:
    """The arguments as fire cannot misread them.

    Left alone, fire calls the function first and then complains of a flag that it does not know: with a misspelt
    --limit, after hours. It also reads `--revision 1e3` as a number and `--tasks a,b` as a tuple.
    """
    if any(argument in ("--help", "-h") for argument in arguments):
        return ["--help"]
    flags = inspect.signature(function).parameters
    checked, given, rest = [], set(), iter(arguments)
    for argument in rest:
        name, has_value, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--"):
            raise ValueError(f"unexpected {argument!r}; every value follows its --flag, one with spaces in quotes")
        if name not in flags:
            near = difflib.get_close_matches(name, flags, 2, 0.4) or list(flags)
            raise ValueError(f"unknown flag --{name}; did you mean {', '.join('--' + other for other in near)}?")
        kind = str(flags[name].annotation)
        if not has_value:
            value = "True" if kind == "bool" else next(rest, "--")
            if value.startswith("--"):
                raise ValueError(f"--{name} needs a value")
        if kind == "float" and not _is_number(value):
            raise ValueError(f"--{name} must be a number, got {value!r}")
        checked.append(f"--{name}={value if kind in _WHOLE else repr(value)}")
        given.add(name)
    missing = [f"--{name}" for name, flag in flags.items() if flag.default is flag.empty and name not in given]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}; --help shows an example")
    return checked


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
