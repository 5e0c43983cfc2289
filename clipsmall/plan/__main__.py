"""Does a config fit, and what would make it fit? Answered on any machine, without GPU, weights or
data.

    python -m clipsmall.plan --config configs/demo.yaml [--section.field=value ...] [--memory 16GiB] [--world_size 8]

One step of the real loop runs on tensors that have shapes and no numbers; what is alive is counted.
A hub id needs its config.json and tokenizer, in the hub's cache or a folder; an open_clip name
needs nothing. No weights are read.

The reserve is for what no meter sees: on a GPU 0.5 GiB (CUDA context, cuBLAS workspaces), NCCL's
buffers, and a twentieth of the memory lost in the allocator's gaps; on a CPU Python and its
libraries. FLOPs are of matrix products, convolutions and attention; a device that waits for its
memory or its data is another matter. Exit codes: 0 it fits; 1 it does not; 2 bad input.
"""

import argparse
import json
import logging
import re
import sys
from pathlib import Path

from clipsmall.cli import refuse
from clipsmall.config import Config
from clipsmall.config.reader import help_text, read
from clipsmall.plan.largest import Planner
from clipsmall.plan.settings import PlanRow, as_configured, plan
from clipsmall.plan.step import Machine
from clipsmall.plan.table import GIB, breakdown, gib, table, verdict

UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
# CUDA context and cuBLAS workspaces; Python, torch, transformers
CONTEXT = {
    "cuda": 0.5 * GIB,
    "cpu": 0.6 * GIB,
}
# buffers of a communicator, with several GPUs
NCCL = 0.25 * GIB
# of all memory: blocks that the allocator holds and cannot hand out
GAPS = 0.05


def size(text: str) -> int:
    """`16GiB`, `24 GB`, `500MiB` -> bytes. Raises ValueError."""
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    try:
        if found is None or unit is None:
            raise ValueError
        return int(float(found[1]) * unit)
    except ValueError:
        raise ValueError(f"{text!r} is no amount of memory; write 16GiB or 24GB") from None


def reserve(machine: Machine, memory: int) -> int:
    """Bytes that no meter sees; none of these numbers is measured on your machine."""
    nccl = NCCL if machine == ("cuda", machine.ranks) and machine.ranks > 1 else 0
    return round(CONTEXT[machine.device] + nccl + GAPS * memory)


def rows_of(config: Config, ranks: int) -> int:
    """Pairs of a rank. Raises ValueError if the batch cannot be shared out."""
    rows, rest = divmod(config.data.batch_size, ranks)
    if rest or not rows:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} is not divisible by --world_size={ranks}"
        )
    return rows


def report(config: Config, machine: Machine, memory: int, kept: int, file: Path | None) -> int:
    rows = rows_of(config, machine.ranks)
    budget = memory - kept
    planner = Planner(machine, budget)
    batch = f"batch {config.data.batch_size} = {machine.ranks} x {rows} pairs"
    print(
        f"{config.model.name}, {config.objective.title}, {batch}; {machine.device}, {gib(memory)} a device"
    )
    found = []
    for row in plan(planner, config, rows):
        found.append(row)
    own = planner.step(as_configured(planner, config, rows), rows)
    print(
        table(found, machine, budget),
        breakdown(own, kept),
        verdict(found, machine, budget, memory),
        sep="\n",
    )
    if file:
        write(file, found, own.bytes, machine, memory, kept)
    return 0 if found[0].peak <= budget else 1


def write(
    file: Path, rows: list[PlanRow], parts: dict[str, int], machine: Machine, memory: int, kept: int
) -> None:
    facts = {
        "device": machine.device,
        "world_size": machine.ranks,
        "memory": memory,
        "reserve": kept,
    }
    lines = [row._asdict() | {"largest": row.largest._asdict()} for row in rows]
    file.write_text(
        json.dumps({**facts, "at_peak": parts, "settings": lines}, indent=2) + "\n",
        encoding="utf-8",
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.plan",
        description=__doc__,
        epilog=help_text(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", default="16GiB", help="of a device")
    parser.add_argument("--world_size", type=int, default=1, help="devices, one rank each")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--reserve", default="", help="memory kept back, as 1GiB; default: see above"
    )
    parser.add_argument("--json", type=Path, help="file to write the plan to")
    options, rest = parser.parse_known_args(words)
    # open_clip warns that there are no weights
    logging.getLogger().setLevel(logging.ERROR)
    try:
        if options.world_size < 1:
            raise ValueError(f"--world_size={options.world_size}: at least one device")
        machine = Machine(options.device, options.world_size)
        memory = size(options.memory)
        kept = size(options.reserve) if options.reserve else reserve(machine, memory)
        if kept >= memory:
            raise ValueError(
                f"--memory {options.memory}: the reserve of {gib(kept)} takes all of it"
            )
        return report(read(rest), machine, memory, kept, options.json)
    except ValueError as error:
        refuse(error)


if __name__ == "__main__":
    sys.exit(main())
