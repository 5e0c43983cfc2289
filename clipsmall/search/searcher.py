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
    cosine: float
    caption: str
    # as in its shard; b"" for a caption alone
    image: bytes


@dataclass
class Answer:
    """What was found, best first, and the seconds it took to embed the query and to compare it."""

    embedding: float
    comparing: float
    images: list[Hit]
    captions: list[Hit] = field(default_factory=list)


class Searcher:
    """A model, and the embeddings that it made of a catalog.

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
        self.images, self.captions = len(images), len(self._distinct)
        self._images = INDEXES[index](embeddings.images, images)
        self._captions = INDEXES[index](embeddings.texts, self._distinct)

    def examples(self, count: int = 4) -> list[str]:
        """Some captions of the data, evenly spread."""
        rows = self._distinct[:: -(-self.captions // count)]
        return [self.found.captions[row].as_py() for row in rows.tolist()]

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
        return Answer(embedded - start, compared - embedded, self._hits(*found, True))

    def by_image(self, image: bytes, k: int) -> Answer:
        """The k images and the k captions (all of them, if there are fewer) nearest to an encoded
        picture.

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
        times = embedded - start, compared - embedded
        return Answer(*times, self._hits(*images, True), self._hits(*captions, False))

    @torch.no_grad()
    def _encoded(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return encode(inputs.to(self.encoder.device))[0].float().cpu()

    def _hits(self, cosines: Tensor, rows: Tensor, pictures: bool) -> list[Hit]:
        return [
            Hit(
                cosine,
                self.found.captions[row].as_py(),
                self.catalog.read(int(self.found.rows[row])).image if pictures else b"",
            )
            for cosine, row in zip(cosines.tolist(), rows.tolist(), strict=True)
        ]
