"""How pictures become pixels: every mode and format rightly, or an error that says which picture and why."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hyperpelt_ds.vision.images import MAX_PIXELS, UnreadableImage, read_pixels

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))


def _colour(picture: Image.Image | Path) -> tuple[int, ...]:
    """The one colour that a picture has."""
    pixels = read_pixels(picture, 5)
    assert pixels.shape == (5, 5, 3) and pixels.dtype == np.uint8 and (pixels == pixels[0, 0]).all()
    return tuple(pixels[0, 0].tolist())


def _palette_with_alpha() -> Image.Image:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([9, 9, 9, 0, 255, 0])
    image.info["transparency"] = bytes([255, 0])  # the second entry is clear
    return image


def _corners() -> Image.Image:
    """Twice as wide as high, with a colour in each quarter: red, green over blue, white."""
    image = Image.new("RGB", (32, 16), RED)
    for box, colour in (((16, 0, 32, 8), GREEN), ((0, 8, 16, 16), BLUE), ((16, 8, 32, 16), WHITE)):
        image.paste(colour, box)
    return image


def test_a_plain_picture_is_only_resized():
    expected = np.array(NOISE.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(read_pixels(NOISE, 16), expected)
    assert np.array_equal(read_pixels(NOISE.convert("RGBA"), 16), expected)
    assert np.array_equal(read_pixels(NOISE.convert("P"), 16), read_pixels(NOISE.convert("P").convert("RGB"), 16))


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("1", (8, 6), 1), WHITE),
        (Image.new("1", (8, 6), 0), (0, 0, 0)),
        (Image.new("L", (8, 6), 77), (77, 77, 77)),
        (Image.new("LA", (8, 6), (77, 255)), (77, 77, 77)),
        (Image.new("LA", (8, 6), (77, 0)), WHITE),
        (Image.new("PA", (8, 6), (0, 0)), WHITE),
        (Image.new("RGB", (8, 6), BLUE), BLUE),
        (Image.new("RGBA", (8, 6), (*BLUE, 255)), BLUE),
        (Image.new("RGBA", (8, 6), (*BLUE, 0)), WHITE),
        (Image.new("RGBA", (8, 6), (0, 0, 0, 102)), (153, 153, 153)),
        (Image.new("P", (8, 6), 0), (0, 0, 0)),
        (_palette_with_alpha(), WHITE),
        (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), RED),
        (Image.new("RGB", (8, 6), GREEN).convert("HSV"), GREEN),
        (Image.fromarray(np.full((6, 8), 65535, np.uint16)), WHITE),
        (Image.fromarray(np.full((6, 8), 40000, np.uint16)), (156, 156, 156)),
        (Image.fromarray(np.full((6, 8), 200, np.uint16)), (1, 1, 1)),  # Pillow's own conversion makes it 200
        (Image.new("RGB", (1, 1), GREEN), GREEN),
        (Image.new("RGB", (20_000, 1), BLUE), BLUE),
        (Image.new("RGB", (1, 20_000), BLUE), BLUE),
    ],
    ids=lambda value: f"{value.mode}-{value.width}x{value.height}" if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_has_its_colour(image, colour):
    assert _colour(image) == colour


@pytest.mark.parametrize(
    ("name", "image", "options", "colour"),
    [
        ("cmyk.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), {"quality": 100}, RED),
        ("cmyk.tif", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), {}, RED),
        ("palette.png", _palette_with_alpha(), {"transparency": bytes([255, 0])}, WHITE),
        ("one_clear_colour.png", Image.new("RGB", (8, 8), BLUE), {"transparency": BLUE}, WHITE),
        ("one_clear_grey.png", Image.new("L", (8, 8), 9), {"transparency": 9}, WHITE),
        ("grey_alpha.png", Image.new("LA", (8, 8), (40, 0)), {}, WHITE),
        ("bits.png", Image.new("1", (8, 8), 1), {}, WHITE),
        ("grey16.png", Image.fromarray(np.full((8, 8), 40000, np.uint16)), {}, (156, 156, 156)),
        ("grey16.tif", Image.fromarray(np.full((8, 8), 40000, np.uint16)), {}, (156, 156, 156)),
        ("plain.bmp", Image.new("RGB", (8, 8), GREEN), {}, GREEN),
        ("plain.ppm", Image.new("RGB", (8, 8), GREEN), {}, GREEN),
        ("wrong_name.jpg", Image.new("RGB", (8, 8), GREEN), {"format": "PNG"}, GREEN),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_file_has_its_colour(tmp_path, name, image, options, colour):
    image.save(tmp_path / name, **options)
    assert _colour(tmp_path / name) == colour


def test_a_pgm_of_16_bits_keeps_its_upper_8(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + np.full((2, 3), 40000, ">u2").tobytes())
    assert _colour(tmp_path / "a.pgm") == (156, 156, 156)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, name):
    frames = [Image.new("RGB", (16, 12), colour) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
    assert Image.open(tmp_path / name).n_frames == 3
    assert _colour(tmp_path / name) == RED


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_turned_upright(tmp_path, name, orientation):
    """What a camera stores is the upright picture after the inverse of the turn that its EXIF field asks for."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose by number; 90 and 270 degrees undo each other
    stored = _corners() if orientation == 1 else _corners().transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if name == "a.jpg" else {"lossless": True} if name == "a.webp" else {}
    stored.save(tmp_path / name, exif=exif, **options)
    found, expected = (read_pixels(picture, 8).astype(int) for picture in (tmp_path / name, _corners()))
    assert abs(found - expected).max() <= (12 if name == "a.jpg" else 0)
    with Image.open(tmp_path / name) as given:  # given as an image, it is the same picture
        assert np.array_equal(read_pixels(given, 8), found)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_do_not_cost_the_picture(tmp_path):
    Image.new("RGB", (8, 8), GREEN).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert _colour(tmp_path / "a.png") == GREEN


