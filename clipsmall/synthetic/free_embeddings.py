"""Free embeddings, trained by plain SGD, with six ways to select batches."""

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
# Sinkhorn iterations.
ROUNDS = 20


def softmax_of_batches(logits: Tensor) -> Tensor:
    """(..., B, B) -> (...): mean over rows of the *sum* (not the mean) of both directions.

    Source: Cho et al. 2023, arXiv 2307.05906.
    """
    own = logits.diagonal(dim1=-2, dim2=-1)
    return (logits.logsumexp(-1) + logits.logsumexp(-2) - 2 * own).mean(-1)


def sigmoid_of_batches(logits: Tensor) -> Tensor:
    """(..., B, B) -> (...): summed over columns, mean over rows.

    Source: Zhai et al. 2023, arXiv 2303.15343, eq. 1.
    """
    own = logits.diagonal(dim1=-2, dim2=-1)
    return F.softplus(logits).sum((-2, -1)) / logits.shape[-1] - own.mean(-1)


def sinkhorn_of_batches(logits: Tensor) -> Tensor:
    """(..., B, B) -> (...): −mean log P_ii of the transport plan P after 20 rounds.

    The row potential is treated as constant (envelope gradient), see `objectives.sinkhorn`.

    Source: Peyré and Cuturi 2019, arXiv 1803.00567, §4.4.
    """
    with torch.no_grad():
        rows = -logits.logsumexp(-1, keepdim=True)
        for _ in range(ROUNDS):
            # normalise columns to sum 1, then rows
            columns = -(logits + rows).logsumexp(-2, keepdim=True)
            rows = -(logits + columns).logsumexp(-1, keepdim=True)

    # the last column step is differentiated
    moved = logits + rows
    own = moved.diagonal(dim1=-2, dim2=-1)
    return (moved.logsumexp(-2) - own).mean(-1)


# (..., B, B) logits of batches -> (...) losses
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax_of_batches,
    "sigmoid": sigmoid_of_batches,
    "sinkhorn": sinkhorn_of_batches,
}
# Logit scale and bias. Cho et al.'s softmax has neither. With the values for sigmoid, batches of 2
# converge to the simplex but a full batch of 8 does not: there, a pair has seven negatives instead
# of one, so repulsion weighs seven times as much.
LOGITS = {"softmax": (1.0, 0.0), "sigmoid": (5.0, -2.0), "sinkhorn": (1.0, 0.0)}


class FreeEmbeddings:
    """N pairs of free d-dimensional vectors, normalised in the loss and trained by plain SGD.

    Args:
        image, text: (N, d) start vectors; copied to float64.
        loss: softmax, sigmoid or sinkhorn, applied to the logits scale · cos + bias.
        scale, bias: None = those of `LOGITS`.
        lr: learning rate of SGD.
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
        # (2, N, d)
        start = np.stack([image, text])
        self.free = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        self.pairs = len(image)

        self.loss = loss
        self.lr = lr

        usual_scale, usual_bias = LOGITS[loss]
        self.scale = usual_scale if scale is None else scale
        self.bias = usual_bias if bias is None else bias

    def cosines(self) -> Tensor:
        """(N, N) cosines of image i and text j."""
        image, text = F.normalize(self.free, dim=-1)
        cosines: Tensor = image @ text.T
        return cosines

    def losses(self, batches: Ints) -> Tensor:
        """(M, B) pair indices of M batches -> (M,) losses."""
        logits = self.scale * self.cosines() + self.bias

        # (M, B, 1) and (M, 1, B) indices select the (M, B, B) logits of the batches
        pairs = torch.from_numpy(batches)
        images = pairs[:, :, None]
        texts = pairs[:, None, :]
        of_batches = logits[images, texts]
        return LOSSES[self.loss](of_batches)

    def full_loss(self) -> float:
        """The loss of a single batch of all pairs."""
        return float(self.losses(np.arange(self.pairs)[None]).detach())

    def update(self, batches: Ints) -> None:
        """One step of SGD on the mean of the batches' losses."""
        mean = self.losses(batches).mean()
        (slope,) = torch.autograd.grad(mean, self.free)

        # in place, so that the vectors stay leaves of the graph
        with torch.no_grad():
            self.free -= self.lr * slope

    def clusters(self, size: int, generator: np.random.Generator) -> Ints:
        """(N / B, B) spectral clusters of equal size, from the current embeddings.

        Sinkhorn's loss is not a sum over pairs, so softmax's weights are used for it.
        """
        unit = F.normalize(self.free.detach(), dim=-1)
        # mining works in float32
        image, text = unit.float().numpy()
        scored = ScoredPairs(image, text, self.scale, self.bias)

        if self.loss == "sigmoid":
            weights = sigmoid_weights(scored, size)
        else:
            weights = softmax_weights(scored, size)

        # no duplicates to keep in different batches
        cannot_link = np.zeros_like(weights, dtype=bool)
        quotas = one_owner(self.pairs, size)
        return spectral_groups(scored, quotas, cannot_link, generator, weights)


