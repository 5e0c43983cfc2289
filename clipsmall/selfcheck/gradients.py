"""Compares one step's loss and gradients with a reference, by groups of parameters.

An error is reported with its factor, as most mistakes multiply a gradient by the number of ranks or
of chunks.
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
# Relative differences below this always pass. On glyphs rounding causes 1e-15 (float64) and 1e-6
# (float32); leaving out one pair of 1,024 causes 1e-3, and any mistake in the number of ranks or
# chunks more.
FLOOR = {torch.float64: 1e-8, torch.float32: 3e-4}
# Units in the last place by which weights are perturbed, to measure the effect of rounding.
PERTURBATION = 8
# Differences up to this many times the perturbation's effect still count as rounding.
MARGIN = 10


def disable_randomness(model: nn.Module) -> None:
    """Training mode without random layers (dropout, stochastic depth, ...).

    Random layers check `training`, so it is set to False. Batch normalisation stays in training
    mode and uses batch statistics; averaged towers stay in evaluation mode, as during training.
    """
    for part in model.train().modules():
        is_norm = isinstance(part, GlobalBatchNorm | nn.modules.batchnorm._BatchNorm)
        if part.training and not is_norm:
            part.training = False


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Change every weight by a few units in the last place, an effect like that of rounding."""
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

    Earlier batches only run forward, to fill the objective's memory.

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
    """Errors of the differentiable exchanges between ranks, each tested separately."""
    ranks = world.size()

    # the ranks' losses have different factors, 1 to W: the gradient must be their sum
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
    """Group (tower, head, or a parameter's own name) -> names of parameters; and the "loss".

    Parameters that image embeddings depend on are the image tower, whatever the library calls them;
    parameters that both modalities depend on are a separate group.
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
    # cosine between the two gradients
    cosine: float
    # norm of their difference
    apart: float
    # the largest difference of a single number
    largest: float
    # how many numbers the group has
    numbers: int
    # parameters that have a gradient in the reference only
    missing: int
    # parameters that have a gradient, but none in the reference
    extra: int
    # numbers that are not finite in either gradient
    broken: int

    @property
    def ratio(self) -> float:
        """Ratio of the norms; NaN if the reference has no gradient."""
        return self.norm / self.reference if self.reference else math.nan


def differences(
    found: StepResult,
    reference: StepResult,
    named: Mapping[str, Sequence[str]],
    device: torch.device,
) -> dict[str, Difference]:
    """Group -> its difference on the rank that differs most. Every rank must call.

    Args:
        named: names of parameters by group, from `gradient_groups`.
        device: device of the tensors that ranks exchange.
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

        # a missing gradient counts as zeros
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
    # unclear: lost in rounding; idle: no gradient; near: agrees, in lower precision
    state: Literal["exact", "wrong", "unclear", "idle", "near"]


@dataclass(frozen=True)
class Judge:
    """Decides whether a difference is an error or rounding.

    Args:
        noise: for each group, the effect of perturbing the reference's weights.
        dtype: dtype of the computation.
    """

    noise: Mapping[str, Difference]
    dtype: torch.dtype

    def verdict(self, group: str, d: Difference, mistakes: Mapping[str, float]) -> Verdict:
        """The verdict on the difference d of a group.

        Args:
            mistakes: common mistakes in words -> the factor by which they multiply a gradient.
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

        # rounding can change far less than the gradient itself
        if group == "loss" or allowed < 0.1 * d.reference:
            return Verdict("exact", "exact")
        if d.reference <= 1000 * eps * size:
            words = "no gradient but rounding" if d.reference else "no gradient"
            return Verdict(words, "idle")

        return Verdict(f"cannot tell: rounding alone makes {noise / d.reference:.1%}", "unclear")

    def _size(self, group: str) -> float:
        """The scale of rounding errors: the norm of all gradients of the reference.

        For the loss it is the loss itself, but at least 1.
        """
        if group == "loss":
            return max(1.0, self.noise["loss"].reference)
        norms = [d.reference for name, d in self.noise.items() if name != "loss"]
        return math.hypot(*norms)


def _explain(what: str, d: Difference, mistakes: Mapping[str, float]) -> str:
    """How a gradient is wrong, in direction or in length, and possible causes."""
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
        # a factor of 1 explains nothing
        if value != 1 and abs(factor / value - 1) < 0.01:
            known.append(words)

    text = f"{factor:.4g} x the {what} of one process"
    if known:
        text += f" ({'; or '.join(known)})"
    return text


def low_precision_verdict(d: Difference) -> Verdict:
    """The verdict on a lower precision, which is wrong only if the direction is lost."""
    if d.broken:
        return Verdict(f"not finite: {d.broken} of {d.numbers} numbers", "wrong")
    if not d.reference:
        return Verdict("no gradient", "idle")

    # for a single number the cosine is only its sign, which means nothing near 0
    if d.numbers == 1:
        return Verdict(f"{math.copysign(d.ratio, d.cosine):.4f} x", "near")

    # NaN counts as lost, too
    if d.cosine >= 0.9:
        return Verdict(f"cosine {d.cosine:.4f}", "near")
    return Verdict(f"cosine {d.cosine:.4f}: direction lost", "wrong")


class GradientRow(NamedTuple):
    """One line of the table: a group of parameters in one way to train."""

    # the way to train: ranks, chunks, precision
    compared: str
    group: str
    difference: Difference
    verdict: Verdict


HEAD = ("compared with one process", "", "|g| / |g one|", "cosine", "largest diff", "verdict")
# Alignment of all columns but the last.
ALIGNMENT = "<<>>>"


def gradient_table(rows: Sequence[GradientRow]) -> str:
    """One line per row; consecutive rows with the same `compared` name it only once."""
    lines = [HEAD]
    before = ""
    for row in rows:
        d = row.difference
        compared = row.compared if row.compared != before else ""

        # for a single number the cosine can only be 1 or -1
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
    """The number with up to six decimals."""
    return f"{x:.6f}" if 1e-3 < abs(x) < 1e3 else f"{x:.3g}"
