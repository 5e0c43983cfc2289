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
# side of an image in pixels
SIZE = 32
# pairs per shard
SHARD = 5_000


@dataclass(frozen=True)
class Glyph:
    """A character of a font."""

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

    font = FT2Font(str(fonts_folder() / f"{face}.ttf"))
    found = []
    for code in sorted(font.get_charmap()):
        name = unicodedata.name(chr(code), "")
        if name:
            found.append(Glyph(face, code, name.lower()))
    return found


def faces() -> list[str]:
    """The faces of DejaVu and STIX, both under free licences."""
    # of matplotlib's others, cm* has no Unicode names, and LastResort draws placeholders
    names = [path.stem for path in fonts_folder().glob("*.ttf")]
    return sorted(name for name in names if name.startswith(("DejaVu", "STIX")))


def held_out_captions(names: set[str], trainable: set[str]) -> set[str]:
    """About a tenth of `names`, by hash, made only of words that the rest of `trainable` holds."""
    wanted = set[str]()
    for name in names:
        first_byte = hashlib.sha256(name.encode()).digest()[0]
        # a little over a tenth: those with words of their own are given back
        if first_byte < 256 * 0.11:
            wanted.add(name)
    known_words = set[str]()
    for name in trainable - wanted:
        known_words.update(name.split())
    return {name for name in wanted if known_words.issuperset(name.split())}


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
    longest = max(right - left, bottom - top)
    if right <= left or bottom <= top:
        return None
    # two pixels of margin on each side
    scale = min(1.0, (size - 4) / longest)
    font = _font(glyph.face, max(int(size * scale), 6))
    left, top, right, bottom = font.getbbox(character)
    x = (size - (right - left)) / 2 - left
    y = (size - (bottom - top)) / 2 - top
    image = Image.new("L", (size, size), 255)
    ImageDraw.Draw(image).text((x, y), character, font=font, fill=0)
    if np.asarray(image).min() > 200:
        return None
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def letter_case(name: str) -> str:
    """The letter case given in a Unicode name."""
    words = name.split()
    if "letter" in words:
        for case in ("small", "capital"):
            if case in words:
                return f"{case} letter"
    return "no case"


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
    """The three sets: train, and held-out faces with captions seen and not seen in training."""
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
        glyphs = list[Glyph]()
        for of_face in pool.map(_inked, faces()):
            glyphs += of_face
        jobs = []
        counts = {}
        # pairs are numbered consecutively over all splits
        first = 0
        for split, members in splits(glyphs).items():
            mixed = [members[row] for row in permutation(len(members), 0)]
            counts[split] = len(mixed)
            for number, start in enumerate(range(0, len(mixed), SHARD)):
                part = mixed[start : start + SHARD]
                jobs.append((out / split, number, part, first + start))
            first += len(mixed)
        written = pool.map(_write, jobs)
        list(tqdm(written, total=len(jobs), desc="glyph shards", unit="shard"))
    names = sorted({glyph.name for glyph in glyphs})
    (out / "classnames.txt").write_text("\n".join(names) + "\n")
    return counts
