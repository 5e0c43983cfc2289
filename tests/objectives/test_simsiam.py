"""SimSiam and BYOL: lightly's negative cosine, and the spread of embeddings.

Seen to fail when: targets are not detached.
"""

import pytest

from clipsmall.objectives.byol import byol
from clipsmall.objectives.simsiam import simsiam
from tests.objectives.outputs_of_heads import D, assert_same, embeddings


def test_simsiam_and_byol_are_lightlys_negative_cosine() -> None:
    lightly = pytest.importorskip("lightly.loss")
    e = embeddings(9)
    cosine = lightly.NegativeCosineSimilarity()
    x = e.extra
    theirs = (
        cosine(x["image_predicted"], e.text.detach())
        + cosine(x["text_predicted"], e.image.detach())
    ) / 2
    assert_same(simsiam(e, e)["loss"], theirs, e)
    theirs = 4 + 2 * cosine(x["image_predicted"], x["text_target"].detach())
    theirs = theirs + 2 * cosine(x["text_predicted"], x["image_target"].detach())
    assert_same(byol(e, e)["loss"], theirs, e)


def test_spread_tells_a_full_sphere_from_a_point() -> None:
    e = embeddings(4096)
    assert simsiam(e, e)["spread"].item() == pytest.approx(1, abs=0.02)
    point = e._replace(image=e.image[:1].expand(4096, D), text=e.text[:1].expand(4096, D))
    assert byol(point, point)["spread"].item() < 1e-6
