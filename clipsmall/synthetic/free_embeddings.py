"""The synthetic study of mining: free embeddings trained on batches that six selections choose."""

from collections.abc import Callable, Iterator
from itertools import combinations, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.mining.scored_pairs import Floats, Ints, ScoredPairs, one_owner
from clipsmall.mining.spectral import spectral_groups
from clipsmall.mining.weights import sigmoid_weights, softmax_weights

SELECTIONS = {
    "f": "fixed partition",
    "s": "SGD: fresh partitions",
    "full": "one batch of all",
    "NcB": "mean of all batches",
    "osgd_NcB": "OSGD: worst of all batches",
    "sc_even": "even spectral clusters",
}
# of Sinkhorn's row and column steps
ROUNDS = 20


def softmax(logits: Tensor) -> Tensor:
    """(..., B, B) -> (...): mean over rows of the *sum* of both directions (Cho et al. 2023, arXiv
    2307.05906).
    """
    own = logits.diagonal(dim1=-2, dim2=-1)
    return (logits.logsumexp(-1) + logits.logsumexp(-2) - 2 * own).mean(-1)


def sigmoid(logits: Tensor) -> Tensor:
    """(..., B, B) -> (...): summed over columns, mean over rows (Zhai et al. 2023, arXiv
    2303.15343, eq. 1).
    """
    own = logits.diagonal(dim1=-2, dim2=-1)
    return F.softplus(logits).sum((-2, -1)) / logits.shape[-1] - own.mean(-1)


def sinkhorn(logits: Tensor) -> Tensor:
    """(..., B, B) -> (...): −mean log P_ii of the transport plan P after 20 rounds (Peyré and
    Cuturi 2019, arXiv 1803.00567, §4.4). The rows' potential is held constant: the envelope
    gradient, see `objectives.sinkhorn`."""
    with torch.no_grad():
        rows = -logits.logsumexp(-1, keepdim=True)
        for _ in range(ROUNDS):
            columns = -(logits + rows).logsumexp(-2, keepdim=True)
            rows = -(logits + columns).logsumexp(-1, keepdim=True)
    moved = logits + rows
    return (moved.logsumexp(-2) - moved.diagonal(dim1=-2, dim2=-1)).mean(-1)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sinkhorn": sinkhorn,
}
# Logit scale and bias: Cho et al.'s softmax has neither. With sigmoid's batches of 2 lead to the
# simplex, a full batch
# of 8 elsewhere: a pair that meets seven others and not one weighs repulsion seven times.
LOGITS = {"softmax": (1.0, 0.0), "sigmoid": (5.0, -2.0), "sinkhorn": (1.0, 0.0)}


class FreeEmbeddings:
    """N pairs of d free numbers each, of unit length before the loss, under plain SGD.

    Args:
        image: (N, d), text: (N, d): where to start; copied, float64.
        loss: softmax, sigmoid or sinkhorn, of the logits scale · cos + bias; None = those of
            `LOGITS`.
        lr: of SGD.
    """

    def __init__(
        self,
        image: Floats,
        text: Floats,
        loss: str = "softmax",
        scale: float | None = None,
        bias: float | None = None,
        lr: float = 0.5,
    ) -> None:
        self.free = torch.tensor(np.stack([image, text]), dtype=torch.float64, requires_grad=True)
        self.pairs = len(image)
        self.loss = loss
        self.lr = lr
        self.scale = LOGITS[loss][0] if scale is None else scale
        self.bias = LOGITS[loss][1] if bias is None else bias

    def cosines(self) -> Tensor:
        """(N, N) image i against text j."""
        image, text = F.normalize(self.free, dim=-1)
        made: Tensor = image @ text.T
        return made

    def losses(self, batches: Ints) -> Tensor:
        """(M, B) places -> (M,) losses."""
        rows = torch.from_numpy(batches)
        logits = self.scale * self.cosines() + self.bias
        return LOSSES[self.loss](logits[rows[:, :, None], rows[:, None, :]])

    def full_loss(self) -> float:
        return float(self.losses(np.arange(self.pairs)[None]).detach())

    def update(self, batches: Ints) -> None:
        """One step of SGD on the mean of the batches' losses."""
        (slope,) = torch.autograd.grad(self.losses(batches).mean(), self.free)
        with torch.no_grad():
            self.free -= self.lr * slope

    def clusters(self, size: int, generator: np.random.Generator) -> Ints:
        """(N / B, B) even spectral clusters. Sinkhorn's loss is no sum over pairs: softmax's
        weights stand in.
        """
        image, text = F.normalize(self.free.detach(), dim=-1).float().numpy()
        scored = ScoredPairs(image, text, self.scale, self.bias)
        weights = (sigmoid_weights if self.loss == "sigmoid" else softmax_weights)(scored, size)
        return spectral_groups(
            scored,
            one_owner(self.pairs, size),
            np.zeros_like(weights, dtype=bool),
            generator,
            weights,
        )


