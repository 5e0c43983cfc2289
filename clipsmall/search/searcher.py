"""Queries and answers: a text or a picture in, pictures and captions of the data set out."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from clipsmall.data import Catalog
from clipsmall.data.preprocess import BadImage, ImageTransform
from clipsmall.evaluation import Encoder
from clipsmall.search.embeddings import StoredEmbeddings
from clipsmall.search.index import INDEXES


class Hit(NamedTuple):
    """An image or a caption that was found."""

    cosine: float
    caption: str
    # encoded image as in its shard; b"" for a caption
    image: bytes


@dataclass
class Answer:
    """The hits, best first, and the seconds taken to embed the query and to search."""

    embedding: float
    comparing: float
    images: list[Hit]
    captions: list[Hit] = field(default_factory=list)


class Searcher:
    """Answers queries with a model and its embeddings of a catalog.

    Args:
        index: `exact`, or `faiss` where it is installed.

    Raises:
        ValueError: faiss is asked for and not installed.
    """

    def __init__(
        self, encoder: Encoder, catalog: Catalog, embeddings: StoredEmbeddings, index: str = "exact"
    ) -> None:
        self.encoder = encoder
        self.catalog = catalog
        self.found = embeddings
        self.transform = ImageTransform(encoder.model.spec)
        encoder.model.eval()
        images = embeddings.distinct_images()
        self._distinct = embeddings.distinct_captions()
        # numbers of distinct images and captions
        self.images = len(images)
        self.captions = len(self._distinct)
        self._images = INDEXES[index](embeddings.images, images)
        self._captions = INDEXES[index](embeddings.texts, self._distinct)

    def examples(self, count: int = 4) -> list[str]:
        """Some captions, evenly spaced over the data."""
        every = -(-self.captions // count)
        examples = []
        for row in self._distinct[::every].tolist():
            examples.append(self.found.captions[row].as_py())

        return examples

    def by_text(self, text: str, k: int) -> Answer:
        """The k images nearest to a text.

        Raises:
            ValueError: an empty text; k below 1, or more than there are images.
        """
        text = " ".join(text.split())
        if not text:
            raise ValueError("the query is empty: type some words, or drop a picture")

        start = time.perf_counter()
        query = self._encoded(self.encoder.model.encode_text, self.encoder.tokenize([text]))
        embedded = time.perf_counter()
        found = self._images(query, k)
        compared = time.perf_counter()
        hits = self._hits(*found, with_images=True)
        return Answer(embedded - start, compared - embedded, hits)

    def by_image(self, image: bytes, k: int) -> Answer:
        """The k images and k captions (or all, if fewer) nearest to an encoded picture.

        Raises:
            ValueError: not a picture; k below 1, or more than there are images.
        """
        start = time.perf_counter()
        try:
            pixels = self.transform(image)[None]
        except BadImage as error:
            raise ValueError(f"this picture cannot be used: {error}") from None

        query = self._encoded(self.encoder.model.encode_image, pixels)
        embedded = time.perf_counter()
        images = self._images(query, k)
        captions = self._captions(query, min(k, self.captions))
        compared = time.perf_counter()
        image_hits = self._hits(*images, with_images=True)
        caption_hits = self._hits(*captions, with_images=False)
        return Answer(embedded - start, compared - embedded, image_hits, caption_hits)

    @torch.no_grad()
    def _encoded(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return encode(inputs.to(self.encoder.device))[0].float().cpu()

    def _hits(self, cosines: Tensor, rows: Tensor, with_images: bool) -> list[Hit]:
        hits = []
        for cosine, row in zip(cosines.tolist(), rows.tolist(), strict=True):
            caption = self.found.captions[row].as_py()
            image = b""
            if with_images:
                image = self.catalog.read(int(self.found.rows[row])).image

            hits.append(Hit(cosine, caption, image))

        return hits
