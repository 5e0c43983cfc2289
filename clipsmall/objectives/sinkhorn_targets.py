"""Sinkhorn targets: a slowly averaged teacher says which other captions an image may match."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.pairs import directions, layout_of, negative_counts, scaled, whole_batch
from clipsmall.objectives.sinkhorn import potentials
from clipsmall.objectives.spec import ObjectiveSpec


def sinkhorn_targets(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    alpha: Annotated[float, Field(ge=0, le=1, description="weight of the plain softmax")] = 0.5,
    epsilon: Annotated[float, Field(gt=0, description="temperature of the targets")] = 0.15,
    iterations: Annotated[
        int, Field(ge=1, description="Sinkhorn iterations that make the targets")
    ] = 5,
) -> dict[str, Tensor]:
    """Softmax, part of it against soft targets from optimal transport.

    Also known as:
        OTTER, soft labels from optimal transport, self-distillation with Sinkhorn targets.

    Formula:
        L = alpha · softmax + (1 − alpha) · ½ mean_i [ −Σ_j Q_ij log softmax_j(s C_ij) ]
        + the same over columns.  Q ∝ exp(A/epsilon + f_i + g_j) is the transport plan of the
        teacher's similarities A_ij = cos(v_i, v_j) + cos(t_i, t_j) + cos(v_i, t_j), v and t its
        features of image and text, without its diagonal; its rows (columns) are made
        distributions. s is `soft_scale`, C the cosines.

    Source:
        Wu et al. 2022, arXiv 2112.09445, §3.

    When to use:
        Noisy web pairs, where other captions of the batch fit as well; batches of 64 and up.

    When not:
        Where time counts: one more forward pass of both towers per step. Not with a queue or a
        ring.

    Related:
        `softmax` with a moco queue and `objective.moco.alpha` has soft targets without transport.

    Args:
        rows: my b pairs; `extra` holds `image_target` and `text_target` (b, D) of the head
            `momentum`, and `soft_scale` () of the head of that name.
        columns: the N pairs of the global batch, gathered.
        mask_duplicates: for the softmax part; the targets are there to find such columns.
        alpha: weight of the plain softmax.
        epsilon: temperature of the plan.
        iterations: of Sinkhorn.

    Returns:
        `loss` () mean over my rows; `softmax` (); `soft` () cross entropy against the targets;
        `accuracy` (); `effective_negatives` ().

    Raises:
        ValueError: columns that are a queue, or travel in a ring.

    Examples:
        >>> import torch
        >>> eye = torch.eye(4)
        >>> heads = {"image_target": eye, "text_target": eye, "soft_scale": torch.tensor(2.0)}
        >>> pairs = Embeddings.of(eye, eye, logit_scale=2.0, **heads)
        >>> round(sinkhorn_targets(pairs, pairs)["soft"].item(), 4)  # targets 1/3 for each other
        2.3408
    """
    layout = layout_of(rows, columns, mask_duplicates)
    if layout.ring or not whole_batch(rows, columns):
        raise ValueError(
            "sinkhorn_targets needs exactly the gathered batch as columns: no queue, no ring"
        )

    # the plain softmax
    image, text = directions(rows, columns, layout)
    hard = (image.cross_entropy.mean() + text.cross_entropy.mean()) / 2

    # equal captions stay in: the targets are there to find them
    others = replace(layout, groups=())
    plan = TransportPlan(rows, others, epsilon, iterations)

    # cross entropy against the plan: log sums less the expected logit, both ways
    x = scaled(rows.image, rows.extra["soft_scale"])
    everything = replace(others, keep_own=True)
    sums = similarity.logsumexp(x, columns.text, everything)
    row_sums = sums.rows.mean()
    column_sums = sums.columns[layout.own].mean()
    expected: Tensor = _ExpectedLogit.apply(x, columns.text, plan) / len(x)
    soft = (row_sums + column_sums) / 2 - expected
    return {
        "loss": alpha * hard + (1 - alpha) * soft,
        "softmax": hard.detach(),
        "soft": soft.detach(),
        "accuracy": (image.accuracy + text.accuracy) / 2,
        "effective_negatives": negative_counts(layout).float().mean(),
    }


class TransportPlan:
    """The targets Q, those of images and those of texts averaged, tile by tile; no gradient.

    Args:
        rows: my b pairs, with the teacher's features.
        others: which columns may be targets.
        epsilon: temperature of the plan.
        iterations: of Sinkhorn.
    """

    @torch.no_grad()
    def __init__(self, rows: Embeddings, others: Layout, epsilon: float, iterations: int) -> None:
        self.layout = others
        image = unit(rows.extra["image_target"])
        text = unit(rows.extra["text_target"])
        all_images = world.gather(image)
        all_texts = world.gather(text)

        # (b, 3D) and (N, 3D): their inner product is the sum of the three similarities
        x = torch.cat([image, text, image], dim=1) / epsilon
        y = torch.cat([all_images, all_texts, all_texts], dim=1)
        self.x = x
        self.y = y

        # f and g make the columns sum to 1
        f, _, _ = potentials(x, y, others, iterations, tolerance=0.0)
        column_sums = similarity.logsumexp(x, y, others, u=f, rows=False)
        self.f_of_columns = f
        self.g = -column_sums.columns

        # this f and g make the rows sum to 1
        row_sums = similarity.logsumexp(x, y, others, v=self.g, columns=False)
        self.f = -row_sums.rows

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns, and the targets (rows, columns) of every tile."""
        tiles = similarity.tiles(self.x, self.y, self.layout, v=self.g)
        for i, j, _, _, _, tile in tiles:
            left_out = self.layout.left_out(i, j)
            tile.masked_fill_(left_out, -torch.inf)

            # rows of the first sum to 1, columns of the second
            row_potential = self.f[i, None]
            of_images = (tile + row_potential).exp()
            row_potential = self.f_of_columns[i, None]
            of_texts = (tile + row_potential).exp()

            yield i, j, (of_images + of_texts) / 2


class _ExpectedLogit(torch.autograd.Function):
    """Σ_ij Q_ij (x yᵀ)_ij, differentiable by x and y; its gradient is made while it sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, plan: TransportPlan) -> Tensor:
        dx = torch.zeros_like(x)
        # y may lie in host memory; the sums are made where x is
        dy = torch.zeros_like(y, dtype=x.dtype, device=x.device)

        with torch.autocast(x.device.type, enabled=False):
            for i, j, q in plan.tiles():
                some_y = y[j].to(x.device, x.dtype)
                dx[i].addmm_(q, some_y)
                dy[j].addmm_(q.T, x[i])

        dy = dy.to(y.device, y.dtype)
        ctx.save_for_backward(dx, dy)
        # it is linear in x: the value is x times its own gradient
        return (x * dx).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy = ctx.saved_tensors
        return grad * dx, grad.to(dy.device) * dy, None


SPEC = ObjectiveSpec(
    sinkhorn_targets,
    section="sinkhorn_targets",
    # OTTER's average, which does not change over the run
    heads={"momentum": {"momentum": 0.999, "schedule": "constant"}, "soft_scale": {}},
    ring=False,
)
