"""Retrieval: does a caption find its image, and an image its caption, among all of a data set?"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from clipsmall.data import Catalog, caption_hash
from clipsmall.distributed import world
from clipsmall.evaluation.features import Encoder, read_texts
from clipsmall.evaluation.hits import chance, chunk_rows, hits, refuse_non_finite, scores
from clipsmall.evaluation.results import Result

KS = (1, 5, 10)


@dataclass
class Relevance:
    """Which of n images and m distinct captions belong together, as (pairs,) coordinates."""

    image: Tensor
    text: Tensor
    images: int
    texts: int

    def block(self, side: str, start: int, stop: int) -> Tensor:
        """(stop − start, other side) True where query and answer belong together."""
        query, answer = (self.image, self.text) if side == "image" else (self.text, self.image)
        wide = self.texts if side == "image" else self.images
        here = (query >= start) & (query < stop)
        block = torch.zeros(stop - start, wide, dtype=torch.bool)
        block[query[here] - start, answer[here]] = True
        return block

    def counts(self, side: str) -> Tensor:
        """(queries,) how many answers are right."""
        query, wide = (self.image, self.images) if side == "image" else (self.text, self.texts)
        return torch.bincount(query, minlength=wide)


def relevance(captions: list[list[str]]) -> tuple[list[str], Relevance]:
    """Captions by image -> the distinct captions (equal up to case and white space are one), and
    who owns which.
    """
    distinct: dict[int, int] = {}
    texts = list[str]()
    owned = set[tuple[int, int]]()
    for image, all_of_one in enumerate(captions):
        for caption in all_of_one:
            place = distinct.setdefault(caption_hash(caption), len(texts))
            if place == len(texts):
                texts.append(caption)
            owned.add((image, place))
    pairs = torch.tensor(sorted(owned), dtype=torch.int64).reshape(-1, 2)
    return texts, Relevance(pairs[:, 0], pairs[:, 1], len(captions), len(texts))


def recalls(queries: Tensor, answers: Tensor, belongs: Relevance, side: str) -> dict[int, float]:
    """recall@k: the share of queries with a right answer among the k best; exact, in chunks of
    queries.

    Memory: half a GiB, and the answers in float64, however many there are.
    """
    ks = tuple(k for k in KS if k == 1 or k < len(answers))
    total = torch.zeros(len(ks), dtype=torch.float64)
    size = chunk_rows(len(answers))
    # once, not in every chunk
    answers = answers.double()
    starts = range(0, len(queries), size)
    for start in tqdm(
        starts,
        desc=f"{side} queries",
        delay=3,
        leave=False,
        disable=None if world.rank() == 0 else True,
    ):
        part = queries[start : start + size]
        total += hits(scores(part, answers), belongs.block(side, start, start + len(part)), ks).sum(
            dim=0
        )
    return dict(zip(ks, (total / len(queries)).tolist(), strict=True))


def retrieval(encoder: Encoder, catalog: Catalog, name: str) -> Result:
    """Both ways over all pairs of `catalog`, several captions an image and several images a
    caption.

    `image_retrieval_recall@k`: a caption finds one of its images; `text_retrieval_recall@k`: an
    image one of its captions (CLIP_benchmark's names and definition). Equal captions count as one
    text with several right images.

    Raises:
        ValueError: features that are not finite.
    """
    texts = read_texts(catalog)
    images, rows = encoder.images(catalog)
    captions, belongs = relevance([texts.captions[row] for row in rows.tolist()])
    features = encoder.texts(captions)
    return retrieval_of(images, features, belongs, name, skipped=catalog.total - len(rows))


def retrieval_of(
    images: Tensor, features: Tensor, belongs: Relevance, name: str, skipped: int = 0
) -> Result:
    """The same of (n, D) features of images and (m, D) of captions.

    Raises:
        ValueError: features that are not finite.
    """
    refuse_non_finite(images, "image")
    refuse_non_finite(features, "text")
    cell = Result(name, "zeroshot_retrieval", {})
    cell.counts = {"images": len(images), "captions": len(features), "skipped": skipped}
    for task, side, queries, answers in (
        ("image_retrieval", "text", features, images),
        ("text_retrieval", "image", images, features),
    ):
        found = recalls(queries, answers, belongs, side)
        wide = torch.full((len(queries),), len(answers))
        guess = chance(wide, belongs.counts(side), tuple(found))
        for (k, value), p in zip(found.items(), guess.tolist(), strict=True):
            cell.metrics[f"{task}_recall@{k}"], cell.chance[f"{task}_recall@{k}"] = value, p
    return cell
