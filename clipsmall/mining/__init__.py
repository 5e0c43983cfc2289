"""Mining: which pairs make a batch that the model finds hard."""

from clipsmall.mining.assignment import SELECTIONS, Dealt, MiningRecipe, deal
from clipsmall.mining.false_negatives import Identity
from clipsmall.mining.scored import Scored

__all__ = ["SELECTIONS", "Dealt", "Identity", "MiningRecipe", "Scored", "deal"]
