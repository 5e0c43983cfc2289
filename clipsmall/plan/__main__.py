"""Does a config fit into memory, and what would make it fit?

    python -m clipsmall.plan --config configs/demo.yaml [--section.field=value ...]
                             [--memory 16GiB] [--world_size 8]

Works on any machine, without GPU, weights or data: one step of the real training loop runs on
tensors that have shapes but no numbers, and the memory of all tensors in use is counted. A model
from the Hugging Face hub needs its config.json and tokenizer, in the hub's cache or a folder; an
open_clip name needs nothing. No weights are read.

The reserve is memory that cannot be counted this way: on a GPU 0.5 GiB (CUDA context, cuBLAS
workspaces), NCCL's buffers, and 5 % of the memory for gaps in the allocator; on a CPU Python and
its libraries. FLOPs are those of matrix products, convolutions and attention; time spent waiting
for memory or data is not predicted. Exit codes: 0 it fits; 1 it does not; 2 bad input.
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
from clipsmall.plan.alternatives import PlanRow, as_configured, plan_rows
from clipsmall.plan.formatting import GIB, breakdown, gib, plan_table, verdict
from clipsmall.plan.largest_batch import Planner
from clipsmall.plan.step import Machine

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
CONTEXT = {
    # CUDA context and cuBLAS workspaces
    "cuda": 0.5 * GIB,
    # Python, torch, transformers
    "cpu": 0.6 * GIB,
}
# NCCL's buffers with several GPUs
NCCL = 0.25 * GIB
# fraction of the memory that is lost to gaps in the allocator
GAPS = 0.05


def memory_size(text: str) -> int:
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
    """Bytes that cannot be counted: typical values, not measured on this machine."""
    several_gpus = machine.device == "cuda" and machine.ranks > 1
    nccl = NCCL if several_gpus else 0
    return round(CONTEXT[machine.device] + nccl + GAPS * memory)


def rows_per_rank(config: Config, ranks: int) -> int:
    """Pairs per rank. Raises ValueError if the batch cannot be divided evenly."""
    rows, rest = divmod(config.data.batch_size, ranks)
    if rest or not rows:
        raise ValueError(
            f"data.batch_size={config.data.batch_size} is not divisible by --world_size={ranks}"
        )
    return rows


def print_plan(
    config: Config, machine: Machine, memory: int, reserved: int, file: Path | None
) -> int:
    """Print the plan, write it to `file` if given, and return the exit code."""
    rows = rows_per_rank(config, machine.ranks)
    budget = memory - reserved
    planner = Planner(machine, budget)
    batch = f"batch {config.data.batch_size} = {machine.ranks} x {rows} pairs"
    device = f"{machine.device}, {gib(memory)} a device"
    print(f"{config.model.name}, {config.objective.title}, {batch}; {device}")
    planned = list(plan_rows(planner, config, rows))
    own = planner.step(as_configured(planner, config, rows), rows)
    print(plan_table(planned, machine, budget))
    print(breakdown(own, reserved))
    print(verdict(planned, machine, budget, memory))
    if file:
        write_plan_json(file, planned, own.bytes, machine, memory, reserved)
    return 0 if planned[0].peak <= budget else 1


def write_plan_json(
    file: Path,
    rows: list[PlanRow],
    parts: dict[str, int],
    machine: Machine,
    memory: int,
    reserved: int,
) -> None:
    """Write machine, memory at the peak by part, and all rows as JSON; amounts are in bytes."""
    settings = [row._asdict() | {"largest": row.largest._asdict()} for row in rows]
    facts = {
        "device": machine.device,
        "world_size": machine.ranks,
        "memory": memory,
        "reserve": reserved,
        "at_peak": parts,
        "settings": settings,
    }
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.plan",
        description=__doc__,
        epilog=help_text(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory", default="16GiB", help="memory of one device")
    parser.add_argument("--world_size", type=int, default=1, help="devices, one rank each")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--reserve", default="", help="memory to leave unused, such as 1GiB; default: see above"
    )
    parser.add_argument("--json", type=Path, help="file to write the plan to")
    options, rest = parser.parse_known_args(words)

    # silence open_clip's warning that there are no weights
    logging.getLogger().setLevel(logging.ERROR)
    try:
        if options.world_size < 1:
            raise ValueError(f"--world_size={options.world_size}: at least one device")
        machine = Machine(options.device, options.world_size)
        memory = memory_size(options.memory)
        reserved = reserve(machine, memory)
        if options.reserve:
            reserved = memory_size(options.reserve)
        if reserved >= memory:
            raise ValueError(
                f"--memory {options.memory}: the reserve of {gib(reserved)} takes all of it"
            )

        return print_plan(read(rest), machine, memory, reserved, options.json)
    except ValueError as error:
        refuse(error)


if __name__ == "__main__":
    sys.exit(main())
