"""AdamW, its parameter groups and learning rate schedule, and a guard against bad steps."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from clipsmall.batch import Embeddings
from clipsmall.distributed import world
from clipsmall.training import fsdp

# names of BatchNorm's buffers
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Groups of trainable parameters by learning rate and weight decay.

    Matrices get weight decay; norms, biases, logit_scale and logit_bias do not.

    Args:
        scale: maps a parameter's name to its learning rate divided by `lr`. The two groups with
            factor 1 come first, even if they are empty.

    Raises:
        ValueError: nothing trains.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {
        (1.0, True): [],
        (1.0, False): [],
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # heads may have their own logit_scale and logit_bias
            decays = parameter.ndim > 1 and not name.endswith(("logit_scale", "logit_bias"))
            groups.setdefault((scale(name), decays), []).append(parameter)
    if not any(groups.values()):
        raise ValueError("tune: every part of the model is frozen, nothing would train")
    return [
        {
            "params": parameters,
            "lr": lr * factor,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (factor, decays), parameters in groups.items()
    ]


class AdamW(torch.optim.AdamW):
    """AdamW for whole and sharded tensors, in one fused kernel.

    AdamW is elementwise, so each rank can update its local part of a sharded tensor.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Fill torch's lists of parameters, gradients and moments for one step."""
        found: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            # in place, because torch uses these lists afterwards
            tensors[:] = map(fsdp.local_part, tensors)
        return found


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> AdamW:
    """AdamW over `parameter_groups`; fused on a GPU."""
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    groups = parameter_groups(model, lr, weight_decay, scale)
    return AdamW(
        groups,
        lr=lr,
        betas=betas,
        eps=eps,
        fused=on_gpu,
    )


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Linear from 1/warmup to 1 over `warmup` steps, then half a cosine to 0 at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        length = max(steps - warmup, 1)
        progress = min((step - warmup) / length, 1.0)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def scaled_lr(lr: float, batch_size: int, rule: str) -> float:
    """The learning rate for a batch size.

    Args:
        rule: `none`: lr as given; `sqrt`: lr is for batch size 256 and is multiplied by
            √(B/256), which suits Adam.
    """
    return lr * math.sqrt(batch_size / 256) if rule == "sqrt" else lr


@torch.no_grad()
def clipped_norm(accelerator: Any, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clip the gradient in place to norm `limit`; returns the norm () before clipping.

    The norm includes the parts of sharded tensors on all ranks. In fp16 the gradient is first
    divided by the loss scale.
    """
    accelerator.unscale_gradients()
    # gradients of whole tensors, equal on all ranks, and local parts of sharded ones
    whole = []
    parts = []
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        mine = fsdp.local_part(parameter.grad)
        gradients.append(mine)
        if mine is parameter.grad:
            whole.append(mine)
        else:
            parts.append(mine)
    norm = torch.nn.utils.get_total_norm(whole)
    if parts:
        of_parts = torch.nn.utils.get_total_norm(parts)
        norm = (norm.square() + world.sum_over_ranks(of_parts.square())).sqrt()
    # as in torch.nn.utils.clip_grad_norm_, including the 1e-6
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm


class NonFiniteError(ValueError):
    """A loss or gradient is not finite; raised on all ranks together.

    The bad step has not changed the weights.

    Attributes:
        numbers: `loss` of this rank and `grad_norm` at that step; in fp16 also `loss_scale` and
            `bad_steps`.
        index: (b,) numbers of this rank's pairs in that batch.
        broken: (b,) bool, True for pairs whose features are not finite; all False if only the
            gradient is not finite.
    """

    def __init__(
        self, message: str, numbers: dict[str, float], index: Tensor, broken: Tensor
    ) -> None:
        super().__init__(message)
        self.numbers = numbers
        self.index = index
        self.broken = broken


class Guard:
    """Decides whether the optimizer takes a step, on all ranks alike.

    A step is bad if the loss of any rank, or the gradient, is not finite. Without a gradient scaler
    the first bad step ends the run. In fp16, gradients overflow now and then, and in the first
    steps, until GradScaler has found its scale: a bad step is skipped and the scale is halved, and
    `limit` bad steps in a row end the run. A skipped step does not change weights, moments or
    averaged towers, but the learning rate schedule advances, because it follows the pairs seen.

    GradScaler alone would not do: on an overflow it still *calls* fused AdamW (used on GPUs), whose
    kernel then writes nothing. The hooks after a step would run and change averaged towers. Here
    the optimizer is not called.

    Args:
        scaler: the gradient scaler of fp16, else None.
        limit: bad steps in a row that end the run.
        model: its BatchNorm running statistics are restored after a bad step, because the forward
            pass has changed them, and a NaN would stay in them forever.
        bad_steps: number of steps skipped so far. The count in a row restarts at 0 on resume.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, limit: int, model: nn.Module, bad_steps: int = 0
    ) -> None:
        self.scaler = scaler
        self.limit = limit
        self.bad_steps = bad_steps
        self.in_a_row = 0
        # without a scaler, the first bad step ends the run, so nothing need be restored
        self.running = running_statistics(model) if scaler is not None else []
        self.kept = [each.clone() for each in self.running]
        # torch warns if the schedule advances although the first step was skipped; intended here
        if scaler is not None:
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    def step(
        self, optimizer: Any, losses: dict[str, Tensor], together: Tensor, rows: Embeddings
    ) -> None:
        """Take the optimizer's step, if it `passes`."""
        if self.passes(losses, together, rows):
            optimizer.step()

    def passes(self, losses: dict[str, Tensor], together: Tensor, rows: Embeddings) -> bool:
        """Whether this step is good. Call after clipping, which unscales the gradient.

        Args:
            losses: with `loss` and `grad_norm`; in fp16 `loss_scale` and `bad_steps` are added.
            together: () finite only if losses and gradients of all ranks are; equal on every rank.
            rows: this rank's embeddings.

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
            copy_each(self.running, self.kept)
            return True
        if self.scaler is None or self.in_a_row >= self.limit:
            raise self._error(losses, rows)
        copy_each(self.kept, self.running)
        # halves the scale if unscaling found a gradient that is not finite
        self.scaler.update()
        return False

    def _error(self, losses: dict[str, Tensor], rows: Embeddings) -> NonFiniteError:
        numbers = dict[str, float]()
        for name in ("loss", "grad_norm", "loss_scale", "bad_steps"):
            if name in losses:
                numbers[name] = losses[name].item()
        values = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        finite = torch.cat([rows.image, rows.text], dim=1).isfinite().all(dim=1)
        often = ""
        remedy = "optim.lr or optim.clip"
        if self.scaler is not None:
            often = f" in {self.in_a_row} steps on end (run.max_bad_steps)"
            remedy = "optim.lr, or train with run.precision=bf16 or fp32"
        message = (
            f"loss or gradient not finite{often}: {values}. Weights are untouched; lower {remedy}"
        )
        return NonFiniteError(message, numbers, rows.index, ~finite)


def copy_each(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy tensors into others of the same shapes."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The BatchNorm buffers that a forward pass in training mode changes.

    Averaged towers are always in eval mode, so their buffers are not included.
    """
    found = []
    for part in model.modules():
        if part.training:
            for name, buffer in part.named_buffers(recurse=False):
                if name in RUNNING_STATISTICS:
                    found.append(buffer)
    return found


def skipped_steps(steps: int, optimizer: torch.optim.Optimizer) -> int:
    """Number of a run's steps that were skipped.

    AdamW counts the steps taken, and checkpoints contain its count.
    """
    taken = [int(state["step"]) for state in optimizer.state.values()]
    return steps - max(taken, default=0)
