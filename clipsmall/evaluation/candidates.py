"""Retrieval among hard candidates: small sets of pairs whose captions have most of their words in
common.
"""

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from clipsmall.evaluation.hits import hits, scores
from clipsmall.evaluation.matching import one_to_one
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.retrieval import Relevance
from clipsmall.evaluation.view import DataView
from clipsmall.mining.initial_groups import grow_groups
from clipsmall.mining.scored_pairs import Bools, Floats, Ints, ScoredPairs, one_owner
from clipsmall.mining.swaps import count_conflicts, improve_by_swaps, separate_conflicts

# at most: all pairs of them are 100 MB (and COCO's test images are as many)
PAIRS = 5000
# of exchanges between sets: mean cosine of words 0.132, 0.155, 0.159 after none, one, two; 0.159
# after ten
SWEEPS = 2
# single letters, which scikit-learn drops, and what is no letter: each caption has words
WORD = r"\w+|[^\w\s]"


def candidates(view: DataView, size: int = 32) -> Result:
    """R@1 both ways within sets of `size` pairs, put together to be hard, and within random ones of
    the same pairs.

    The counterpart between images and texts of Cho et al.'s corrupted top-1 (arXiv 2307.05906, §5),
    whose candidates are versions of one image. Sets are those of the miner (groups grown, then
    exchanges), but hard is what captions say and no model's opinion: pairs of one set share many
    words, weighted by tf-idf. So all models meet the same sets, and none meets its own mistakes, as
    it would in sets of its own; a reference model would be hardest on its kin.
    In a script without spaces a sentence is one word: such sets are hardly harder than random ones,
    as `details` tell.

    A pair is an image with one of its captions, each once, and no set holds a caption that is right
    for two of its images, so a guess is right once in `size`. Up to 5,000 pairs, evenly chosen;
    those that fill no set are left out.

    Raises:
        ValueError: no set of that size can be made.
    """
    images = view.images[view.captioned]
    texts = view.texts
    belongs = view.captions[1]
    mine, own = one_to_one(belongs, PAIRS)
    if not 2 <= size <= len(mine):
        raise ValueError(
            f"--candidates={size}: must be 2 to {len(mine)}, the pairs with a caption of their own here"
        )
    words = alike([view.captions[0][text] for text in own.tolist()])
    hard, random = sets(words, confusable(belongs, mine, own), size)
    if not len(hard) or not len(random):
        raise ValueError(
            f"--candidates={size}: images share so many captions that no set can do without; choose fewer"
        )
    cell = Result(view.data.name, "candidates", {}, details={"word_cosine": {}})
    for name, groups in (("hard", hard), ("random", random)):
        forth, back = recalls_within(images[mine], texts[own], torch.from_numpy(groups))
        cell.metrics |= {
            f"{name}_image_retrieval_recall@1": back,
            f"{name}_text_retrieval_recall@1": forth,
        }
        inside = [words[np.ix_(members, members)].sum() for members in groups]
        cell.details["word_cosine"][name] = float(np.mean(inside)) / (size * (size - 1))
    cell.chance = dict.fromkeys(cell.metrics, 1 / size)
    cell.counts = {
        "candidates": size,
        "sets": len(hard),
        "pairs": hard.size,
        "skipped": view.skipped,
    }
    return cell


def alike(captions: list[str]) -> Floats:
    """n captions -> (n, n) cosines of their words, weighted by tf-idf; 0 on the diagonal."""
    words = TfidfVectorizer(token_pattern=WORD, dtype=np.float32).fit_transform(captions)
    cosines: Floats = (words @ words.T).toarray()
    np.fill_diagonal(cosines, 0)
    return cosines


def confusable(belongs: Relevance, images: Tensor, texts: Tensor) -> Bools:
    """(p,), (p,) pairs -> (p, p) pairs of pairs of which one's caption is right for the other's
    image, too.
    """
    place = torch.full((belongs.texts,), -1)
    place[texts] = torch.arange(len(texts))
    of_image = torch.full((belongs.images,), -1)
    of_image[images] = torch.arange(len(images))
    one = of_image[belongs.image]
    other = place[belongs.text]
    both = (one >= 0) & (other >= 0) & (one != other)
    found = np.zeros((len(images),) * 2, dtype=bool)
    found[one[both].numpy(), other[both].numpy()] = True
    return found | found.T


def sets(words: Floats, cannot: Bools, size: int) -> tuple[Ints, Ints]:
    """(p, p) likeness and who may not meet -> (m, size) places of hard sets, and of random ones;
    the same always.
    """
    quotas = one_owner(len(words), size)
    random = np.random.default_rng(0)
    # of which `grow_groups` asks no more than how many they are
    pairs = ScoredPairs(words, words)
    hard = improve_by_swaps(
        words,
        grow_groups(pairs, quotas, cannot, random, words),
        quotas.owner,
        cannot,
        SWEEPS,
        random,
    )
    hard = hard[count_conflicts(hard, cannot) == 0]
    others = separate_conflicts(
        random.permutation(hard.ravel()).reshape(hard.shape), quotas.owner, cannot, random
    )
    return hard, others[count_conflicts(others, cannot) == 0]


def recalls_within(images: Tensor, texts: Tensor, groups: Tensor) -> tuple[float, float]:
    """(p, D), (p, D), (m, C) -> the share of images that find their caption in their set, and of
    captions their image.

    Ties count as a random order.
    """
    own = torch.eye(groups.shape[1], dtype=torch.bool)
    found = []
    for members in groups:
        near = scores(images[members], texts[members])
        found.append(torch.cat([hits(near, own, (1,)), hits(near.T, own, (1,))], dim=1).mean(dim=0))
    forth, back = torch.stack(found).mean(dim=0).tolist()
    return forth, back
