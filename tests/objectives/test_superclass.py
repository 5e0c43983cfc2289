"""SuperClass against the dense formula.

Seen to fail when: it counts its own captions only, or a word twice.
"""

import torch
import torch.nn.functional as F

from clipsmall.objectives.superclass import Superclass
from tests.objectives.outputs_of_heads import V, embeddings, gradients, setting


def test_superclass_is_the_dense_formula() -> None:
    objective = Superclass(setting())
    documents = torch.zeros(V)
    captions = 0
    for step in range(3):
        e = embeddings(9, seed=step)
        present = torch.zeros(9, V).scatter_(1, e.extra["token_ids"], 1.0)
        documents = documents + present.sum(dim=0)
        captions = captions + 9
        targets = present.double() * (captions / (1 + documents)).log().clamp(min=0)
        # the token of every caption
        assert targets[:, 0].eq(0).all()
        theirs = (
            -(F.normalize(targets, p=1, dim=1) * e.extra["token_logits"].log_softmax(dim=1))
            .sum(dim=1)
            .mean()
        )
        ours = objective(e, e)
        torch.testing.assert_close(ours["loss"], theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            gradients(ours["loss"], e)["token_logits"],
            gradients(theirs, e)["token_logits"],
            rtol=1e-5,
            atol=1e-8,
        )
        best = targets.gather(1, e.extra["token_logits"].argmax(dim=1, keepdim=True)) > 0
        assert ours["accuracy"] == best.float().mean()
    assert torch.equal(objective.documents, documents.long())
    assert objective.captions == 27
