"""Objectives without negatives: against lightly's and dense formulas, and over ranks with their
heads.

Seen to fail when: a sum of `moments`, Barlow's or VICReg's matrix stays on its rank, or its
backward does; hsic's row weights, mean or squares are of one rank; swav queues its own rows, or
before use, or detaches frozen prototypes; superclass counts its own captions, or a word twice;
targets are not detached; any sum is made in half precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

from clipsmall.batch import Embeddings, Pairs, RunContext
from clipsmall.data.preprocess import ImageSpec
from clipsmall.distributed import similarity, world
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.heads import HEADS
from clipsmall.model.towers.small import SmallConfig, SmallTowers
from clipsmall.objectives.barlow import barlow
from clipsmall.objectives.byol import byol
from clipsmall.objectives.hsic import hsic
from clipsmall.objectives.simsiam import simsiam
from clipsmall.objectives.superclass import Superclass
from clipsmall.objectives.swav import Swav
from clipsmall.objectives.vicreg import vicreg
from tests.objectives.outputs_of_heads import D, P, V, embeddings, gradients, setting
from tests.shards_for_tests import TOWERS


@dataclass
class Case:
    make: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ring: bool = False

    def objective(
        self, setting: RunContext
    ) -> Callable[[Embeddings, Embeddings], dict[str, Tensor]]:
        if isinstance(self.make, type):
            made: nn.Module = self.make(setting, **self.options)
            return made.double()
        return lambda rows, columns: self.make(rows, columns, **self.options)


CASES = {
    "simsiam": Case(simsiam, heads={"predictors": {"hidden": 0.5}}),
    "byol": Case(byol, heads={"predictors": {"hidden": 2.0}, "momentum": {"momentum": 0.9}}),
    "swav": Case(Swav, {"queue": 40, "freeze_steps": 1}, {"prototypes": {"prototypes": P}}),
    "swav in a ring": Case(
        Swav, {"queue": 40, "freeze_steps": 0}, {"prototypes": {"prototypes": P}}, ring=True
    ),
    "barlow": Case(barlow, heads={"projectors": {"widths": [20, 14]}}),
    "vicreg": Case(vicreg, heads={"projectors": {}}),
    "hsic": Case(hsic, {"gamma": 0.5}),
    "hsic in a ring": Case(hsic, ring=True),
    "superclass": Case(Superclass, heads={"tokens": {}}),
}


# ---- formulas


# ---- every one of them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["pair", "copies"])
@pytest.mark.parametrize("name", CASES)
def test_tiny_batches_and_batches_of_copies_are_finite(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    """`copies` is one pair 6 times: equal captions, equal embeddings, no variance."""
    e = embeddings(6)
    rows = torch.tensor([0, 1] if kind == "pair" else [0] * 6)

    def low(x: Tensor) -> Tensor:
        x = x.detach()[rows] if len(x) == 6 and x is not e.extra["prototypes"] else x.detach()
        return x.to(dtype).requires_grad_() if x.is_floating_point() else x

    extra = {key: low(x) for key, x in e.extra.items()}
    small = Embeddings(
        low(e.image), low(e.text), e.index[: len(rows)], e.caption_hash[rows], *e[4:6], extra
    )
    objective = CASES[name].objective(setting())
    if isinstance(objective, nn.Module):
        objective.float()
    for _ in range(2):
        terms = objective(small, small)
        assert terms["loss"].dtype == torch.float32
        assert all(torch.isfinite(term) and not term.dim() for term in terms.values())
        assert not any(term.requires_grad for key, term in terms.items() if key != "loss")
        assert all(torch.isfinite(g).all() for g in gradients(terms["loss"], small).values())


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name: str) -> None:
    e = embeddings(16)
    e = e._replace(image=e.image.detach().float(), text=e.text.detach().float())
    e = e._replace(
        extra={k: x.detach().float() if x.is_floating_point() else x for k, x in e.extra.items()}
    )
    plain = CASES[name].objective(setting())(e, e)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = CASES[name].objective(setting())(e, e)["loss"]
    torch.testing.assert_close(inside, plain, rtol=1e-6, atol=1e-7)


class Largest(TorchDispatchMode):
    """The most numbers that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("name", CASES)