def choice(
    free: FreeEmbeddings, selection: str, size: int, generator: np.random.Generator
) -> Iterator[Ints]:
    """Without end, the (M, B) batches of the next update, decided when they are asked for.

    f is one random partition into N / B batches over and over, s a fresh one every step; full is
    one batch of all, NcB all C(N, B) batches at once; osgd_NcB of all of them the one whose loss is
    highest now (the first of equals); sc_even the clusters of the embeddings as they are when a
    step begins, one by one.
    """
    pairs = free.pairs
    partition = generator.permutation(pairs).reshape(-1, 1, size)
    batches = np.arange(pairs)[None]
    if selection in ("NcB", "osgd_NcB"):
        batches = np.array(list(combinations(range(pairs), size)))
    while True:
        if selection in ("full", "NcB"):
            yield batches
        elif selection == "osgd_NcB":
            yield batches[int(free.losses(batches).argmax())][None]
        elif selection == "sc_even":
            yield from free.clusters(size, generator)[:, None]
        else:
            yield from partition
            if selection == "s":
                partition = generator.permutation(pairs).reshape(-1, 1, size)


def train(
    free: FreeEmbeddings, selection: str, size: int, steps: int, generator: np.random.Generator
) -> Iterator[dict[str, float | None]]:
    """The state before the first and after every step, as columns of a table.

    A step makes N / B updates, but one for full and NcB, as in Cho et al.'s code. `pairs` counts
    those that entered a
    gradient: selections can be compared by either. See `distances` for the other columns.
    """
    optimum = target(free.pairs, free.free.shape[-1])
    batches = choice(free, selection, size, generator)
    a_step = 1 if selection in ("full", "NcB") else free.pairs // size
    updates = seen = 0
    for step in range(steps + 1):
        for chosen in islice(batches, a_step if step else 0):
            free.update(chosen)
            updates = updates + 1
            seen = seen + chosen.size
        measured = distances(free.cosines().detach(), optimum)
        yield {
            "step": step,
            "updates": updates,
            "pairs": seen,
            **measured,
            "full_loss": free.full_loss(),
        }


def simplex(pairs: int, width: int) -> Tensor:
    """(N, d >= N − 1) float64: all cosines −1/(N−1), the equiangular tight frame. With u = v it
    minimises the full softmax loss, at 2 ln(1 + (N−1) e^(−N/(N−1))), and its mean over all batches
    (Cho et al. 2023, theorem 4)."""
    corners = torch.linalg.svd(torch.eye(pairs, dtype=torch.float64) - 1 / pairs)[0][:, :-1]
    return F.pad(F.normalize(corners, dim=1), (0, width - pairs + 1))


def cross_polytope(width: int) -> Tensor:
    """(2 d, d) float64: ± unit vectors, so that a row's cosines are 1, one −1 and N − 2 zeros. Full
    softmax loss 2 ln(1 + e^(−2) + (N−2) e^(−1)); the least that we, like Cho et al. among antipodal
    ones, know of."""
    return torch.cat(
        [torch.eye(width, dtype=torch.float64), -torch.eye(width, dtype=torch.float64)]
    )


def target(pairs: int, width: int) -> Tensor | None:
    """(N, d) the optimum u = v of the full softmax loss where its form is known; for other losses a
    landmark.
    """
    if width >= pairs - 1:
        return simplex(pairs, width)
    return cross_polytope(width) if pairs == 2 * width else None


def distances(cosines: Tensor, optimum: Tensor | None) -> dict[str, float | None]:
    """How far (N, N) cosines are from the optimum's: `row_distance`, the Frobenius norm after
    sorting each row, which does not ask which pair is whose opposite, nor (so look at `diagonal`)
    which is its own; `distance`, the plain norm, where all pairs are alike; `diagonal`, the mean
    cosine of true pairs."""
    sorted_rows = plain = None
    if optimum is not None:
        wanted = optimum @ optimum.T
        sorted_rows = float((cosines.sort(1).values - wanted.sort(1).values).norm())
        if optimum.shape[1] >= len(optimum) - 1:
            plain = float((cosines - wanted).norm())
    return {
        "row_distance": sorted_rows,
        "distance": plain,
        "diagonal": float(cosines.diagonal().mean()),
    }
