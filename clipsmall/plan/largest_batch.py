"""How many pairs fit on a device.

Memory is piecewise linear in the number of pairs, so a few abstract steps find the answer.
"""

from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

from clipsmall.config import Config
from clipsmall.config.reader import validated
from clipsmall.distributed.similarity import TILE
from clipsmall.plan.step import Machine, Step, measure_step

# Pairs per device at which the search stops.
MOST = 32_768
# Global batch beyond which a larger one no longer improves a model (SigLIP, arXiv 2303.15343,
# §4.2): printed as `any`.
ANY = 32_768
# An answer that uses this fraction of the budget is good enough.
CLOSE = 0.98


class FitAnswer(NamedTuple):
    """The largest number of pairs per rank that fits, and the memory it needs."""

    # 0 = not even one pair fits; MOST = this many or more
    rows: int
    bytes: int


class Planner:
    """Finds what configs need on a machine; each abstract step is made only once.

    Args:
        budget: bytes per device, minus the reserve.
    """

    def __init__(self, machine: Machine, budget: int) -> None:
        self.machine = machine
        self.budget = budget
        self._known: dict[tuple[str, int, bool], Step] = {}

    def step(self, config: Config, rows: int, hollow: bool = False) -> Step:
        """`measure`, once for each config and number of rows."""
        key = config.model_dump_json(), rows, hollow
        if key not in self._known:
            self._known[key] = measure_step(config, self.machine, rows, hollow)
        return self._known[key]

    def fits(self, config: Config, rows: int) -> bool:
        """Whether a step with `rows` pairs per rank is within the budget."""
        return self.peak(config, rows) <= self.budget

    def peak(self, config: Config, rows: int) -> int:
        """Bytes at the peak of a step with `rows` pairs per rank."""
        if chunk := chunk_if_cut(config, rows):
            return self._peak_in_chunks(config, chunk, rows)
        return self.step(config, rows).total

    def flops(self, config: Config, rows: int) -> float:
        """FLOPs per pair in such a step."""
        # two chunks represent any number of them
        step = self.step(config, 2 * chunk_if_cut(config, rows) or rows)
        return step.flops / step.rows

    def largest(self, config: Config, rows: int) -> FitAnswer:
        """The largest batch that fits: the secant method, between a lower and an upper bound.

        A step of the returned size has been measured, unless it has more than two chunks.

        Args:
            rows: pairs per rank to start from.

        Raises:
            ValueError: what `measure` raises.
        """
        unit = config.optim.accumulate
        found = FitAnswer(rows, self.peak(config, rows))

        # bounds: the largest size known to fit, the smallest known not to
        low = FitAnswer(0, 0)
        high = FitAnswer(MOST + unit, 0)

        # the first secant starts at 0 pairs, with the memory that is always in use
        first = self.step(config, 2 * chunk_if_cut(config, rows) or rows)
        before = FitAnswer(0, first.total - transient_bytes(first))
        while True:
            if found.bytes > self.budget:
                high = found
            else:
                low = found

            guess = _line_meets_budget(before, found, self.budget) // unit * unit
            guess = min(max(guess, low.rows + unit), high.rows - unit)
            if guess <= low.rows or low.bytes > CLOSE * self.budget:
                return low
            before = found
            found = FitAnswer(guess, self.peak(config, guess))

    def _peak_in_chunks(self, config: Config, chunk: int, rows: int) -> int:
        """Bytes at the peak of a step of many chunks, extrapolated from smaller steps.

        The peak is within a chunk or in the loss, and two chunks represent all. A pair outside the
        current chunk keeps its pixels and embeddings, the same amount for each pair. The loss is
        measured with towers that cost nothing; above one full tile its memory is linear.
        """
        two_chunks = self.step(config, 2 * chunk)
        whole = changed(config, {"model.chunk_size": 0})
        height, width = TILE[self.machine.device]
        full_tiles = max(height, ceil(width / self.machine.ranks))

        # memory of the loss: with full tiles, and for each further pair
        small = transient_bytes(self.step(whole, full_tiles, hollow=True), "pixels")
        large = transient_bytes(self.step(whole, 2 * full_tiles, hollow=True), "pixels")
        per_pair = (large - small) / full_tiles
        if rows <= full_tiles:
            loss: float = transient_bytes(self.step(whole, rows, hollow=True), "pixels")
        else:
            loss = small + per_pair * (rows - full_tiles)

        pixels = two_chunks.bytes.get("pixels", 0) / two_chunks.rows
        in_chunk = two_chunks.total + (per_pair + pixels) * (rows - two_chunks.rows)
        permanent = two_chunks.total - transient_bytes(two_chunks)
        in_loss = permanent + pixels * rows + loss
        return round(max(in_chunk, in_loss))


def chunk_if_cut(config: Config, rows: int) -> int:
    """The chunk size if `rows` pairs are more than two chunks, else 0."""
    chunk = config.model.chunk_size
    if isinstance(chunk, int) and 0 < 2 * chunk < rows:
        return chunk
    return 0


def _line_meets_budget(one: FitAnswer, other: FitAnswer, budget: int) -> int:
    """The number of rows at which the line through both points reaches the budget."""
    slope = (other.bytes - one.bytes) / (other.rows - one.rows)
    return int(other.rows + (budget - other.bytes) / max(slope, 1.0))


def transient_bytes(step: Step, without: str = "") -> int:
    """Bytes allocated and freed within a step; `without`: a label to leave out."""
    labels = {"activations", "loss", "gradients", "pixels"} - {without}
    return sum(step.bytes.get(label, 0) for label in labels)


def changed(config: Config, changes: Mapping[str, object]) -> Config:
    """The config with other values for `section.field`s.

    Raises:
        ConfigError: the values do not go together.
    """
    tree = config.model_dump(mode="json")
    for name, value in changes.items():
        *sections, field = name.split(".")
        part = tree
        for section in sections:
            part = part[section]
        part[field] = value

    return validated(tree)
