"""AdamW without decay where it hurts, warm-up and cosine by pairs seen, and one guarded step."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from clipsmall.distributed import world
from clipsmall.training import fsdp as sharded


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters by lr and decay: matrices decay; norms, biases, logit_scale and
    logit_bias do not.

    Args:
        scale: name of a parameter -> its lr over `lr`. The two groups of `lr` itself come first,
            though they be empty.

    Raises:
        ValueError: nothing trains.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and not name.endswith(("logit_scale", "logit_bias"))
            groups.setdefault((scale(name), decays), []).append(p)
    if not any(groups.values()):
        raise ValueError("tune: every part of the model is frozen, nothing would train")
    return [
        {"params": those, "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        for (factor, decays), those in groups.items()
    ]


class AdamW(torch.optim.AdamW):
    """Over whole and sharded tensors alike, in one fused kernel: what it does to a number asks no
    other number, so each rank does it to its shares."""

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Fills lists of parameters, gradients and moments, of which torch makes a step."""
        found: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = map(sharded.share, tensors)
        return found


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> AdamW:
    """Over `parameter_groups`; fused on a GPU."""
    fused = any(p.is_cuda for p in model.parameters())
    groups = parameter_groups(model, lr, weight_decay, scale)
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Linear from 1/warmup to 1 over `warmup` steps, then half a cosine to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))

    return LambdaLR(optimizer, factor)


def scaled_lr(lr: float, batch_size: int, rule: str) -> float:
    """`none`: lr as given; `sqrt`: lr is for batch 256 and grows with √(B/256), as suits Adam."""
    return lr * math.sqrt(batch_size / 256) if rule == "sqrt" else lr


@torch.no_grad()
def clipped_norm(accelerator: Any, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """(): the norm of the whole gradient, of sharded tensors too, which is then scaled down to at
    most `limit`.
    """
    accelerator.unscale_gradients()
    found = [p.grad for p in parameters if p.grad is not None]
    mine = [sharded.share(grad) for grad in found]
    kept = [part for part, grad in zip(mine, found, strict=True) if part is grad]
    shares = [part for part, grad in zip(mine, found, strict=True) if part is not grad]
    norm = torch.nn.utils.get_total_norm(kept)
    if shares:
        norm = (
            norm.square() + world.sum_over_ranks(torch.nn.utils.get_total_norm(shares).square())
        ).sqrt()
    torch._foreach_mul_(mine, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


class NonFiniteError(ValueError):
    """A loss or gradient is not finite, and training ends, on all ranks together; weights were not
    touched.

    Attributes:
        numbers: `loss` (this rank's), `grad_norm`, and in fp16 `loss_scale` and `bad_steps`, of
            that step.
        index: (b,) this rank's pairs of that batch.
        broken: (b,) bool, whose features are not finite: none, where the gradient alone is not.
    """

    def __init__(
        self, message: str, numbers: dict[str, float], index: Tensor, broken: Tensor
    ) -> None:
        super().__init__(message)
        self.numbers = numbers
        self.index = index
        self.broken = broken


class Guard:
    """Says, on all ranks alike, whether a step is taken: not if any rank's loss, or the gradient,
    is not finite.

    Without a scaler the first bad step ends the run. In fp16 gradients overflow now and then, and
    at the start, until
    GradScaler has found its scale: a bad step is skipped and the scale halved; `limit` of them in a
    row end the run. Weights, moments and averaged towers stay as they were. The schedule goes on:
    it follows the pairs seen.

    GradScaler skips by itself, too, but fused AdamW, which is what GPUs get, is *called* on an
    overflow, and its kernel
    then writes nothing: the hooks after a step would run, and averaged towers move. Here it is not
    called.

    Args:
        scaler: fp16's, else None.
        limit: bad steps in a row that end the run.
        model: its batch normalisation's running statistics, which the forward pass has changed by
            then, are put back
            after a bad step: there a NaN would stay for ever.
        bad_steps: skipped so far. Those in a row are counted anew when a run is resumed.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, limit: int, model: nn.Module, bad_steps: int = 0
    ) -> None:
        self.scaler = scaler
        self.limit = limit
        self.bad_steps = bad_steps
        self.in_a_row = 0
        self.running = running_statistics(model) if scaler is not None else []
        self.kept = [each.clone() for each in self.running]
        # what torch says of a first step that is skipped; here the schedule is to go on
        if scaler is not None:
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    def step(self, optimizer: Any, losses: dict[str, Tensor], together: Tensor, rows: Any) -> None:
        """The optimizer's step, if this one `passes`."""
        if self.passes(losses, together, rows):
            optimizer.step()

    def passes(self, losses: dict[str, Tensor], together: Tensor, rows: Any) -> bool:
        """Call between clipping, which unscales the gradient, and the optimizer's step.

        Args:
            losses: with `loss` and `grad_norm`; in fp16 `loss_scale` and `bad_steps` are added.
            together: () finite only if all ranks' losses and gradients are; the same on every rank.
            rows: my Embeddings.

        Raises:
            NonFiniteError: a bad step without a scaler, or the `limit`th in a row.
        """
        good = bool(together.isfinite())
        self.in_a_row = 0 if good else self.in_a_row + 1
        self.bad_steps += not good
        if self.scaler is not None:
            losses["loss_scale"] = torch.tensor(self.scaler.get_scale())
            losses["bad_steps"] = torch.tensor(float(self.bad_steps))
        if good:
            for kept, running in zip(self.kept, self.running, strict=True):
                kept.copy_(running)
            return True
        if self.scaler is None or self.in_a_row >= self.limit:
            raise self._end(losses, rows)
        for kept, running in zip(self.kept, self.running, strict=True):
            running.copy_(kept)
        # halves the scale if unscaling found the gradient at fault
        self.scaler.update()
        return False

    def _end(self, losses: dict[str, Tensor], rows: Any) -> NonFiniteError:
        names = ("loss", "grad_norm", "loss_scale", "bad_steps")
        numbers = {name: losses[name].item() for name in names if name in losses}
        said = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        broken = ~torch.cat([rows.image, rows.text], dim=1).isfinite().all(dim=1)
        often = ""
        remedy = "optim.lr or optim.clip"
        if self.scaler is not None:
            often = f" in {self.in_a_row} steps on end (run.max_bad_steps)"
            remedy = "optim.lr, or train with run.precision=bf16 or fp32"
        message = (
            f"loss or gradient not finite{often}: {said}. Weights are untouched; lower {remedy}"
        )
        return NonFiniteError(message, numbers, rows.index, broken)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Of batch normalisation that trains; averaged towers never do, and their copies change after a
    step.
    """
    names = ("running_mean", "running_var", "num_batches_tracked")
    trains = (part for part in model.modules() if part.training)
    return [
        buffer
        for part in trains
        for name, buffer in part.named_buffers(recurse=False)
        if name in names
    ]


def skipped(steps: int, optimizer: torch.optim.Optimizer) -> int:
    """How many of a run's steps were not taken: AdamW counts those that were, and a checkpoint
    holds its count.
    """
    return steps - max((int(state["step"]) for state in optimizer.state.values()), default=0)
