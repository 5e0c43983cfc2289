"""bce against its formula, its choice of negatives, its controller; over ranks, resumed, on strange
batches.

Seen to fail when: negatives are weighted by the batch instead of a row's own number; the shifts
ignore the step, or may be 0; k grows on a step's accuracy instead of the running one, or beyond the
batch; accuracy is a rank's own; a row without negatives counts as right.
"""

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings, RunContext
from clipsmall.objectives.bce import Bce, Mode
from tests.objectives.test_gcl import (
    SETTING,
    STRANGE,
    B,
    assert_finite,
    assert_same,
    batch,
    trained,
)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", get_args(Mode))
def test_ranks_learn_and_remember_as_one_process(ranks: Any, mode: str, world_size: int) -> None:
    """Twelve steps: by then k has grown, at the same step everywhere, with some images wrong on
    some ranks.
    """
    batches = [{"noise": 1.0}] * 12
    expected = trained("bce", {"mode": mode}, batches)
    assert (expected["memory"]["count"] > 2) == (mode == "warmup")
    assert 0.5 < min(step["accuracy"] for step in expected["steps"]) < 1
    assert expected["memory"]["step"] == 12
    for found in ranks(world_size, trained, "bce", {"mode": mode}, batches):
        assert_same(found, expected)


def same_caption(e: Embeddings, mask: bool) -> Tensor:
    same = (
        e.caption_hash[:, None] == e.caption_hash[None, :]
        if mask
        else torch.zeros(len(e.index), len(e.index)).bool()
    )
    return same | torch.eye(len(e.index), dtype=torch.bool)


def check(objective: Bce, e: Embeddings, weights: Tensor) -> None:
    """weights: (B, B) of the negatives."""
    s = e.logit_scale * e.image @ e.text.T + e.logit_bias
    sides = F.binary_cross_entropy_with_logits(
        s, torch.eye(len(s), dtype=s.dtype), reduction="none"
    )
    theirs = (sides.diagonal().sum() + objective.weight * (sides * weights).sum()) / len(s)
    ours = objective(e, e)
    torch.testing.assert_close(ours["loss"], theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        ours["positive"] + objective.weight * ours["negative"], ours["loss"].detach()
    )
    leaves = [e.image, e.text, e.logit_scale, e.logit_bias]
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (ours["loss"], theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_balanced_weighs_all_negatives_of_a_row_like_its_positive(
    mask: bool, weight: float
) -> None:
    e = batch()
    # rows have different numbers of them
    e = e._replace(caption_hash=torch.arange(B) // 3 * (torch.arange(B) < 9))
    counts = (~same_caption(e, mask)).double()
    assert (len(counts.sum(dim=1).unique()) > 1) == mask
    check(
        Bce(SETTING, weight=weight, mask_duplicates=mask).double(),
        e,
        counts / counts.sum(dim=1, keepdim=True),
    )


def shifts(objective: Bce, columns: int = B) -> list[int]:
    return objective._chosen_shifts(columns, torch.device("cpu")).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(
    ("mode", "k"), [("one", 1), ("warmup", 1), ("warmup", 5), ("warmup", B - 1)]
)
def test_k_negatives_are_columns_at_k_shifts(mode: str, k: int, mask: bool) -> None:
    objective = Bce(SETTING, mode=mode, weight=0.7, mask_duplicates=mask).double()
    objective.count.fill_(k)
    for number in range(3):
        e = batch(number, captions=5)
        weights = torch.zeros(B, B, dtype=torch.float64)
        for shift in shifts(objective):
            weights[torch.arange(B), (torch.arange(B) + shift) % B] = 1
        assert (
            weights.sum(dim=0).tolist()
            == weights.sum(dim=1).tolist()
            == [float(len(shifts(objective)))] * B
        )
        check(objective, e, weights * ~same_caption(e, mask))


def test_shifts_are_drawn_anew_by_seed_and_step() -> None:
    objective = Bce(SETTING, mode="warmup")
    other = Bce(RunContext(12, B, 12, seed=6), mode="warmup")
    objective.count.fill_(4)
    other.count.fill_(4)
    drawn = []
    for step in range(200):
        objective.step.fill_(step)
        drawn.append(shifts(objective))
        assert len(drawn[-1]) == 4
        assert 1 <= min(drawn[-1]) <= max(drawn[-1]) < B
    assert len({tuple(each) for each in drawn}) > 150
    often = torch.tensor(sum(drawn, [])).bincount(minlength=B)[1:]  # noqa: RUF017
    assert often.min() > 0.6 * 4 * 200 / (B - 1)
    assert shifts(other) != shifts(Bce(SETTING, mode="warmup")) or shifts(other) != drawn[0]
    objective.step.fill_(17)
    assert shifts(objective) == drawn[17]


def test_k_grows_while_the_running_accuracy_is_above_one_half() -> None:
    """From 0 by tenths: 1 − 0.9ⁿ passes ½ at the seventh step. Up to all of the batch, and never
    down.
    """
    objective = Bce(SETTING, mode="warmup")
    for number in range(40):
        e = batch(number, noise=0.05, captions=10**6)
        made = objective(e, e)
        assert made["accuracy"] == 1
        assert made["effective_negatives"] == min(max(1, number - 5), B - 1)
    wrong = batch(0, captions=10**6)
    wrong = wrong._replace(text=-wrong.image.detach())
    grown = objective.count.item()
    for _ in range(20):
        assert objective(wrong, wrong)["accuracy"] == 0
    assert objective.count == grown == B - 1
    assert objective.accuracy < 0.2


def test_hard_batches_and_other_modes_keep_their_k() -> None:
    hard = batch(0, captions=10**6)
    hard = hard._replace(text=-hard.image.detach())
    for mode, e in (("warmup", hard), ("one", batch(noise=0.05)), ("balanced", batch(noise=0.05))):
        objective = Bce(SETTING, mode=mode)
        for _ in range(12):
            objective(e, e)
        assert objective.count == 1


def test_a_row_without_negatives_is_neither_right_nor_wrong() -> None:
    objective = Bce(SETTING, mode="warmup")
    objective.accuracy.fill_(0.3)
    e = batch(captions=1)
    assert objective(e, e)["negative"] == 0
    assert objective.accuracy == pytest.approx(0.3)
    half = batch(noise=0.0, captions=10**6)
    # the others lose
    half = half._replace(caption_hash=torch.arange(B).clamp(max=B // 2), text=-half.image)
    assert objective(half, half)["accuracy"] == 0


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_resumed_memory_goes_on_bit_for_bit(mode: str) -> None:
    whole, first, second = (Bce(SETTING, mode=mode) for _ in range(3))
    batches = [batch(number, noise=0.2) for number in range(14)]
    expected = [whole(e, e)["loss"] for e in batches]
    for e in batches[:9]:
        first(e, e)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for number, e in enumerate(batches[9:]):
        assert torch.equal(second(e, e)["loss"], expected[9 + number])
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("mode", get_args(Mode))
def test_strange_batches_are_finite(mode: str, strange: str, dtype: torch.dtype) -> None:
    objective = Bce(SETTING, mode=mode)
    assert_finite(objective, strange, dtype, ("image", "text", "logit_scale", "logit_bias"))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="mode must be 'balanced', 'warmup' or 'one'"):
        Bce(SETTING, mode="all")
    with pytest.raises(ValueError, match="weight"):
        Bce(SETTING, weight=-1)
    with pytest.raises(ValueError, match="at least 2"):
        Bce(SETTING)(batch(size=1), batch(size=1))
