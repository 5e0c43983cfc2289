"""A plan as a table and in sentences."""

import textwrap
from collections.abc import Sequence

from clipsmall.plan.alternatives import PlanRow, best_row
from clipsmall.plan.largest_batch import ANY, MOST
from clipsmall.plan.step import Machine, Step

GIB = 2**30
HEAD = ("", "peak", "fits", "largest", "effective", "FLOPs")


def plan_table(rows: Sequence[PlanRow], machine: Machine, budget: int) -> str:
    """One line per row, at most 120 columns wide."""
    lines = [HEAD, ("setting", f"at {rows[0].rows} pairs", "", "batch", "batch", "a pair")]
    for row in rows:
        batch = row.largest.rows * machine.ranks
        or_more = "+" if row.largest.rows == MOST else ""
        lines.append(
            (
                row.title,
                gib(row.peak),
                "yes" if row.peak <= budget else "no",
                f"{row.largest.rows:,}{or_more}",
                "any" if batch >= ANY else f"{batch:,}",
                f"x {row.flops / rows[0].flops:.2f}",
            )
        )

    widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    texts = []
    for title, *numbers in lines:
        cells = [title.ljust(widths[0])]
        for number, width in zip(numbers, widths[1:], strict=True):
            cells.append(number.rjust(width))
        texts.append("  ".join(cells))

    return "\n".join(texts)


def breakdown(step: Step, reserve: int) -> str:
    """What the memory is used for at the peak, largest part first."""
    parts = sorted(step.bytes.items(), key=lambda part: -part[1])
    # only parts that do not print as 0.00 GiB
    shown = [f"{name} {gib(size)}" for name, size in parts if size >= GIB / 200]
    listed = ", ".join(shown) or "next to nothing"
    return wrap(f"At the peak: {listed}; and {gib(reserve)} in reserve.")


def verdict(rows: Sequence[PlanRow], machine: Machine, budget: int, memory: int) -> str:
    """Whether it fits, which options allow the largest batch, and what `any` means."""
    own = rows[0]
    best = best_row(rows)
    fits = own.peak <= budget
    text = (
        f"{'Fits' if fits else 'Does not fit'}: {own.rows} pairs a device need {gib(own.peak)}, "
        f"and there are {gib(budget)} of {gib(memory)}."
    )
    if best:
        options = " ".join(f"--{name}={str(value).lower()}" for name, value in best.options.items())
        text += (
            f" What buys most is {options}: up to {best.largest.rows:,} pairs a device "
            f"at {best.flops / own.flops:.2f} x the FLOPs."
        )
    elif not fits:
        text += " Nothing here makes it fit: take a smaller model or smaller images."

    any_batch = [row.largest for row in rows if row.largest.rows * machine.ranks >= ANY]
    if any_batch:
        least = min(any_batch, key=lambda answer: answer.bytes)
        text += (
            f" (any: {ANY:,} pairs or more in all; the loss is linear in memory: {least.rows:,} "
            f"pairs a device need {gib(least.bytes)}.)"
        )

    return wrap(text)


def wrap(text: str) -> str:
    return textwrap.fill(text, 116, subsequent_indent="  ", break_on_hyphens=False)


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
