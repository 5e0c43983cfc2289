"""Drawings as data: addresses."""

import numpy as np

from clipsmall.pages.figures import heat_map_address
from tests.html_for_tests import decoded


def test_a_heat_map_has_its_labels_only_where_they_can_be_read() -> None:
    few = decoded(heat_map_address(np.full((40, 40), np.nan), ["plain"] * 40))
    assert b"plain" in few
    # too many to read
    many = decoded(heat_map_address(np.full((41, 41), np.nan), ["plain"] * 41))
    assert b"plain" not in many
