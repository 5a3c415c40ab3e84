"""Matrices, shares and answers as images (height, width, 3) uint8, drawn with Pillow alone.

It must not know where figures come from or go to.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, SIZE = 44, 12, 14
INK, PAPER, MISSING = (30, 30, 30), (255, 255, 255), (225, 225, 225)
COLD, WARM = (33, 102, 172), (178, 24, 43)
SERIES = ((120, 144, 176), (230, 126, 34))

Values = Sequence[Sequence[float | None]]


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Values, signed: bool) -> np.ndarray:
    """A matrix as colours with its numbers in them: from -1 (blue) over 0 (white) to 1 (red) if `signed`, else from its
    smallest (white) to its largest (red). None is a grey cell.
    """
    known = [value for row in values for value in row if value is not None]
    low, high = (0.0, 1.0) if signed else (min(known, default=0.0), max(known, default=0.0))
    scale = (high - low) or 1.0
    left, head = _width(rows) + 2 * GAP, _width(columns) + SIZE + 4 * GAP
    width = max(left + CELL * len(columns), _width([title]) + GAP) + GAP
    canvas = Image.new("RGB", (width, head + CELL * len(rows) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, INK, _font())
    for place, name in enumerate(columns):
        _upright(canvas, name, left + CELL * place + CELL // 2, head - GAP // 2)
    for down, (name, row) in enumerate(zip(rows, values, strict=True)):
        middle = head + CELL * down + CELL // 2
        draw.text((left - GAP, middle), name, INK, _font(), anchor="rm")
        for across, value in enumerate(row):
            x, y = left + CELL * across, head + CELL * down
            colour = MISSING if value is None else _colour((value - low) / scale)
            draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), colour)
            if value is not None:
                ink = PAPER if sum(colour) < 380 else INK
                draw.text((x + CELL // 2 - 1, middle), _short(value, signed), ink, _font(12), anchor="mm")
    return np.asarray(canvas)


def bars(title: str, names: Sequence[str], series: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Shares of several kinds beside each other for every name, as horizontal bars in per cent."""
    thick, length = 16, 320
    left, top = _width(names) + 2 * GAP, 2 * SIZE + 4 * GAP
    each = thick * len(series) + GAP
    largest = max((value for values in series.values() for value in values), default=0.0) or 1.0
    canvas = Image.new("RGB", (left + length + 80, top + each * len(names) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, GAP), title, INK, _font())
    x = left
    for colour, label in zip(SERIES, series, strict=False):
        draw.rectangle((x, SIZE + 2 * GAP + 3, x + 12, SIZE + 2 * GAP + 15), colour)
        draw.text((x + 18, SIZE + 2 * GAP), label, INK, _font())
        x += 18 + _width([label]) + 2 * GAP
    for down, name in enumerate(names):
        y = top + each * down
        draw.text((left - GAP, y + thick * len(series) / 2), name, INK, _font(), anchor="rm")
        for number, (colour, values) in enumerate(zip(SERIES, series.values(), strict=False)):
            end = left + round(length * values[down] / largest)
            draw.rectangle((left, y + thick * number, end, y + thick * (number + 1) - 2), colour)
            draw.text((end + 6, y + thick * number + thick // 2), f"{values[down]:.1%}", INK, _font(12), anchor="lm")
    return np.asarray(canvas)


def answers(entries: Sequence[tuple[Image.Image, Sequence[str]]]) -> np.ndarray:
    """Pictures with lines of text below them, side by side."""
    side, letters = 240, 34
    lines = [[part for text in texts for part in textwrap.wrap(text, letters) or [""]] for _, texts in entries]
    height = side + 3 * GAP + (SIZE + 5) * max(map(len, lines))
    canvas = Image.new("RGB", ((side + GAP) * len(entries) + GAP, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, ((picture, _), own) in enumerate(zip(entries, lines, strict=True)):
        x = GAP + (side + GAP) * place
        canvas.paste(_fitted(picture, side), (x, GAP))
        for number, line in enumerate(own):
            draw.text((x, side + 2 * GAP + (SIZE + 5) * number), line, INK, _font())
    return np.asarray(canvas)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture in a square, small ones enlarged."""
    scale = side / max(picture.size)
    size = tuple(max(1, round(scale * edge)) for edge in picture.size)
    square = Image.new("RGB", (side, side), MISSING)
    square.paste(picture.convert("RGB").resize((size[0], size[1])), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _colour(share: float) -> tuple[int, int, int]:
    """White at 0, through to one end's colour at -1 or 1."""
    end = WARM if share > 0 else COLD
    part = min(1.0, abs(share))
    red, green, blue = (round(255 + (channel - 255) * part) for channel in end)
    return red, green, blue


def _short(value: float, signed: bool) -> str:
    """At most five characters."""
    if signed or 1 <= value < 10:
        return f"{value:.2f}"
    if 10 <= value < 1000:
        return f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return f"{value:.3f}" if value == 0 or 0.001 <= value < 1 else f"{value:.0e}"


@functools.cache
def _font(size: int = SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(texts: Sequence[str]) -> int:
    return round(max((_font().getlength(text) for text in texts), default=0))


def _upright(canvas: Image.Image, text: str, centre: int, foot: int) -> None:
    """Text that runs upwards, its end at `foot`."""
    line = Image.new("RGB", (_width([text]) + 2, SIZE + 6), PAPER)
    ImageDraw.Draw(line).text((0, 1), text, INK, _font())
    turned = line.rotate(90, expand=True)
    canvas.paste(turned, (centre - turned.width // 2, foot - turned.height))
