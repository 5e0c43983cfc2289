"""What tests of objectives with heads share: all that a model with every head delivers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings, RunContext

D = 12


P = 6


V = 40


def embeddings(size: int, noise: float = 1.0, seed: int = 0) -> Embeddings:
    """What a model with every head would deliver; all that has a gradient is a leaf."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image = leaf(size, D)
    text = image + noise * leaf(size, D)
    extra = {
        "image_projected": 2 * image + 1,
        "text_projected": text - 3,
        **{
            f"{name}_{kind}": leaf(size, D)
            for name in ("image", "text")
            for kind in ("predicted", "target")
        },
        "prototypes": F.normalize(leaf(P, D), dim=1),
        "token_logits": leaf(size, V),
    }
    ids = torch.randint(0, V, (size, 5), generator=generator)
    # every caption has it
    ids[:, 0] = 0
    return Embeddings(
        F.normalize(image, dim=-1).requires_grad_(),
        F.normalize(text, dim=-1).requires_grad_(),
        torch.randperm(size, generator=generator) * 7,
        torch.arange(size),
        torch.tensor(100.0, dtype=torch.float64),
        torch.tensor(0.0, dtype=torch.float64),
        {name: x.requires_grad_() for name, x in extra.items()} | {"token_ids": ids},
    )


def setting(size: int = 16) -> RunContext:
    return RunContext(width=D, batch_size=size, steps=5, vocabulary=V)


def gradients(loss: Tensor, e: Embeddings) -> dict[str, Tensor]:
    leaves = {"image": e.image, "text": e.text} | {
        n: x for n, x in e.extra.items() if x.requires_grad
    }
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def assert_same(ours: Tensor, theirs: Tensor, e: Embeddings) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    mine = gradients(ours, e)
    other = gradients(theirs, e)
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-9, atol=1e-13, msg=name)
