"""One step's loss and gradients beside a reference: which group of parameters is wrong, and by
which factor.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, Pairs
from clipsmall.distributed import world
from clipsmall.distributed.batch_norm import GlobalBatchNorm
from clipsmall.model.dual_encoder import DualEncoder

# in host memory: gradients by parameter, None where there is none; and the "loss"
Found = dict[str, Tensor | None]
# Smaller relative differences are fine in any case. Rounding makes 1e-15 and 1e-6 on glyphs; one
# pair of 1,024 left out makes 1e-3, and every mistake in the number of ranks or chunks more.
FLOOR = {torch.float64: 1e-8, torch.float32: 3e-4}
# units in the last place by which weights are shaken to see what rounding does
SHAKE = 8
# a difference of so many times what the shaking does is still rounding
MARGIN = 10


def without_chance(model: nn.Module) -> None:
    """Training mode but for random layers (dropout, stochastic depth, ...), which all ask
    `training`.

    Batch normalisation keeps it, to see the batch; what has evaluation mode in training (averaged
    towers) keeps that.
    """
    for part in model.train().modules():
        if part.training and not isinstance(
            part, GlobalBatchNorm | nn.modules.batchnorm._BatchNorm
        ):
            part.training = False


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Every weight by a few units in its last place: what that changes is no more than rounding."""
    for p in model.parameters():
        p.mul_(1 + SHAKE * torch.finfo(p.dtype).eps * torch.randn_like(p))


def step(
    model: Callable[[Pairs], Embeddings],
    encoder: nn.Module,
    objective: Callable[..., dict[str, Tensor]],
    columns: Callable[[Embeddings], Embeddings],
    batches: Sequence[Pairs],
    backward: Callable[[Tensor], Any],
) -> Found:
    """The last batch's loss (mean over ranks) and gradients; those before it only pass, to fill
    memories.

    encoder: `model` without its wrapping, and without gradients so far.
    """
    for k, pairs in enumerate(batches):
        with torch.set_grad_enabled(k == len(batches) - 1):
            rows = model(pairs)
            loss = objective(rows, columns(rows))["loss"]
    backward(loss)
    named = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    return {
        "loss": world.mean(loss).cpu(),
        **{name: None if g is None else g.cpu() for name, g in named.items()},
    }


def faults_of_exchange(device: torch.device) -> list[str]:
    """What is wrong with the differentiable exchanges between ranks, each tried by itself on a
    number of each rank.
    """
    mine = world.rank() + 1.0
    ranks = world.size()
    found = []
    for name, exchange in (("gather", world.gather), ("add", world.add)):
        x = torch.ones(2, device=device, requires_grad=True)
        (exchange(x) * mine).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        if world.maximum((x.grad - ranks * (ranks + 1) / 2).abs()).any():
            found.append(f"world.{name}: its backward does not give the sum over ranks")
    return found


def groups(model: DualEncoder, pairs: Pairs) -> dict[str, list[str]]:
    """Trainable parameters by tower, head and name. What the images' outputs depend on is the image
    tower, whatever its library calls it; what both modalities depend on is a group of its own."""
    towers = {f"towers.{name}": p for name, p in model.towers.named_parameters() if p.requires_grad}
    of_image = _reached(model.towers.image(model.normalised(pairs.image)), towers)
    of_text = _reached(model.towers.text(pairs.text), towers)
    found: dict[str, list[str]] = {
        "loss": ["loss"],
        "image tower": [],
        "text tower": [],
        "both towers": [],
    }
    for name in [name for name, p in model.named_parameters() if p.requires_grad]:
        first, *rest = name.split(".")
        group = f"head {rest[0]}" if first == "heads" else first
        if name in of_image | of_text:
            group = (
                "text tower"
                if name not in of_image
                else "both towers"
                if name in of_text
                else "image tower"
            )
        found.setdefault(group, []).append(name)
    return {group: names for group, names in found.items() if names}


def _reached(output: Tensor, named: Mapping[str, Tensor]) -> set[str]:
    if not output.requires_grad:
        return set()
    slopes = torch.autograd.grad(output.sum(), list(named.values()), allow_unused=True)
    return {name for name, slope in zip(named, slopes, strict=True) if slope is not None}


@dataclass(frozen=True)
class Difference:
    """Of one group, on the rank where it is largest."""

    norm: float
    # its norm
    reference: float
    cosine: float
    # norm of the difference
    apart: float
    # of one number
    largest: float
    numbers: int
    # parameters that have a gradient in the reference only
    missing: int
    # and those that have none in the reference only
    extra: int
    # numbers that are not finite, in either
    broken: int

    @property
    def ratio(self) -> float:
        return self.norm / self.reference if self.reference else math.nan


def differences(
    found: Found, reference: Found, named: Mapping[str, Sequence[str]], device: torch.device
) -> dict[str, Difference]:
    """By group, the same on all ranks. Every rank must call."""
    mine = {group: asdict(_difference(found, reference, names)) for group, names in named.items()}
    ranks = [json.loads(data) for data in world.gather_bytes(json.dumps(mine).encode(), device)]
    made = {group: [Difference(**each[group]) for each in ranks] for group in named}
    return {
        group: max(each, key=lambda d: (d.broken, d.missing + d.extra, d.apart))
        for group, each in made.items()
    }


