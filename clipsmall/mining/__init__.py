"""Hard-negative mining: choosing which pairs share a batch, so that batches are hard.

Terms: a *pool* is the pairs of a few global batches, which are scored and assigned to new batches
together; a *group* is a set of pairs in one batch that are hard negatives of one another; *places*
are numbers of pairs within a pool, from 0; *copies* are pairs with equal number, caption or image.
"""

from clipsmall.mining.assignment import SELECTIONS, BatchAssignment, MiningRecipe, assign_batches
from clipsmall.mining.false_negatives import Identity
from clipsmall.mining.scored_pairs import ScoredPairs

__all__ = [
    "SELECTIONS",
    "BatchAssignment",
    "Identity",
    "MiningRecipe",
    "ScoredPairs",
    "assign_batches",
]
