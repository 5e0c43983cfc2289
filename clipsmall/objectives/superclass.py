"""SuperClass: the image alone predicts which words its caption has."""

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world
from clipsmall.objectives.spec import ObjectiveSpec


class Superclass(nn.Module):
    """Classification of images into the tokens of their captions.

    Also known as:
        SuperClass, the classification term of SuperCLIP, bag-of-words prediction.

    Formula:
        L = −mean_i Σ_c ŷ_ic log softmax_c(z_i),  ŷ_ic = w_c y_ic / Σ_c' w_c' y_ic',
        y the *set* of the caption's tokens, w_c = log(n / (1 + df_c)) or 0 if that is negative:
        n captions seen so far, df_c of them with token c.

    Source:
        Huang et al. 2024, arXiv 2411.03313, §3; as a second term: SuperCLIP, Zhao et al. 2025,
        arXiv 2512.14480.

    When to use:
        As the second term beside a contrastive loss, for what small batches lose: it compares no
        pair with another, so no batch is too small for it.

    When not:
        By itself: it trains no text tower and no retrieval.

    Related:
        Any contrastive objective, as in `{softmax: 1, superclass: 0.2}`.

    Called with rows, my b pairs with `token_logits` (b, V) and `token_ids` (b, L) of the head
    `tokens`; the columns are not looked at.

    Padding and special tokens, which every caption has, weigh 0; a caption all of whose tokens
    weigh 0 teaches nothing. The counts are of all captions so far and the present batch, over all
    ranks, so that the first batch is weighed by itself. Targets are kept by token, (b, L): only the
    logits and their gradient are (b, V).

    Args:
        context: `vocabulary` (V) is used.

    Returns:
        `loss` () mean over my rows; `accuracy` () fraction of my rows whose highest logit is a
        token of the caption with a weight above 0.

    Raises:
        ValueError: the vocabulary's size is not known.

    Examples:
        >>> eye = torch.eye(4)
        >>> ids = torch.arange(4)[:, None]
        >>> pairs = Embeddings.of(eye, eye, token_logits=10 * eye, token_ids=ids)
        >>> loss = Superclass(RunContext(width=4, batch_size=4, steps=10, vocabulary=4))
        >>> loss(pairs, pairs)["accuracy"].item()
        1.0
    """

    def __init__(self, context: RunContext) -> None:
        super().__init__()
        if not context.vocabulary:
            raise ValueError(
                "superclass needs the size of the text tower's vocabulary, which this model does "
                "not tell"
            )
        self.documents: Tensor
        self.captions: Tensor
        # df: number of captions with each token
        self.register_buffer("documents", torch.zeros(context.vocabulary, dtype=torch.int64))
        # n: number of captions
        self.register_buffer("captions", torch.tensor(0))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        logits = rows.extra["token_logits"]
        logits = logits.to(similarity.wide(logits))
        ids = rows.extra["token_ids"].sort(dim=1).values
        # a token repeated in a caption counts once
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        self._count(ids[first], len(ids))

        # (V,) w of all tokens, then (b, L) of these
        rarity = (self.captions / (1 + self.documents)).to(logits.dtype)
        rarity = rarity.log().clamp(min=0)
        weights = rarity[ids] * first
        sums = weights.sum(dim=1, keepdim=True)
        targets = weights / sums.clamp(min=1e-12)

        # (b, L) −log softmax of these tokens, by their targets
        log_sums = logits.logsumexp(dim=1, keepdim=True)
        surprise = log_sums - logits.gather(1, ids)
        costs = targets * surprise

        predicted = logits.argmax(dim=1, keepdim=True)
        is_right = (ids == predicted) & (weights > 0)
        return {
            "loss": costs.sum(dim=1).mean(),
            "accuracy": is_right.any(dim=1).float().mean(),
        }

    @torch.no_grad()
    def _count(self, tokens: Tensor, captions: int) -> None:
        """Add all ranks' captions of this batch to the counts; tokens are distinct per caption."""
        vocabulary = len(self.documents)
        counts = torch.bincount(tokens, minlength=vocabulary)

        self.documents += world.sum_over_ranks(counts)
        self.captions += captions * world.size()


SPEC = ObjectiveSpec(
    Superclass,
    section="superclass",
    heads={"tokens": {}},
    scale=None,
    trains_both_towers=lambda options: False,
    # it aligns no embeddings
    retrieval_head=lambda options: None,
)
