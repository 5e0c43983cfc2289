"""Queues: what rows meet beside the batch, and that they learn from it as a plain formula says.

Seen to fail when: the queue is pushed before it is used; a wrap-around loses or doubles an entry; a
pair meets an older copy of itself; keys carry a gradient (moco), or the batch's columns carry none
(xbm); an empty queue counts as columns; soft targets leave the own pair out, or are not ramped.
"""

from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings, RunContext
from clipsmall.objectives import OBJECTIVES
from clipsmall.objectives.queued import Queued
from clipsmall.objectives.soft_targets import SoftTargets
from tests.meter import Meter
from tests.objectives.pair_losses import embeddings

WIDTH = 12


BATCH = 5


def batch(step: int) -> Embeddings:
    """5 of 9 pairs, each with one of two captions, one of which two pairs share: much is met again
    in a queue.
    """
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(9, generator=generator)[:BATCH]
    captions = index // 2 * 10 + torch.randint(0, 2, (BATCH,), generator=generator)
    return embeddings(BATCH, seed=step)._replace(index=index, caption_hash=captions)


class Plain:
    """The columns as a list, oldest first; the in-batch ones stand before them."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind = kind
        self.past = deque[tuple[Tensor, Tensor, int, int]](maxlen=size)

    def columns(self, e: Embeddings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.kind == "moco":
            image, text = (
                F.normalize(e.extra[f"{side}_target"], dim=-1).detach()
                for side in ("image", "text")
            )
        else:
            image = e.image
            text = e.text
        mine = list(zip(image, text, e.index.tolist(), e.caption_hash.tolist(), strict=True))
        images, texts, index, captions = zip(*mine, *self.past, strict=True)
        self.past.extend((i.detach(), t.detach(), n, c) for i, t, n, c in mine)
        return torch.stack(images), torch.stack(texts), torch.tensor(index), torch.tensor(captions)


def dense(
    name: str,
    e: Embeddings,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: bool,
    in_batch: bool = True,
) -> Tensor:
    """The objective as plain autograd over the rows' two matrices."""
    images, texts, index, captions = columns
    own = torch.zeros(len(e.index), len(index), dtype=torch.bool)
    own.fill_diagonal_(True)
    met = ~own & (e.index[:, None] != index) & ~(mask & (e.caption_hash[:, None] == captions))
    if not in_batch and len(index) > len(e.index):
        met[:, : len(e.index)] = False
    losses = []
    for x, y in ((e.image, texts), (e.text, images)):
        cosines = x @ y.T
        s = e.logit_scale * cosines
        c = cosines[own]
        rest = s.masked_fill(~met, -torch.inf)
        hinges = (0.2 + cosines - c[:, None]).clamp(min=0) * met
        some = met.any(dim=1)
        if name == "softmax":
            losses.append(
                -torch.log_softmax(s.masked_fill(~met & ~own, -torch.inf), dim=1)[own].mean() / 2
            )
        elif name == "dcl":
            losses.append((rest.logsumexp(dim=1) - s[own])[some].sum() / len(x) / 2)
        elif name in ("sigmoid", "bce"):
            each = met.sum(dim=1).clamp(min=1) if name == "bce" else 1
            costs = (F.softplus(s + e.logit_bias) * met).sum(dim=1) / each + F.softplus(
                -s - e.logit_bias
            )[own]
            losses.append(costs.mean() / 2)
        elif name == "triplet":
            losses.append(hinges.sum(dim=1).mean())
        elif name == "vse++":
            losses.append(hinges.amax(dim=1).mean())
        else:
            assert name == "spectral"
            losses.append(
                (-2 * c + 10 * (cosines**2 * met).sum(dim=1) / met.sum(dim=1).clamp(min=1)).mean()
                / 2
            )
    return torch.stack(losses).sum()


def objective(name: str, mask: bool) -> Any:
    make = OBJECTIVES[name].make
    setting = RunContext(width=WIDTH, batch_size=BATCH, steps=10)
    if isinstance(make, type):
        return make(setting, mask_duplicates=mask, **({"warmup": 0.0} if name == "vse++" else {}))
    return lambda rows, columns: make(rows, columns, mask)


def gradients(loss: Tensor, e: Embeddings) -> list[Tensor]:
    leaves = [e.extra["raw_image"], e.extra["raw_text"], e.logit_scale, e.logit_bias]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)
    ]


SERVED = [name for name, kind in OBJECTIVES.items() if kind.queue and name not in ("dclw", "gcl")]


