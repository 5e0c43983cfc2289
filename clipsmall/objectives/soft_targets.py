"""Soft targets: averaged towers say which other columns a row may also match."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity
from clipsmall.distributed.similarity import Layout
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.pairs import directions, dots, layout_of, negative_counts, scaled


class SoftTargets(nn.Module):
    """Softmax with momentum distillation, over the columns of a moco queue.

    Also known as:
        Momentum distillation (MoD), soft-label InfoNCE, the ITC loss of ALBEF and BLIP.

    Formula:
        L = ½ mean_i [ LSE_j S_ij − (1 − α) S_ii − α Σ_j q_ij S_ij ] + the same for texts among
        images;  q_ij = softmax_j(S'_ij), S' the logits of the averaged towers' own features with
        the same columns, without gradient. Σ_j q_ij S_ij is x_i · Σ_j q_ij y_j, and that sum is the
        gradient of the teacher's LSE: nothing is held but (b, D).

    Source:
        ALBEF, Li et al. 2021, arXiv 2107.07651, §3.4, eq. 6.

    When to use:
        Noisy web pairs: what the averaged towers find to fit as well is pushed away less.

    When not:
        In the first steps: the average knows nothing then, so α grows from 0 (ALBEF: to 0.4, over
        the first epoch).

    Related:
        It replaces `softmax` where `objective.moco.alpha` is above 0; `sinkhorn_targets` makes
        targets by optimal transport.

    Called with rows, whose `extra` holds `image_target` and `text_target` (b, D) of the head
    momentum, and the N columns of a queue.

    Args:
        context: its `steps` give `ramp` its length.
        alpha: weight of the soft targets.
        ramp: fraction of the run over which it grows.
        mask_duplicates: leave columns with the row's own caption out.

    Returns:
        `loss` () mean over my rows; `softmax` () the plain loss; `accuracy` ();
        `effective_negatives` ().

    Examples:
        >>> eye = torch.eye(4)
        >>> pairs = Embeddings.of(eye, eye, logit_scale=2.0, image_target=eye, text_target=eye)
        >>> context = RunContext(width=4, batch_size=4, steps=10)
        >>> terms = SoftTargets(context, alpha=0.5, ramp=0.0)(pairs, pairs)
        >>> round(terms["softmax"].item(), 4), round(terms["loss"].item(), 4)
        (0.3408, 0.6295)
    """

    def __init__(
        self,
        context: RunContext,
        alpha: Annotated[
            float,
            Field(ge=0, le=1, description="softmax: weight of the averaged towers' soft targets"),
        ] = 0.0,
        ramp: Annotated[
            float, Field(ge=0, le=1, description="fraction of the run over which alpha grows")
        ] = 0.1,
        mask_duplicates: bool = True,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.ramp_steps = round(ramp * context.steps)
        self.mask_duplicates = mask_duplicates
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        layout = layout_of(rows, columns, self.mask_duplicates)
        image, text = directions(rows, columns, layout)
        grown: Tensor | float = 1.0
        if self.ramp_steps:
            step = self.step.to(image.own.dtype)
            grown = (step / self.ramp_steps).clamp(max=1.0)

        both_ways = image.cross_entropy.mean() + text.cross_entropy.mean()
        hard = both_ways / 2

        # α (S_ii − Σ_j q_ij S_ij): what the soft targets change in either direction
        expected_text = expected_column(rows, "image_target", columns.text, layout)
        expected_image = expected_column(rows, "text_target", columns.image, layout)
        of_image = dots(scaled(rows.image, rows.logit_scale), expected_text)
        of_text = dots(scaled(rows.text, rows.logit_scale), expected_image)
        pull_of_image = (image.own - of_image).mean() / 2
        pull_of_text = (text.own - of_text).mean() / 2
        soft = self.alpha * grown * (pull_of_image + pull_of_text)

        self.step += 1
        return {
            "loss": hard + soft,
            "softmax": hard.detach(),
            "accuracy": (image.accuracy + text.accuracy) / 2,
            "effective_negatives": negative_counts(layout).float().mean(),
        }


def expected_column(rows: Embeddings, target: str, y: Tensor, layout: Layout) -> Tensor:
    """(b, D) mean of the columns y (N, D) under the averaged towers' softmax; no gradient.

    Args:
        rows: my b pairs.
        target: the entry of `extra` with the averaged towers' features (b, D).
        y: the columns of the other modality.
        layout: which columns are negatives; a row's own counts, too.
    """
    everything = replace(layout, keep_own=True)
    features = unit(rows.extra[target])

    with torch.enable_grad():
        teacher = scaled(features, rows.logit_scale)
        teacher = teacher.detach().requires_grad_()
        y = y.detach()
        sums = similarity.logsumexp(teacher, y, everything, columns=False)
        # the gradient of a log sum is the mean of the columns under its softmax
        total = sums.rows.sum()
        expected: Tensor = torch.autograd.grad(total, teacher)[0]
    return expected
