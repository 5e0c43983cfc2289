"""Glyphs drawn as pictures: a data set that needs no download.

Every named character of the fonts inside matplotlib is one picture; its Unicode name is the
caption. Whole faces are held out (a style never trained on), and a tenth of the captions (names
never trained on, made of words that were). `data_tools.glyphs` says what the shards hold.
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from clipsmall.data.making.shard_writer import ShardSample, write_shard
from clipsmall.data.order import permutation

HELD_OUT_FACES = ("DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralItalic")
# pixels
SIZE = 32
# pairs
SHARD = 5_000


@dataclass(frozen=True)
class Glyph:
    face: str
    codepoint: int
    # lower case
    name: str


def fonts_folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def glyphs_of(face: str) -> list[Glyph]:
    """The named characters of one face, by code point."""
    from matplotlib.ft2font import FT2Font

    named = (
        (code, unicodedata.name(chr(code), ""))
        for code in FT2Font(str(fonts_folder() / f"{face}.ttf")).get_charmap()
    )
    return sorted(
        (Glyph(face, code, name.lower()) for code, name in named if name), key=lambda g: g.codepoint
    )


def faces() -> list[str]:
    """DejaVu and STIX, both under free licences; cm* has no Unicode names, LastResort draws
    placeholders.
    """
    return sorted(
        path.stem
        for path in fonts_folder().glob("*.ttf")
        if path.stem.startswith(("DejaVu", "STIX"))
    )


def held_out_captions(names: set[str], trainable: set[str]) -> set[str]:
    """About a tenth of `names`, by hash, each made only of words that the rest of `trainable` holds
    too.
    """
    wanted = {name for name in names if hashlib.sha256(name.encode()).digest()[0] < 256 * 0.11}
    words = {word for name in trainable - wanted for word in name.split()}
    return {name for name in wanted if words.issuperset(name.split())}


@lru_cache(maxsize=8)
def _font(face: str, points: int) -> ImageFont.FreeTypeFont:
    # the basic layout engine is the same in every Pillow build; Raqm is optional
    return ImageFont.truetype(
        fonts_folder() / f"{face}.ttf", points, layout_engine=ImageFont.Layout.BASIC
    )


def draw_glyph(glyph: Glyph, size: int = SIZE) -> bytes | None:
    """A PNG of the glyph, black on white, centred, as large as fits; None for one without ink
    (spaces, controls).
    """
    character = chr(glyph.codepoint)
    left, top, right, bottom = _font(glyph.face, size).getbbox(character)
    width = right - left
    height = bottom - top
    if width <= 0 or height <= 0:
        return None
    font = _font(glyph.face, max(int(size * min(1.0, (size - 4) / max(width, height))), 6))
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (size, size), 255)
    corner = ((size - (right - left)) / 2 - left, (size - (bottom - top)) / 2 - top)
    ImageDraw.Draw(image).text(corner, character, font=font, fill=0)
    if np.asarray(image).min() > 200:
        return None
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def letter_case(name: str) -> str:
    words = name.split()
    return next(
        (f"{word} letter" for word in ("small", "capital") if word in words and "letter" in words),
        "no case",
    )


def glyph_samples(glyphs: list[Glyph], first: int) -> Iterator[ShardSample]:
    for number, glyph in enumerate(glyphs, start=first):
        image = draw_glyph(glyph)
        assert image is not None, glyph
        fields = {
            "face": glyph.face,
            "codepoint": glyph.codepoint,
            "script": glyph.name.split()[0],
            "case": letter_case(glyph.name),
        }
        yield ShardSample(number, image, "png", [glyph.name], SIZE, SIZE, fields)


def _inked(face: str) -> list[Glyph]:
    return [glyph for glyph in glyphs_of(face) if draw_glyph(glyph) is not None]


def _write(job: tuple[Path, int, list[Glyph], int]) -> int:
    folder, number, glyphs, first = job
    return write_shard(folder, number, glyph_samples(glyphs, first))


def splits(glyphs: list[Glyph]) -> dict[str, list[Glyph]]:
    """Train, and held-out faces with seen and never-seen captions. A caption no training face draws
    is unseen.
    """
    train = [g for g in glyphs if g.face not in HELD_OUT_FACES]
    hidden = held_out_captions({g.name for g in glyphs}, {g.name for g in train})
    train = [g for g in train if g.name not in hidden]
    seen = {g.name for g in train}
    test = [g for g in glyphs if g.face in HELD_OUT_FACES]
    return {
        "train": train,
        "test_seen": [g for g in test if g.name in seen],
        "test_unseen": [g for g in test if g.name in hidden],
    }


def make_glyph_shards(out: Path, workers: int) -> dict[str, int]:
    """Write all splits; returns the number of pairs of each."""
    with ProcessPoolExecutor(workers) as pool:
        glyphs = [glyph for face in pool.map(_inked, faces()) for glyph in face]
        jobs = []
        counts = {}
        first = 0
        for split, members in splits(glyphs).items():
            mixed = [members[i] for i in permutation(len(members), 0)]
            counts[split] = len(mixed)
            for number, start in enumerate(range(0, len(mixed), SHARD)):
                jobs.append((out / split, number, mixed[start : start + SHARD], first + start))
            first += len(mixed)
        list(tqdm(pool.map(_write, jobs), total=len(jobs), desc="glyph shards", unit="shard"))
    names = sorted({glyph.name for glyph in glyphs})
    (out / "classnames.txt").write_text("\n".join(names) + "\n")
    return counts
