"""Tests of decode on awkward and broken pictures: made here, and Pillow's own ones if they lie
beside.
"""

import random
import struct
import zlib
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clipsmall.data.preprocess import BadImage, decode
from tests import ROOT

COLLECTION = ROOT.parent / "shared" / "data" / "bad_inputs"
beside = pytest.mark.skipif(
    not COLLECTION.exists(), reason="the collection of bad inputs is not here"
)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def quarters(size: int = 64) -> Image.Image:
    """Four colours, so that no turn or mirror looks like another."""
    image = Image.new("RGB", (size, size // 2), "red")
    for box, colour in (((1, 0), "lime"), ((0, 1), "blue"), ((1, 1), "yellow")):
        image.paste(
            colour,
            (
                box[0] * size // 2,
                box[1] * size // 4,
                (box[0] + 1) * size // 2,
                (box[1] + 1) * size // 4,
            ),
        )
    return image


def close(image: Image.Image, other: Image.Image, tolerance: float = 6) -> bool:
    assert image.mode == "RGB"
    assert image.size == other.size
    difference = np.asarray(image, dtype=float) - np.asarray(other.convert("RGB"), dtype=float)
    return bool(np.abs(difference).mean() < tolerance)


def test_plain_modes_become_rgb() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        assert close(decode(saved(quarters(), kind)), quarters(), 12)
    assert close(decode(saved(quarters().convert("L"))), quarters().convert("L"))
    assert close(decode(saved(quarters().convert("1"))), quarters().convert("1"))


def test_cmyk() -> None:
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    assert close(decode(saved(flat.convert("CMYK"), "JPEG", quality=95)), flat)
    assert close(decode(saved(flat.convert("CMYK"), "TIFF")), flat)


def test_transparency_lies_on_white() -> None:
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 4, 8))
    half.paste((0, 0, 0, 128), (4, 0, 8, 4))
    for kind in ("PNG", "WEBP", "TIFF"):
        got = decode(saved(half, kind, **({"lossless": True} if kind == "WEBP" else {})))
        assert got.getpixel((0, 0)) == (255, 0, 0)
        assert got.getpixel((7, 7)) == (255, 255, 255)
        assert abs(got.getpixel((7, 0))[0] - 127) <= 1
    grey = Image.new("LA", (4, 4), (0, 0))
    assert decode(saved(grey)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(saved(Image.new("LA", (4, 4), (70, 255)))).getpixel((0, 0)) == (70, 70, 70)


def test_palettes_with_transparency() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.paste(1, (0, 0, 2, 4))
    for kind in ("PNG", "GIF"):
        got = decode(saved(image, kind, transparency=0))
        assert got.getpixel((0, 0)) == (10, 200, 30)
        assert got.getpixel((3, 3)) == (255, 255, 255)
    key = saved(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert decode(key).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_greys_are_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    got = np.asarray(decode(saved(Image.fromarray(ramp), kind)))
    assert got.shape == (16, 16, 3)
    np.testing.assert_array_equal(got[..., 0].ravel(), np.arange(256))


def test_shares_of_light_are_no_black_picture() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    got = np.asarray(decode(saved(Image.fromarray(ramp), "TIFF")))
    np.testing.assert_array_equal(got[..., 0].ravel(), np.arange(256))


def turned(image: Image.Image, orientation: int) -> bytes:
    """The picture as a camera stores it: turned, with the tag that says how to turn it back."""
    steps = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }.get(orientation, [])
    for step in steps:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", exif=exif, quality=95, subsampling=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation: int) -> None:
    assert close(decode(turned(quarters(), orientation)), quarters())


def test_broken_exif_leaves_the_pixels_good() -> None:
    image = quarters()
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0nonsense",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20),
    ):
        assert close(decode(saved(image, "JPEG", exif=exif)), image, 12)


def test_the_first_frame_of_an_animation() -> None:
    red = Image.new("RGB", (8, 8), "red")
    blue = Image.new("RGB", (8, 8), "blue")
    for kind in ("GIF", "WEBP", "PNG"):
        pixel = decode(saved(red, kind, save_all=True, append_images=[blue, blue])).getpixel((4, 4))
        assert np.abs(np.subtract(pixel, (255, 0, 0))).max() < 12


def cut(kind: str) -> bytes:
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    data = saved(noise, kind)
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
        (bytes(1000), "not an image"),
        (random.Random(1).randbytes(1000), "not an image"),
        (b"\xff\xd8\xff\xe0", "not an image"),
        (cut("JPEG"), "truncated or broken image"),
        (cut("PNG"), "truncated or broken image"),
        (cut("GIF"), "truncated or broken image"),
        (cut("TIFF"), "truncated or broken image|not an image"),
        (cut("WEBP"), "truncated or broken image|not an image"),
    ],
)
def test_what_is_no_picture_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^({reason})$"):
        decode(data)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000), (60_000, 60_000)])
def test_bombs_are_refused_from_the_header(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Image.Image) -> None:
        raise AssertionError("pixels were made")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(BadImage, match=r"^too many pixels$"):
        decode(png_claiming(*size))


def test_the_limit_is_the_callers() -> None:
    assert decode(saved(quarters(20)), max_pixels=200).size == (20, 10)
    with pytest.raises(BadImage, match="too many pixels"):
        decode(saved(quarters(20)), max_pixels=199)
    assert decode(saved(Image.new("RGB", (1, 1)))).size == (1, 1)
    assert decode(saved(Image.new("RGB", (50, 1)))).size == (50, 1)


@beside
@pytest.mark.filterwarnings("ignore:::PIL")
def test_the_collection_fails_where_its_table_says() -> None:
    table = pd.read_csv(COLLECTION / "bad_inputs.csv")
    assert len(table) > 50
    for row in table.itertuples():
        data = (COLLECTION / row.filename).read_bytes()
        if isinstance(row.pil_error, str):
            with pytest.raises(BadImage):
                decode(data)
            continue
        image = decode(data)
        width, height = map(int, row.size.split("x"))
        turned_over = row.exif_orientation >= 5
        assert (image.mode, image.size) == (
            "RGB",
            (height, width) if turned_over else (width, height),
        ), row.filename


@beside
def test_the_collections_eight_orientations_are_one_picture() -> None:
    upright = decode((COLLECTION / "hopper.jpg").read_bytes())
    for orientation in range(2, 9):
        assert close(
            decode((COLLECTION / f"hopper_orientation_{orientation}.jpg").read_bytes()), upright, 8
        )
    assert close(decode((COLLECTION / "hopper_orientation_6.webp").read_bytes()), upright, 8)


@beside
def test_the_collections_cmyk_and_16_bit_pictures() -> None:
    rgb = decode((COLLECTION / "pil_sample_rgb.jpg").read_bytes())
    for name in ("pil_sample_cmyk.jpg", "tiff_strip_cmyk_jpeg.tif"):
        assert close(decode((COLLECTION / name).read_bytes()), rgb, 8)
    grey = decode((COLLECTION / "hopper.jpg").read_bytes()).convert("L")
    assert close(decode((COLLECTION / "hopper_16bit.pgm").read_bytes()), grey, 4)
    pixels = np.asarray(decode((COLLECTION / "uint16_1_4660.tif").read_bytes()))
    # 4660 of 65535 is dark
    assert pixels.max() < 30


@pytest.mark.parametrize("size", [(1, 60), (20_000, 1)])
def test_a_thread_of_pixels_is_refused_before_it_is_blown_up(size: tuple[int, int]) -> None:
    buffer = BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    with pytest.raises(BadImage, match="times as long as wide"):
        decode(buffer.getvalue())
