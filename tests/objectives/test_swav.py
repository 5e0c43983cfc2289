"""SwAV against lightly, and its queue.

Seen to fail when: it queues its own rows, or before use, or detaches frozen prototypes.
"""

import pytest
import torch

from clipsmall.batch import Embeddings
from clipsmall.objectives.swav import Swav, shared_out
from tests.objectives.outputs_of_heads import D, P, assert_same, embeddings, gradients, setting


def test_swav_codes_are_lightlys() -> None:
    theirs = pytest.importorskip("lightly.loss.swav_loss")
    e = embeddings(30)
    scores = (e.image @ e.extra["prototypes"].T).detach()
    for iterations in (1, 3, 20):
        ours = shared_out(scores, 0.05, iterations)
        torch.testing.assert_close(
            ours, theirs.sinkhorn(scores, iterations, 0.05), rtol=1e-12, atol=1e-15
        )
    torch.testing.assert_close(
        ours.sum(dim=0), torch.full((P,), 30 / P, dtype=torch.float64), rtol=0.02, atol=0
    )


def test_swav_is_lightlys_with_a_queue_once_it_is_full() -> None:
    theirs = pytest.importorskip("lightly.loss.swav_loss").SwaVLoss()
    objective = Swav(setting(), queue=20, freeze_steps=0).double()
    past: list[Embeddings] = []
    for step in range(5):
        e = embeddings(7, seed=step)
        c = e.extra["prototypes"]
        queue = None
        # 21 pairs of the past, the oldest of them overwritten
        if step >= 3:
            kept = [
                torch.cat([x.image for x in past])[-20:],
                torch.cat([x.text for x in past])[-20:],
            ]
            queue = [x.detach() @ c.detach().T for x in kept]
        assert_same(objective(e, e)["loss"], theirs([e.image @ c.T, e.text @ c.T], [], queue)[0], e)
        past.append(e)


def test_a_queue_keeps_the_newest_pairs_whatever_the_batch() -> None:
    for batches in ([3, 5, 4, 7, 2], [20, 3, 9], [8, 8, 8]):
        objective = Swav(setting(), queue=8)
        seen = torch.empty(0, D)
        for number, size in enumerate(batches):
            e = embeddings(size, seed=number)
            objective(e, e)
            seen = torch.cat([seen, e.text.detach().float()])
            kept = (
                objective.texts[(int(objective.written) - 8 + torch.arange(8)) % 8]
                if len(seen) >= 8
                else seen[-8:]
            )
            assert torch.equal(kept, seen[-8:])


def test_frozen_prototypes_get_a_gradient_of_zero() -> None:
    objective = Swav(setting(), queue=0, freeze_steps=2)
    e = embeddings(8)
    norms = [gradients(objective(e, e)["loss"], e)["prototypes"].norm() for _ in range(3)]
    assert norms[:2] == [0, 0]
    assert norms[2] > 0


def test_swav_refuses_more_prototypes_than_pairs() -> None:
    e = embeddings(3)
    Swav(setting(), queue=3)(e, e)
    with pytest.raises(ValueError, match="queue of 3 or more"):
        Swav(setting(), queue=2)(e, e)
