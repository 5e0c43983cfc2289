"""nn against lists and loops; its queues over ranks, round the end, resumed and on strange batches.

Seen to fail when: neighbours carry a gradient; a rank pushes only its own rows; more rows than
entries are written; the part of the queue that is still empty is searched; equal neighbours stay
negatives; a pair's former visit may be its neighbour; `seen` is not in the checkpoint.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings, RunContext
from clipsmall.objectives.neighbours import Neighbours, Queue
from clipsmall.objectives.softmax import softmax
from tests.objectives.test_gcl import STRANGE, B, D, assert_finite, assert_same, batch, trained

SETTING = RunContext(width=D, batch_size=B, steps=12)
SMALL: dict[str, Any] = {"size": 21, "start": 10}


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("images", [True, False])
def test_ranks_learn_and_remember_as_one_process(ranks: Any, images: bool, world_size: int) -> None:
    options = SMALL | {"images": images}
    expected = trained("nn", options, [{}] * 5)
    assert expected["steps"][4]["neighbour_cosine"] < 0.9
    assert expected["memory"]["texts.seen"] == 5 * B
    for found in ranks(world_size, trained, "nn", options, [{}] * 5):
        assert_same(found, expected)


class Oracle:
    """Queues as lists of (index, caption, feature), newest last."""

    def __init__(self, size: int, start: int, mask: bool) -> None:
        self.size = size
        self.start = start
        self.mask = mask
        self.queues: dict[str, list[tuple[int, int, Tensor]]] = {"text": [], "image": []}

    def step(self, e: Embeddings) -> Tensor:
        losses = []
        for learning, given in ((e.image, "text"), (e.text, "image")):
            queue = self.queues[given]
            rows = list(
                zip(
                    e.index.tolist(),
                    e.caption_hash.tolist(),
                    getattr(e, given).detach(),
                    strict=True,
                )
            )
            partners = []
            for row in rows:
                found = [entry for entry in queue if entry[0] != row[0] or not self.mask]
                found = found if len(queue) >= self.start else [row]
                partners.append(max(found, key=lambda entry, row=row: float(entry[2] @ row[2])))
            s = e.logit_scale * learning @ torch.stack([feature for *_, feature in partners]).T
            captions = torch.tensor([caption for _, caption, _ in partners])
            out = (
                (captions[:, None] == captions)
                & ~torch.eye(len(s), dtype=torch.bool)
                & torch.tensor(self.mask)
            )
            s, target = s.masked_fill(out, -torch.inf), torch.arange(len(s))
            losses.append((F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2)
            queue.extend(rows)
            del queue[: -self.size]
        return (losses[0] + losses[1]) / 2


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(("size", "start"), [(21, 10), (16, 2), (50, 40), (5, 5), (2, 2)])
def test_loss_and_gradients_are_those_of_loops_over_lists(
    size: int, start: int, mask: bool
) -> None:
    """Queues of two entries, shorter than a batch, as long, and longer; `start` reached at once and
    late.
    """
    objective = Neighbours(SETTING, size, start, mask_duplicates=mask).double()
    oracle = Oracle(size, start, mask)
    for number in range(7):
        e = batch(number)
        # the pairs of the step before once more: with two entries, two of them have one choice
        if number == 6:
            e = e._replace(index=batch(5).index, caption_hash=batch(5).caption_hash)
        made = objective(e, e)["loss"]
        theirs = oracle.step(e)
        torch.testing.assert_close(made, theirs, rtol=1e-12, atol=0)
        leaves = [e.image, e.text, e.logit_scale]
        for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (made, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("size", [1, 3, 7, 16, 20])
@pytest.mark.parametrize(
    "counts", [[1] * 30, [6] * 8, [7] * 5, [16] * 4, [50, 50], [5, 50, 4, 1, 23, 8, 3, 16, 2]]
)
def test_a_queue_holds_the_last_entries_whatever_the_batch(size: int, counts: list[int]) -> None:
    queue = Queue(size, 1)
    stream = torch.arange(1, sum(counts) + 1)
    for part in stream.split(counts):
        queue.push(part, -part, features=part[:, None].float())
        assert len(queue) == min(size, int(part[-1]))
        last = stream[: part[-1]][-size:]
        assert sorted(queue.index[: len(queue)].tolist()) == last.tolist()
        assert torch.equal(queue.features[: len(queue), 0].long(), queue.index[: len(queue)])
        assert torch.equal(queue.caption, -queue.index)


def test_the_nearest_is_looked_for_among_what_is_there() -> None:
    """An empty entry has cosine 0, more than that of a true one that points away."""
    queue = Queue(8, 2)
    queue.push(
        torch.tensor([5, 6]),
        torch.tensor([50, 60]),
        features=torch.tensor([[-1.0, 0.0], [-0.6, 0.8]]),
    )
    here = torch.tensor([[1.0, 0.0]])
    cosine, entry, caption = queue.nearest(here, None)
    assert (cosine.item(), caption.item()) == (pytest.approx(-0.6), 60)
    assert torch.equal(entry, torch.tensor([[-0.6, 0.8]]))
    assert queue.nearest(here, torch.tensor([6]))[2].item() == 50


def test_before_the_start_it_is_softmax_with_half_its_gradient() -> None:
    e = batch()
    made = Neighbours(SETTING, 100, 100).double()(e, e)
    theirs = softmax(e, e)
    torch.testing.assert_close(made["loss"], theirs["loss"], rtol=1e-12, atol=0)
    assert made["neighbour_cosine"] == 1
    assert made["effective_negatives"] == theirs["effective_negatives"]
    for a, b in zip(
        *(torch.autograd.grad(x["loss"], [e.image, e.text]) for x in (made, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b / 2, rtol=1e-10, atol=1e-15)


def test_without_images_only_images_learn() -> None:
    objective = Neighbours(SETTING, **SMALL, images=False).double()
    for number in range(2):
        e = batch(number)
        gradients = torch.autograd.grad(
            objective(e, e)["loss"], [e.image, e.text], allow_unused=True
        )
        assert gradients[0].norm() > 0
        assert gradients[1] is None
    assert objective.images is None
    assert {key.split(".")[0] for key in objective.state_dict()} == {"texts"}


def test_equal_neighbours_are_no_negatives() -> None:
    """Two entries, so two kinds of neighbours: what has mine is masked, what has the other is told
    apart.
    """
    masked, plain = (Neighbours(SETTING, 2, 2, mask_duplicates=on).double() for on in (True, False))
    e = batch(0, captions=10**6)
    last = batch(1, captions=10**6)
    last = last._replace(index=last.index + 10**6)
    for objective in (masked, plain):
        objective(e, e)
    near = (last.text @ e.text[-2:].T).argmax(dim=1)
    images = (last.image @ e.image[-2:].T).argmax(dim=1)
    told_apart = (
        sum((kind[:, None] != kind).sum(dim=1).double().mean() for kind in (near, images)) / 2
    )
    assert masked(last, last)["effective_negatives"].item() == pytest.approx(told_apart)
    assert plain(last, last)["effective_negatives"] == B - 1


def test_a_resumed_memory_goes_on_bit_for_bit() -> None:
    whole, first, second = (Neighbours(SETTING, **SMALL) for _ in range(3))
    expected = [whole(e, e)["loss"] for e in map(batch, range(6))]
    for e in map(batch, range(3)):
        first(e, e)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for number, e in enumerate(map(batch, range(3, 6))):
        assert torch.equal(second(e, e)["loss"], expected[3 + number])
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strange", STRANGE)
def test_strange_batches_are_finite(strange: str, dtype: torch.dtype) -> None:
    objective = Neighbours(SETTING, size=21, start=2)
    assert_finite(objective, strange, dtype, ("image", "text", "logit_scale"))


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(ValueError, match="own queue"):
        Neighbours(SETTING)(batch(size=4), batch(size=8))
    with pytest.raises(ValueError, match="batch of at least 2"):
        Neighbours(SETTING)(batch(size=1), batch(size=1))
    for wrong in ({"size": 1}, {"start": 0}):
        with pytest.raises(ValueError, match=r"(size|start) must be greater than or equal to 2"):
            Neighbours(SETTING, **wrong)
