"""Tests of parameter groups, the schedule, the scaled learning rate and the guarded step.

Seen to fail when: `parameter_groups` lets a 1-d or a [1, 1]-shaped scale decay, or forgets
`requires_grad`; the warm-up starts at 0 or ends a step late; the guard looks at the gradient alone,
never forgets a bad step, leaves batch normalisation's statistics, puts averaged ones back, or lets
the scaler be.
"""

import math

import pytest
import torch
from torch import nn

from clipsmall.batch import Embeddings
from clipsmall.data.preprocess import ImageSpec
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.momentum import MovingAverage
from clipsmall.model.towers.small import SmallConfig, SmallTowers
from clipsmall.training.optim import (
    Guard,
    NonFiniteError,
    adamw,
    parameter_groups,
    running_statistics,
    scaled_lr,
    skipped_steps,
    warmup_cosine,
)
from tests.shards_for_tests import TOWERS


def encoder(learn_bias: bool = True) -> DualEncoder:
    return DualEncoder(
        SmallTowers(SmallConfig.model_validate(TOWERS)), ImageSpec(16), 10.0, -5.0, learn_bias
    )


def names(model: nn.Module, decay: float = 0.1) -> tuple[set[str], set[str]]:
    """Names of the parameters that decay, and of those that do not."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 1.0, decay)
    assert [group["weight_decay"] for group in groups] == [decay, 0.0]
    found = [[by_id[id(p)] for p in group["params"]] for group in groups]
    assert all(len(group) == len(set(group)) for group in found)
    return set(found[0]), set(found[1])


def test_matrices_decay_and_norms_biases_scale_and_bias_do_not() -> None:
    model = encoder()
    decaying, free = names(model)
    assert {
        "logit_scale",
        "logit_bias",
        "towers.head.bias",
        "towers.blocks.layers.0.norm1.weight",
    } <= free
    assert {
        "towers.head.weight",
        "towers.words.weight",
        "towers.visual.0.weight",
        "towers.positions",
    } <= decaying
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

    groups = parameter_groups(Tied(), 1.0, 0.1)
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
    torch.testing.assert_close(
        after["towers.head.weight"].detach(), before["towers.head.weight"] * (1 - 0.1 * 0.5)
    )


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


NUMBERS = (1.5, math.nan, math.inf, -math.inf)
FEATURES = torch.ones(20, 4)
ROWS = Embeddings(
    FEATURES, FEATURES, torch.arange(40, 60), torch.arange(20), torch.tensor(1.0), torch.tensor(0.0)
)


def offered(guard: Guard, loss: float, grad_norm: float = 1.0, rows: Embeddings = ROWS) -> bool:
    losses = {
        "loss": torch.tensor(loss, requires_grad=True) * 1.0,
        "grad_norm": torch.tensor(grad_norm),
    }
    return guard.passes(losses, losses["loss"].detach() + losses["grad_norm"], rows)


@pytest.mark.parametrize("loss", NUMBERS)
@pytest.mark.parametrize("grad_norm", NUMBERS)
def test_without_a_scaler_the_first_bad_step_ends_the_run(loss: float, grad_norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        assert offered(Guard(None, 5, nn.Identity()), loss, grad_norm)
        return
    broken = ROWS._replace(text=torch.where(torch.arange(20)[:, None] == 3, math.inf, FEATURES))
    with pytest.raises(
        NonFiniteError, match=f"not finite: loss {loss:g}, grad_norm {grad_norm:g}"
    ) as said:
        offered(Guard(None, 5, nn.Identity()), loss, grad_norm, broken)
    assert said.value.index.tolist() == list(range(40, 60))
    assert said.value.index[said.value.broken].tolist() == [43]


def overflow(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, factor: float) -> None:
    """A backward pass whose gradient is multiplied by `factor`, and what clipping begins with."""
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = None
    scaler.scale((weight * factor).sum()).backward()
    scaler.unscale_(optimizer)


def test_with_a_scaler_only_bad_steps_on_end_do() -> None:
    weight = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    guard = Guard(scaler, 3, nn.Identity(), 7)
    for number, good in enumerate([False, False, True, False, False]):
        overflow(scaler, optimizer, 1.0 if good else math.inf)
        losses = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0 if good else math.inf)}
        assert guard.passes(losses, losses["grad_norm"], ROWS) is good
        assert losses["loss_scale"] == [64.0, 32.0, 16.0, 16.0, 8.0][number]
        assert losses["bad_steps"] == [8.0, 9.0, 9.0, 10.0, 11.0][number]
        if good:
            scaler.step(optimizer)
            scaler.update()
    overflow(scaler, optimizer, math.inf)
    with pytest.raises(
        NonFiniteError, match=r"in 3 steps on end.*grad_norm nan, loss_scale 4, bad_steps 12"
    ) as said:
        offered(guard, 1.0, math.nan)
    assert not said.value.broken.any()
    assert said.value.numbers["loss_scale"] == 4.0


def test_a_bad_loss_alone_skips_the_step_and_leaves_the_loss_scale() -> None:
    weight = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    overflow(scaler, optimizer, 1.0)
    assert not offered(Guard(scaler, 3, nn.Identity()), math.inf)
    assert scaler.get_scale() == 64.0
    # unscaling twice would raise: the scaler knows that a step went by
    overflow(scaler, optimizer, 1.0)


def test_running_statistics_of_a_bad_step_are_taken_back() -> None:
    norm = nn.BatchNorm1d(4)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    guard = Guard(scaler, 3, nn.Sequential(norm))

    def seen(features: torch.Tensor) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        loss = norm(features).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if offered(guard, loss.item()):
            # a bad step's is the guard's
            scaler.update()
        return {name: buffer.clone() for name, buffer in norm.named_buffers()}

    before = seen(torch.arange(20.0).view(5, 4))
    assert before["num_batches_tracked"] == 1
    bad = seen(torch.full((5, 4), math.nan))
    assert all(torch.equal(bad[name], value) for name, value in before.items())
    after = seen(torch.arange(20.0).view(5, 4) + 1)
    assert after["num_batches_tracked"] == 2
    assert all(value.isfinite().all() for value in after.values())


def test_steps_that_were_not_taken_are_counted_from_the_optimizer() -> None:
    model = encoder()
    optimizer = adamw(model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.98), eps=1e-8)
    assert skipped_steps(0, optimizer) == 0
    assert skipped_steps(3, optimizer) == 3
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.step()
    assert skipped_steps(3, optimizer) == 1


def test_averaged_towers_keep_the_statistics_that_they_follow() -> None:
    """Theirs change after a step and not in the forward pass: put back, they would be those of the
    step before.
    """
    model = nn.Module()
    model.towers = nn.BatchNorm1d(4)
    model.average = MovingAverage(model.towers, 0.9, 0)
    model.train()
    assert [id(each) for each in running_statistics(model)] == [
        id(each) for each in model.towers.buffers()
    ]
