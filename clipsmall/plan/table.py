"""A plan as a table, and in words."""

import textwrap
from collections.abc import Sequence

from clipsmall.plan.largest import ANY, MOST
from clipsmall.plan.settings import PlanRow, best
from clipsmall.plan.step import Machine, Step

GIB = 2**30
HEAD = ("", "peak", "fits", "largest", "effective", "FLOPs")


def table(rows: Sequence[PlanRow], machine: Machine, budget: int) -> str:
    """One line a setting, at most 120 columns wide."""
    lines = [HEAD, ("setting", f"at {rows[0].rows} pairs", "", "batch", "batch", "a pair")]
    for row in rows:
        batch = row.largest.rows * machine.ranks
        lines.append(
            (
                row.title,
                gib(row.peak),
                "yes" if row.peak <= budget else "no",
                f"{row.largest.rows:,}" + "+" * (row.largest.rows == MOST),
                "any" if batch >= ANY else f"{batch:,}",
                f"x {row.flops / rows[0].flops:.2f}",
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )


def breakdown(step: Step, reserve: int) -> str:
    """What the memory is at the peak, largest first."""
    parts = sorted(step.bytes.items(), key=lambda part: -part[1])
    shown = [f"{name} {gib(size)}" for name, size in parts if size >= GIB / 200]
    return wrap(
        f"At the peak: {', '.join(shown) or 'next to nothing'}; and {gib(reserve)} in reserve."
    )


def verdict(rows: Sequence[PlanRow], machine: Machine, budget: int, memory: int) -> str:
    """Fits or not, what buys most, and what `any` means."""
    own = rows[0]
    most = best(rows)
    fits = own.peak <= budget
    said = (
        f"{'Fits' if fits else 'Does not fit'}: {own.rows} pairs a device need {gib(own.peak)}, and there are "
        f"{gib(budget)} of {gib(memory)}."
    )
    if most:
        what = " ".join(f"--{name}={str(value).lower()}" for name, value in most.options.items())
        said += (
            f" What buys most is {what}: up to {most.largest.rows:,} pairs a device at {most.flops / own.flops:.2f} x "
            "the FLOPs."
        )
    elif not fits:
        said += " Nothing here makes it fit: take a smaller model or smaller images."
    if best_any := [row.largest for row in rows if row.largest.rows * machine.ranks >= ANY]:
        found = min(best_any, key=lambda answer: answer.bytes)
        said += (
            f" (any: {ANY:,} pairs or more in all; the loss is linear in memory: {found.rows:,} pairs a device need "
            f"{gib(found.bytes)}.)"
        )
    return wrap(said)


def wrap(text: str) -> str:
    return textwrap.fill(text, 116, subsequent_indent="  ", break_on_hyphens=False)


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
