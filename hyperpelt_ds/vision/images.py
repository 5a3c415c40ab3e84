"""How a picture becomes pixels: the one place that opens pictures, for stored features and for new images alike.

Whatever a picture is, it comes out as upright 8-bit RGB on white, or as an UnreadableImage that says which and why.
This file must not know what is made of the pixels.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Picture = Image.Image | str | Path

MAX_PIXELS = 89_478_485
"""Larger pictures are refused before they are decompressed: a file of some kB can hold gigabytes. It is what Pillow
warns of (256 MiB as RGB); cameras of up to 89 megapixels pass. Does not follow Image.MAX_IMAGE_PIXELS, which others
may set."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened, whatever a file is called. Pillow has more, of which some run other programs (EPS)."""

_CLEAR = ("LA", "La", "PA", "P", "RGBA", "RGBa")
_GREY16 = ("I;16", "I;16L", "I;16B", "I;16N")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises for damaged content besides OSError: of 70,000 files with changed bytes, some gave each of
# ValueError, RuntimeError, SyntaxError, TypeError and DecompressionBombError; the rest its readers can raise as well.
# Warnings: where the caller has made errors of them.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)


class UnreadableImage(ValueError):
    """A picture that gives no pixels: its name (of a file, the path) and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read image {self.name!r}: {self.reason}"


def read_pixels(picture: Picture, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB of a picture or a file of one; the aspect ratio is not kept.

    Turned upright as its EXIF orientation says; transparent parts become white; of an animation the first frame; of
    16 bits of grey the upper 8; colour profiles are not applied. Raises UnreadableImage for a file that is missing,
    empty, cut short, damaged or none of FORMATS, for more than MAX_PIXELS pixels, and for numbers without a range
    (floats, 32-bit integers).
    """
    name = _name(picture)
    try:
        if isinstance(picture, Image.Image):
            return _pixels(picture, size)
        with Image.open(picture, formats=_formats()) as image:
            return _pixels(image, size)
    except UnidentifiedImageError:
        empty = not isinstance(picture, Image.Image) and Path(picture).stat().st_size == 0
        reason = "the file is empty" if empty else f"damaged, or none of the formats {', '.join(FORMATS)}"
        raise UnreadableImage(name, reason) from None
    except OSError as error:
        raise UnreadableImage(name, error.strerror or str(error)) from error
    except _DAMAGE as error:
        raise UnreadableImage(name, str(error) or type(error).__name__) from error


def read_batch(pictures: Sequence[Picture], size: int) -> np.ndarray:
    """(pictures, size, size, 3) uint8; raises UnreadableImage for the first that cannot be read."""
    return np.stack([read_pixels(picture, size) for picture in pictures])


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS:,} are taken: make it smaller")
    if not width * height:
        raise ValueError(f"{width} x {height} pixels")
    image.load()
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    return np.array(_rgb(image).resize((size, size), Image.Resampling.BICUBIC))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _GREY16 or (image.mode == "I" and image.format in ("PNG", "PPM")):  # of these, 16 bits as well
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} ({image.format or 'no file'}) have no known range: store 8 bits")
    if image.mode in _CLEAR or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 0..65535 as 0..255, rounded; Pillow's own conversion would make 255 of all above 255."""
    values = np.asarray(image).astype(np.int64)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the one grey that stands for nothing
        values[values == clear] = 65535
    return Image.fromarray(((values.clip(0, 65535) + 128) // 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """1..8 as EXIF counts them; 1, upright, where the metadata are damaged: the picture itself is not."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, *_DAMAGE):
        return 1
    return value if isinstance(value, int) else 1


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _name(picture: Picture) -> str:
    if not isinstance(picture, Image.Image):
        return str(picture)
    file = getattr(picture, "filename", "")
    return str(file) if file else f"a picture of {picture.width} x {picture.height} pixels, mode {picture.mode}"
