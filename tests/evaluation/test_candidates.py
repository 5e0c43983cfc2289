"""Tests of hard candidate sets: sets by hand, the same for every model, recalls that are counts.

Seen to fail when: captions that are right twice stand in one set, or make one pair of pairs of two;
such sets stay; sets are the easiest, differ from run to run, or are this model's own; single
letters are no words; likeness counts a caption with itself; directions are exchanged, or one is
counted twice; any size passes; chance is that among all; its size is part of every key, or of none.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.evaluation.recall import one_to_one, relevance
from clipsmall.evaluation.sets import open_set
from clipsmall.evaluation.suite import option_values
from clipsmall.evaluation.tasks import TASKS, candidates
from clipsmall.evaluation.tasks.candidates import (
    candidate_sets,
    confusable,
    measure_candidates,
    recalls_within,
    word_cosines,
)
from clipsmall.evaluation.view import DataView
from clipsmall.mining.swaps import count_conflicts
from tests.evaluation.test_evaluation import small_encoder, unit_rows, write_pictures
from tests.evaluation.test_suite import cells, run, write_model

SCRIPTS = ("latin", "greek", "gothic", "runic", "thai")
FAMILIES = [f"{script} letter {member}" for member in "abcd" for script in SCRIPTS]


def seen(captions: list[list[str]], images: Tensor, texts: Tensor) -> DataView:
    """A view of features that are made up."""
    view = DataView.__new__(DataView)
    view.data = type(
        "Data", (), {"name": "made", "catalog": type("Catalog", (), {"total": len(captions)})()}
    )()
    view.__dict__.update(
        encoded=(images, torch.arange(len(images))),
        texts=texts,
        captioned=torch.arange(len(images)),
        captions=relevance(captions),
    )
    return view


# ---- sets ----


def test_captions_are_alike_by_words_weighted_by_rarity() -> None:
    found = word_cosines(["letter e", "Letter  E!", "letter a", "sign a", "?", "!"])
    counts = np.array(
        [
            [1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 1],
            [1, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            # letter e a sign ? !
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
        dtype=float,
    )
    # scikit-learn's smooth idf
    rows = counts * (np.log(7 / (1 + (counts > 0).sum(axis=0))) + 1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = rows @ rows.T
    np.fill_diagonal(expected, 0)
    assert np.allclose(found, expected, atol=1e-6)


def test_families_are_found_and_random_sets_mix_them() -> None:
    words = word_cosines(FAMILIES)
    cannot = np.zeros_like(words, dtype=bool)
    hard, random = candidate_sets(words, cannot, 4)
    assert sorted(hard.flatten().tolist()) == sorted(random.flatten().tolist()) == list(range(20))
    assert {tuple({FAMILIES[i].split()[0] for i in members}) for members in hard} == {
        (script,) for script in SCRIPTS
    }
    again = candidate_sets(words, cannot, 4)
    assert np.array_equal(hard, again[0])
    assert np.array_equal(random, again[1])
    assert max(len({FAMILIES[i].split()[0] for i in members}) for members in random) > 2


def test_no_set_holds_two_that_may_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    words = word_cosines(FAMILIES)
    cannot = np.zeros_like(words, dtype=bool)
    # within families, all but the last
    for a, b in ((0, 5), (2, 12), (5, 15), (3, 17)):
        cannot[a, b] = cannot[b, a] = True
    for made in candidate_sets(words, cannot, 4):
        assert len(made) == 5
        assert not count_conflicts(made, cannot).any()
    with monkeypatch.context() as patch:
        rows = np.arange(20).reshape(5, 4)
        # where it fails, sets are left out
        patch.setattr(candidates, "separate_conflicts", lambda *_: rows)
        cannot[8, 9] = cannot[9, 8] = True
        assert candidate_sets(words, cannot, 4)[1].tolist() == np.delete(rows, 2, axis=0).tolist()
    cannot[:] = True
    np.fill_diagonal(cannot, False)
    assert [len(made) for made in candidate_sets(words, cannot, 4)] == [0, 0]


def test_confusable_pairs_are_those_that_share_a_caption() -> None:
    captions = [["a", "b"], ["b", "c"], ["c"], ["d", "a"], ["e"], ["B "]]
    texts, belongs = relevance(captions)
    images, own = one_to_one(belongs, limit=2000)
    found = confusable(belongs, images, own)
    owned = [
        {
            texts.index(t)
            for t in texts
            if any(t.strip().lower() == c.strip().lower() for c in all_of_one)
        }
        for all_of_one in captions
    ]
    for i, j in np.ndindex(*found.shape):
        either = own[j].item() in owned[images[i]] or own[i].item() in owned[images[j]]
        assert found[i, j] == (i != j and either)
    assert found.any()


# ---- recalls ----


def test_recalls_within_sets_are_counts() -> None:
    images = unit_rows(24, 4, seed=1)
    texts = unit_rows(24, 4, seed=2)
    groups = torch.randperm(24, generator=torch.Generator().manual_seed(0)).reshape(4, 6)
    forth = back = 0
    for members in groups.tolist():
        for i in members:
            forth += max(members, key=lambda j: float(images[i] @ texts[j])) == i
            back += max(members, key=lambda j: float(images[j] @ texts[i])) == i
    assert forth != back
    assert recalls_within(images, texts, groups) == pytest.approx((forth / 24, back / 24))
    assert recalls_within(images, images, groups) == (1, 1)
    same = images[:1].expand(24, -1)
    assert recalls_within(same, texts, groups) == pytest.approx(
        (recalls_within(same, texts, groups)[0], 1 / 6)
    )
    # ties: a guess
    assert recalls_within(same, same, groups) == pytest.approx((1 / 6, 1 / 6))


def test_hard_sets_are_harder_for_a_model_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of words with noise: captions that share words are near one another."""
    names = [
        [f"{a} {b} {c}"]
        for a in "rgb"
        for b in ("cat", "dog", "cow", "bee")
        for c in map(str, range(8))
    ]
    vocabulary = {
        word: place for place, word in enumerate(sorted({w for (n,) in names for w in n.split()}))
    }
    directions = unit_rows(len(vocabulary), 24, seed=5)
    texts = F.normalize(
        torch.stack([directions[[vocabulary[w] for w in n.split()]].sum(0) for (n,) in names]),
        dim=1,
    )
    images = F.normalize(texts + 1.5 * unit_rows(96, 24, seed=6), dim=1)
    cell = measure_candidates(seen(names, images, texts), 8)
    for way in ("image", "text"):
        hard, random = (
            cell.metrics[f"{name}_{way}_retrieval_recall@1"] for name in ("hard", "random")
        )
        assert 1 / 8 < hard < random - 0.05
    assert cell.details["word_cosine"]["hard"] > 2 * cell.details["word_cosine"]["random"]
    assert cell.chance == dict.fromkeys(cell.metrics, 1 / 8)
    assert cell.counts == {"candidates": 8, "sets": 12, "pairs": 96, "skipped": 0}

    words = word_cosines([name for (name,) in names])
    groups = candidate_sets(words, np.zeros((96, 96), dtype=bool), 8)[0]
    forth, back = recalls_within(images, texts, torch.from_numpy(groups))
    assert cell.metrics["hard_text_retrieval_recall@1"] == forth
    assert cell.metrics["hard_image_retrieval_recall@1"] == back
    inside = np.mean(
        [words[i, j] for members in groups for i in members for j in members if i != j]
    )
    assert cell.details["word_cosine"]["hard"] == pytest.approx(inside)

    # every other pair; the last two fill no set
    monkeypatch.setattr(candidates, "PAIRS", 50)
    cell = measure_candidates(seen(names, images, texts), 23)
    assert cell.counts == {"candidates": 23, "sets": 2, "pairs": 46, "skipped": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("candidates") / "pictures"
    # most captions belong to several images
    write_pictures(folder / "test", broken=(4, 21))
    return folder


def test_all_models_meet_the_same_sets(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Any] = []
    real = recalls_within
    monkeypatch.setattr(candidates, "recalls_within", lambda *a: met.append(a) or real(*a))
    first = small_encoder()
    second = small_encoder()
    for weights in second.model.parameters():
        weights.data.mul_(-1.3)
    found = [measure_candidates(DataView(e, open_set(str(pictures))), 6) for e in (first, second)]
    assert not torch.equal(met[0][0], met[2][0])
    # hard
    assert torch.equal(met[0][2], met[2][2])
    # random
    assert torch.equal(met[1][2], met[3][2])
    assert found[0].counts == found[1].counts
    assert found[0].counts["skipped"] == 2

    view = DataView(first, open_set(str(pictures)))
    belongs = view.captions[1]
    images, own = one_to_one(belongs, limit=2000)
    rights = {*zip(belongs.image.tolist(), belongs.text.tolist(), strict=True)}
    for groups in (met[0][2], met[1][2]):
        for members in groups.tolist():
            right = [(int(images[i]), int(own[j])) in rights for i in members for j in members]
            assert sum(right) == len(members)


@pytest.mark.parametrize("size", [1, 0, -3, 200])
def test_sets_of_impossible_sizes_are_refused(size: int, pictures: Path) -> None:
    view = DataView(small_encoder(), open_set(str(pictures)))
    pairs = len(one_to_one(view.captions[1], limit=2000)[0])
    with pytest.raises(
        ValueError, match=rf"--candidates={size}: must be 2 to {pairs}, the pairs with a caption"
    ):
        measure_candidates(view, size)


def test_images_that_share_their_captions_are_refused() -> None:
    captions = [["a", "b", "c"]] * 3
    view = seen(captions, unit_rows(3, 4), unit_rows(3, 4))
    with pytest.raises(ValueError, match=r"--candidates=3: images share so many captions"):
        measure_candidates(view, 3)


def test_its_size_is_part_of_its_own_key_alone(pictures: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    words = [
        model,
        "--data",
        pictures,
        "--out",
        tmp_path / "out",
        "--tasks",
        "candidates",
        "geometry",
    ]
    assert run(*words, "--candidates", "5") == 0
    before = cells(tmp_path / "out")
    assert run(*words, "--candidates", "6") == 0
    after = cells(tmp_path / "out")
    assert after["geometry"]["key"] == before["geometry"]["key"]
    assert after["candidates"]["key"] != before["candidates"]["key"]
    assert after["candidates"]["counts"]["candidates"] == 6
    assert all(math.isclose(value, 1 / 6) for value in after["candidates"]["chance"].values())
    assert TASKS["candidates"].chosen(option_values(candidates=7)) == {"candidates": 7}