def _difference(found: Found, reference: Found, names: Sequence[str]) -> Difference:
    missing = extra = broken = numbers = 0
    largest = 0.0
    sums = torch.zeros(4, dtype=torch.float64)
    for x, y in ((found[name], reference[name]) for name in names):
        there = x if x is not None else y
        if there is None:
            continue
        missing = missing + (x is None)
        extra = extra + (y is None)
        x, y = (torch.zeros_like(there) if z is None else z for z in (x, y))
        x = x.double().flatten()
        y = y.double().flatten()
        numbers = numbers + len(x)
        broken = broken + int((~(x.isfinite() & y.isfinite())).sum())
        x = x.nan_to_num(0.0, 0.0, 0.0)
        y = y.nan_to_num(0.0, 0.0, 0.0)
        sums += torch.stack([x @ x, y @ y, x @ y, (x - y) @ (x - y)])
        largest = max(largest, float((x - y).abs().max()))
    norm, other, apart = sums[[0, 1, 3]].sqrt().tolist()
    cosine = float(sums[2]) / (norm * other) if norm * other else math.nan
    return Difference(norm, other, cosine, apart, largest, numbers, missing, extra, broken)


class Verdict(NamedTuple):
    words: str
    # idle: there is no gradient; near: lower precision
    state: Literal["exact", "wrong", "unclear", "idle", "near"]


@dataclass(frozen=True)
class Judge:
    """Says what a difference means.

    Args:
        noise: what shaking the weights of the reference does to each group.
        dtype: of the computation.
    """

    noise: Mapping[str, Difference]
    dtype: torch.dtype

    def verdict(self, group: str, d: Difference, mistakes: Mapping[str, float]) -> Verdict:
        """mistakes: known ones in words, and what they multiply a gradient by."""
        if broken := max(d.broken, self.noise[group].broken):
            return Verdict(f"not finite: {broken} of {d.numbers} numbers", "wrong")
        if d.missing or d.extra:
            words = f"{d.missing} parameters without the gradient of one process, {d.extra} with one it has not"
            return Verdict(words, "wrong")
        eps = torch.finfo(self.dtype).eps
        noise = self.noise[group].apart
        size = self._size(group)
        allowed = max(FLOOR[self.dtype] * d.reference, MARGIN * noise, MARGIN * eps * size)
        if d.apart > allowed:
            return Verdict(_blame("loss" if group == "loss" else "gradient", d, mistakes), "wrong")
        if group == "loss" or allowed < 0.1 * d.reference:
            return Verdict("exact", "exact")
        if d.reference <= 1000 * eps * size:
            return Verdict("no gradient but rounding" if d.reference else "no gradient", "idle")
        return Verdict(f"cannot tell: rounding alone makes {noise / d.reference:.1%}", "unclear")

    def _size(self, group: str) -> float:
        """What rounding is measured by: all gradients of the reference together; of the loss, 1 at
        least.
        """
        if group == "loss":
            return max(1.0, self.noise["loss"].reference)
        return math.hypot(*(d.reference for name, d in self.noise.items() if name != "loss"))


def _blame(what: str, d: Difference, mistakes: Mapping[str, float]) -> str:
    if not d.reference:
        return f"a {what} of {d.norm:.3g}, where one process has none"
    factor = math.copysign(d.ratio, d.cosine)
    if d.norm and math.sqrt(max(0.0, 1 - d.cosine**2)) > 0.1 * abs(factor - 1):
        near = f"{d.cosine:.4f}" if d.cosine < 0.9999 else f"1 - {1 - d.cosine:.0e}"
        return f"direction differs (cosine {near}), {d.ratio:.4g} x as long"
    known = [
        words for words, value in mistakes.items() if value != 1 and abs(factor / value - 1) < 0.01
    ]
    return f"{factor:.4g} x the {what} of one process" + (
        f" ({'; or '.join(known)})" if known else ""
    )


def loose(d: Difference) -> Verdict:
    """Of a precision that rounds more, and claims no more: wrong is only a direction that is
    lost.
    """
    if d.broken:
        return Verdict(f"not finite: {d.broken} of {d.numbers} numbers", "wrong")
    if not d.reference:
        return Verdict("no gradient", "idle")
    # may be near 0, where its sign means nothing
    if d.numbers == 1:
        return Verdict(f"{math.copysign(d.ratio, d.cosine):.4f} x", "near")
    lost = not d.cosine >= 0.9
    return Verdict(
        f"cosine {d.cosine:.4f}" + ": direction lost" * lost, "wrong" if lost else "near"
    )


class GradientRow(NamedTuple):
    compared: str
    group: str
    difference: Difference
    verdict: Verdict


def table(rows: Sequence[GradientRow]) -> str:
    lines = [
        ("compared with one process", "", "|g| / |g one|", "cosine", "largest diff", "verdict")
    ]
    for before, (compared, group, d, verdict) in zip(
        ["", *(row.compared for row in rows)], rows, strict=False
    ):
        ratio, cosine = (
            f"{x:.6f}" if 1e-3 < abs(x) < 1e3 else f"{x:.3g}" for x in (d.ratio, d.cosine)
        )
        numbers = ratio, cosine if d.numbers > 1 else "", f"{d.largest / (d.reference or 1):.0e}"
        lines.append((compared if compared != before else "", group, *numbers, verdict.words))
    wide = [max(len(line[k]) for line in lines) for k in range(5)]
    cells = [
        [f"{cell:{side}{n}}" for cell, side, n in zip(line, "<<>>>", wide, strict=False)]
        for line in lines
    ]
    return "\n".join("  ".join([*row, line[5]]) for row, line in zip(cells, lines, strict=True))