def test_nothing_grows_with_the_square_of_the_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(similarity.TILE, "cpu", (16, 16))
    e = embeddings(256)
    objective = CASES[name].objective(setting())
    with Largest() as largest:
        objective(e, e)["loss"].backward()  # type: ignore[no-untyped-call]
    assert 256 * D <= largest.numbers <= 256 * V < 256 * 256


@pytest.mark.parametrize("name", ["swav", "superclass"])
def test_a_restored_memory_goes_on_to_the_bit(name: str) -> None:
    straight = CASES[name].objective(setting())
    first = CASES[name].objective(setting())
    batches = [embeddings(16, seed=seed) for seed in range(6)]
    expected = [straight(e, e)["loss"] for e in batches]
    found = [first(e, e)["loss"] for e in batches[:3]]
    second: Any = CASES[name].objective(setting())
    second.load_state_dict(first.state_dict())  # type: ignore[attr-defined]
    found += [second(e, e)["loss"] for e in batches[3:]]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    for key, value in straight.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, second.state_dict()[key])


# ---- over ranks

B = 32


def batch(step: int) -> Pairs:
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(1, 60, (B, 8), generator=generator)
    text[-8:] = text[:8]
    image = torch.randint(0, 256, (B, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Pairs(image, text, torch.randperm(1000, generator=generator)[:B], text.sum(dim=1))


def trained(name: str) -> tuple[list[float], dict[str, Any]]:
    """The losses of 4 steps; their reported terms, gradients, and all weights and memory after
    them.
    """
    case = CASES[name]
    torch.manual_seed(0)
    towers = SmallTowers(SmallConfig.model_validate(TOWERS))
    given = RunContext(width=16, batch_size=B, steps=6, towers=towers, vocabulary=512)
    heads = {key: HEADS[key](given, **options) for key, options in case.heads.items()}
    model = (
        DualEncoder(towers, ImageSpec(16), 20.0, 0.0, False, learn_scale=False, heads=heads)
        .double()
        .train()
    )
    objective = case.objective(given)
    wrapped = DDP(model) if world.size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = B // world.size()
    losses = list[float]()
    reported = dict[str, Any]()
    for step in range(4):
        mine = slice(world.rank() * local, (world.rank() + 1) * local)
        rows = wrapped(Pairs(*(x[mine] for x in batch(step))))
        terms = objective(
            rows, world.ring_columns(rows) if case.ring else world.gathered_columns(rows)
        )
        reported |= {
            f"{step} mean {key}": world.mean_over_ranks(term).numpy() for key, term in terms.items()
        }
        loss = terms["loss"]
        # has nothing for the text tower to do
        if name == "superclass":
            loss = loss + 0.1 * barlow_of(rows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(world.mean_over_ranks(loss).item())
        named = [(key, p.grad) for key, p in model.named_parameters() if p.grad is not None]
        reported |= {f"{step} gradient {key}": grad.numpy().copy() for key, grad in named}
        optimizer.step()
        model.after_step()
    state = model.state_dict() | (
        objective.state_dict() if isinstance(objective, nn.Module) else {}
    )
    return losses, reported | {key: value.numpy() for key, value in state.items()}


def barlow_of(rows: Embeddings) -> Tensor:
    return barlow(
        rows._replace(extra={"image_projected": rows.image, "text_projected": rows.text}), rows
    )["loss"]


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process(ranks: Any, name: str) -> None:
    expected, numbers = trained(name)
    assert len(set(expected)) == 4
    assert all(
        abs(value).max() > 0 for key, value in numbers.items() if key.startswith("3 gradient")
    )
    for world_size in (1, 2, 4, 8):
        for losses, found in ranks(world_size, trained, name):
            assert losses == pytest.approx(expected, rel=1e-9)
            assert found.keys() == numbers.keys()
            for key, value in numbers.items():
                torch.testing.assert_close(
                    torch.as_tensor(found[key]),
                    torch.as_tensor(value),
                    rtol=1e-9,
                    atol=1e-12,
                    msg=f"{world_size} ranks: {key}",
                )
