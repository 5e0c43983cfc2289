"""The embedded data set: the same bytes every time, whole faces and a tenth of the names held
out.
"""

import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_tools.glyphs
from clipsmall.data import open_catalog, read_index
from clipsmall.data.making import glyphs
from clipsmall.data.making.glyphs import (
    Glyph,
    draw_glyph,
    faces,
    glyphs_of,
    held_out_captions,
    splits,
)


@pytest.fixture(scope="module")
def everything() -> list[Glyph]:
    return [glyph for face in faces() for glyph in glyphs_of(face)]


def test_held_out_names_are_made_of_known_words(everything: list[Glyph]) -> None:
    parts = splits(everything)
    seen = {glyph.name for glyph in parts["train"]}
    words = {word for name in seen for word in name.split()}
    unseen = {glyph.name for glyph in parts["test_unseen"]}
    assert not seen & unseen
    assert all(words.issuperset(name.split()) for name in unseen)
    assert {glyph.name for glyph in parts["test_seen"]} <= seen
    hidden = held_out_captions({g.name for g in everything}, {g.name for g in everything})
    assert 0.08 < len(hidden) / len({g.name for g in everything}) < 0.12


def test_held_out_faces_are_never_trained_on(everything: list[Glyph]) -> None:
    parts = splits(everything)
    assert (
        {g.face for g in parts["test_seen"]}
        == {g.face for g in parts["test_unseen"]}
        == set(glyphs.HELD_OUT_FACES)
    )
    assert not {g.face for g in parts["train"]} & set(glyphs.HELD_OUT_FACES)
    assert len(everything) > 50_000
    assert len({g.name for g in everything}) > 7_000


def test_a_glyph_is_drawn_whole_and_in_the_middle() -> None:
    for character in "ÅgWjﷺ":
        image = np.asarray(
            Image.open(BytesIO(draw_glyph(Glyph("DejaVuSans", ord(character), "")) or b""))
        )
        ink = np.argwhere(image < 128)
        assert image.shape == (32, 32)
        assert ink.min() >= 1
        assert ink.max() <= 30
        assert np.abs((ink.min(axis=0) + ink.max(axis=0)) / 2 - 15.5).max() <= 2
    assert draw_glyph(Glyph("DejaVuSans", ord(" "), "space")) is None


def test_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glyphs, "faces", lambda: ["STIXGeneralItalic", "STIXGeneralBolIta"])
    monkeypatch.setattr(glyphs, "SHARD", 400)
    counts = [glyphs.make_glyph_shards(tmp_path / str(workers), workers) for workers in (1, 2)]
    assert counts[0] == counts[1]
    names = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.tar"))
    assert len(names) >= 4
    digests = [
        [hashlib.sha256((tmp_path / w / n).read_bytes()).hexdigest() for n in names]
        for w in ("1", "2")
    ]
    assert digests[0] == digests[1]
    train = open_catalog(str(tmp_path / "1" / "train"))
    assert len(train) == counts[0]["train"]
    assert set(read_index(tmp_path / "1" / names[0])["status"].to_pylist()) == {""}


def test_made_twice_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classnames.txt").write_text("a\n")
    assert data_tools.glyphs.main([str(tmp_path)]) == 0
    assert "made before" in capsys.readouterr().out
