"""Triplet and softmax against pytorch-metric-learning."""

from typing import Any

import pytest
import torch

from tests.objectives.pair_losses import assert_same, call, embeddings


def test_parity_with_metric_learning() -> None:
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning import distances, reducers

    e = embeddings(13)
    labels = torch.arange(13)
    theirs = pml.TripletMarginLoss(
        0.2, distance=distances.CosineSimilarity(), reducer=reducers.DoNothingReducer()
    )
    total: Any = 0.0
    for x, y in ((e.image, e.text), (e.text, e.image)):
        total = (
            total + theirs(x, labels, ref_emb=y, ref_labels=labels.clone())["loss"]["losses"].sum()
        )
    assert_same(call("triplet", e, mask=False)["loss"], total / 13, e)
    ntxent = pml.SelfSupervisedLoss(pml.NTXentLoss(1 / 14.3), symmetric=False)
    both = (ntxent(e.image, e.text) + ntxent(e.text, e.image)) / 2
    torch.testing.assert_close(call("softmax", e, mask=False)["loss"], both, rtol=1e-9, atol=1e-9)
