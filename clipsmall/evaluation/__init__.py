"""Evaluations: pure functions over features, and the cells of the table they fill."""

from clipsmall.evaluation.classification import zero_shot
from clipsmall.evaluation.features import Encoder
from clipsmall.evaluation.results import Result, print_cells, write_cell
from clipsmall.evaluation.retrieval import retrieval

__all__ = ["Encoder", "Result", "print_cells", "retrieval", "write_cell", "zero_shot"]
