"""The parts of a page: pictures as data: addresses."""

import io

from PIL import Image

from clipsmall.pages.html_page import data_address, picture_address
from tests.html_for_tests import decoded, png


def test_a_tiny_image_is_kept_and_a_large_one_shrunk() -> None:
    assert picture_address(png(32)) == (data_address(png(32), "image/png"), True)
    source, tiny = picture_address(png(1000))
    assert (Image.open(io.BytesIO(decoded(source))).size, tiny) == ((256, 256), False)
    assert picture_address(b"broken")[0].startswith("data:image/png")
