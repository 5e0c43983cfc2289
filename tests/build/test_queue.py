"""Queues of a run: how long they are, when they are used, and what they refuse."""

from typing import Any

import pytest
import torch

from clipsmall.batch import RunContext
from clipsmall.build import objective as build_objective
from clipsmall.build import queue as build_queue
from clipsmall.build import run as build
from clipsmall.config.reader import read
from clipsmall.objectives.queued import Queued
from tests.objectives.pair_losses import embeddings
from tests.objectives.test_queued import BATCH, batch, objective

WIDTH = 12


def test_a_queue_may_be_met_later() -> None:
    plain = objective("softmax", True)
    queued = Queued(plain, "xbm", 13, WIDTH, start=2 * BATCH).double()
    sizes = []
    for step in range(4):
        e = batch(step)
        found = queued(e, e)
        sizes.append(int(found["queue"]))
        if not sizes[-1]:
            torch.testing.assert_close(found["loss"], plain(e, e)["loss"])
    assert sizes == [0, 0, 10, 13]
    words = ["--objective.queue=xbm", "--optim.pairs=1000"]
    made = build.objective(run(*words), RunContext(width=WIDTH, batch_size=32, steps=10))
    assert made.start == 300
    made = build.objective(
        run(*words, "--objective.queue=moco"), RunContext(width=WIDTH, batch_size=32, steps=10)
    )
    assert made.start == 0


def queue_warnings(given: Any, fresh: bool) -> list[str]:
    return build_queue.warnings(
        given.objective, given.data.batch_size, fresh=fresh, streaming=given.data.streaming
    )


def run(*words: str) -> Any:
    return read(["--data.train=[x]", "--data.batch_size=32", *words])


@pytest.mark.parametrize(
    ("words", "pairs", "size"),
    [
        # 0.5 · 32 / 0.005
        (["--objective.queue=moco"], None, 3_200),
        (["--objective.queue=moco", "--objective.moco.momentum=0.999"], None, 16_000),
        (["--objective.queue=moco", "--objective.moco.momentum=0.99999"], None, 65_536),
        (["--objective.queue=moco", "--objective.moco.momentum=0.5"], None, 32),
        # of a small data set all but what fills no batch
        (["--objective.queue=moco"], 1_000, 992),
        (["--objective.queue=moco", "--objective.moco.size=77"], 1_000, 77),
        (["--objective.queue=xbm"], None, 128),
        (["--objective.queue=xbm", "--objective.xbm.size=5"], None, 5),
        ([], None, 0),
    ],
)
def test_the_size_of_a_queue(words: list[str], pairs: int | None, size: int) -> None:
    assert build_queue.queue_size(run(*words).objective, 32, pairs) == size


def test_a_queue_of_stale_keys_is_told_and_what_would_do() -> None:
    (said,) = queue_warnings(
        run("--objective.queue=moco", "--objective.moco.size=65536"), fresh=True
    )
    assert "2,048 steps old" in said
    assert "remember 200 " in said
    assert "take 3200 or fewer, or momentum 0.9998" in said
    for fine in (["3200", "0.995"], ["65536", "0.9998"], ["32", "0.4"], ["auto", "0.3"]):
        words = [
            "--objective.queue=moco",
            f"--objective.moco.size={fine[0]}",
            f"--objective.moco.momentum={fine[1]}",
        ]
        assert not queue_warnings(run(*words), fresh=True)
    # the momentum that is offered is no cause for another warning
    for size in (
        3_232,
        6_000,
        6_720,
        999_999,
    ):
        words = ["--objective.queue=moco", f"--objective.moco.size={size}"]
        (said,) = queue_warnings(run(*words), fresh=True)
        offered = said.rpartition(" ")[2]
        assert not queue_warnings(
            run(*words, f"--objective.moco.momentum={offered}"), fresh=True
        ), said


def test_features_that_age_are_told() -> None:
    long = ["--objective.queue=xbm", "--objective.xbm.size=512"]
    assert "told apart by its age" in queue_warnings(run(*long), fresh=True)[0]
    assert not queue_warnings(run(*long), fresh=False)
    assert not queue_warnings(run("--objective.queue=xbm"), fresh=True)
    (said,) = queue_warnings(run("--objective.queue=xbm", "--data.streaming=true"), fresh=True)
    assert "streamed pairs have no stable number" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--objective=sinkhorn", "--objective.queue=xbm"],
            "sinkhorn compares exactly the batch; a queue works with softmax",
        ),
        (["--objective.queue=moco", "--objective.exchange=ring"], "every rank holds the queue"),
        (["--objective.queue=xbm", "--objective.exchange=host"], "every rank holds the queue"),
        (
            [
                "--objective=bce",
                "--objective.bce.mode=one",
                "--objective.queue=moco",
                "--objective.moco.in_batch=false",
            ],
            "use mode balanced",
        ),
        (
            ["--objective=dcl", "--objective.queue=moco", "--objective.moco.alpha=0.4"],
            "soft targets work with softmax with default options, not dcl",
        ),
        (["--objective.queue=xbm", "--objective.moco.alpha=0.4"], ""),
        (["--objective.queue=moco", "--optim.accumulate=4"], "take model.chunk_size"),
    ],
)
def test_what_a_queue_refuses(words: list[str], said: str) -> None:
    setting = RunContext(width=WIDTH, batch_size=32, steps=10)
    # an option of the other queue: a note, no error
    if not said:
        build.objective(run(*words), setting)
        assert build_objective.without_effect(run(*words).objective) == ["objective.moco"]
        assert build.objective(run(*words, "--objective.moco.in_batch=false"), setting).in_batch
        return
    with pytest.raises(ValueError, match=said):
        build.objective(run(*words), setting)


def test_beside_a_queue_sinkhorn_compares_the_batch() -> None:
    e = embeddings(32)
    mixed = run(
        "--objective={sinkhorn: 0.5, softmax: 2}",
        "--objective.queue=xbm",
        "--objective.xbm.start=0",
    )
    made = build.objective(mixed, RunContext(width=WIDTH, batch_size=32, steps=10)).double()
    plain = build.objective(
        run("--objective=sinkhorn"), RunContext(width=WIDTH, batch_size=32, steps=10)
    )
    for _ in range(2):
        found = made(e, e)
        torch.testing.assert_close(found["sinkhorn"], plain(e, e)["loss"].detach())
    assert found["sinkhorn/effective_negatives"] == 31
    # the most that one of them meets
    assert found["effective_negatives"] == 62
    # the others twice: as they are, and as they were
    assert found["softmax/effective_negatives"] == 62
    assert found["queue"] == 32
