"""What the entry points share: flags by fire, checked names, and one line for what the user did wrong."""

from __future__ import annotations

import ast
import difflib
import inspect
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import fire

from hyperpelt_ds.train import crash, outcome
from hyperpelt_ds.train.outcome import Stopped

_OWN = tuple(str(Path(__file__).resolve().parents[1] / folder) for folder in ("hyperpelt_ds", "launch"))


def run(function: Callable[..., None]) -> None:
    """Calls `function` with the command line's flags; exits with 2 after one line `error: ...` for a bad request.

    A ValueError raised by this project is the user's to mend; one raised by a library is a bug and keeps its traceback,
    which of several ranks is shown once (train/crash.py). A training that its ranks left together exits with the code
    that says why.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    if int(os.environ.get("RANK", 0)) or not sys.stderr.isatty():  # else the bars of W ranks, in a file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    folder = None
    try:
        arguments = _checked(function, sys.argv[1:])
        folder = next((text.partition("=")[2] for text in arguments if text.startswith("--run_dir=")), None)
        if folder is not None:
            crash.speak_once(Path(ast.literal_eval(folder)))
        fire.Fire(function, command=arguments)
        _leave(0)
    except Stopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            print(stop, file=sys.stderr, flush=True)
        _leave(stop.code)
    except ValueError as error:
        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_OWN):
            raise
        _report(error)
        if folder is not None:
            _tell_supervisor(Path(ast.literal_eval(folder)))
        _leave(2, together=False)


def _checked(function: Callable[..., None], arguments: list[str]) -> list[str]:
    """The arguments in a form that fire cannot misread, every flag known and every required one there.

    Left alone, fire answers an unknown flag with a page, takes what follows a bare switch for its value, and reads
    `--text "a, b"` as a tuple and `--run_dir 1e3` as a number.
    """
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if any(argument in ("--help", "-h") for argument in own):
        return ["--help"]
    parameters = inspect.signature(function).parameters
    takes_words = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    flags = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    checked: list[str] = []
    given, rest = set(), iter(arguments)
    for argument in rest:
        name, has_value, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if argument == "--" and takes_words:  # another command, not to be looked into
            checked += map(repr, rest)
            break
        if not argument.startswith("--"):
            if not takes_words:
                raise ValueError(f"unexpected {argument!r}; a value with spaces needs quotes")
            checked.append(repr(argument))
            continue
        if name not in flags:
            near = difflib.get_close_matches(name, flags, 2, 0.4) or list(flags)
            raise ValueError(f"unknown flag --{name}; did you mean {', '.join('--' + n for n in near)}?")
        if not has_value:
            value = "True" if flags[name].annotation == "bool" else next(rest, "--")
            if value == "--" or (value.removeprefix("--").partition("=")[0] in flags and value.startswith("--")):
                raise ValueError(f"--{name} needs a value")
        checked.append(f"--{name}={_literal(name, flags[name].annotation, value)}")
        given.add(name)
    missing = [f"--{n}" for n, p in flags.items() if p.default is p.empty and n not in given]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}; --help shows an example")
    return checked


def _literal(name: str, annotation: str, value: str) -> str:
    """The value as a Python literal of the annotated type, which is what fire reads."""
    if annotation == "bool" and value not in ("True", "False"):
        raise ValueError(f"--{name} is a switch: give it alone, or =True or =False, not {value!r}")
    if annotation == "int" and not value.removeprefix("-").isdigit():
        raise ValueError(f"--{name} must be a whole number, got {value!r}")
    return value if annotation in ("bool", "int") else repr(value)


def _leave(code: int, *, together: bool = True) -> None:
    """Exits with the code, by way of the process group if the command joined one."""
    distributed = sys.modules.get("torch.distributed")  # not imported for a command that did not need it
    if distributed is not None and distributed.is_initialized():
        from hyperpelt_ds import dist

        dist.leave(code, together=together)
    if code:
        sys.exit(code)


def _tell_supervisor(run_dir: Path) -> None:
    """Says of a start that a supervisor began that its request was wrong, for launchers make 1 of any code."""
    if int(os.environ.get("RANK", 0)) == 0 and (run_dir / outcome.START).is_file():
        outcome.begin(run_dir)
        outcome.write_status(run_dir, outcome.FAILED, 0, 2)


def _report(error: ValueError) -> None:
    """Prints the error once. The launcher ends all ranks when one fails, so the others give rank 0 time to speak; if it
    has not failed by then, the fault is theirs alone and they say so."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(15)
    where = f" (rank {rank})" if rank else ""
    print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
