"""SwAV: each modality predicts which prototypes the other is assigned to."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.objectives.fifo import finite
from clipsmall.objectives.pairs import own_columns
from clipsmall.objectives.spec import ObjectiveSpec, Options


class Swav(nn.Module):
    """Swapped prediction of cluster assignments between the modalities.

    Also known as:
        SwAV, swapped assignments, online clustering with Sinkhorn codes.

    Formula:
        L = −½ mean_i Σ_p [ Q^T_ip log softmax_p(x_i c_p / temperature)
        + Q^I_ip log softmax_p(y_i c_p / temperature) ],
        with the codes Q of the *other* modality: the transport plan of exp(scores / epsilon) that
        gives every pair one unit and every prototype the same part, by `iterations` of Sinkhorn
        over batch and queue together, without gradient.

    Source:
        Caron et al. 2020, arXiv 2006.09882, eq. 1 to 5.

    When to use:
        To compare no pair with another: it needs no negatives. Usually a second term.

    When not:
        Much of the paper's gain is from small crops, which captions do not have. A loss that stays
        at log P means that all embeddings are alike; `prototypes_used` is then P, `confidence` 1/P.

    Related:
        `sinkhorn` and `sinkhorn_targets` use the same iterations between the pairs themselves.

    Called with rows, my b pairs with `prototypes` (P, D) of the head of that name, and columns, the
    N pairs of the global batch.

    A batch of fewer pairs than prototypes cannot be shared out among them: every row would end up
    with prototypes of its own. So the codes of small batches are made together with those of the
    last `queue` pairs, as soon as the queue is full; before that, of the batch alone. A queue of
    more than about 15 batches (the paper's 3,840 at 256, with 3,000 prototypes) is too old: on
    synthetic pairs at batch 64 recall fell from 94 % with 1,024 to 75 % with 3,840, where softmax
    had 97 %.

    Args:
        context: `width` is used.
        queue: past pairs kept, 0 for none.
        temperature: of the predictions.
        epsilon: temperature of the codes; smaller makes them harder.
        iterations: of Sinkhorn.
        freeze_steps: first steps in which the prototypes stay as drawn; the paper's 313 at a batch
            of 4,096.

    Returns:
        `loss` () mean over my rows; `prototypes_used` () exp of the entropy of the mean assignment
        over all ranks (1 = all pairs to one prototype); `confidence` () mean highest assignment of
        my rows.

    Raises:
        ValueError: fewer pairs in batch and queue together than prototypes.

    Examples:
        >>> pairs = Embeddings.of(torch.eye(4), torch.eye(4), prototypes=torch.eye(4))
        >>> loss = Swav(RunContext(width=4, batch_size=4, steps=10), queue=0)
        >>> round(loss(pairs, pairs)["prototypes_used"].item(), 3)
        4.0
    """

    def __init__(
        self,
        context: RunContext,
        queue: Annotated[
            int, Field(ge=0, description="past pairs that share the prototypes with the batch")
        ] = 1024,
        temperature: Annotated[float, Field(gt=0, description="of the predictions")] = 0.1,
        epsilon: Annotated[float, Field(gt=0, description="temperature of the codes")] = 0.05,
        iterations: Annotated[
            int, Field(ge=1, description="Sinkhorn iterations that make the codes")
        ] = 3,
        freeze_steps: Annotated[int, Field(ge=0, description="steps before prototypes move")] = 100,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.epsilon = epsilon
        self.iterations = iterations
        self.queue = queue
        self.freeze_steps = freeze_steps
        self.images: Tensor
        self.texts: Tensor
        self.written: Tensor
        self.step: Tensor
        self.register_buffer("images", torch.zeros(queue, context.width))
        self.register_buffer("texts", torch.zeros(queue, context.width))
        # number of pairs pushed so far
        self.register_buffer("written", torch.tensor(0))
        self.register_buffer("step", torch.tensor(0))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        prototypes = rows.extra["prototypes"]
        self._check_sizes(len(columns.index), len(prototypes))
        # while frozen, the gradient is 0, not None: DDP refuses parameters without a gradient
        frozen = (self.step < self.freeze_steps).to(prototypes.dtype)
        prototypes = prototypes - frozen * (prototypes - prototypes.detach())

        # (N, D) of all ranks, where the rows are
        device = rows.image.device
        images = _everyones(columns.image, columns).to(device)
        texts = _everyones(columns.text, columns).to(device)

        # (b, P) codes: what is predicted
        positions = own_columns(rows, columns)
        of_image = self._codes(images, self.images, prototypes)[positions]
        of_text = self._codes(texts, self.texts, prototypes)[positions]

        # (b, P) log assignments: what learns
        image_logits = _scores(rows.image, prototypes) / self.temperature
        text_logits = _scores(rows.text, prototypes) / self.temperature
        by_image = image_logits.log_softmax(dim=1)
        by_text = text_logits.log_softmax(dim=1)
        self._remember(images, texts)

        # each predicts the codes of the other
        text_by_image = (of_text * by_image).sum(dim=1)
        image_by_text = (of_image * by_text).sum(dim=1)
        swapped = text_by_image.mean() + image_by_text.mean()

        assigned = ((by_image.exp() + by_text.exp()) / 2).detach()
        # (P,) mean assignment over all ranks
        used = world.mean_over_ranks(assigned.mean(dim=0))
        return {
            "loss": -swapped / 2,
            "prototypes_used": torch.special.entr(used).sum().exp(),
            "confidence": assigned.amax(dim=1).mean(),
        }

    def _check_sizes(self, batch: int, prototypes: int) -> None:
        if batch + self.queue < prototypes:
            raise ValueError(
                f"swav: {prototypes} prototypes cannot be shared out among a batch of {batch} and "
                f"a queue of {self.queue}: take a queue of {prototypes - batch} or more, or fewer "
                "prototypes"
            )

    @torch.no_grad()
    def _codes(self, features: Tensor, queued: Tensor, prototypes: Tensor) -> Tensor:
        """(N, P) of the batch, or of batch and queue; every rank computes the same numbers."""
        # a queue that is not full yet holds zeros
        is_full = bool(self.queue) and bool(self.written >= self.queue)
        if is_full:
            queued = queued.to(features.dtype)
            features = torch.cat([features, queued])

        scores = _scores(features, prototypes)
        return shared_out(scores, self.epsilon, self.iterations)

    @torch.no_grad()
    def _remember(self, images: Tensor, texts: Tensor) -> None:
        """The newest pairs overwrite the oldest, if they are finite."""
        count = len(images)
        sound = finite(images, texts)

        # if there are more pairs than fit, keep the last
        new = min(count, self.queue)
        if new:
            newest = torch.arange(count - new, count, device=self.written.device)
            positions = (self.written + newest) % self.queue
            for queue, features in ((self.images, images), (self.texts, texts)):
                old = queue[positions]
                taken = features[-new:].to(queue.dtype)
                # torch.where instead of `if`, so that the host does not wait for `sound`
                queue[positions] = torch.where(sound, taken, old)

        self.written += count * sound
        self.step += 1


def _everyones(features: Tensor, columns: Embeddings) -> Tensor:
    """(N, D) features of all ranks, without gradient; in a ring the columns are only mine."""
    gathered = len(columns.image) == len(columns.index)
    return features.detach() if gathered else world.gather(features.detach())


def _scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """(n, P) cosines, at least in float32."""
    dtype = similarity.wide(features)
    features = features.to(dtype)
    prototypes = prototypes.to(dtype)

    # autocast would multiply in half precision
    with torch.autocast(features.device.type, enabled=False):
        return features @ prototypes.T


def shared_out(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """(n, P) codes: rows sum to 1, columns to about n/P.

    Computed in logs, as exp(1/0.05) is too much for half precision.
    """
    log_plan = scores / epsilon
    for _ in range(iterations):
        log_plan -= log_plan.logsumexp(dim=0)
        log_plan -= log_plan.logsumexp(dim=1, keepdim=True)
    return log_plan.exp_()


def _least_batch(options: Options) -> int:
    return int(options["prototypes"]) - int(options["queue"])


SPEC = ObjectiveSpec(
    Swav,
    section="swav",
    heads={"prototypes": {}},
    first=("prototypes",),
    least_batch=_least_batch,
    least_batch_reason=(
        "the prototypes cannot be shared out among fewer pairs than they are, batch and queue "
        "together: take a longer queue or fewer prototypes"
    ),
    scale=None,
    by_second_step=lambda pairs: {"freeze_steps": 1},
)
