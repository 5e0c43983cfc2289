"""Retrieval recall: captions that find their image, and images that find a caption of theirs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from clipsmall.data import caption_hash
from clipsmall.distributed import world
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.top_k import (
    chance_in_top_k,
    chunk_rows,
    in_top_k,
    refuse_non_finite,
    scores,
)

KS = (1, 5, 10)


@dataclass
class Relevance:
    """Which of n images and m distinct captions match, as (pairs,) coordinates."""

    image: Tensor
    text: Tensor
    images: int
    texts: int

    def block(self, side: str, start: int, stop: int) -> Tensor:
        """(stop − start, other side) True where query and answer match."""
        if side == "image":
            query, answer, answers = self.image, self.text, self.texts
        else:
            query, answer, answers = self.text, self.image, self.images
        # the pairs whose query is in these rows
        inside = (query >= start) & (query < stop)
        rows = query[inside] - start
        columns = answer[inside]

        block = torch.zeros(stop - start, answers, dtype=torch.bool)
        block[rows, columns] = True
        return block

    def counts(self, side: str) -> Tensor:
        """(queries,) the number of right answers."""
        if side == "image":
            return torch.bincount(self.image, minlength=self.images)
        return torch.bincount(self.text, minlength=self.texts)


def relevance(captions: list[list[str]]) -> tuple[list[str], Relevance]:
    """The captions of each image -> the distinct captions, and which image has which.

    Captions that differ only in case and white space count as one.
    """
    number_of: dict[int, int] = {}
    texts = list[str]()
    pairs = set[tuple[int, int]]()
    for image, its_captions in enumerate(captions):
        for caption in its_captions:
            # a new text gets the next number
            next_number = len(texts)
            number = number_of.setdefault(caption_hash(caption), next_number)
            if number == next_number:
                texts.append(caption)
            pairs.add((image, number))

    # (pairs, 2), even if there are no pairs
    columns = torch.tensor(sorted(pairs), dtype=torch.int64)
    columns = columns.reshape(-1, 2)
    image_column = columns[:, 0]
    text_column = columns[:, 1]
    return texts, Relevance(image_column, text_column, len(captions), len(texts))


def one_to_one(belongs: Relevance, limit: int) -> tuple[Tensor, Tensor]:
    """(p,) images and (p,) texts that match, each used once.

    At most about `limit` pairs, evenly spaced over the data set.
    """
    text_of = dict[int, int]()
    taken = set[int]()
    all_images = belongs.image.tolist()
    all_texts = belongs.text.tolist()
    for image, text in zip(all_images, all_texts, strict=True):
        # the first text of each image that no other image has taken
        if image not in text_of and text not in taken:
            text_of[image] = text
            taken.add(text)

    # rounded up
    step = -(-len(text_of) // limit)
    chosen = list(text_of.items())[::step]
    images = torch.tensor([image for image, _ in chosen])
    texts = torch.tensor([text for _, text in chosen])
    return images, texts


def recalls(queries: Tensor, answers: Tensor, belongs: Relevance, side: str) -> dict[int, float]:
    """recall@k: the fraction of queries with a right answer among the k best.

    Exact, in chunks of queries. Memory: half a GiB for any number of queries, and the answers in
    float64.
    """
    ks = tuple(k for k in KS if k == 1 or k < len(answers))
    total = torch.zeros(len(ks), dtype=torch.float64)
    size = chunk_rows(len(answers))
    # converted once, not in every chunk
    answers = answers.double()
    bar = tqdm(
        range(0, len(queries), size),
        desc=f"{side} queries",
        delay=3,
        leave=False,
        disable=None if world.rank() == 0 else True,
    )
    for start in bar:
        part = queries[start : start + size]
        stop = start + len(part)
        # scores and `right` are (rows, n)
        right = belongs.block(side, start, stop)
        cosines = scores(part, answers)
        found = in_top_k(cosines, right, ks)
        total += found.sum(dim=0)

    fractions = total / len(queries)
    return dict(zip(ks, fractions.tolist(), strict=True))


def both_recalls(
    images: Tensor, texts: Tensor, belongs: Relevance, name: str, task: str, skipped: int = 0
) -> Result:
    """(n, D) images, (m, D) distinct captions -> recall@k in both directions, with chance levels.

    `image_retrieval_recall@k`: a caption finds one of its images. `text_retrieval_recall@k`: an
    image finds one of its captions. Names and definitions are CLIP_benchmark's. Equal captions
    count as one text with several right images.

    Raises:
        ValueError: features that are not finite.
    """
    refuse_non_finite(images, "image")
    refuse_non_finite(texts, "text")
    result = Result(name, task, {})
    result.counts = {"images": len(images), "captions": len(texts), "skipped": skipped}

    # what is retrieved, by what, queries, answers
    ways = (
        ("image_retrieval", "text", texts, images),
        ("text_retrieval", "image", images, texts),
    )
    for way, side, queries, answers in ways:
        found = recalls(queries, answers, belongs, side)
        # (queries,) numbers of all answers and of right ones
        number_of_answers = torch.full((len(queries),), len(answers))
        number_of_right = belongs.counts(side)
        guess = chance_in_top_k(number_of_answers, number_of_right, tuple(found))
        for k, level in zip(found, guess.tolist(), strict=True):
            result.metrics[f"{way}_recall@{k}"] = found[k]
            result.chance[f"{way}_recall@{k}"] = level
    return result
