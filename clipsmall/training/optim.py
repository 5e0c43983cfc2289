"""AdamW with its parameter groups and learning rate schedule, and a guard against bad steps."""

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

# of batch normalisation
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and weight decay.

    Matrices decay; norms, biases, logit_scale and logit_bias do not.

    Args:
        scale: name of a parameter -> its learning rate divided by `lr`. The two groups of `lr`
            itself come first, even if they are empty.

    Raises:
        ValueError: nothing trains.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {
        (1.0, True): [],
        (1.0, False): [],
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # heads may have a scale and a bias of their own
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
    """AdamW over whole and sharded tensors alike, in one fused kernel.

    AdamW is elementwise, so each rank can update its local part of a sharded tensor.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        """Fills torch's lists of parameters, gradients and moments, from which it makes a step."""
        found: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            # in place: torch goes on with the same lists
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
        rule: `none`, lr as given; `sqrt`, lr is for batch 256 and grows with √(B/256), as suits
            Adam.
    """
    return lr * math.sqrt(batch_size / 256) if rule == "sqrt" else lr


@torch.no_grad()
def clipped_norm(accelerator: Any, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """(): the norm of the whole gradient, which is scaled down in place to at most `limit`.

    Sharded tensors count with their parts on all ranks. In fp16 the loss scale is taken out first.
    """
    accelerator.unscale_gradients()
    # gradients of whole tensors, equal on all ranks, and my parts of sharded ones
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
    # as torch.nn.utils.clip_grad_norm_ has it, 1e-6 included
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm


class NonFiniteError(ValueError):
    """A loss or gradient is not finite, and training ends, on all ranks together.

    Weights have not been changed by the bad step.

    Attributes:
        numbers: of that step: `loss` (this rank's), `grad_norm`, and in fp16 `loss_scale` and
            `bad_steps`.
        index: (b,) this rank's pairs of that batch.
        broken: (b,) bool, pairs with features that are not finite: none if only the gradient is
            not.
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

    It does not if any rank's loss, or the gradient, is not finite. Without a gradient scaler the
    first bad step ends the run. In fp16 gradients overflow now and then, and in the first steps,
    until GradScaler has found its scale: a bad step is skipped and the scale halved; `limit` of
    them in a row end the run. Weights, moments and averaged towers stay as they were. The learning
    rate schedule goes on: it follows the pairs seen.

    GradScaler skips such steps, too, but fused AdamW, which GPUs get, is *called* on an overflow,
    and only its kernel writes nothing: the hooks after a step would run, and averaged towers would
    move. Here it is not called.

    Args:
        scaler: fp16's, else None.
        limit: bad steps in a row that end the run.
        model: the running statistics of its batch normalisation, which the forward pass has
            changed by then, are restored after a bad step: a NaN would stay in them for ever.
        bad_steps: skipped so far. Those in a row are counted from 0 when a run is resumed.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler | None, limit: int, model: nn.Module, bad_steps: int = 0
    ) -> None:
        self.scaler = scaler
        self.limit = limit
        self.bad_steps = bad_steps
        self.in_a_row = 0
        # without a scaler no run goes on after a bad step
        self.running = running_statistics(model) if scaler is not None else []
        self.kept = [each.clone() for each in self.running]
        # torch warns if the first step is skipped and the schedule goes on, which is meant here
        if scaler is not None:
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    def step(
        self, optimizer: Any, losses: dict[str, Tensor], together: Tensor, rows: Embeddings
    ) -> None:
        """The optimizer's step, if this one `passes`."""
        if self.passes(losses, together, rows):
            optimizer.step()

    def passes(self, losses: dict[str, Tensor], together: Tensor, rows: Embeddings) -> bool:
        """Whether this step is good. Call after clipping, which unscales the gradient.

        Args:
            losses: with `loss` and `grad_norm`; in fp16 `loss_scale` and `bad_steps` are added.
            together: () finite only if all ranks' losses and gradients are; the same on every rank.
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
        # halves the scale if unscaling has found a gradient that is not finite
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
    """The buffers of batch normalisation that a forward pass in training mode changes.

    Averaged towers are always in eval mode: their copies change after a step.
    """
    found = []
    for part in model.modules():
        if part.training:
            for name, buffer in part.named_buffers(recurse=False):
                if name in RUNNING_STATISTICS:
                    found.append(buffer)
    return found


def skipped_steps(steps: int, optimizer: torch.optim.Optimizer) -> int:
    """How many of a run's steps were not taken.

    AdamW counts those that were, and a checkpoint holds its count.
    """
    taken = [int(state["step"]) for state in optimizer.state.values()]
    return steps - max(taken, default=0)
