"""Evaluation: tasks (one file each), the features that they share, and files of results."""

from clipsmall.evaluation.features import Encoder
from clipsmall.evaluation.results import Result, results_text, write_cell

__all__ = ["Encoder", "Result", "results_text", "write_cell"]
