"""Sinkhorn targets: a slowly averaged teacher says which other captions an image may also match."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity, world
from clipsmall.distributed.similarity import Layout
from clipsmall.model.dual_encoder import unit
from clipsmall.objectives.pairs import directions, layout, negatives, scaled, whole_batch
from clipsmall.objectives.sinkhorn import potentials


def sinkhorn_targets(
    rows: Embeddings,
    columns: Embeddings,
    mask_duplicates: bool = True,
    alpha: float = 0.5,
    epsilon: float = 0.15,
    iterations: int = 5,
) -> dict[str, Tensor]:
    """OTTER: softmax, part of it against soft targets from optimal transport (Wu et al. 2022, arXiv
    2112.09445, §3).

    L = alpha · softmax + (1 − alpha) · ½ mean_i [ −Σ_j Q_ij log softmax_j(s C_ij) ] + the same over
    columns.

    Q ∝ exp(A/epsilon + f_i + g_j) is the transport plan of the teacher's similarities A_ij =
    cos(v_i, v_j) + cos(t_i, t_j) + cos(v_i, t_j), v and t being features of towers averaged over
    steps (`momentum`), without its diagonal, and its rows (columns) made distributions. For noisy
    web pairs, where other captions of the batch fit as well; batches of 64 and up. Costs one more
    forward pass of both towers.

    Args:
        rows: my b pairs; `extra` holds `image_target` and `text_target` (b, D) of the head
            `momentum`, and `soft_scale` () of the head `soft_scale`, the second temperature.
            columns: the global batch.
        mask_duplicates: for the softmax part; the targets are there to find such columns.
        alpha: weight of the plain softmax. epsilon: temperature of the plan. iterations: of
            Sinkhorn.

    Returns `loss` (mean over my rows), `softmax`, `soft` (cross entropy against the targets),
    `accuracy`, `effective_negatives`.

    Raises:
        ValueError: columns that are a queue, or travel in a ring.
    """
    place = layout(rows, columns, mask_duplicates)
    if place.ring or not whole_batch(rows, columns):
        raise ValueError(
            "sinkhorn_targets needs exactly the gathered batch as columns: no queue, no ring"
        )
    image, text = directions(rows, columns, place)
    hard = (image.surprise.mean() + text.surprise.mean()) / 2
    # targets are there to find equal captions
    others = replace(place, groups=())
    plan = TransportPlan(rows, others, epsilon, iterations)
    x = scaled(rows.image, rows.extra["soft_scale"])
    sums = similarity.logsumexp(x, columns.text, replace(others, keep_own=True))
    expected: Tensor = _Expected.apply(x, columns.text, plan) / len(x)
    soft = (sums.rows.mean() + sums.columns[place.own].mean()) / 2 - expected
    return {
        "loss": alpha * hard + (1 - alpha) * soft,
        "softmax": hard.detach(),
        "soft": soft.detach(),
        "accuracy": (image.accuracy + text.accuracy) / 2,
        "effective_negatives": negatives(place).float().mean(),
    }


class TransportPlan:
    """The targets Q, tile by tile: those of images and those of texts, averaged; no gradient."""

    @torch.no_grad()
    def __init__(self, rows: Embeddings, others: Layout, epsilon: float, iterations: int) -> None:
        v, t = (unit(rows.extra[name]) for name in ("image_target", "text_target"))
        all_v = world.gather(v)
        all_t = world.gather(t)
        self.layout = others
        self.x = torch.cat([v, t, v], dim=1) / epsilon
        self.y = torch.cat([all_v, all_t, all_t], dim=1)
        f, _, _ = potentials(self.x, self.y, others, iterations, tolerance=0.0)
        self.g = -similarity.logsumexp(self.x, self.y, others, u=f, rows=False).columns
        # rows sum to 1
        self.f = -similarity.logsumexp(self.x, self.y, others, v=self.g, columns=False).rows
        # with g: columns sum to 1
        self.f_of_columns = f

    def tiles(self) -> Any:
        for i, j, _, _, _, tile in similarity.tiles(self.x, self.y, self.layout, v=self.g):
            tile.masked_fill_(self.layout.left_out(i, j), -torch.inf)
            yield (
                i,
                j,
                ((tile + self.f[i, None]).exp() + (tile + self.f_of_columns[i, None]).exp()) / 2,
            )


class _Expected(torch.autograd.Function):
    """Σ_ij Q_ij (x yᵀ)_ij, differentiable by x and y; the gradient is made while it sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, plan: TransportPlan) -> Tensor:
        dx = torch.zeros_like(x)
        dy = torch.zeros_like(y, dtype=x.dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for i, j, q in plan.tiles():
                dx[i].addmm_(q, y[j].to(x.device, x.dtype))
                dy[j].addmm_(q.T, x[i])
        ctx.save_for_backward(dx, dy.to(y.device, y.dtype))
        return (x * dx).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy = ctx.saved_tensors
        return grad * dx, grad.to(dy.device) * dy, None
