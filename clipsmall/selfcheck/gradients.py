"""Compare loss and gradients of one step with a reference, one group of parameters at a time."""

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

# In host memory: the gradient of each parameter by its name (None if it has none), and "loss".
Found = dict[str, Tensor | None]
# Relative differences below these count as exact. On the glyphs rounding makes 1e-15 (float64) and
# 1e-6 (float32); one pair of 1,024 left out makes 1e-3, and a wrong number of ranks or chunks more.
FLOOR = {torch.float64: 1e-8, torch.float32: 3e-4}
# Weights are changed by about this many units in the last place, to see what rounding does.
SHAKE = 8
# A difference of up to this many times the effect of that change is taken for rounding.
MARGIN = 10


def turn_off_random_layers(model: nn.Module) -> None:
    """Put the model into training mode, except for random layers (dropout, stochastic depth, ...).

    Batch normalisation stays in training mode, so that it uses the batch. Parts that are in
    evaluation mode even during training (averaged towers) stay so.
    """
    batch_norms = GlobalBatchNorm | nn.modules.batchnorm._BatchNorm
    for part in model.train().modules():
        if part.training and not isinstance(part, batch_norms):
            part.training = False


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Change every weight by a few units in its last place; the effect is that of rounding."""
    for parameter in model.parameters():
        unit = torch.finfo(parameter.dtype).eps
        parameter.mul_(1 + SHAKE * unit * torch.randn_like(parameter))


def step(
    model: Callable[[Pairs], Embeddings],
    encoder: nn.Module,
    objective: Callable[..., dict[str, Tensor]],
    columns: Callable[[Embeddings], Embeddings],
    batches: Sequence[Pairs],
    backward: Callable[[Tensor], Any],
) -> Found:
    """The loss (mean over ranks) and the gradients of the last batch.

    The batches before it run forward only: they fill the memories of objectives.

    Args:
        model: `encoder` as training wraps it (DDP), or the encoder itself.
        encoder: the model without its wrapping, and without gradients so far.
    """
    last = len(batches) - 1
    for number, pairs in enumerate(batches):
        with torch.set_grad_enabled(number == last):
            rows = model(pairs)
            loss = objective(rows, columns(rows))["loss"]
    backward(loss)
    found: Found = {"loss": world.mean(loss).cpu()}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            found[name] = None if parameter.grad is None else parameter.grad.cpu()
    return found


def faults_of_exchange(device: torch.device) -> list[str]:
    """Errors of the differentiable exchanges between ranks, one sentence each.

    Each exchange is tried by itself: rank r multiplies the result by r + 1, so the gradient of
    every entry must be 1 + 2 + ... + W. Every rank must call.
    """
    mine = world.rank() + 1.0
    ranks = world.size()
    expected = ranks * (ranks + 1) / 2
    found = []
    for name, exchange in (("gather", world.gather), ("add", world.add)):
        x = torch.ones(2, device=device, requires_grad=True)
        weighted = exchange(x) * mine
        weighted.sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        if world.maximum((x.grad - expected).abs()).any():
            found.append(f"world.{name}: its backward does not give the sum over ranks")
    return found


def groups(model: DualEncoder, pairs: Pairs) -> dict[str, list[str]]:
    """Names of trainable parameters, grouped by tower, head or parameter; and the group "loss".

    A parameter belongs to the image tower if the outputs for images depend on it, whatever its
    library calls it. Those that the outputs of both towers depend on are a group of their own.
    """
    towers = {f"towers.{name}": p for name, p in model.towers.named_parameters() if p.requires_grad}
    of_image = _reached(model.towers.image(model.normalised(pairs.image)), towers)
    of_text = _reached(model.towers.text(pairs.text), towers)
    found: dict[str, list[str]] = {
        "loss": ["loss"],
        "image tower": [],
        "text tower": [],
        "both towers": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        first, *rest = name.split(".")
        if name in of_image and name in of_text:
            group = "both towers"
        elif name in of_image:
            group = "image tower"
        elif name in of_text:
            group = "text tower"
        elif first == "heads":
            group = f"head {rest[0]}"
        else:
            group = first
        found.setdefault(group, []).append(name)
    return {group: names for group, names in found.items() if names}


def _reached(output: Tensor, named: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters that an output depends on."""
    if not output.requires_grad:
        return set()
    parameters = list(named.values())
    gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True)
    reached = set()
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is not None:
            reached.add(name)
    return reached