def choose_batches(
    free: FreeEmbeddings, selection: str, size: int, generator: np.random.Generator
) -> Iterator[Ints]:
    """An endless iterator of (M, B) batches, one item per update, chosen when requested.

    f: one random partition into N / B batches, repeated.
    s: a new random partition every step.
    full: one batch of all pairs.
    NcB: all C(N, B) batches at once.
    osgd_NcB: of all C(N, B) batches, the one whose loss is highest now (the first of equals).
    sc_even: spectral clusters of the embeddings at the start of each step, one by one.

    Args:
        selection: one of these names.
        size: B.
    """
    pairs = free.pairs
    # (N / B, 1, B): one batch per update
    partition = generator.permutation(pairs).reshape(-1, 1, size)
    batches = np.arange(pairs)[None]

    if selection in ("NcB", "osgd_NcB"):
        batches = np.array(list(combinations(range(pairs), size)))

    while True:
        if selection in ("full", "NcB"):
            yield batches
        elif selection == "osgd_NcB":
            hardest = int(free.losses(batches).argmax())
            yield batches[hardest][None]
        elif selection == "sc_even":
            yield from free.clusters(size, generator)[:, None]
        else:
            yield from partition
            if selection == "s":
                partition = generator.permutation(pairs).reshape(-1, 1, size)


def train_free_embeddings(
    free: FreeEmbeddings, selection: str, size: int, steps: int, generator: np.random.Generator
) -> Iterator[dict[str, float | None]]:
    """One dict (row of a table) before the first step and after every step.

    As in Cho et al.'s code, a step is N / B updates, but one update for full and NcB. `pairs`
    counts the pairs in all gradients so far; selections can be compared by steps or by pairs. See
    `optimum_distances` for further columns.

    Args:
        selection, size: see `choose_batches`.
    """
    optimum = known_optimum(free.pairs, free.free.shape[-1])
    batches = choose_batches(free, selection, size, generator)
    updates_per_step = 1 if selection in ("full", "NcB") else free.pairs // size

    updates = 0
    seen = 0
    for step in range(steps + 1):
        # the first row is the state before any update
        for chosen in islice(batches, updates_per_step if step else 0):
            free.update(chosen)
            updates += 1
            seen += chosen.size

        distances = optimum_distances(free.cosines().detach(), optimum)
        yield {
            "step": step,
            "updates": updates,
            "pairs": seen,
            **distances,
            "full_loss": free.full_loss(),
        }


def simplex(pairs: int, width: int) -> Tensor:
    """(N, d >= N − 1) float64: all cosines −1/(N−1), the equiangular tight frame.

    With image = text it minimises the full softmax loss, at 2 ln(1 + (N−1) e^(−N/(N−1))), and its
    mean over all batches.

    Source: Cho et al. 2023, theorem 4.
    """
    centred = torch.eye(pairs, dtype=torch.float64) - 1 / pairs
    directions = torch.linalg.svd(centred)[0]
    # the last direction is the mean, along which nothing varies
    corners = F.normalize(directions[:, :-1], dim=1)
    # pad from N − 1 to d dimensions
    spare = width - pairs + 1
    return F.pad(corners, (0, spare))


def cross_polytope(width: int) -> Tensor:
    """(2 d, d) float64: ± unit vectors, so that a row's cosines are 1, one −1 and N − 2 zeros.

    Its full softmax loss is 2 ln(1 + e^(−2) + (N−2) e^(−1)), the lowest that we know. Cho et al.
    know no lower one among antipodal arrangements.
    """
    unit = torch.eye(width, dtype=torch.float64)
    return torch.cat([unit, -unit])


def known_optimum(pairs: int, width: int) -> Tensor | None:
    """(N, d): the optimum image = text of the full softmax loss, where its form is known.

    For other losses it is only a point of reference.
    """
    if width >= pairs - 1:
        return simplex(pairs, width)

    return cross_polytope(width) if pairs == 2 * width else None


def optimum_distances(cosines: Tensor, optimum: Tensor | None) -> dict[str, float | None]:
    """How far (N, N) cosines are from those of the optimum; None where it is not known.

    row_distance: the Frobenius norm after sorting each row. It ignores which pairs are opposite,
        and even whether true pairs match: see `diagonal` for that.
    distance: the Frobenius norm without sorting, for optima in which all pairs are equivalent.
    diagonal: the mean cosine of true pairs.
    """
    row_distance = None
    distance = None
    if optimum is not None:
        wanted = optimum @ optimum.T
        row_distance = float((cosines.sort(1).values - wanted.sort(1).values).norm())
        is_simplex = optimum.shape[1] >= len(optimum) - 1
        if is_simplex:
            distance = float((cosines - wanted).norm())

    return {
        "row_distance": row_distance,
        "distance": distance,
        "diagonal": float(cosines.diagonal().mean()),
    }
