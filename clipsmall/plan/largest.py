"""How many pairs a device takes: memory grows with them in straight pieces, so few abstract steps
find the answer.
"""

from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

from clipsmall.config import Config
from clipsmall.config.reader import validated
from clipsmall.distributed.tiles import TILE
from clipsmall.plan.step import Machine, Step, measure

# pairs of a device: nobody asks for more
MOST = 32_768
# pairs of all devices: more teach no more (SigLIP, arXiv 2303.15343, §4.2)
ANY = 32_768
# of the budget: an answer that uses it is good enough
CLOSE = 0.98


class FitAnswer(NamedTuple):
    """The largest number of a rank's pairs that fits, and what so many need."""

    # 0: not even one; MOST: or more
    rows: int
    bytes: int


class Planner:
    """Args:
    budget: bytes of a device, less the reserve.
    """

    def __init__(self, machine: Machine, budget: int) -> None:
        self.machine = machine
        self.budget = budget
        self._known: dict[tuple[str, int, bool], Step] = {}

    def step(self, config: Config, rows: int, hollow: bool = False) -> Step:
        """`measure`, each once."""
        key = config.model_dump_json(), rows, hollow
        if key not in self._known:
            self._known[key] = measure(config, self.machine, rows, hollow)
        return self._known[key]

    def fits(self, config: Config, rows: int) -> bool:
        return self.peak(config, rows) <= self.budget

    def peak(self, config: Config, rows: int) -> int:
        """Bytes at the peak of a step of so many pairs a rank."""
        if chunk := cut(config, rows):
            return self._chunked(config, chunk, rows)
        return self.step(config, rows).total

    def flops(self, config: Config, rows: int) -> float:
        """A pair's share."""
        seen = self.step(config, 2 * cut(config, rows) or rows)
        return seen.flops / seen.rows

    def largest(self, config: Config, rows: int) -> FitAnswer:
        """The answer was tried, unless it is more than two chunks. rows: where to begin.

        Raises:
            ValueError: what `measure` raises.
        """
        unit = config.optim.accumulate
        found = FitAnswer(rows, self.peak(config, rows))
        low = FitAnswer(0, 0)
        high = FitAnswer(MOST + unit, 0)
        standing = self.step(config, 2 * cut(config, rows) or rows)
        before = FitAnswer(0, standing.total - moving(standing))
        while True:
            if found.bytes > self.budget:
                high = found
            else:
                low = found
            guess = _meets(before, found, self.budget) // unit * unit
            guess = min(max(guess, low.rows + unit), high.rows - unit)
            if guess <= low.rows or low.bytes > CLOSE * self.budget:
                return low
            before = found
            found = FitAnswer(guess, self.peak(config, guess))

    def _chunked(self, config: Config, chunk: int, rows: int) -> int:
        """The peak is within a chunk or in the loss. Two chunks stand for all. Of a pair outside
        its chunk its bytes and its embeddings are kept, always as much. The loss is seen with
        hollow towers; from its first full tiles on it is linear."""
        two = self.step(config, 2 * chunk)
        whole = changed(config, {"model.chunk_size": 0})
        height, width = TILE[self.machine.device]
        first = max(height, ceil(width / self.machine.ranks))
        small, large = (self.step(whole, n * first, hollow=True) for n in (1, 2))
        slope = (moving(large, "pixels") - moving(small, "pixels")) / first
        pixels = two.bytes.get("pixels", 0) / two.rows
        if rows <= first:
            loss: float = moving(self.step(whole, rows, hollow=True), "pixels")
        else:
            loss = moving(small, "pixels") + slope * (rows - first)
        standing = two.total - moving(two)
        return round(
            max(two.total + (slope + pixels) * (rows - two.rows), standing + pixels * rows + loss)
        )


def cut(config: Config, rows: int) -> int:
    """The chunks' size if so many pairs are more than two chunks, else 0: then a whole step is
    tried.
    """
    chunk = config.model.chunk_size
    return chunk if isinstance(chunk, int) and 0 < 2 * chunk < rows else 0


def _meets(one: FitAnswer, other: FitAnswer, budget: int) -> int:
    """Where the straight line through both meets the budget."""
    slope = (other.bytes - one.bytes) / (other.rows - one.rows)
    return int(other.rows + (budget - other.bytes) / max(slope, 1.0))


def moving(step: Step, without: str = "") -> int:
    """Bytes of what comes and goes within a step."""
    labels = {"activations", "loss", "gradients", "pixels"} - {without}
    return sum(step.bytes.get(label, 0) for label in labels)


def changed(config: Config, changes: Mapping[str, object]) -> Config:
    """The config with other values for `section.field`s. Raises ConfigError where they do not go
    together.
    """
    tree = config.model_dump(mode="json")
    for name, value in changes.items():
        *sections, field = name.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[field] = value
    return validated(tree)
