"""HTML as a browser would see it, and texts and pictures to fill a page with."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

# what a caption may try
EVIL = "<script>alert('caption')</script>"


def png(size: int = 8) -> bytes:
    Image.new("RGB", (size, size), "white").save(file := io.BytesIO(), "png")
    return file.getvalue()


def decoded(source: str) -> bytes:
    return base64.b64decode(source.partition(";base64,")[2])


class Reader(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside of scripts and
    styles.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in {"script", "style"}:
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]
