"""Soft targets: averaged towers say which other columns a row may also match."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity
from clipsmall.distributed.similarity import Layout
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.pairs import directions, dots, layout, negatives, scaled


class SoftTargets(nn.Module):
    """Softmax with momentum distillation, over the columns of a `moco` queue (ALBEF, Li et al.
    2021, arXiv 2107.07651, §3.4, eq. 6).

    L = ½ mean_i [ LSE_j S_ij − (1 − α) S_ii − α Σ_j q_ij S_ij ] + the same for texts among images,
    q_ij = softmax_j(S'_ij), S' the logits of the averaged towers' own features with the same
    columns, no gradient.

    For noisy web pairs: what the averaged towers find to fit as well is pushed away less. α grows
    from 0 over the first steps, as the average knows nothing then (ALBEF: 0.4, over the first
    epoch).

    Σ_j q_ij S_ij is x_i · Σ_j q_ij y_j, and that sum is the gradient of the teacher's LSE: nothing
    is held but (b, D).

    Args:
        setting: its `steps` give `ramp` its length.
        alpha: the soft targets' weight. ramp: share of the run over which it grows.
        mask_duplicates: leave columns with the row's own caption out.

    Called with rows (`extra` holds the head momentum's targets) and a queue's columns it returns
    `loss` (mean over my rows), `softmax` (the plain loss), `accuracy`, `effective_negatives`.
    """

    def __init__(
        self, setting: RunContext, alpha: float, ramp: float = 0.1, mask_duplicates: bool = True
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.until = round(ramp * setting.steps)
        self.mask_duplicates = mask_duplicates
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        place = layout(rows, columns, self.mask_duplicates)
        image, text = directions(rows, columns, place)
        grown = (self.step.to(image.own.dtype) / self.until).clamp(max=1.0) if self.until else 1.0
        hard = (image.surprise.mean() + text.surprise.mean()) / 2
        pulls = [
            (
                way.own
                - dots(scaled(mine, rows.logit_scale), expected(rows, target, theirs, place))
            ).mean()
            / 2
            for way, mine, target, theirs in (
                (image, rows.image, "image_target", columns.text),
                (text, rows.text, "text_target", columns.image),
            )
        ]
        self.step += 1
        return {
            "loss": hard + self.alpha * grown * (pulls[0] + pulls[1]),
            "softmax": hard.detach(),
            "accuracy": (image.accuracy + text.accuracy) / 2,
            "effective_negatives": negatives(place).float().mean(),
        }


def expected(rows: Embeddings, target: str, y: Tensor, place: Layout) -> Tensor:
    """(b, D) the mean of the columns y (N, D) under the averaged towers' softmax; no gradient."""
    with torch.enable_grad():
        teacher = scaled(unit(rows.extra[target]), rows.logit_scale).detach().requires_grad_()
        sums = similarity.logsumexp(
            teacher, y.detach(), replace(place, keep_own=True), columns=False
        )
        made: Tensor = torch.autograd.grad(sums.rows.sum(), teacher)[0]
    return made
