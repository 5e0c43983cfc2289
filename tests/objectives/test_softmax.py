"""Softmax over more columns than the batch."""

import torch
import torch.nn.functional as F

from clipsmall.objectives import OBJECTIVES
from tests.objectives.pair_losses import embeddings


def test_a_wider_set_of_columns_is_compared_both_ways() -> None:
    """As a queue has it: rows are 5 pairs, columns those and 9 others; each direction by its own
    matrix.
    """
    wide = embeddings(14)
    rows = embeddings(14)._replace(index=wide.index)
    rows = rows._replace(
        image=rows.image[:5],
        text=rows.text[:5],
        index=wide.index[:5],
        caption_hash=rows.caption_hash[:5],
    )
    losses = OBJECTIVES["softmax"].make(rows, wide)
    target = torch.arange(5)
    forth = 14.3 * rows.image @ wide.text.T
    back = 14.3 * rows.text @ wide.image.T
    expected = (F.cross_entropy(forth, target) + F.cross_entropy(back, target)) / 2
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-10, atol=0)
    assert losses["effective_negatives"] == 13
