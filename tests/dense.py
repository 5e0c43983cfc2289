"""Reference implementations of the objectives: plain autograd over whole matrices in one process.

Tests compare the streamed objectives with these. They are written from the formulas and use nothing
of the package but `Embeddings`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings


def counted(e: Embeddings, mask: bool) -> Tensor:
    """(B, B) True for the negatives: not the diagonal and, if `mask`, not equal captions."""
    own = torch.eye(len(e.index), dtype=torch.bool)
    return ~own & ~(mask & (e.caption_hash[:, None] == e.caption_hash[None, :]))


def logits(e: Embeddings) -> Tensor:
    return e.logit_scale * e.image @ e.text.T


def softmax(e: Embeddings, mask: bool, intra_modal: bool = False) -> Tensor:
    out = ~counted(e, mask)
    keep_own = out & ~torch.eye(len(out), dtype=torch.bool)
    s = logits(e).masked_fill(keep_own, -torch.inf)
    target = torch.arange(len(out))
    forth = s
    back = s.T
    if intra_modal:
        images = (e.logit_scale * e.image @ e.image.T).masked_fill(out, -torch.inf)
        texts = (e.logit_scale * e.text @ e.text.T).masked_fill(out, -torch.inf)
        forth = torch.cat([s, images], dim=1)
        back = torch.cat([s.T, texts], dim=1)
    return (F.cross_entropy(forth, target) + F.cross_entropy(back, target)) / 2


def dcl(
    e: Embeddings, mask: bool, weighted: bool = False, sigma: float = 0.5, intra_modal: bool = False
) -> Tensor:
    s = logits(e)
    out = ~counted(e, mask)
    own = s.diagonal()
    rest = s.masked_fill(out, -torch.inf)
    forth = rest
    back = rest.T
    if intra_modal:
        forth = torch.cat(
            [forth, (e.logit_scale * e.image @ e.image.T).masked_fill(out, -torch.inf)], dim=1
        )
        back = torch.cat(
            [back, (e.logit_scale * e.text @ e.text.T).masked_fill(out, -torch.inf)], dim=1
        )
    cosines = (e.image * e.text).sum(dim=1).detach()
    weight = 2 - len(own) * (cosines / sigma).softmax(dim=0) if weighted else 1.0
    some = ~out.all(dim=1)
    losses = [
        (side.logsumexp(dim=1) - weight * own)[some].sum() / len(own) for side in (forth, back)
    ]
    return (losses[0] + losses[1]) / 2


def sigmoid(e: Embeddings, mask: bool, relative_bias: bool = False) -> Tensor:
    s = (
        e.logit_scale * (e.image @ e.text.T + e.logit_bias)
        if relative_bias
        else logits(e) + e.logit_bias
    )
    signs = 2 * torch.eye(len(s), dtype=s.dtype) - 1
    costs = -F.logsigmoid(signs * s)
    return (costs * (counted(e, mask) | torch.eye(len(s), dtype=torch.bool))).sum() / len(s)


def triplet(e: Embeddings, mask: bool, margin: float = 0.2) -> Tensor:
    c = e.image @ e.text.T
    ok = counted(e, mask)
    own = c.diagonal()
    by_image = (margin + c - own[:, None]).clamp(min=0)
    by_text = (margin + c - own[None, :]).clamp(min=0)
    return ((by_image + by_text) * ok).sum() / len(c)


def hardest(e: Embeddings, mask: bool, margin: float = 0.2) -> Tensor:
    c = e.image @ e.text.T
    ok = counted(e, mask)
    own = c.diagonal()
    by_image = (margin + c - own[:, None]).clamp(min=0)
    by_text = (margin + c - own[None, :]).clamp(min=0)
    return ((by_image * ok).amax(dim=1) + (by_text * ok).amax(dim=0)).mean()


def spectral(e: Embeddings, mask: bool, mu: float = 10.0) -> Tensor:
    c = e.image @ e.text.T
    ok = counted(e, mask)
    return (
        -2 * c.diagonal().mean() + mu * ((c**2 * ok).sum(dim=1) / ok.sum(dim=1).clamp(min=1)).mean()
    )


def align_uniform(
    e: Embeddings,
    mask: bool,
    align: float = 1.0,
    uniform: float = 1.0,
    alpha: float = 2.0,
    t: float = 2.0,
    cross: bool = False,
) -> Tensor:
    ok = counted(e, mask)

    def spread(x: Tensor, y: Tensor) -> Tensor:
        apart = ((x[:, None] - y[None, :]) ** 2).sum(dim=-1)
        return (-t * apart)[ok].exp().mean().log()

    alignment = ((e.image - e.text) ** 2).sum(dim=1).pow(alpha / 2).mean()
    both = (spread(e.image, e.image) + spread(e.text, e.text)) / 2
    return align * alignment + uniform * (spread(e.image, e.text) if cross else both)


def sinkhorn(
    e: Embeddings, mask: bool, iterations: int = 20, tolerance: float = 0.0, unrolled: bool = False
) -> Tensor:
    assert tolerance == 0
    own = torch.eye(len(e.index), dtype=torch.bool)
    s = logits(e).masked_fill(~counted(e, mask) & ~own, -torch.inf)
    fixed = s if unrolled else s.detach()
    f = -fixed.logsumexp(dim=1)
    g = torch.zeros_like(fixed[0])
    for step in range(iterations):
        if step:
            f = -(fixed + g).logsumexp(dim=1)
        g = -(fixed + f[:, None]).logsumexp(dim=0)
    value = -(fixed.diagonal() + f + g).mean()
    if unrolled:
        return value
    plan = (fixed + f[:, None] + g).exp()
    surrogate = (((plan - torch.eye(len(s), dtype=s.dtype)) / len(s)) * logits(e)).sum()
    return surrogate + (value - surrogate).detach()


def sinkhorn_targets(
    e: Embeddings, mask: bool, alpha: float = 0.5, epsilon: float = 0.15, iterations: int = 5
) -> Tensor:
    v, t = (F.normalize(e.extra[name], dim=-1).detach() for name in ("image_target", "text_target"))
    a = ((v @ v.T + t @ t.T + v @ t.T) / epsilon).masked_fill(
        torch.eye(len(v), dtype=torch.bool), -torch.inf
    )
    q = a.exp()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True)
        q = q / q.sum(dim=0, keepdim=True)
    s = e.extra["soft_scale"] * e.image @ e.text.T
    of_images = q / q.sum(dim=1, keepdim=True)
    of_texts = q / q.sum(dim=0, keepdim=True)
    by_image = s.log_softmax(dim=1)
    by_text = s.log_softmax(dim=0)
    soft = -((of_images * by_image).sum() + (of_texts * by_text).sum()) / (2 * len(s))
    return alpha * softmax(e, mask) + (1 - alpha) * soft


# (objective, its reference, options)
Case = tuple[str, Any, dict[str, Any]]
CASES: list[Case] = [
    ("softmax", softmax, {}),
    ("softmax", softmax, {"intra_modal": True}),
    ("dcl", dcl, {}),
    ("dcl", dcl, {"intra_modal": True}),
    ("dclw", lambda e, mask, **o: dcl(e, mask, weighted=True, **o), {"sigma": 0.3}),
    ("sigmoid", sigmoid, {}),
    ("sigmoid", sigmoid, {"relative_bias": True}),
    ("triplet", triplet, {"margin": 0.3}),
    (
        "vse++",
        lambda e, mask, margin, warmup: hardest(e, mask, margin),
        {"margin": 0.3, "warmup": 0.0},
    ),
    (
        "vse++",
        lambda e, mask, margin, warmup: triplet(e, mask, margin),
        {"margin": 0.3, "warmup": 1.0},
    ),
    ("spectral", spectral, {"mu": 3.0}),
    ("align_uniform", align_uniform, {}),
    (
        "align_uniform",
        align_uniform,
        {"align": 6.0, "uniform": 2.0, "alpha": 1.0, "t": 3.0, "cross": True},
    ),
    ("sinkhorn", sinkhorn, {"iterations": 7, "tolerance": 0.0}),
    ("sinkhorn", sinkhorn, {"iterations": 0, "tolerance": 0.0}),
    ("sinkhorn", sinkhorn, {"iterations": 4, "tolerance": 0.0, "unrolled": True}),
    ("sinkhorn_targets", sinkhorn_targets, {}),
    ("sinkhorn_targets", sinkhorn_targets, {"alpha": 0.2, "epsilon": 0.5, "iterations": 3}),
]