@pytest.mark.parametrize(
    "size",
    [3, 5, 13],
    # shorter than a batch, as long, and wrapping around within one
)
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("kind", ["moco", "xbm"])
@pytest.mark.parametrize("name", SERVED)
def test_rows_meet_the_batch_and_the_past(name: str, kind: Any, mask: bool, size: int) -> None:
    queued = Queued(objective(name, mask), kind, size, WIDTH).double()
    plain = Plain(kind, size)
    for step in range(6):
        e = batch(step)
        found = queued(e, e)
        expected = dense(name, e, plain.columns(e), mask)
        torch.testing.assert_close(found["loss"], expected, rtol=1e-9, atol=1e-13)
        for ours, theirs in zip(gradients(found["loss"], e), gradients(expected, e), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert found["queue"] == min(step * BATCH, size)


@pytest.mark.parametrize("name", ["softmax", "dcl", "sigmoid"])
def test_the_queue_alone_may_give_the_negatives(name: str) -> None:
    queued = Queued(objective(name, True), "moco", 13, WIDTH, in_batch=False).double()
    plain = Plain("moco", 13)
    for step in range(4):
        e = batch(step)
        found = queued(e, e)
        expected = dense(name, e, plain.columns(e), True, in_batch=False)
        torch.testing.assert_close(found["loss"], expected, rtol=1e-9, atol=1e-13)
        for ours, theirs in zip(gradients(found["loss"], e), gradients(expected, e), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_effective_negatives_are_those_met() -> None:
    for in_batch in (True, False):
        queued = Queued(objective("softmax", True), "moco", 13, WIDTH, in_batch)
        plain = Plain("moco", 13)
        for step in range(4):
            e = batch(step)
            _, _, index, captions = plain.columns(e)
            met = (e.index[:, None] != index) & (e.caption_hash[:, None] != captions)
            if step and not in_batch:
                met[:, :BATCH] = False
            found = queued(e, e)["effective_negatives"]
            assert found.item() == pytest.approx(met.sum(dim=1).float().mean().item())


def test_an_empty_xbm_queue_is_the_plain_objective() -> None:
    e = embeddings(9)
    plain = objective("softmax", True)
    found = Queued(plain, "xbm", 4, WIDTH).double()(e, e)["loss"]
    expected = plain(e, e)["loss"]
    for ours, theirs in zip(gradients(found, e), gradients(expected, e), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def soft(e: Embeddings, columns: tuple[Tensor, Tensor, Tensor, Tensor], alpha: float) -> Tensor:
    """ALBEF's eq. 6 with duplicates and older copies left out, over whole matrices."""
    images, texts, index, captions = columns
    own = torch.zeros(len(e.index), len(index), dtype=torch.bool)
    own.fill_diagonal_(True)
    kept = own | ((e.index[:, None] != index) & (e.caption_hash[:, None] != captions))
    losses = []
    for x, target, y in ((e.image, "image_target", texts), (e.text, "text_target", images)):
        teacher = F.normalize(e.extra[target], dim=-1) @ y.T * e.logit_scale
        q = (
            alpha * teacher.masked_fill(~kept, -torch.inf).softmax(dim=1).detach()
            + (1 - alpha) * own.double()
        )
        log_p = (e.logit_scale * x @ y.T).masked_fill(~kept, -torch.inf).log_softmax(dim=1)
        losses.append(-(q * log_p.masked_fill(~kept, 0.0)).sum(dim=1).mean() / 2)
    return losses[0] + losses[1]


def test_soft_targets_are_albefs_and_grow() -> None:
    setting = RunContext(width=WIDTH, batch_size=BATCH, steps=8)
    queued = Queued(SoftTargets(setting, alpha=0.4, ramp=0.5), "moco", 13, WIDTH).double()
    plain = Plain("moco", 13)
    for step in range(6):
        e = batch(step)
        found = queued(e, e)
        expected = soft(e, plain.columns(e), 0.4 * min(step / 4, 1))
        torch.testing.assert_close(found["loss"], expected, rtol=1e-9, atol=1e-13)
        for ours, theirs in zip(gradients(found["loss"], e), gradients(expected, e), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_long_queue_is_exact_and_takes_no_more_than_tiles() -> None:
    """32 rows, 200,000 columns: of K numbers a few, of 32·K none."""
    e = embeddings(32)
    queued = Queued(objective("softmax", True), "moco", 200_000, WIDTH).double()
    generator = torch.Generator().manual_seed(0)
    stuff = [
        F.normalize(torch.randn(200_000, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    ]
    index, captions = (torch.randint(10**6, (200_000,), generator=generator) for _ in range(2))
    queued.past.push(index, captions, image=stuff[0], text=stuff[1])
    targets = [F.normalize(e.extra[f"{side}_target"], dim=-1) for side in ("image", "text")]
    numbers = torch.cat([e.index, index]), torch.cat([e.caption_hash, captions])
    columns = torch.cat([targets[0], stuff[0]]), torch.cat([targets[1], stuff[1]]), *numbers
    with Meter() as meter:
        found = queued(e, e)["loss"]
        found.backward(retain_graph=True)
    assert meter.largest <= 200_032 * WIDTH
    # over many of the wide tiles that few rows get
    expected = dense("softmax", e, columns, True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for ours, theirs in zip(gradients(found, e), gradients(expected, e), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
