"""Heads against torch's own batch normalisation, and moving averages against their closed form.

That W ranks train heads as one process does is shown in test_noncontrastive.py.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipsmall.batch import Pairs, RunContext
from clipsmall.data.preprocess import ImageSpec
from clipsmall.distributed.batch_norm import GlobalBatchNorm, moments
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.heads import HEADS
from clipsmall.model.towers.small import SmallConfig, SmallTowers
from tests.shards_for_tests import TOWERS

WIDTH = 16


def pairs(size: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    text = torch.randint(1, 512, (size, 8), generator=generator)
    return Pairs(image, text, torch.arange(size), torch.arange(size))


def small_towers() -> SmallTowers:
    torch.manual_seed(0)
    return SmallTowers(SmallConfig.model_validate(TOWERS))


def setting(towers: Any = None, **given: Any) -> RunContext:
    return RunContext(
        **{
            "width": WIDTH,
            "batch_size": 8,
            "steps": 10,
            "towers": towers,
            "vocabulary": 512,
            **given,
        }
    )


def test_batch_norm_is_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    ours = GlobalBatchNorm(5).double()
    theirs = nn.BatchNorm1d(5).double()
    for norm in (ours, theirs):
        norm.weight.data = torch.arange(1.0, 6.0).double()
        norm.bias.data = torch.arange(5.0).double()
    for _ in range(3):
        x = 3 + torch.randn(7, 5, generator=generator, dtype=torch.float64)
        seen = []
        for norm in (ours, theirs):
            leaf = x.clone().requires_grad_()
            out = norm(leaf)
            seen.append(
                [out, *torch.autograd.grad(out.sin().sum(), [leaf, norm.weight, norm.bias])]
            )
        torch.testing.assert_close(seen[0], seen[1], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.eval()(x[:1]), theirs.eval()(x[:1]), rtol=1e-12, atol=0)


def test_variances_keep_their_digits_far_from_zero() -> None:
    x = 10_000 + torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        moments(x)[2], x.double().var(dim=0, correction=0).float(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_sums_half_precision_in_float32(dtype: torch.dtype) -> None:
    # squares overflow fp16
    x = (300 * torch.randn(512, 4, generator=torch.Generator().manual_seed(3))).to(dtype)
    norm = GlobalBatchNorm(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), nn.BatchNorm1d(4)(x.float()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        norm.running_var, 0.9 + 0.1 * x.float().var(dim=0), rtol=1e-5, atol=0
    )


def test_a_single_row_has_no_variance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        GlobalBatchNorm(4)(torch.ones(1, 4))


def test_projectors_default_to_the_towers_outputs() -> None:
    image = torch.randn(4, WIDTH)
    text = torch.randn(4, WIDTH)
    plain = HEADS["projectors"](setting())(pairs(4), image, text, none)
    assert plain["image_projected"] is image
    assert plain["text_projected"] is text
    head = HEADS["projectors"](setting(), widths=[12, 10, 6])
    assert [type(layer).__name__ for layer in head.image] == [  # type: ignore[union-attr]
        *("Linear", "GlobalBatchNorm", "ReLU") * 2,
        "Linear",
    ]
    assert head(pairs(4), image, text, none)["text_projected"].shape == (4, 6)


def none(towers: Any) -> Any:
    raise AssertionError("a head that needs no other towers asked for their outputs")


def test_a_model_retrieves_through_its_predictors_one_pair_at_a_time() -> None:
    towers = small_towers()
    batch = pairs(6)
    head = HEADS["predictors"](setting(), hidden=0.25)
    assert head.image[0].out_features == WIDTH // 4  # type: ignore[index, union-attr]
    heads = {"predictors": head}
    model = DualEncoder(
        towers, ImageSpec(16), 10.0, 0.0, False, heads=heads, retrieval_head="predictors"
    )
    extra = model.train()(batch).extra
    assert extra["image_predicted"].shape == extra["text_raw"].shape == (6, WIDTH)
    model.eval()
    whole = model.encode_image(batch.image)
    single = model.encode_image(batch.image[:1])
    torch.testing.assert_close(single, whole[:1], rtol=1e-5, atol=1e-6)
    expected = nn.functional.cosine_similarity(
        model(batch).extra["image_predicted"], model(batch).text
    )
    found = 2 * (whole * model.encode_text(batch.text)).sum(dim=1)
    back = nn.functional.cosine_similarity(model(batch).extra["text_predicted"], model(batch).image)
    torch.testing.assert_close(found, expected + back, rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """Buffers of all kinds, and a weight with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.tied = self.layer
        self.norm = nn.BatchNorm1d(3)
        self.mask: Tensor
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent=False)


def test_a_moving_average_averages_parameters_and_buffers() -> None:
    towers = Odd()
    head = HEADS["momentum"](setting(towers), momentum=0.75, schedule="constant")
    mine: Any = head.average.towers  # type: ignore[union-attr]
    old = mine.layer.weight.clone()
    with torch.no_grad():
        towers.layer.weight += 1
        towers.norm(torch.randn(4, 3) + 5)
    head.after_step(towers)
    # once, though it has two names
    torch.testing.assert_close(mine.layer.weight, old + 0.25)
    torch.testing.assert_close(mine.norm.running_mean, towers.norm.running_mean / 4)
    assert mine.norm.num_batches_tracked == 1
    assert mine.mask.tolist() == [0.0, -math.inf]


def test_the_average_slows_down_along_half_a_cosine() -> None:
    towers = nn.Linear(1, 1, bias=False)
    head = HEADS["momentum"](setting(towers, steps=4), momentum=0.9)
    average: Any = head.average
    nn.init.zeros_(average.towers.weight)
    nn.init.ones_(towers.weight)
    expected = 0.0
    for step in range(6):
        share = 0.1 * (1 + math.cos(math.pi * min(step / 4, 1))) / 2
        expected += share * (1 - expected)
        head.after_step(towers)
        assert average.towers.weight.item() == pytest.approx(expected, rel=1e-6)
    assert average.step == 6


def test_targets_are_the_averaged_towers_outputs_without_gradient_or_dropout() -> None:
    towers = small_towers()
    batch = pairs(4)
    towers.visual.append(nn.Dropout(0.5))
    head = HEADS["momentum"](setting(towers)).train()
    assert not any(p.requires_grad for p in head.parameters())
    assert not set(map(id, head.parameters())) & set(map(id, towers.parameters()))
    images = batch.image.float()
    targets = head(batch, images, images, lambda its: (its.image(images), its.text(batch.text)))
    torch.testing.assert_close(targets["image_target"], towers.eval().image(images))
    torch.testing.assert_close(targets["text_target"], towers.eval().text(batch.text))
    assert not targets["image_target"].requires_grad


def test_prototypes_stay_on_the_sphere() -> None:
    head = HEADS["prototypes"](setting(), prototypes=7)
    (weight,) = head.parameters()
    assert head(pairs(2), torch.ones(2), torch.ones(2), none)["prototypes"] is weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(7))
    weight.data *= 3
    head.after_step(nn.Identity())
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(7))


def test_tokens_need_a_vocabulary() -> None:
    batch = pairs(3)
    image = torch.randn(3, WIDTH)
    extra = HEADS["tokens"](setting())(batch, image, image, none)
    assert extra["token_logits"].shape == (3, 512)
    assert extra["token_ids"] is batch.text
    with pytest.raises(ValueError, match="vocabulary"):
        HEADS["tokens"](setting(vocabulary=0))
