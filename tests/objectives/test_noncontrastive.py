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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

from clipsmall.batch import Embeddings, Pairs, RunContext
from clipsmall.data.preprocess import ImageSpec
from clipsmall.distributed import similarity, world
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.heads import HEADS
from clipsmall.model.small import SmallConfig, SmallTowers
from clipsmall.objectives.barlow import barlow
from clipsmall.objectives.byol import byol
from clipsmall.objectives.hsic import hsic
from clipsmall.objectives.simsiam import simsiam
from clipsmall.objectives.superclass import Superclass
from clipsmall.objectives.swav import Swav, shared_out
from clipsmall.objectives.vicreg import vicreg
from tests.shards_for_tests import TOWERS

D = 12
P = 6
V = 40


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


def embeddings(size: int, noise: float = 1.0, seed: int = 0) -> Embeddings:
    """What a model with every head would deliver; all that has a gradient is a leaf."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image = leaf(size, D)
    text = image + noise * leaf(size, D)
    extra = {
        "image_projected": 2 * image + 1,
        "text_projected": text - 3,
        **{
            f"{name}_{kind}": leaf(size, D)
            for name in ("image", "text")
            for kind in ("predicted", "target")
        },
        "prototypes": F.normalize(leaf(P, D), dim=1),
        "token_logits": leaf(size, V),
    }
    ids = torch.randint(0, V, (size, 5), generator=generator)
    # every caption has it
    ids[:, 0] = 0
    return Embeddings(
        F.normalize(image, dim=-1).requires_grad_(),
        F.normalize(text, dim=-1).requires_grad_(),
        torch.randperm(size, generator=generator) * 7,
        torch.arange(size),
        torch.tensor(100.0, dtype=torch.float64),
        torch.tensor(0.0, dtype=torch.float64),
        {name: x.requires_grad_() for name, x in extra.items()} | {"token_ids": ids},
    )


def setting(size: int = 16) -> RunContext:
    return RunContext(width=D, batch_size=size, steps=5, vocabulary=V)


def gradients(loss: Tensor, e: Embeddings) -> dict[str, Tensor]:
    leaves = {"image": e.image, "text": e.text} | {
        n: x for n, x in e.extra.items() if x.requires_grad
    }
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def assert_same(ours: Tensor, theirs: Tensor, e: Embeddings) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    mine = gradients(ours, e)
    other = gradients(theirs, e)
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-9, atol=1e-13, msg=name)


# ---- formulas
# --------------------------------------------------------------------------------------------------


def test_simsiam_and_byol_are_lightlys_negative_cosine() -> None:
    lightly = pytest.importorskip("lightly.loss")
    e = embeddings(9)
    cosine = lightly.NegativeCosineSimilarity()
    x = e.extra
    theirs = (
        cosine(x["image_predicted"], e.text.detach())
        + cosine(x["text_predicted"], e.image.detach())
    ) / 2
    assert_same(simsiam(e, e)["loss"], theirs, e)
    theirs = 4 + 2 * cosine(x["image_predicted"], x["text_target"].detach())
    theirs = theirs + 2 * cosine(x["text_predicted"], x["image_target"].detach())
    assert_same(byol(e, e)["loss"], theirs, e)


def test_spread_tells_a_full_sphere_from_a_point() -> None:
    e = embeddings(4096)
    assert simsiam(e, e)["spread"].item() == pytest.approx(1, abs=0.02)
    point = e._replace(image=e.image[:1].expand(4096, D), text=e.text[:1].expand(4096, D))
    assert byol(point, point)["spread"].item() < 1e-6


@pytest.mark.parametrize("size", [5, 40])
def test_barlow_and_vicreg_are_lightlys(size: int) -> None:
    lightly = pytest.importorskip("lightly.loss")
    e = embeddings(size)
    x = e.extra["image_projected"]
    y = e.extra["text_projected"]
    assert_same(barlow(e, e)["loss"], lightly.BarlowTwinsLoss()(x, y), e)
    assert_same(barlow(e, e, redundancy=0.1)["loss"], lightly.BarlowTwinsLoss(0.1)(x, y), e)
    assert_same(vicreg(e, e)["loss"], lightly.VICRegLoss()(x, y), e)
    theirs = lightly.VICRegLoss(lambda_param=3, mu_param=2, nu_param=0.5)(x, y)
    assert_same(vicreg(e, e, invariance=3, variance=2, covariance=0.5)["loss"], theirs, e)


@pytest.mark.parametrize("objective", [barlow, vicreg])
def test_terms_add_up_to_the_loss(objective: Any) -> None:
    terms = objective(embeddings(8), embeddings(8))
    loss = terms.pop("loss")
    torch.testing.assert_close(sum(terms.values()), loss.detach())


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


@pytest.mark.parametrize(("gamma", "width"), [(3.0, 1.0), (0.3, 0.5)])
def test_hsic_is_the_dense_formula(gamma: float, width: float) -> None:
    e = embeddings(11)
    z = torch.cat([e.image, e.text])
    k = width / (width**2 + 2 - 2 * z @ z.T).sqrt()
    h = torch.eye(22, dtype=torch.float64) - 1 / 22
    # Y: the same pair or not
    pairs = torch.eye(11, dtype=torch.float64).repeat(2, 2)
    of_pair = (k * (pairs - torch.eye(22))).sum() / 22 - k.mean()
    theirs = -of_pair + gamma * ((h @ k @ h).square().mean() + 1e-10).sqrt()
    ours = hsic(e, e, gamma, width)
    assert_same(ours["loss"], theirs, e)
    torch.testing.assert_close(ours["dependence"], of_pair.detach())


def test_hsic_keeps_its_digits_in_float32_when_embeddings_are_alike() -> None:
    e = embeddings(64)
    near = e._replace(
        **{n: F.normalize(1 + 0.05 * getattr(e, n).detach(), dim=1) for n in ("image", "text")}
    )
    low = near._replace(image=near.image.float(), text=near.text.float())
    torch.testing.assert_close(
        hsic(low, low)["redundancy"].double(), hsic(near, near)["redundancy"], rtol=3e-3, atol=0
    )


def test_hsic_takes_cosines_that_rounding_made_greater_than_one() -> None:
    e = embeddings(64)
    low = e._replace(
        image=e.image.detach().to(torch.bfloat16), text=e.image.detach().to(torch.bfloat16)
    )
    assert (low.image.float().norm(dim=1) > 1.001).any()
    assert torch.isfinite(hsic(low, low, width=0.02)["loss"])


def test_superclass_is_the_dense_formula() -> None:
    objective = Superclass(setting())
    documents = torch.zeros(V)
    captions = 0
    for step in range(3):
        e = embeddings(9, seed=step)
        present = torch.zeros(9, V).scatter_(1, e.extra["token_ids"], 1.0)
        documents = documents + present.sum(dim=0)
        captions = captions + 9
        targets = present.double() * (captions / (1 + documents)).log().clamp(min=0)
        # the token of every caption
        assert targets[:, 0].eq(0).all()
        theirs = (
            -(F.normalize(targets, p=1, dim=1) * e.extra["token_logits"].log_softmax(dim=1))
            .sum(dim=1)
            .mean()
        )
        ours = objective(e, e)
        torch.testing.assert_close(ours["loss"], theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            gradients(ours["loss"], e)["token_logits"],
            gradients(theirs, e)["token_logits"],
            rtol=1e-5,
            atol=1e-8,
        )
        best = targets.gather(1, e.extra["token_logits"].argmax(dim=1, keepdim=True)) > 0
        assert ours["accuracy"] == best.float().mean()
    assert torch.equal(objective.documents, documents.long())
    assert objective.captions == 27


# ---- every one of them
# -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("objective", [barlow, vicreg])
def test_one_pair_is_refused(objective: Any) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        objective(embeddings(1), embeddings(1))


def test_hsic_refuses_columns_that_are_not_the_batch() -> None:
    with pytest.raises(ValueError, match="not 5 pairs"):
        hsic(embeddings(4), embeddings(5))


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
# ------------------------------------------------------------------------------------------------

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
