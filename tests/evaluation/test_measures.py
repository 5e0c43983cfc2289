"""Tests of probes, calibration, geometry, matching and Cho et al.'s tasks against scikit-learn,
scipy, POT and counts.

Seen to fail when: votes are cosines; the search keeps the worst strength; k is not checked; a bin
holds its lower edge; ECE forgets the bins' sizes; probabilities are made without scale or bias;
uniformity counts a row with itself; the rank is of squared singular values; columns sum to 1 in a
plan that is not square; the assignment is the worst; either potential is left out; a text is
matched twice; views leave the dice of training moved, or are the same picture twice; one direction
is counted twice.
"""

import math
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from clipsmall.evaluation.corruptions import Corruption
from clipsmall.evaluation.recall import one_to_one, relevance
from clipsmall.evaluation.sets import open_set
from clipsmall.evaluation.tasks import calibration, geometry, knn, linear_probe, matching, top1
from clipsmall.evaluation.view import DataView
from tests.evaluation.test_corruptions import scene
from tests.evaluation.test_evaluation import COLOURS, small_encoder, unit_rows, write_pictures


def clusters(n: int, classes: int, seed: int, noise: float = 0.9) -> tuple[Tensor, Tensor]:
    """Unit rows around one centre a class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=random)
    centres = unit_rows(classes, 12, seed=99)
    return F.normalize(
        centres[labels] + noise * torch.randn(n, 12, generator=random) / 2, dim=-1
    ), labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("measures") / "pictures"
    write_pictures(made / "test")
    write_pictures(made / "train", 60)
    (made / "classnames.txt").write_text("\n".join(COLOURS[:-1]))
    return made


@pytest.fixture
def view(folder: Path) -> DataView:
    return DataView(small_encoder(), open_set(str(folder), label="kind"))


# ---- probes ----


@pytest.mark.parametrize("k", [1, 4, 50])
def test_votes_are_scikit_learns(k: int) -> None:
    (train, labels), (test, _) = clusters(200, 5, 0), clusters(60, 5, 1)
    found = knn.votes(train, labels, test, 5, k, temperature=0)
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train.double(), labels)
    assert np.allclose(found / k, theirs.predict_proba(test.double()))
    weighted = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda far: np.exp(-far / 0.07)
    ).fit(train.double(), labels)
    found = knn.votes(train, labels, test, 5, k, temperature=0.07)
    assert np.allclose(
        found / found.sum(dim=1, keepdim=True), weighted.predict_proba(test.double()), atol=1e-5
    )


def test_far_neighbours_vote_at_any_temperature() -> None:
    # cosines far from 1
    train = F.one_hot(torch.tensor([0, 1, 2])).float()
    test = torch.tensor([[0.1, 0.15, 0.0]])
    found = knn.votes(train, torch.tensor([0, 1, 1]), test, 2, 2, temperature=1e-3)
    assert found.tolist() == [[pytest.approx(math.exp(-50)), 1.0]]


def test_votes_of_more_than_there_are_are_refused() -> None:
    train, labels = clusters(20, 3, 0)
    assert knn.votes(train, labels, train, 3, 20).shape == (20, 3)
    for k in (0, 21):
        with pytest.raises(ValueError, match=rf"k={k}: there are 20 images to learn from"):
            knn.votes(train, labels, train, 3, k)


def test_the_probe_is_scikit_learns_with_the_best_strength() -> None:
    (train, labels), (test, truth) = clusters(240, 4, 0), clusters(200, 4, 1)
    model, strength = linear_probe.fit(train, labels)
    x = train.double().numpy()
    y = labels.numpy()
    direct = LogisticRegression(C=strength, max_iter=1000).fit(x, y)
    assert np.allclose(model.predict_proba(test.double()), direct.predict_proba(test.double()))
    parts = train_test_split(x, y, test_size=48, random_state=0, stratify=y)
    x_fit, x_held, y_fit, y_held = parts

    def judged(c: float) -> float:
        return LogisticRegression(C=c, max_iter=1000).fit(x_fit, y_fit).score(x_held, y_held)

    coarse = max(judged(10.0**power) for power in range(-6, 7, 2))
    assert judged(strength) >= coarse
    assert judged(1e-6) < coarse
    assert (model.predict(test.double()) == truth.numpy()).mean() > 0.6


def test_probe_cells_are_scikit_learns_numbers(view: DataView) -> None:
    train, labels, truth, classes = view.training
    assert classes == 7
    for cell, theirs in (
        (
            linear_probe.linear_probe(view),
            LogisticRegression(C=linear_probe.fit(train, labels)[1], max_iter=1000),
        ),
        (
            knn.knn(view, k=1, temperature=0),
            KNeighborsClassifier(1, metric="cosine", algorithm="brute"),
        ),
    ):
        predicted = theirs.fit(train.double(), labels).predict(view.images.double())
        assert cell.metrics["acc1"] == pytest.approx((predicted == truth.numpy()).mean())
        assert cell.metrics["mean_per_class_recall"] == pytest.approx(
            balanced_accuracy_score(truth, predicted)
        )
        assert cell.counts["train"] == 60
    told = LogisticRegression(C=linear_probe.fit(train, labels)[1], max_iter=1000).fit(
        train.double(), labels
    )
    best = np.argsort(-told.predict_proba(view.images.double()), axis=1)[:, :5]
    expected = np.mean(
        [
            told.classes_[row].tolist().count(own)
            for row, own in zip(best, truth.tolist(), strict=True)
        ]
    )
    assert linear_probe.linear_probe(view).metrics["acc5"] == pytest.approx(expected)


def test_rare_and_single_classes() -> None:
    train, labels = clusters(30, 3, 0)
    # once: no part of it can be held out alike
    labels[0] = 7
    model, _ = linear_probe.fit(train, labels)
    assert 7 in model.classes_
    with pytest.raises(ValueError, match="at least two classes; all 30 train images are of one"):
        linear_probe.fit(train, torch.zeros(30, dtype=torch.int64))


def test_a_class_that_was_never_learned_is_named(folder: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "few", 3)
    view = DataView(
        small_encoder(), open_set(str(folder), label="kind", train=str(tmp_path / "few"))
    )
    with pytest.raises(
        ValueError, match=r"images are of classes without a train image, as '\d'; learn from other"
    ):
        knn.knn(view, k=1)


# ---- calibration ----


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_ece_is_a_count_by_hand(bins: int) -> None:
    random = np.random.default_rng(bins)
    # on edges, too
    told = np.concatenate([random.random(500), [0.0, 1.0, 0.2, 0.4, 1 / 3]])
    right = random.random(505) < told**2
    total = 0.0
    for b in range(bins):
        low = b / bins
        high = (b + 1) / bins
        here = [i for i, p in enumerate(told) if (low < p <= high) or (b == 0 and p == 0)]
        if here:
            total += abs(sum(right[i] for i in here) - sum(told[i] for i in here)) / len(told)
    assert calibration.ece(calibration.equal_width(told, right, bins)) == pytest.approx(
        total, abs=1e-12
    )
    order = np.argsort(told, kind="stable")
    parts = np.array_split(order, bins)
    expected = sum(abs(right[p].mean() - told[p].mean()) * len(p) / len(told) for p in parts)
    found = calibration.equal_mass(told, right, bins)
    assert max(b["count"] for b in found) - min(b["count"] for b in found) <= 1
    assert calibration.ece(found) == pytest.approx(expected, abs=0.02)
    whole = np.arange(bins * 20) / 100
    assert {b["count"] for b in calibration.equal_mass(whole, whole > 0.5, bins)} == {20}


def test_a_bin_holds_its_upper_edge() -> None:
    found = calibration.equal_width(np.array([0.0, 0.2, 0.4, 0.41, 1.0]), np.ones(5), 5)
    assert [(b["count"], b["confidence"]) for b in found] == [
        (2, 0.1),
        (1, 0.4),
        (1, 0.41),
        (1, 1.0),
    ]


def test_an_honest_model_has_no_ece_and_a_sure_one_all() -> None:
    random = np.random.default_rng(0)
    told = random.random(100_000)
    honest = calibration.equal_width(told, random.random(100_000) < told)
    assert calibration.ece(honest) < 0.01
    assert calibration.ece(calibration.equal_width(np.ones(10), np.zeros(10))) == 1.0


def test_calibration_is_of_the_models_own_probabilities(
    view: DataView, folder: Path, tmp_path: Path
) -> None:
    cell = calibration.calibration(view)
    shares = (view.images.double() @ view.class_features.double().T * 10).softmax(dim=1)
    told, best = shares.max(dim=1)
    right = (best == view.labels).numpy()
    assert cell.metrics["softmax_accuracy"] == pytest.approx(right.mean())
    assert cell.metrics["softmax_confidence"] == pytest.approx(told.mean().item(), abs=1e-6)
    expected = calibration.ece(calibration.equal_width(told.numpy(), right))
    assert cell.metrics["softmax_ece"] == pytest.approx(expected, abs=1e-5)
    # it has no bias
    assert "sigmoid_ece" not in cell.metrics

    view.encoder.model.logit_bias.data.fill_(-4.0)
    cell = calibration.calibration(view)
    told = (view.images.double() @ view.texts.double().T * 10 - 4).sigmoid().flatten().numpy()
    true = view.captions[1].block("image", 0, 43).flatten().numpy()
    assert true.sum() == len(view.captions[1].image)
    assert cell.metrics["sigmoid_accuracy"] == pytest.approx(true.mean())
    assert cell.metrics["sigmoid_ece"] == pytest.approx(
        calibration.ece(calibration.equal_width(told, true)), abs=1e-5
    )
    calibration.draw_reliability(cell, tmp_path / "x.json")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"

    (tmp_path / "pairs").mkdir()
    write_pictures(tmp_path / "pairs" / "p")
    # no classes: captions instead
    pairs = DataView(view.encoder, open_set(str(tmp_path / "pairs" / "p")))
    best = (pairs.images.double() @ pairs.texts.double().T).argmax(dim=1)
    own = pairs.captions[1].block("image", 0, 43)
    found = calibration.calibration(pairs).metrics["softmax_accuracy"]
    assert found == pytest.approx(own[torch.arange(43), best].double().mean().item())


def test_pairs_of_many_images_are_a_part_evenly_chosen(
    view: DataView, monkeypatch: pytest.MonkeyPatch
) -> None:
    view.encoder.model.logit_bias.data.fill_(-4.0)
    monkeypatch.setattr(calibration, "PAIRS_OF", 22)
    told, true = calibration._all_pairs(view, 10.0, -4.0)
    belongs = view.captions[1]
    chosen = list(range(0, 43, 2))
    texts = sorted(
        {
            t
            for i, t in zip(belongs.image.tolist(), belongs.text.tolist(), strict=True)
            if i in chosen
        }
    )
    expected = (view.images[chosen].double() @ view.texts[texts].double().T * 10 - 4).sigmoid()
    assert np.allclose(told, expected.flatten(), atol=1e-6)
    assert true.tolist() == belongs.block("image", 0, 43)[chosen][:, texts].flatten().tolist()


# ---- geometry ----


def test_geometry_is_a_count_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    x = unit_rows(30, 8, seed=1)
    y = unit_rows(20, 8, seed=2)
    _, belongs = relevance([[f"c {i % 20}", f"c {(i + 7) % 20}"] for i in range(30)])
    own = belongs.block("image", 0, 30)
    cosines = x.double() @ y.double().T
    monkeypatch.setattr(geometry, "chunk_rows", lambda columns: 7)
    pairs, others = geometry.mean_cosines(x, y, belongs)
    assert pairs == pytest.approx(cosines[own].mean().item())
    assert others == pytest.approx(cosines[~own].mean().item())
    assert geometry.modality_gap(x, y) == pytest.approx(
        np.linalg.norm(x.numpy().mean(0) - y.numpy().mean(0)), rel=1e-5
    )
    far = [
        (x[i].double() - x[j].double()).norm().item()
        for i in range(30)
        for j in range(30)
        if i != j
    ]
    assert geometry.uniformity(x) == pytest.approx(
        math.log(np.mean([math.exp(-2 * d * d) for d in far]))
    )
    assert geometry.alignment(x[:20], y) == pytest.approx(
        (x[:20] - y).norm(dim=1).square().mean().item(), rel=1e-5
    )


def test_geometry_of_known_shapes(view: DataView) -> None:
    eye = torch.eye(6)
    assert geometry.effective_rank(eye) == pytest.approx(6)
    assert geometry.effective_rank(eye[:1].expand(5, 6)) == pytest.approx(1)
    assert geometry.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert geometry.uniformity(eye[:1].expand(5, 6)) == pytest.approx(0)
    # all √2 apart
    assert geometry.uniformity(eye) == pytest.approx(-4)
    assert geometry.alignment(eye, eye) == 0
    assert geometry.modality_gap(eye, -eye) == pytest.approx(2 / math.sqrt(6))
    cell = geometry.geometry(view)
    assert cell.metrics["modality_gap"] == pytest.approx(
        geometry.modality_gap(view.images, view.texts)
    )
    pairs = (
        (view.images[view.captions[1].image] * view.texts[view.captions[1].text])
        .sum(dim=1)
        .mean()
        .item()
    )
    assert cell.metrics["mean_cosine_of_pairs"] == pytest.approx(pairs, abs=1e-6)
    assert cell.metrics["alignment"] == pytest.approx(2 - 2 * pairs, abs=1e-5)


# ---- matching ----


@pytest.mark.parametrize(("n", "m"), [(12, 12), (9, 20), (20, 9)])
def test_potentials_are_pots(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "chunk_rows", lambda columns: 5)
    x = unit_rows(n, 6, seed=n)
    y = unit_rows(m, 6, seed=m + 50)
    f, g, error = matching.dual_potentials(x, y, 8.0, 2000, 1e-10)
    logits = x.double() @ y.double().T * 8
    plan = (logits + f[:, None] + g).exp()
    assert error < 1e-9
    assert torch.allclose(plan.sum(dim=1), torch.ones(n, dtype=torch.float64))
    assert torch.allclose(plan.sum(dim=0), torch.full((m,), n / m, dtype=torch.float64))
    theirs = ot.sinkhorn(
        np.ones(n) / n, np.ones(m) / m, -logits.numpy() / 8, 1 / 8, "sinkhorn_log", 5000, 1e-12
    )
    assert np.allclose(plan / n, theirs, atol=1e-8)


def test_the_best_assignment_is_the_best_of_all() -> None:
    x = unit_rows(6, 5, seed=1)
    y = unit_rows(6, 5, seed=2)
    values = (x.double() @ y.double().T).numpy()
    best = max(
        permutations(range(6)), key=lambda order: sum(values[i, j] for i, j in enumerate(order))
    )
    assert matching.assigned(x, y).tolist() == list(best)
    big = unit_rows(80, 5, seed=3), unit_rows(80, 5, seed=4)
    _, theirs = linear_sum_assignment(-(big[0].double() @ big[1].double().T).numpy())
    assert matching.assigned(*big).tolist() == theirs.tolist()


def test_the_assignment_of_equal_scores_is_a_guess() -> None:
    """scipy prefers the diagonal, which is the truth: a collapsed model had 100 %."""
    same = unit_rows(1, 5, seed=1).expand(200, -1)
    assert (matching.assigned(same, same) == torch.arange(200)).float().mean() < 0.03
    # right among five: a fifth
    fives = unit_rows(100, 8, seed=2).repeat_interleave(5, dim=0)
    assert (
        matching.assigned(fives, fives) == torch.arange(500)
    ).float().mean().item() == pytest.approx(0.2, abs=0.06)


def test_one_to_one_takes_each_once() -> None:
    _, belongs = relevance([["a", "b"], ["a"], ["b"], ["c"], ["c", "d"], ["e"]])
    images, texts = one_to_one(belongs, limit=2000)
    assert list(zip(images.tolist(), texts.tolist(), strict=True)) == [
        (0, 0),
        (2, 1),
        (3, 2),
        (4, 3),
        (5, 4),
    ]
    images, texts = one_to_one(belongs, limit=2)
    assert list(zip(images.tolist(), texts.tolist(), strict=True)) == [(0, 0), (4, 3)]


def test_matching_a_hub_away(view: DataView) -> None:
    """A text that is near to all images is everybody's argmax; normalised, each finds its own
    again.
    """
    texts = unit_rows(43, 16, seed=8)
    hub = F.normalize(texts.mean(dim=0), dim=0)
    images = F.normalize(texts + 1.5 * hub, dim=-1)
    texts[0] = F.normalize(texts[0] + 3 * hub, dim=0)
    view.__dict__.update(
        encoded=(images, torch.arange(43)),
        texts=texts,
        captioned=torch.arange(43),
        captions=relevance([[f"c {i}"] for i in range(43)]),
    )
    view.encoder.model.logit_scale.data.fill_(math.log(30.0))
    cell = matching.matching(view)
    assert cell.metrics["argmax_image_to_text"] < 0.8
    assert cell.metrics["sinkhorn_image_to_text"] > cell.metrics["argmax_image_to_text"] + 0.2
    assert cell.metrics["hungarian"] > cell.metrics["argmax_image_to_text"] + 0.2
    f, g, _ = matching.dual_potentials(images, texts, 30.0, 50, 1e-3)
    plan = images.double() @ texts.double().T * 30 + f[:, None] + g
    for task, values in (("text", plan), ("image", plan.T)):
        right = (values.argsort(dim=1, descending=True)[:, :5] == torch.arange(43)[:, None]).any(
            dim=1
        )
        assert cell.metrics[f"sinkhorn_{task}_retrieval_recall@5"] == pytest.approx(
            right.double().mean().item()
        )
        alone = (values.argmax(dim=1) == torch.arange(43)).double().mean().item()
        assert cell.metrics[f"sinkhorn_{task}_retrieval_recall@1"] == pytest.approx(alone)


# ---- Cho et al. ----


def test_a_view_of_a_picture_is_always_the_same() -> None:
    image = scene(40, 60)
    state = torch.get_rng_state()
    first = top1.Augmented(0, 24)(image, 7)
    assert first.size == (24, 24)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.tobytes() == top1.Augmented(0, 24)(image, 7).tobytes()
    noise = Corruption("gaussian_noise", 5, 24)
    others = [
        top1.Augmented(1, 24)(image, 7),
        top1.Augmented(0, 24)(image, 8),
        top1.Augmented(0, 24, noise)(image, 7),
    ]
    assert len({first.tobytes(), *(other.tobytes() for other in others)}) == 4


def test_pictures_are_corrupted_in_turn() -> None:
    image = scene(20, 20)
    damage = tuple(Corruption(name, 5, 16) for name in ("contrast", "fog", "pixelate"))
    for number in range(6):
        assert (
            top1.InTurn(damage)(image, number).tobytes()
            == damage[number % 3](image, number).tobytes()
        )


def test_top1_among_corruptions_is_a_count_by_hand() -> None:
    first = unit_rows(20, 4, 6, seed=1)
    second = unit_rows(20, 4, 6, seed=2)
    hits = []
    for a, b in zip(first, second, strict=True):
        values = a @ b.T
        hits += [
            *(values.argmax(dim=1) == torch.arange(4)).tolist(),
            *(values.argmax(dim=0) == torch.arange(4)).tolist(),
        ]
    assert top1.among_corruptions(first, second) == pytest.approx(np.mean(hits))
    assert top1.among_corruptions(first, first) == 1
    same = first[:, :1].expand(-1, 4, -1)
    # ties: a guess
    assert top1.among_corruptions(same, same) == pytest.approx(1 / 4)
    own = torch.arange(20)
    values = first[:, 0] @ second[:, 0].T
    expected = (
        (values.argmax(dim=1) == own).double().mean()
        + (values.argmax(dim=0) == own).double().mean()
    ) / 2
    assert top1.both_ways(first[:, 0], second[:, 0]) == pytest.approx(expected.item())


def test_chos_tasks_and_their_cross_modal_forms(view: DataView) -> None:
    names = ("contrast", "gaussian_noise", "pixelate")
    cell = top1.top1(view, names, (5,), limit=20)
    assert set(cell.metrics) == {
        "top1_accuracy",
        "corrupted_top1_accuracy/5",
        "cross_modal_top1_accuracy",
        "cross_modal_corrupted_top1_accuracy/5",
    }
    assert cell.chance == {"top1_accuracy": 1 / 43, "corrupted_top1_accuracy/5": 1 / 3}
    assert cell.counts["images_corrupted"] == 15
    encoder = view.encoder
    catalog = view.data.catalog
    pair = [encoder.images(catalog, change=top1.Augmented(v, 16))[0] for v in (0, 1)]
    assert cell.metrics["top1_accuracy"] == pytest.approx(top1.both_ways(*pair))
    few = range(0, 43, 3)
    damage = [Corruption(name, 5, 16) for name in names]
    views: list[Any] = [
        torch.stack(
            [encoder.images(catalog, list(few), top1.Augmented(v, 16, each))[0] for each in damage],
            dim=1,
        )
        for v in (0, 1)
    ]
    assert cell.metrics["corrupted_top1_accuracy/5"] == pytest.approx(
        top1.among_corruptions(*views)
    )
    one_each = torch.stack(
        [
            encoder.images(catalog, [row], damage[int(catalog.index[row]) % 3])[0][0]
            for row in range(43)
        ]
    )
    expected = top1.cross_modal(one_each, view.texts, view.captions[1])
    assert cell.metrics["cross_modal_corrupted_top1_accuracy/5"] == pytest.approx(expected)
