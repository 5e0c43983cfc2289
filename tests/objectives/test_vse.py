"""VSE++: its warm-up, and rows without negatives."""

from clipsmall.objectives import OBJECTIVES
from tests.objectives.pair_losses import SETTING, call, embeddings, with_duplicates


def test_the_hardest_of_no_negatives_costs_nothing() -> None:
    e = with_duplicates(embeddings(6), [(0, i) for i in range(1, 6)])
    assert call("vse++", e, margin=1.9, warmup=0.0)["loss"] == 0


def test_vse_warms_up_and_then_takes_the_hardest() -> None:
    e = embeddings(9)
    made = OBJECTIVES["vse++"].make(SETTING, warmup=0.2)
    values = [made(e, e)["loss"].item() for _ in range(4)]
    assert values[0] == values[1] == call("triplet", e)["loss"].item()
    assert values[2] == values[3] == call("vse++", e, warmup=0.0)["loss"].item() < values[0]
    other = OBJECTIVES["vse++"].make(SETTING, warmup=0.2)
    other.load_state_dict(made.state_dict())
    assert other(e, e)["loss"].item() == values[3]
