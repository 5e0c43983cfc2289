"""Compares one step's loss and gradients with a reference, by groups of parameters.

What is wrong is said with the factor by which it is wrong, as most mistakes multiply a gradient by
the number of ranks or of chunks.
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

# In host memory: the gradient of each parameter by its name, None where there is none; and "loss".
StepResult = dict[str, Tensor | None]
# Smaller relative differences are fine in any case. On glyphs rounding causes 1e-15 and 1e-6; one
# pair of 1,024 that is left out causes 1e-3, and every mistake in the number of ranks or chunks
# more.
FLOOR = {torch.float64: 1e-8, torch.float32: 3e-4}
# units in the last place by which weights are perturbed to see what rounding does
PERTURBATION = 8
# a difference of up to so many times what the perturbation causes is still rounding
MARGIN = 10


def disable_randomness(model: nn.Module) -> None:
    """Training mode without random layers (dropout, stochastic depth, ...).

    They all look at `training`, so it is set to False. Batch normalisation stays in training mode,
    to see the batch; what is in evaluation mode during training (averaged towers) stays in that.
    """
    for part in model.train().modules():
        is_norm = isinstance(part, GlobalBatchNorm | nn.modules.batchnorm._BatchNorm)
        if part.training and not is_norm:
            part.training = False


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Change every weight by a few units in its last place: that causes no more than rounding."""
    for p in model.parameters():
        eps = torch.finfo(p.dtype).eps
        noise = torch.randn_like(p)
        p.mul_(1 + PERTURBATION * eps * noise)


def run_steps(
    model: Callable[[Pairs], Embeddings],
    encoder: nn.Module,
    objective: Callable[..., dict[str, Tensor]],
    columns: Callable[[Embeddings], Embeddings],
    batches: Sequence[Pairs],
    backward: Callable[[Tensor], Any],
) -> StepResult:
    """Loss (mean over ranks) and gradients of the last batch.

    The batches before it go forward only, to fill what an objective remembers.

    Args:
        encoder: `model` without DDP or other wrapping; it must have no gradients yet.
    """
    for k, pairs in enumerate(batches):
        is_last = k == len(batches) - 1
        with torch.set_grad_enabled(is_last):
            rows = model(pairs)
            loss = objective(rows, columns(rows))["loss"]

    backward(loss)
    result: StepResult = {"loss": world.mean_over_ranks(loss).cpu()}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            result[name] = None if gradient is None else gradient.cpu()

    return result


def faults_of_exchange(device: torch.device) -> list[str]:
    """What is wrong with the differentiable exchanges between ranks, each tried by itself."""
    ranks = world.size()

    # each rank's loss has another factor, 1 to W: the gradient must be their sum
    factor = world.rank() + 1.0
    expected = ranks * (ranks + 1) / 2
    exchanges = {"gather": world.gather, "differentiable_sum": world.differentiable_sum}
    faults = []
    for name, exchange in exchanges.items():
        x = torch.ones(2, device=device, requires_grad=True)
        (exchange(x) * factor).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        difference = (x.grad - expected).abs()
        if world.max_over_ranks(difference).any():
            faults.append(f"world.{name}: its backward does not give the sum over ranks")

    return faults