@dataclass(frozen=True)
class Difference:
    """How the gradient of one group differs from the reference, on the rank where it does most."""

    # of this group's gradient
    norm: float
    # norm of the reference's gradient
    reference: float
    # between the two
    cosine: float
    # norm of the difference
    apart: float
    # largest difference of a single number
    largest: float
    numbers: int
    # parameters that have a gradient in the reference only
    missing: int
    # parameters that have a gradient here only
    extra: int
    # numbers that are not finite, here or in the reference
    broken: int

    @property
    def ratio(self) -> float:
        return self.norm / self.reference if self.reference else math.nan

    @property
    def severity(self) -> tuple[int, int, float]:
        """By which the worst rank is found."""
        return self.broken, self.missing + self.extra, self.apart


def differences(
    found: Found, reference: Found, named: Mapping[str, Sequence[str]], device: torch.device
) -> dict[str, Difference]:
    """The difference of each group, the same on all ranks. Every rank must call.

    Args:
        named: names of the parameters of each group, see `groups`.
        device: that ranks exchange data over.
    """
    mine = {}
    for group, names in named.items():
        mine[group] = asdict(_difference(found, reference, names))
    ranks = [json.loads(data) for data in world.gather_bytes(json.dumps(mine).encode(), device)]
    worst = {}
    for group in named:
        of_ranks = [Difference(**each[group]) for each in ranks]
        worst[group] = max(of_ranks, key=lambda difference: difference.severity)
    return worst


def _difference(found: Found, reference: Found, names: Sequence[str]) -> Difference:
    """Of one group on this rank; sums are made in float64."""
    missing = 0
    extra = 0
    broken = 0
    numbers = 0
    largest = 0.0
    # squared norms of both, their product, and the squared norm of the difference
    sums = torch.zeros(4, dtype=torch.float64)
    for name in names:
        x = found[name]
        y = reference[name]
        if x is None and y is None:
            continue
        if x is None:
            assert y is not None
            missing += 1
            x = torch.zeros_like(y)
        if y is None:
            extra += 1
            y = torch.zeros_like(x)
        x = x.double().flatten()
        y = y.double().flatten()
        numbers += len(x)
        finite = x.isfinite() & y.isfinite()
        broken += int((~finite).sum())
        x = x.nan_to_num(0.0, 0.0, 0.0)
        y = y.nan_to_num(0.0, 0.0, 0.0)
        apart = x - y
        sums += torch.stack([x @ x, y @ y, x @ y, apart @ apart])
        largest = max(largest, float(apart.abs().max()))
    norm, reference_norm, difference_norm = sums[[0, 1, 3]].sqrt().tolist()
    product = norm * reference_norm
    return Difference(
        norm=norm,
        reference=reference_norm,
        cosine=float(sums[2]) / product if product else math.nan,
        apart=difference_norm,
        largest=largest,
        numbers=numbers,
        missing=missing,
        extra=extra,
        broken=broken,
    )


class Verdict(NamedTuple):
    """What a difference means, in words and as a state."""

    words: str
    # unclear: rounding hides it; idle: there is no gradient; near: a lower precision, no promise
    state: Literal["exact", "wrong", "unclear", "idle", "near"]


