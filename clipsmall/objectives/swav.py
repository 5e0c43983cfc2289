"""SwAV: each modality tells which prototypes the other is assigned to."""

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.objectives.fifo import finite
from clipsmall.objectives.pairs import own_places


class Swav(nn.Module):
    """SwAV between the modalities (Caron et al. 2020, arXiv 2006.09882, eq. 1 to 5).

    L = −½ mean_i Σ_p [ Q^T_ip log softmax_p(x_i c_p / temperature) + Q^I_ip log softmax_p(y_i c_p /
    temperature) ],
    with the codes Q of the *other* modality: the transport plan of exp(scores / epsilon) that gives
    every pair one unit and every prototype the same share, by `iterations` of Sinkhorn over batch
    and queue together, no gradient.

    A batch of fewer pairs than prototypes cannot be shared out: every row would end up with
    prototypes of its own. So the codes of small batches are made together with those of the last
    `queue` pairs, as soon as the queue is full; before that, of the batch alone. A queue of more
    than about 15 batches (the paper's 3,840 at 256, with 3,000 prototypes) is too old: on synthetic
    pairs at batch 64 recall fell from 94 % with 1,024 to 75 % with 3,840, where softmax had 97 %.
    Much of the paper's gain is from small crops, which captions do not have.

    A loss that stays at log P says that all embeddings are alike; `prototypes_used` is then P,
    `confidence` 1/P.

    Args:
        queue: past pairs kept, 0 for none.
        temperature, epsilon, iterations: see above. A smaller epsilon makes codes harder.
        freeze_steps: the prototypes stay as drawn for so many first steps; the paper's 313 at a
            batch of 4,096.

    Called with (rows, columns): my b pairs with `prototypes` (P, D) of the head of that name, and
    the N pairs of the global batch. Returns `loss` (mean over my rows), `prototypes_used` (exp of
    the entropy of the mean assignment over
    all ranks: 1 = all pairs to one prototype) and `confidence` (mean highest assignment of my
    rows).

    Raises:
        ValueError: fewer pairs in batch and queue together than prototypes.
    """

    def __init__(
        self,
        setting: RunContext,
        queue: int = 1024,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        freeze_steps: int = 100,
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
        self.register_buffer("images", torch.zeros(queue, setting.width))
        self.register_buffer("texts", torch.zeros(queue, setting.width))
        self.register_buffer("written", torch.tensor(0))
        self.register_buffer("step", torch.tensor(0))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        prototypes = rows.extra["prototypes"]
        self._check(len(columns.index), len(prototypes))
        # a gradient of 0 rather than none: DDP refuses parameters that get none
        frozen = (self.step < self.freeze_steps).to(prototypes.dtype)
        prototypes = prototypes - frozen * (prototypes - prototypes.detach())
        # in a ring the columns are only mine
        whole = len(columns.image) == len(columns.index)
        everyone = (
            x.detach() if whole else world.gather(x.detach()) for x in (columns.image, columns.text)
        )
        images, texts = (x.to(rows.image.device) for x in everyone)
        places = own_places(rows, columns)
        of_image = self._codes(images, self.images, prototypes)[places]
        of_text = self._codes(texts, self.texts, prototypes)[places]
        by_image = (_scores(rows.image, prototypes) / self.temperature).log_softmax(dim=1)
        by_text = (_scores(rows.text, prototypes) / self.temperature).log_softmax(dim=1)
        self._remember(images, texts)
        assigned = ((by_image.exp() + by_text.exp()) / 2).detach()
        share = world.mean_over_ranks(assigned.mean(dim=0))
        return {
            "loss": -(
                (of_text * by_image).sum(dim=1).mean() + (of_image * by_text).sum(dim=1).mean()
            )
            / 2,
            "prototypes_used": torch.special.entr(share).sum().exp(),
            "confidence": assigned.amax(dim=1).mean(),
        }

    def _check(self, batch: int, prototypes: int) -> None:
        if batch + self.queue < prototypes:
            raise ValueError(
                f"swav cannot share out {prototypes} prototypes among a batch of {batch} and a queue of {self.queue}: "
                f"take a queue of {prototypes - batch} or more, or fewer prototypes"
            )

    @torch.no_grad()
    def _codes(self, features: Tensor, queued: Tensor, prototypes: Tensor) -> Tensor:
        """(N, P) of the batch; computed on every rank alike, from the same numbers."""
        if self.queue and bool(self.written >= self.queue):
            features = torch.cat([features, queued.to(features.dtype)])
        return shared_out(_scores(features, prototypes), self.epsilon, self.iterations)

    @torch.no_grad()
    def _remember(self, images: Tensor, texts: Tensor) -> None:
        """The newest pairs overwrite the oldest, if they are finite."""
        count = len(images)
        sound = finite(images, texts)
        new = min(count, self.queue)
        if new:
            places = (
                self.written + torch.arange(count - new, count, device=self.written.device)
            ) % self.queue
            for queue, features in ((self.images, images), (self.texts, texts)):
                queue[places] = torch.where(sound, features[-new:].to(queue.dtype), queue[places])
        self.written += count * sound
        self.step += 1


def _scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """(n, P) cosines, at least in float32."""
    with torch.autocast(features.device.type, enabled=False):
        return features.to(similarity.wide(features)) @ prototypes.to(similarity.wide(features)).T


def shared_out(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """(n, P) codes: rows sum to 1, columns to about n/P; in logs, as exp(1/0.05) is too much for
    half precision.
    """
    log_plan = scores / epsilon
    for _ in range(iterations):
        log_plan -= log_plan.logsumexp(dim=0)
        log_plan -= log_plan.logsumexp(dim=1, keepdim=True)
    return log_plan.exp_()
