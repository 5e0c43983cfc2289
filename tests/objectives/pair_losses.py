"""What tests of pair losses share: embeddings, a call by name, and gradients to compare."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings, RunContext
from clipsmall.objectives import OBJECTIVES

SETTING = RunContext(width=12, batch_size=17, steps=10)


def embeddings(
    size: int, noise: float = 1.0, scale: float = 14.3, bias: float = -3.0, seed: int = 0
) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    text = image + noise * torch.randn(size, 12, generator=generator, dtype=torch.float64)
    leaf: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    # losses may differ along the length of a feature
    image = image.requires_grad_()
    text = text.requires_grad_()
    return Embeddings(
        F.normalize(image, dim=-1),
        F.normalize(text, dim=-1),
        torch.randperm(size, generator=generator) * 7,
        torch.arange(size) - 2**40,
        torch.tensor(scale, **leaf),
        torch.tensor(bias, **leaf),
        {
            "raw_image": image,
            "raw_text": text,
            "image_target": image.detach()
            + torch.randn(size, 12, generator=generator, dtype=torch.float64),
            "text_target": text.detach()
            + torch.randn(size, 12, generator=generator, dtype=torch.float64),
            "soft_scale": torch.tensor(5.0, **leaf),
        },
    )


def with_duplicates(e: Embeddings, equal: list[tuple[int, int]]) -> Embeddings:
    hashes = e.caption_hash.clone()
    for a, b in equal:
        hashes[b] = hashes[a]
    return e._replace(caption_hash=hashes)


def call(name: str, e: Embeddings, mask: bool = True, **options: Any) -> dict[str, Tensor]:
    make = OBJECTIVES[name].make
    if isinstance(make, type):
        return make(SETTING, mask_duplicates=mask, **options)(e, e)
    return make(e, e, mask, **options)


def gradients(loss: Tensor, e: Embeddings) -> list[Tensor | None]:
    leaves = [
        e.extra["raw_image"],
        e.extra["raw_text"],
        e.logit_scale,
        e.logit_bias,
        e.extra["soft_scale"],
    ]
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True))


def assert_same(ours: Tensor, theirs: Tensor, e: Embeddings, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-13)
    for mine, other in zip(gradients(ours, e), gradients(theirs, e), strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (mine, other))
        assert (a.shape == b.shape) or not (a.any() or b.any())
        if a.shape == b.shape:
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=1e-13 if a.dtype == torch.float64 else 1e-6
            )
