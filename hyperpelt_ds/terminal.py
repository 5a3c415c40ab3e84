"""How commands say how far they are. Standard library only; it must not know what is counted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, total: int = 0) -> Iterator[T]:
    """The items as they are, and after 2 s a line on how far they are: one that is rewritten on a terminal, otherwise
    one now and then. `total` is their number, if known. Of several ranks only the first speaks."""
    if int(os.environ.get("RANK", 0)):
        yield from items
        return
    terminal, start, count = sys.stdout.isatty(), time.monotonic(), 0
    due = start + 2.0

    def say(text: str) -> None:
        print(f"\r{text:<100}" if terminal else text, end="" if terminal else "\n", flush=True)

    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now > due:
            due, rate = now + (0.5 if terminal else 10.0), count / (now - start)
            left = f" of {total:,}, {max(total - count, 0) / rate:,.0f} s left" if total else ""
            say(f"{what}: {count:,}{left}, {rate:,.0f} a second")
    if time.monotonic() > start + 2.0:
        say(f"{what}: {count:,} in {time.monotonic() - start:.0f} s")
        print(end="\n" if terminal else "", flush=True)