@dataclass(frozen=True)
class Judge:
    """Says what a difference means.

    Args:
        noise: the effect on each group of shaking the weights of the reference.
        dtype: of the computation.
    """

    noise: Mapping[str, Difference]
    dtype: torch.dtype

    def verdict(self, group: str, d: Difference, mistakes: Mapping[str, float]) -> Verdict:
        """
        Args:
            mistakes: known ones in words, and what each multiplies a gradient by.
        """
        if broken := max(d.broken, self.noise[group].broken):
            return Verdict(f"not finite: {broken} of {d.numbers} numbers", "wrong")
        if d.missing or d.extra:
            words = (
                f"{d.missing} parameters without the gradient that one process has, "
                f"{d.extra} with a gradient that one process lacks"
            )
            return Verdict(words, "wrong")
        eps = torch.finfo(self.dtype).eps
        noise = self.noise[group].apart
        size = self._size(group)
        allowed = max(FLOOR[self.dtype] * d.reference, MARGIN * noise, MARGIN * eps * size)
        if d.apart > allowed:
            what = "loss" if group == "loss" else "gradient"
            return Verdict(_blame(what, d, mistakes), "wrong")
        if group == "loss" or allowed < 0.1 * d.reference:
            return Verdict("exact", "exact")
        if d.reference <= 1000 * eps * size:
            return Verdict("no gradient but rounding" if d.reference else "no gradient", "idle")
        return Verdict(f"cannot tell: rounding alone makes {noise / d.reference:.1%}", "unclear")

    def _size(self, group: str) -> float:
        """The size that rounding errors are relative to.

        For gradients the norm of all gradients of the reference together; for the loss its value,
        but at least 1.
        """
        if group == "loss":
            return max(1.0, self.noise["loss"].reference)
        norms = [d.reference for name, d in self.noise.items() if name != "loss"]
        return math.hypot(*norms)


def _blame(what: str, d: Difference, mistakes: Mapping[str, float]) -> str:
    """What is wrong, in words: the direction, or a factor and the mistakes that would make it."""
    if not d.reference:
        return f"a {what} of {d.norm:.3g}, where one process has none"
    factor = math.copysign(d.ratio, d.cosine)
    # the sine of the angle: the part of the difference that no factor explains
    sine = math.sqrt(max(0.0, 1 - d.cosine**2))
    if d.norm and sine > 0.1 * abs(factor - 1):
        cosine = f"{d.cosine:.4f}" if d.cosine < 0.9999 else f"1 - {1 - d.cosine:.0e}"
        return f"direction differs (cosine {cosine}), {d.ratio:.4g} x as long"
    known = []
    for words, value in mistakes.items():
        if value != 1 and abs(factor / value - 1) < 0.01:
            known.append(words)
    reason = f" ({'; or '.join(known)})" if known else ""
    return f"{factor:.4g} x the {what} of one process{reason}"


def judge_low_precision(d: Difference) -> Verdict:
    """The verdict for a lower precision, which promises less.

    Only a lost direction (a cosine below 0.9) counts as wrong.
    """
    if d.broken:
        return Verdict(f"not finite: {d.broken} of {d.numbers} numbers", "wrong")
    if not d.reference:
        return Verdict("no gradient", "idle")
    # a single number may be near 0, where its sign means nothing
    if d.numbers == 1:
        return Verdict(f"{math.copysign(d.ratio, d.cosine):.4f} x", "near")
    if d.cosine >= 0.9:
        return Verdict(f"cosine {d.cosine:.4f}", "near")
    return Verdict(f"cosine {d.cosine:.4f}: direction lost", "wrong")


class GradientRow(NamedTuple):
    """One row of the table that selfcheck prints."""

    # ranks, chunks and precision, in words
    compared: str
    group: str
    difference: Difference
    verdict: Verdict


def table(rows: Sequence[GradientRow]) -> str:
    """All rows as text; numbers are aligned on the right, verdicts are not padded."""
    lines = [
        ("compared with one process", "", "|g| / |g one|", "cosine", "largest diff", "verdict"),
    ]
    before = ""
    for row in rows:
        d = row.difference
        cosine = _number(d.cosine) if d.numbers > 1 else ""
        largest = f"{d.largest / (d.reference or 1):.0e}"
        # what is compared stands once, in the first of its rows
        title = row.compared if row.compared != before else ""
        lines.append((title, row.group, _number(d.ratio), cosine, largest, row.verdict.words))
        before = row.compared
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    printed = []
    for line in lines:
        cells = []
        for cell, side, width in zip(line[:5], "<<>>>", widths, strict=True):
            cells.append(f"{cell:{side}{width}}")
        printed.append("  ".join([*cells, line[5]]))
    return "\n".join(printed)


def _number(x: float) -> str:
    return f"{x:.6f}" if 1e-3 < abs(x) < 1e3 else f"{x:.3g}"
