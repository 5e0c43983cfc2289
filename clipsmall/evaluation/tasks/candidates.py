"""Retrieval among hard candidates: small sets of pairs whose captions share many words."""

import numpy as np
import torch
from torch import Tensor

from clipsmall.evaluation.recall import Relevance, one_to_one
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import Task, TaskOption
from clipsmall.evaluation.top_k import in_top_k, scores
from clipsmall.evaluation.view import DataView
from clipsmall.mining.initial_groups import grow_groups
from clipsmall.mining.scored_pairs import Bools, Floats, Ints, ScoredPairs, one_owner
from clipsmall.mining.swaps import count_conflicts, improve_by_swaps, separate_conflicts

NAME = "candidates"
# Most pairs to use: their (p, p) matrix takes 100 MB. COCO's test set has as many images.
PAIRS = 5000
# Rounds of exchanging pairs between sets. The mean word cosine is 0.132, 0.155, 0.159 after none,
# one and two rounds, and still 0.159 after ten.
SWEEPS = 2
# Keeps single letters (which scikit-learn drops) and symbols, so that no caption is without words.
WORD = r"\w+|[^\w\s]"


def measure_candidates(view: DataView, candidates: int = 32) -> Result:
    """recall@1 in both directions within hard sets of pairs, and within random sets of these pairs.

    The image-text counterpart of Cho et al.'s corrupted top-1 (arXiv 2307.05906, §5), whose
    candidates are versions of one image. Sets are built like the miner's groups (they grow, then
    exchange pairs), but hardness comes from the captions alone: pairs of a set share many words,
    weighted by tf-idf. So all models get the same sets; sets chosen by one model's scores would be
    hardest for similar models. In a script without spaces a sentence counts as one word, and the
    sets are hardly harder than random ones: see `details`.

    A pair is an image with one of its captions, each used once. No set holds a caption that is
    right for two of its images, so chance is 1 / `candidates`. Up to 5,000 pairs, evenly spaced;
    pairs that do not fill a set are left out.

    Args:
        candidates: pairs per set.

    Raises:
        ValueError: no set of this size can be made.
    """
    size = candidates
    images = view.images[view.captioned]
    texts = view.texts
    belongs = view.captions[1]
    mine, own = one_to_one(belongs, PAIRS)

    if not 2 <= size <= len(mine):
        raise ValueError(
            f"--candidates={size}: must be 2 to {len(mine)}, "
            "the pairs with a caption of their own here"
        )
    distinct = view.captions[0]
    own_captions = [distinct[text] for text in own.tolist()]

    # (p, p), (p, p)
    words = word_cosines(own_captions)
    cannot = confusable(belongs, mine, own)
    hard, random = candidate_sets(words, cannot, size)
    if not len(hard) or not len(random):
        raise ValueError(
            f"--candidates={size}: images share so many captions that no set can do without; "
            "choose fewer"
        )
    result = Result(view.data.name, NAME, {}, details={"word_cosine": {}})
    for name, groups in (("hard", hard), ("random", random)):
        sets = torch.from_numpy(groups)
        image_finds, text_finds = recalls_within(images[mine], texts[own], sets)
        result.metrics[f"{name}_image_retrieval_recall@1"] = text_finds
        result.metrics[f"{name}_text_retrieval_recall@1"] = image_finds
        inside = [words[np.ix_(members, members)].sum() for members in groups]
        # mean over the combinations within a set, without the diagonal
        result.details["word_cosine"][name] = float(np.mean(inside)) / (size * (size - 1))
    result.chance = dict.fromkeys(result.metrics, 1 / size)
    result.counts = {
        "candidates": size,
        "sets": len(hard),
        "pairs": hard.size,
        "skipped": view.skipped,
    }
    return result


def word_cosines(captions: list[str]) -> Floats:
    """n captions -> (n, n) cosines of their words, weighted by tf-idf; 0 on the diagonal."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(token_pattern=WORD, dtype=np.float32).fit_transform(captions)
    cosines: Floats = (words @ words.T).toarray()
    np.fill_diagonal(cosines, 0)
    return cosines


def confusable(belongs: Relevance, images: Tensor, texts: Tensor) -> Bools:
    """(p,), (p,) pairs -> (p, p) True where one pair's caption is right for the other's image."""
    # the pair of each text, and of each image; −1 = none
    pair_of_text = torch.full((belongs.texts,), -1)
    pair_of_text[texts] = torch.arange(len(texts))
    pair_of_image = torch.full((belongs.images,), -1)
    pair_of_image[images] = torch.arange(len(images))

    # (matches,) for each matching image and text, the pair that each is part of
    one = pair_of_image[belongs.image]
    other = pair_of_text[belongs.text]
    both_in_pairs = (one >= 0) & (other >= 0)
    two_pairs = both_in_pairs & (one != other)

    rows = one[two_pairs].numpy()
    columns = other[two_pairs].numpy()
    pairs = len(images)
    found = np.zeros((pairs, pairs), dtype=bool)
    found[rows, columns] = True
    # symmetric: either caption may be right for the other image
    return found | found.T


def candidate_sets(words: Floats, cannot: Bools, size: int) -> tuple[Ints, Ints]:
    """(p, p) word cosines and forbidden combinations -> (m, size) hard sets and random sets.

    Deterministic: the seed is fixed.
    """
    quotas = one_owner(len(words), size)
    random = np.random.default_rng(0)
    # `grow_groups` uses only the number of pairs
    pairs = ScoredPairs(words, words)
    groups = grow_groups(pairs, quotas, cannot, random, words)
    hard = improve_by_swaps(words, groups, quotas.owner, cannot, SWEEPS, random)
    # sets that still hold a forbidden combination are left out
    conflicts = count_conflicts(hard, cannot)
    hard = hard[conflicts == 0]

    # the same pairs, shuffled among the sets
    shuffled = random.permutation(hard.ravel())
    shuffled = shuffled.reshape(hard.shape)
    others = separate_conflicts(shuffled, quotas.owner, cannot, random)
    conflicts = count_conflicts(others, cannot)
    others = others[conflicts == 0]
    return hard, others


def recalls_within(images: Tensor, texts: Tensor, groups: Tensor) -> tuple[float, float]:
    """(p, D), (p, D), (m, C) -> recall@1 within sets: image to caption, and caption to image.

    Ties are broken at random, in expectation.
    """
    size = groups.shape[1]
    # the k-th image of a set belongs to its k-th text
    own = torch.eye(size, dtype=torch.bool)
    found = []
    for members in groups:
        # (C, C)
        cosines = scores(images[members], texts[members])
        of_images = in_top_k(cosines, own, (1,))
        of_texts = in_top_k(cosines.T, own, (1,))
        # (C, 2): both directions
        both = torch.cat([of_images, of_texts], dim=1)
        found.append(both.mean(dim=0))

    means = torch.stack(found).mean(dim=0)
    image_finds, text_finds = means.tolist()
    return image_finds, text_finds


TASK = Task(
    NAME,
    measure_candidates,
    options={
        "candidates": TaskOption(32, "pairs per hard set, for the task candidates", least=2),
    },
    matches="captions",
    metrics=tuple(
        f"{name}_{way}_retrieval_recall@1"
        for name in ("hard", "random")
        for way in ("image", "text")
    ),
)
