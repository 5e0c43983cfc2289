"""Retrieval among hard candidates: small sets of pairs whose captions share most of their words."""

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
# at most: all pairs of them are 100 MB (and COCO's test images are as many)
PAIRS = 5000
# of exchanges between sets: mean cosine of words 0.132, 0.155, 0.159 after none, one, two; 0.159
# after ten
SWEEPS = 2
# single letters, which scikit-learn drops, and what is no letter: each caption has words
WORD = r"\w+|[^\w\s]"


def measure_candidates(view: DataView, candidates: int = 32) -> Result:
    """R@1 both ways within hard sets of pairs, and within random sets of the same pairs.

    The counterpart between images and texts of Cho et al.'s corrupted top-1 (arXiv 2307.05906, §5),
    whose candidates are versions of one image. Sets are made as the miner makes groups (they grow,
    then exchange pairs), but only captions decide what is hard, no model's scores: pairs of one
    set share many words, weighted by tf-idf. So all models get the same sets, and none gets its own
    mistakes; sets chosen by a model would be hardest for similar models. In a script without spaces
    a sentence is one word: such sets are hardly harder than random ones, as `details` show.

    A pair is an image with one of its captions, each once, and no set holds a caption that is right
    for two of its images, so a guess is right once in `candidates`. Up to 5,000 pairs, evenly
    chosen; those that fill no set are left out.

    Args:
        candidates: pairs of a set.

    Raises:
        ValueError: no set of that size can be made.
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
        # over the pairs of a set, without the diagonal
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
    # the pair of each text and of each image; −1 = of none
    pair_of_text = torch.full((belongs.texts,), -1)
    pair_of_text[texts] = torch.arange(len(texts))
    pair_of_image = torch.full((belongs.images,), -1)
    pair_of_image[images] = torch.arange(len(images))

    # (belonging,) the pair of each image and of each text that belong together
    one = pair_of_image[belongs.image]
    other = pair_of_text[belongs.text]
    both_in_pairs = (one >= 0) & (other >= 0)
    two_pairs = both_in_pairs & (one != other)

    rows = one[two_pairs].numpy()
    columns = other[two_pairs].numpy()
    pairs = len(images)
    found = np.zeros((pairs, pairs), dtype=bool)
    found[rows, columns] = True
    # confusion counts both ways
    return found | found.T


def candidate_sets(words: Floats, cannot: Bools, size: int) -> tuple[Ints, Ints]:
    """(p, p) word cosines and which pairs may not meet -> (m, size) pairs of hard and random sets.

    The same ones every time.
    """
    quotas = one_owner(len(words), size)
    random = np.random.default_rng(0)
    # `grow_groups` only asks them for their number
    pairs = ScoredPairs(words, words)
    groups = grow_groups(pairs, quotas, cannot, random, words)
    hard = improve_by_swaps(words, groups, quotas.owner, cannot, SWEEPS, random)
    # sets that still hold a conflict are left out
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
    """(p, D), (p, D), (m, C) -> fraction of images that find their caption in their set, and back.

    Ties count as a random order.
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
        # (C, 2): both ways
        both = torch.cat([of_images, of_texts], dim=1)
        found.append(both.mean(dim=0))

    means = torch.stack(found).mean(dim=0)
    image_finds, text_finds = means.tolist()
    return image_finds, text_finds


TASK = Task(
    NAME,
    measure_candidates,
    options={
        "candidates": TaskOption(32, "pairs of a hard set of the task candidates", least=2),
    },
    matches="captions",
    metrics=tuple(
        f"{name}_{way}_retrieval_recall@1"
        for name in ("hard", "random")
        for way in ("image", "text")
    ),
)
