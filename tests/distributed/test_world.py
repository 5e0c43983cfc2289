"""The headline: W ranks with 256/W pairs each train exactly as one process with the 256×256 matrix.

Seen to fail when: `_AllGather.backward` drops its all_reduce, or returns the first rank's chunk on
all; a loss is summed instead of averaged over rows; sinkhorn's column sums stay on the rank.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from clipsmall.batch import Pairs
from clipsmall.build import objective as build_objective
from clipsmall.build import run as build
from clipsmall.config.reader import validated
from clipsmall.distributed import world
from clipsmall.model.towers.small import SmallConfig, WordTokenizer, load_small
from clipsmall.objectives import OBJECTIVES
from tests.shards_for_tests import TOWERS, config

B = 64
STEPS = 3
ALL: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {})
        for name in OBJECTIVES
        if name not in ("sinkhorn", "vse++", "swav", "nn", "superclass")
    ),
    ("softmax", {"softmax": {"intra_modal": True}}),
    ("softmax", {"exchange": "ring"}),
    *((name, {"exchange": "ring"}) for name in ("sigmoid", "triplet", "gcl", "hsic")),
    ("align_uniform", {"exchange": "ring"}),
    ("sinkhorn", {"exchange": "ring"}),
    # stops by itself
    ("sinkhorn", {"sinkhorn": {"iterations": 500, "tolerance": 1e-6}}),
    ("sinkhorn", {"sinkhorn": {"iterations": 3, "unrolled": True}}),
    ("vse++", {"triplet": {"warmup": 0.5}}),
    ("bce", {"bce": {"mode": "warmup"}}),
    *(
        ("gcl", {"gcl": {"variant": name}})
        for name in ("isogclr", "fastclip_v0", "fastclip_v1", "fastclip_v2")
    ),
    ("nn", {"nn": {"size": 100, "start": 60}}),
    ("swav", {"swav": {"prototypes": 40, "queue": 70, "freeze_steps": 1}}),
    ("vicreg", {"vicreg": {"widths": [24, 12]}}),
    ({"softmax": 1, "superclass": 0.3, "byol": 0.2}, {}),
    ("softmax", {"queue": "moco", "moco": {"size": 100}}),
    (
        "softmax",
        {"queue": "moco", "moco": {"size": 50, "alpha": 0.4, "ramp": 0.0, "in_batch": False}},
    ),
    ("dcl", {"queue": "xbm", "xbm": {"size": 100}}),
    ("gcl", {"queue": "moco", "moco": {"size": 100, "schedule": "cosine", "momentum": 0.9}}),
    ({"sinkhorn": 0.5, "sigmoid": 0.5}, {"queue": "xbm", "xbm": {"size": 100}}),
    ("sigmoid", {"exchange": "host"}),
    *((name, {"accumulate": 4}) for name in ("softmax", "gcl")),
    ("sinkhorn", {"accumulate": 2, "exchange": "ring"}),
    ({"sigmoid": 0.5, "gcl": 1, "vse++": 2}, {"exchange": "gather"}),
]


def global_batch(step: int) -> Pairs:
    """64 of 100 pairs, some of them in every step; a quarter repeats captions, so that duplicates
    cross ranks.
    """
    generator = torch.Generator().manual_seed(step + 1)
    text = torch.randint(1, 512, (B, 8), generator=generator)
    text[-B // 4 :] = text[: B // 4]
    caption_hash = torch.randint(-(2**62), 2**62, (B,), generator=generator)
    caption_hash[-B // 4 :] = caption_hash[: B // 4]
    image = torch.randint(0, 256, (B, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Pairs(image, text, torch.randperm(100, generator=generator)[:B] * 3, caption_hash)


def trained(
    name: Any, options: dict[str, Any], mask: bool, chunk_size: int = 0
) -> tuple[list[float], dict[str, Any], dict[str, Any]]:
    """A few steps in float64, all of them built from a config: losses, the last gradients, the
    objective's memory.
    """
    torch.manual_seed(0)
    given = {"name": name, "mask_duplicates": mask, **options}
    optim = {"pairs": B * STEPS, "accumulate": given.pop("accumulate", 1)}
    run = validated({"data": {"train": ["x"], "batch_size": B}, "objective": given, "optim": optim})
    loaded = load_small(
        SmallConfig.model_validate(TOWERS),
        WordTokenizer.train(["a b c"], SmallConfig.model_validate(TOWERS).text),
    )
    setting = build.run_context(run, loaded, torch.arange(100) * 3)
    model = build.dual_encoder(run, loaded, setting).double().train()
    model.chunk_size = chunk_size
    objective = build.objective(run, setting)
    columns = build_objective.columns_of_exchange(run.objective.exchange)
    memory = objective if isinstance(objective, torch.nn.Module) else torch.nn.Module()
    memory.double()
    wrapped = DDP(model) if world.size() > 1 else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    local = B // world.size()
    losses = []
    mine = slice(world.rank() * local, (world.rank() + 1) * local)
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = wrapped(Pairs(*(field[mine] for field in global_batch(step))))
        loss = objective(rows, columns(rows))["loss"]
        loss.backward()
        losses.append(world.mean_over_ranks(loss).item())
        optimizer.step()
        model.after_step()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return (
        losses,
        gradients,
        {n: b.numpy() for n, b in [*memory.state_dict().items(), *model.named_buffers()]},
    )


# what one process finds, by case
EXPECTED: dict[str, Any] = {}


@pytest.mark.parametrize(("world_size", "mask"), [(1, True), (2, True), (4, False), (8, True)])
@pytest.mark.parametrize(
    "case", range(len(ALL)), ids=lambda i: "-".join([str(ALL[i][0]), *map(str, ALL[i][1].values())])
)
def test_ranks_train_as_one_process(ranks: Any, case: int, world_size: int, mask: bool) -> None:
    name, options = ALL[case]
    key = f"{case} {mask}"
    if key not in EXPECTED:
        EXPECTED[key] = trained(name, options, mask)
    gradients = EXPECTED[key][1]
    assert gradients
    assert any(abs(g).max() > 0 for g in gradients.values())
    for found in ranks(world_size, trained, name, options, mask):
        assert_same_training(found, EXPECTED[key], rtol=1e-9)


def assert_same_training(found: Any, expected: Any, rtol: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=rtol)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # a bias in front of batch normalisation has no gradient but rounding: 1e-15
            size = max(abs(value).max(initial=0.0), 1e-3)
            torch.testing.assert_close(
                torch.from_numpy(ours[key]),
                torch.from_numpy(value),
                rtol=rtol,
                atol=rtol * size,
                msg=key,
            )


def uneven() -> list[list[int]]:
    mine = torch.arange(world.rank() * 10, world.rank() * 10 + world.rank() % 3)
    parts = world.gather_bytes(b"x" * world.rank() + b"!", torch.device("cpu"))
    return [world.gather_uneven(mine).tolist(), [len(part) for part in parts]]


def test_uneven_gather_keeps_every_row_once(ranks: Any) -> None:
    for rows, lengths in ranks(4, uneven):
        assert rows == [10, 20, 21]
        assert lengths == [1, 2, 3, 4]


def reduced() -> tuple[int, int, float]:
    mine = torch.tensor(world.rank())
    return (
        world.sum_over_ranks(mine).item(),
        world.max_over_ranks(mine).item(),
        world.mean_over_ranks(mine.double()).item(),
    )


def test_reductions_are_the_same_on_every_rank(ranks: Any) -> None:
    assert ranks(4, reduced) == [(6, 3, 1.5)] * 4


def test_ranks_that_are_not_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world.check_ranks(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each rank would train alone"):
        world.check_ranks(1)


def test_columns_in_host_memory_go_back_in_one_thread() -> None:
    """Two devices' backward passes in two threads would start their collectives in an order of
    chance (on GPUs).
    """
    with torch.autograd.set_multithreading_enabled(True):
        for exchange, threads in (("gather", True), ("host", False)):
            run = validated(
                {"data": {"train": ["x"], "batch_size": B}, "objective": {"exchange": exchange}}
            )
            build_objective.columns_of_exchange(run.objective.exchange)
            assert torch._C._is_multithreading_enabled() == threads


def meets(folder: Path) -> int:
    """How many ranks have come by the time this one goes on; the last comes late."""
    if world.rank() == world.size() - 1:
        time.sleep(0.5)
    (folder / str(world.rank())).touch()
    world.check_ranks(world.size())
    return len(list(folder.iterdir()))


def test_no_rank_goes_on_before_all_have_met(ranks: Any, tmp_path: Path) -> None:
    """One with nothing to do would leave, and another that is still connecting to it would fail."""
    assert ranks(4, meets, tmp_path) == [4] * 4


def run_trainer(words: list[str]) -> int:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from clipsmall import train

    try:
        return train.main(words)
    finally:
        # Accelerate's state outlives a run; the next one in this worker has another world
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()


def test_eight_ranks_log_the_loss_curve_of_one(ranks: Any, glyphs: Path, tmp_path: Path) -> None:
    """The whole trainer, float32: 12 steps at one global batch of 64, ranks of 8 pairs against one
    of 64.
    """
    changes = {"data.batch_size": 64, "optim.pairs": 64 * 12, "optim.lr": 1e-2}
    for name in ("softmax", "sigmoid", "sinkhorn"):
        curves = []
        for world_size in (1, 8):
            out = tmp_path / f"{name}{world_size}"
            words = config(glyphs, out, **changes, **{"objective.name": name})
            assert ranks(world_size, run_trainer, words) == [0] * world_size
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            curves.append([row["loss"] for row in rows if "loss" in row])
        assert len(curves[0]) == 12
        assert curves[0][-1] < curves[0][0]
        assert curves[1] == pytest.approx(curves[0], rel=1e-4)
