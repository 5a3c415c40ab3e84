"""What a task is: one frozen record.

A task says how an example becomes a source and a target text, and how an answer is read and judged. It never loads
data, never tokenizes, and does not know its row in an embedding table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Example = Mapping[str, Any]
"""One example as a data_prep builder reads it from its source; each task's `render` says which fields it uses."""


def normalise(text: str) -> str:
    """Lower case, words and numbers only, single spaces: "A red  circle." becomes "a red circle"."""
    return " ".join(re.findall(r"\w+", text.casefold()))


@dataclass(frozen=True)
class Task:
    """`about` says in one line what is asked, where the data comes from and under which licence.

    render: an example to its (source, target) texts, or None if the example carries no label for this task. The
    source never names the task: only the task embedding tells two tasks on the same source apart.
    parse: a generated or stored target to the label that scores compare.
    """

    name: str
    modality: Literal["text", "vision"]
    metric: Literal["exact_match", "token_f1"]
    about: str
    render: Callable[[Example], tuple[str, str] | None]
    parse: Callable[[str], str] = normalise
