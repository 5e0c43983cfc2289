"""SuperClass: the image alone says which words its caption has."""

import torch
from torch import Tensor, nn

from clipsmall.batch import Embeddings, RunContext
from clipsmall.distributed import similarity, world


class Superclass(nn.Module):
    """Classification of images into their captions' tokens (Huang et al. 2024, arXiv 2411.03313,
    §3).

    L = −mean_i Σ_c ŷ_ic log softmax_c(z_i),  ŷ_ic = w_c y_ic / Σ_c' w_c' y_ic',  y the *set* of the
    caption's tokens, w_c = log(n / (1 + df_c)) or 0 if that is negative: n captions seen so far,
    df_c of them with token c.

    It compares no pair with another, so no batch is too small for it: as the second term beside a
    contrastive loss (SuperCLIP, Zhao et al. 2025, arXiv 2512.14480) it is there for what small
    batches lose. By itself it trains no text tower and no retrieval. Padding and special tokens,
    which every caption has, weigh 0.

    The counts are of all captions so far and the present batch, over all ranks, so that the first
    batch is weighed by itself. A caption all of whose tokens weigh 0 teaches nothing.

    Called with (rows, columns): my b pairs with `token_logits` (b, V) and `token_ids` (b, L) of the
    head `tokens`; the columns are not looked at. Targets are kept by token, (b, L): only the logits
    and their gradient are (b, V). Returns `loss` (mean over my rows) and `accuracy` (share of my
    rows whose highest logit is a token of the caption that weighs something).

    Raises:
        ValueError: the vocabulary's size is not known.
    """

    def __init__(self, setting: RunContext) -> None:
        super().__init__()
        if not setting.vocabulary:
            raise ValueError(
                "superclass needs the size of the text tower's vocabulary, which this model does not tell"
            )
        self.documents: Tensor
        self.captions: Tensor
        # df
        self.register_buffer("documents", torch.zeros(setting.vocabulary, dtype=torch.int64))
        # n
        self.register_buffer("captions", torch.tensor(0))

    def forward(self, rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
        logits = rows.extra["token_logits"]
        logits = logits.to(similarity.wide(logits))
        ids = rows.extra["token_ids"].sort(dim=1).values
        # of equal tokens in a caption
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        self._count(ids[first], len(ids))
        weights = (self.captions / (1 + self.documents)).to(logits.dtype).log().clamp(min=0)[
            ids
        ] * first
        targets = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
        costs = targets * (logits.logsumexp(dim=1, keepdim=True) - logits.gather(1, ids))
        right = ((ids == logits.argmax(dim=1, keepdim=True)) & (weights > 0)).any(dim=1)
        return {"loss": costs.sum(dim=1).mean(), "accuracy": right.float().mean()}

    @torch.no_grad()
    def _count(self, tokens: Tensor, captions: int) -> None:
        self.documents += world.sum_over_ranks(
            torch.bincount(tokens, minlength=len(self.documents))
        )
        self.captions += captions * world.size()
