"""Mining: which pairs make a batch that the model finds hard."""

from clipsmall.mining.deal import SELECTIONS, Dealt, Recipe, deal
from clipsmall.mining.guards import Identity
from clipsmall.mining.scored import Scored

__all__ = ["SELECTIONS", "Dealt", "Identity", "Recipe", "Scored", "deal"]
