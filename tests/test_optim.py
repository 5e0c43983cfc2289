"""Tests of parameter groups, the schedule, the scaled learning rate and the guarded step.

Seen to fail when: `parameter_groups` lets a 1-d or a [1, 1]-shaped scale decay, or forgets `requires_grad`; the
warm-up starts at 0 or ends a step late; `check_finite` passes a NaN loss of a scaled run.
"""

import math

import pytest
import torch
from torch import nn

from clipsmall.optim import NonFiniteError, adamw, check_finite, parameter_groups, scaled_lr, warmup_cosine
from clipsmall.preprocess import ImageSpec
from clipsmall.small_towers import SmallConfig, SmallTowers
from clipsmall.towers import DualEncoder
from tests.shards_for_tests import TOWERS


def encoder(learn_bias: bool = True) -> DualEncoder:
    return DualEncoder(SmallTowers(SmallConfig.model_validate(TOWERS)), ImageSpec(16), 10.0, -5.0, learn_bias)


def names(model: nn.Module, decay: float = 0.1) -> tuple[set[str], set[str]]:
    """Names of the parameters that decay, and of those that do not."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, decay)
    assert [group["weight_decay"] for group in groups] == [decay, 0.0]
    found = [[by_id[id(p)] for p in group["params"]] for group in groups]
    assert all(len(group) == len(set(group)) for group in found)
    return set(found[0]), set(found[1])


def test_matrices_decay_and_norms_biases_scale_and_bias_do_not() -> None:
    model = encoder()
    decaying, free = names(model)
    assert {"logit_scale", "logit_bias", "towers.head.bias", "towers.blocks.layers.0.norm1.weight"} <= free
    assert {"towers.head.weight", "towers.words.weight", "towers.visual.0.weight", "towers.positions"} <= decaying
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert all(shapes[name] >= 2 for name in decaying)
    assert all(shapes[name] <= 1 for name in free)


def test_every_trainable_parameter_is_in_one_group_and_no_other() -> None:
    for learn_bias in (True, False):
        model = encoder(learn_bias)
        model.towers.words.weight.requires_grad_(False)
        decaying, free = names(model)
        assert not decaying & free
        assert decaying | free == {name for name, p in model.named_parameters() if p.requires_grad}
        assert ("logit_bias" in free) is learn_bias
        assert "towers.words.weight" not in decaying


def test_a_scale_of_any_shape_does_not_decay() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.logit_scale = nn.Parameter(torch.ones(1))
            self.inner.logit_scale = nn.Parameter(torch.ones(1, 1))
            self.inner.logit_bias = nn.Parameter(torch.ones(1, 1))

    assert names(Shaped()) == (
        {"inner.weight"},
        {"inner.bias", "logit_scale", "inner.logit_scale", "inner.logit_bias"},
    )


def test_a_shared_parameter_comes_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight

    groups = parameter_groups(Tied(), 0.1)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_decay_shrinks_matrices_and_leaves_the_scale() -> None:
    model = encoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.98), eps=1e-8)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    assert torch.equal(after["logit_scale"], before["logit_scale"])
    assert torch.equal(after["towers.head.bias"], before["towers.head.bias"])
    torch.testing.assert_close(after["towers.head.weight"].detach(), before["towers.head.weight"] * (1 - 0.1 * 0.5))


def factors(steps: int, warmup: int) -> list[float]:
    """The factor of lr at each step, and after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_cosine(optimizer, steps, warmup)
    found = []
    for _ in range(steps + 2):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    return found


def test_the_schedule_by_hand() -> None:
    root = math.sqrt(0.5)
    cosine = [1.0, (1 + root) / 2, 0.5, (1 - root) / 2, 0.0, 0.0]
    assert factors(8, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine], abs=1e-12)
    assert factors(4, 0) == pytest.approx(cosine, abs=1e-12)
    assert factors(1, 0) == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)


def test_a_warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    assert factors(2, 2) == pytest.approx([0.5, 1.0, 1.0, 0.0], abs=1e-12)
    assert factors(2, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-12)


def test_lr_scales_with_the_square_root_of_the_batch() -> None:
    assert scaled_lr(1e-3, 1024, "none") == 1e-3
    assert scaled_lr(1e-3, 256, "sqrt") == pytest.approx(1e-3)
    assert scaled_lr(1e-3, 1024, "sqrt") == pytest.approx(2e-3)
    assert scaled_lr(1e-3, 64, "sqrt") == pytest.approx(5e-4)


FINE, BAD = torch.tensor(1.5), [torch.tensor(float(x)) for x in ("nan", "inf", "-inf")]
INDEX = torch.arange(40, 60)


def test_finite_steps_pass() -> None:
    check_finite(FINE, FINE, INDEX, scaled=False)
    check_finite(FINE, FINE, INDEX, scaled=True)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_loss_stops_and_a_bad_gradient_only_without_a_scaler(bad: torch.Tensor) -> None:
    for scaled in (False, True):
        with pytest.raises(NonFiniteError, match=r"not finite.*\[40, 41, 42, 43, 44, 45, 46, 47\]"):
            check_finite(bad, FINE, INDEX, scaled)
    with pytest.raises(NonFiniteError, match=r"gradient norm (nan|inf|-inf)"):
        check_finite(FINE, bad, INDEX, scaled=False)
    check_finite(FINE, bad, INDEX, scaled=True)