def gradient_groups(model: DualEncoder, pairs: Pairs) -> dict[str, list[str]]:
    """Names of trainable parameters by tower, head, or their own name; and the "loss".

    What the images' outputs depend on is the image tower, whatever its library calls it; what the
    outputs of both modalities depend on is a group of its own.
    """
    towers = {f"towers.{name}": p for name, p in model.towers.named_parameters() if p.requires_grad}
    of_image = _used_by(model.towers.image(model.normalised(pairs.image)), towers)
    of_text = _used_by(model.towers.text(pairs.text), towers)
    groups: dict[str, list[str]] = {
        "loss": ["loss"],
        "image tower": [],
        "text tower": [],
        "both towers": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        first, *rest = name.split(".")
        group = f"head {rest[0]}" if first == "heads" else first
        if name in of_image and name in of_text:
            group = "both towers"
        elif name in of_image:
            group = "image tower"
        elif name in of_text:
            group = "text tower"

        groups.setdefault(group, []).append(name)

    return {group: names for group, names in groups.items() if names}


def _used_by(output: Tensor, named: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters that the output depends on."""
    if not output.requires_grad:
        return set()
    gradients = torch.autograd.grad(output.sum(), list(named.values()), allow_unused=True)
    return {name for name, each in zip(named, gradients, strict=True) if each is not None}


@dataclass(frozen=True)
class Difference:
    """How the gradients of one group differ, on the rank where they differ most."""

    # norms of the two gradients
    norm: float
    reference: float
    # between them
    cosine: float
    # norm of their difference
    apart: float
    # the largest difference of one number
    largest: float
    # how many numbers the group has
    numbers: int
    # parameters that have a gradient in the reference only
    missing: int
    # parameters that have a gradient, but none in the reference
    extra: int
    # numbers that are not finite, in either
    broken: int

    @property
    def ratio(self) -> float:
        """Of the norms; NaN where the reference has no gradient."""
        return self.norm / self.reference if self.reference else math.nan


def differences(
    found: StepResult,
    reference: StepResult,
    named: Mapping[str, Sequence[str]],
    device: torch.device,
) -> dict[str, Difference]:
    """By group, the same on all ranks: those of the rank that differs most. Every rank must call.

    Args:
        named: names of parameters by group, as of `parameter_groups`.
        device: what ranks exchange lies there.
    """
    local = {}
    for group, names in named.items():
        local[group] = asdict(_group_difference(found, reference, names))
    of_ranks = world.gather_bytes(json.dumps(local).encode(), device)
    ranks = [json.loads(data) for data in of_ranks]
    worst = {}
    for group in named:
        each = [Difference(**rank[group]) for rank in ranks]
        worst[group] = max(each, key=lambda d: (d.broken, d.missing + d.extra, d.apart))

    return worst


def _group_difference(found: StepResult, reference: StepResult, names: Sequence[str]) -> Difference:
    missing = 0
    extra = 0
    broken = 0
    numbers = 0
    largest = 0.0

    # x·x, y·y, x·y and |x − y|² over the group
    sums = torch.zeros(4, dtype=torch.float64)
    for name in names:
        x = found[name]
        y = reference[name]
        if x is None and y is None:
            continue

        # a gradient that is missing counts as zeros
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
    cosine = float(sums[2]) / product if product else math.nan
    return Difference(
        norm=norm,
        reference=reference_norm,
        cosine=cosine,
        apart=difference_norm,
        largest=largest,
        numbers=numbers,
        missing=missing,
        extra=extra,
        broken=broken,
    )


class Verdict(NamedTuple):
    words: str
    # unclear: lost in rounding; idle: there is no gradient; near: lower precision
    state: Literal["exact", "wrong", "unclear", "idle", "near"]


@dataclass(frozen=True)
class Judge:
    """Decides what a difference means.

    Args:
        noise: what perturbing the weights of the reference does to each group.
        dtype: of the computation.
    """

    noise: Mapping[str, Difference]
    dtype: torch.dtype

    def verdict(self, group: str, d: Difference, mistakes: Mapping[str, float]) -> Verdict:
        """Of a group's difference d.

        Args:
            mistakes: known ones in words, and the factor by which they multiply a gradient.
        """
        if broken := max(d.broken, self.noise[group].broken):
            return Verdict(f"not finite: {broken} of {d.numbers} numbers", "wrong")
        if d.missing or d.extra:
            words = (
                f"{d.missing} parameters without the gradient of one process, "
                f"{d.extra} with one it has not"
            )
            return Verdict(words, "wrong")

        eps = torch.finfo(self.dtype).eps
        noise = self.noise[group].apart
        size = self._size(group)
        allowed = max(FLOOR[self.dtype] * d.reference, MARGIN * noise, MARGIN * eps * size)
        if d.apart > allowed:
            what = "loss" if group == "loss" else "gradient"
            return Verdict(_explain(what, d, mistakes), "wrong")

        # what rounding may change is far less than the gradient
        if group == "loss" or allowed < 0.1 * d.reference:
            return Verdict("exact", "exact")
        if d.reference <= 1000 * eps * size:
            words = "no gradient but rounding" if d.reference else "no gradient"
            return Verdict(words, "idle")

        return Verdict(f"cannot tell: rounding alone makes {noise / d.reference:.1%}", "unclear")

    def _size(self, group: str) -> float:
        """What rounding errors are relative to: the norm of all gradients of the reference.

        For the loss, the loss itself, but at least 1.
        """
        if group == "loss":
            return max(1.0, self.noise["loss"].reference)
        norms = [d.reference for name, d in self.noise.items() if name != "loss"]
        return math.hypot(*norms)


def _explain(what: str, d: Difference, mistakes: Mapping[str, float]) -> str:
    """How a gradient is wrong: another direction, or another length, and why perhaps."""
    if not d.reference:
        return f"a {what} of {d.norm:.3g}, where one process has none"
    factor = math.copysign(d.ratio, d.cosine)
    sine = math.sqrt(max(0.0, 1 - d.cosine**2))

    # the direction differs more than the length
    if d.norm and sine > 0.1 * abs(factor - 1):
        near = f"{d.cosine:.4f}" if d.cosine < 0.9999 else f"1 - {1 - d.cosine:.0e}"
        return f"direction differs (cosine {near}), {d.ratio:.4g} x as long"

    known = []
    for words, value in mistakes.items():
        # a factor of 1 would explain nothing
        if value != 1 and abs(factor / value - 1) < 0.01:
            known.append(words)

    text = f"{factor:.4g} x the {what} of one process"
    if known:
        text += f" ({'; or '.join(known)})"
    return text


def low_precision_verdict(d: Difference) -> Verdict:
    """The verdict on a precision that rounds more: wrong is only a direction that is lost."""
    if d.broken:
        return Verdict(f"not finite: {d.broken} of {d.numbers} numbers", "wrong")
    if not d.reference:
        return Verdict("no gradient", "idle")

    # a single number may be near 0, where its sign means nothing
    if d.numbers == 1:
        return Verdict(f"{math.copysign(d.ratio, d.cosine):.4f} x", "near")

    # a cosine of NaN is lost, too
    if d.cosine >= 0.9:
        return Verdict(f"cosine {d.cosine:.4f}", "near")
    return Verdict(f"cosine {d.cosine:.4f}: direction lost", "wrong")


class GradientRow(NamedTuple):
    """One line of the table: a group of parameters in one of the ways to train."""

    # what was compared with one process: ranks, chunks, precision
    compared: str
    group: str
    difference: Difference
    verdict: Verdict


HEAD = ("compared with one process", "", "|g| / |g one|", "cosine", "largest diff", "verdict")
# of the columns but the last: words to the left, numbers to the right
ALIGNMENT = "<<>>>"


def gradient_table(rows: Sequence[GradientRow]) -> str:
    """One line per row; what is compared is named on the first of its lines."""
    lines = [HEAD]
    before = ""
    for row in rows:
        d = row.difference
        compared = row.compared if row.compared != before else ""

        # between two single numbers it could only be 1 or -1
        cosine = _number(d.cosine) if d.numbers > 1 else ""
        largest = f"{d.largest / (d.reference or 1):.0e}"
        words = row.verdict.words
        lines.append((compared, row.group, _number(d.ratio), cosine, largest, words))
        before = row.compared

    widths = [max(len(line[k]) for line in lines) for k in range(len(ALIGNMENT))]
    texts = []
    for line in lines:
        *cells, words = line
        aligned = []
        for cell, side, width in zip(cells, ALIGNMENT, widths, strict=True):
            aligned.append(f"{cell:{side}{width}}")
        texts.append("  ".join([*aligned, words]))

    return "\n".join(texts)


def _number(x: float) -> str:
    """Six decimals where they say something."""
    return f"{x:.6f}" if 1e-3 < abs(x) < 1e3 else f"{x:.3g}"
