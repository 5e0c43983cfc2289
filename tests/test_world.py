"""The headline: W ranks with 256/W pairs each train exactly as one process with the 256×256 matrix.

Seen to fail when: `_AllGather.backward` drops its all_reduce, or returns the first rank's chunk on all; a loss is
summed instead of averaged over rows; sinkhorn's column sums stay on the rank.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from clipsmall import world
from clipsmall.batch import Pairs
from clipsmall.objectives import OBJECTIVES, USES_BIAS
from clipsmall.preprocess import ImageSpec
from clipsmall.small_towers import SmallConfig, SmallTowers
from clipsmall.towers import DualEncoder
from tests.shards_for_tests import TOWERS, config

B = 256
OPTIONS: dict[str, dict[str, Any]] = {"sinkhorn": {"iterations": 500, "tolerance": 1e-6}}  # stops by itself


def global_batch() -> Pairs:
    """256 pairs; the last quarter repeats captions of the first, so that duplicates cross ranks."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 512, (B, 8), generator=generator)
    text[-B // 4 :] = text[: B // 4]
    caption_hash = torch.randint(-(2**62), 2**62, (B,), generator=generator)
    caption_hash[-B // 4 :] = caption_hash[: B // 4]
    image = torch.randint(0, 256, (B, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Pairs(image, text, torch.randperm(10_000, generator=generator)[:B], caption_hash)


def loss_and_gradients(name: str, mask: bool) -> tuple[float, dict[str, Any]]:
    torch.manual_seed(0)
    towers = SmallTowers(SmallConfig.model_validate(TOWERS))
    model = DualEncoder(towers, ImageSpec(16), 20.0, -5.0, learn_bias=name in USES_BIAS).double()
    wrapped = DDP(model) if world.size() > 1 else model
    local = B // world.size()
    pairs = Pairs(*(field[world.rank() * local : (world.rank() + 1) * local] for field in global_batch()))
    rows = wrapped(pairs)
    objective = partial(OBJECTIVES[name], mask_duplicates=mask, **OPTIONS.get(name, {}))
    loss = objective(rows, world.columns(rows))["loss"]
    loss.backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return world.mean(loss).item(), gradients


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_train_as_one_process(ranks: Any, name: str, world_size: int, mask: bool) -> None:
    expected, gradients = loss_and_gradients(name, mask)
    assert {"logit_scale", *(["logit_bias"] if name in USES_BIAS else [])} <= set(gradients)
    assert all(abs(g).max() > 0 for g in gradients.values())
    for loss, found in ranks(world_size, loss_and_gradients, name, mask):
        assert loss == pytest.approx(expected, rel=1e-10)
        assert found.keys() == gradients.keys()
        for key, value in gradients.items():
            torch.testing.assert_close(
                torch.from_numpy(found[key]),
                torch.from_numpy(value),
                rtol=1e-10,
                atol=1e-14,
                msg=f"{key}: {name}",
            )


def uneven() -> list[list[int]]:
    mine = torch.arange(world.rank() * 10, world.rank() * 10 + world.rank() % 3)
    parts = world.gather_bytes(b"x" * world.rank() + b"!", torch.device("cpu"))
    return [world.gather_uneven(mine).tolist(), [len(part) for part in parts]]


def test_uneven_gather_keeps_every_row_once(ranks: Any) -> None:
    for rows, lengths in ranks(4, uneven):
        assert rows == [10, 20, 21]
        assert lengths == [1, 2, 3, 4]


def summed() -> torch.Tensor:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(world.rank()), dtype=torch.float64) * 300
    return torch.stack([world.logsumexp(x), torch.logsumexp(world.gather(x), dim=0)])


def test_logsumexp_over_ranks_is_that_of_all_rows(ranks: Any) -> None:
    for found, expected in ranks(4, summed):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def reduced() -> tuple[int, int, float]:
    mine = torch.tensor(world.rank())
    return world.total(mine).item(), world.maximum(mine).item(), world.mean(mine.double()).item()


def test_reductions_are_the_same_on_every_rank(ranks: Any) -> None:
    assert ranks(4, reduced) == [(6, 3, 1.5)] * 4


def test_ranks_that_are_not_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world.check(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="train apart"):
        world.check(1)


def trained(words: list[str]) -> int:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from clipsmall import train

    try:
        return train.main(words)
    finally:  # Accelerate's state outlives a run; the next one in this worker has another world
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()


def test_eight_ranks_log_the_loss_curve_of_one(ranks: Any, glyphs: Path, tmp_path: Path) -> None:
    """The whole trainer, float32: 12 steps at one global batch of 64, ranks of 8 pairs against one of 64."""
    changes = {"data.batch_size": 64, "optim.pairs": 64 * 12, "optim.lr": 1e-2}
    for name in OBJECTIVES:
        curves = []
        for world_size in (1, 8):
            out = tmp_path / f"{name}{world_size}"
            words = config(glyphs, out, **changes, **{"objective.name": name})
            assert ranks(world_size, trained, words) == [0] * world_size
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            curves.append([row["loss"] for row in rows if "loss" in row])
        assert len(curves[0]) == 12
        assert curves[0][-1] < curves[0][0]
        assert curves[1] == pytest.approx(curves[0], rel=1e-4)