def test_a_given_picture_is_left_as_it_was():
    image = NOISE.copy()
    image.getexif()[0x0112] = 6
    read_pixels(image, 8)
    assert image.size == NOISE.size and image.tobytes() == NOISE.tobytes()


def _bomb(width: int, height: int) -> bytes:
    """A PNG of some 100 bytes that says it has width x height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def _png() -> bytes:
    content = io.BytesIO()
    NOISE.save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404 not found</html>", "damaged, or none of the formats AVIF, BMP"),
        (_png()[:4000], "truncated"),
        (_png()[:30], "truncated|damaged"),
        (_png().replace(b"IDAT", b"IDAX"), "."),
        (_bomb(10_000, 8_948), rf"10000 x 8948 pixels, at most {MAX_PIXELS:,} are taken"),
        (_bomb(60_000, 60_000), "decompression bomb"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of the formats"),  # would start Ghostscript
    ],
    ids=["empty", "html", "cut", "cut_early", "no_data", "large", "huge", "postscript"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_cannot_be_read_is_named_with_its_reason(tmp_path, content, reason):
    file = tmp_path / "a.png"
    file.write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"cannot read image '{file}': .*({reason})") as caught:
        read_pixels(file, 8)
    assert caught.value.name == str(file) and caught.value.reason in str(caught.value)


@pytest.mark.parametrize("form", ["JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_a_picture_cut_in_half_is_not_taken_for_a_whole_one(tmp_path, form):
    content = io.BytesIO()
    NOISE.save(content, form)
    (tmp_path / "a").write_bytes(content.getvalue()[: content.tell() // 2])
    with pytest.raises(UnreadableImage, match="a'"):
        read_pixels(tmp_path / "a", 8)


def test_a_file_that_is_not_there_and_a_folder_are_named(tmp_path):
    with pytest.raises(UnreadableImage, match=r"nowhere\.png': No such file"):
        read_pixels(tmp_path / "nowhere.png", 8)
    with pytest.raises(UnreadableImage, match="Is a directory"):
        read_pixels(tmp_path, 8)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_range_are_refused(tmp_path, mode):
    with pytest.raises(UnreadableImage, match=rf"a picture of 4 x 3 pixels, mode {mode}.*no known range"):
        read_pixels(Image.new(mode, (4, 3)), 8)
    Image.new(mode, (4, 3)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImage, match=rf"a\.tif.*pixels of mode {mode} \(TIFF\) have no known range"):
        read_pixels(tmp_path / "a.tif", 8)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(UnreadableImage, match="0 x 5 pixels"):
        read_pixels(Image.new("RGB", (0, 5)), 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_changed_bytes_give_pixels_or_an_error_and_nothing_else(tmp_path, form):
    content = io.BytesIO()
    NOISE.resize((12, 9)).save(content, form, **({"exif": _exif()} if form not in ("GIF", "BMP", "PPM") else {}))
    whole, rng = content.getvalue(), np.random.default_rng(1)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(damaged), 200), 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "a").write_bytes(damaged)
        try:
            outcomes.add(read_pixels(tmp_path / "a", 4).shape)
        except UnreadableImage:
            outcomes.add("error")
    assert "error" in outcomes and outcomes <= {"error", (4, 4, 3)}


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
