"""Mining: choosing which pairs share a batch, so that the model finds it hard.

Words: a *pool* is a few global batches of pairs that are scored and assigned to new batches
together; a *group* is a set of pairs in one batch that are hard for one another; *places* are
numbers of pairs within a pool, from 0; *copies* are the same pair, caption or image twice.
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
