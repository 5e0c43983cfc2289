"""What mining costs a training run: the same run without and with it, in turns.

    python -m tests.bench.overhead [--config configs/demo.yaml] [--rounds 3] [--pairs 12800]
        [--json OUT.json] [WORDS of clipsmall.train, such as --mining.method=chain]

Every run is a process of its own; pools are mined from the first step to the last, and the first
tenth is not timed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

from tests.bench.sides import ROOT


def seconds(config: str, pairs: int, words: list[str]) -> float:
    """Of the steps after the first tenth, evaluation and start left out."""
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"--config={config}",
            f"--optim.pairs={pairs}",
            "--optim.warmup_pairs=0",
            "--data.batch_size=32",
        ]
        quiet = [
            "--evaluate={}",
            "--run.log_every=20",
            "--run.checkpoint_every=1000000",
            f"--out={folder}/run",
        ]
        command = [sys.executable, "-m", "clipsmall.train", *common, *quiet, *words]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if found.returncode:
            raise SystemExit(found.stderr)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "pairs_per_second" in row]
    timed = [row for row in rows if row["pairs"] > pairs / 10]
    return sum(
        (row["pairs"] - before["pairs"]) / row["pairs_per_second"]
        for before, row in pairwise(timed)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=12_800)
    parser.add_argument("--json", type=Path)
    options, words = parser.parse_known_args()
    plain = [word for word in words if not word.startswith("--mining.")]
    mined = ["--mining.method=groups", "--mining.start=0", "--mining.end=1", *words]
    sides: dict[str, list[float]] = {"plain": [], "mined": []}
    for number in range(options.rounds):
        for name in ("plain", "mined") if number % 2 == 0 else ("mined", "plain"):
            took = seconds(options.config, options.pairs, mined if name == "mined" else plain)
            sides[name].append(took)
            print(f"round {number + 1}, {name}: {took:.1f} s", flush=True)
    ratio = median(sides["mined"]) / median(sides["plain"])
    print(f"mined / plain: {ratio:.2f}")
    if options.json:
        options.json.write_text(
            json.dumps({"seconds": sides, "ratio": ratio, "words": mined}, indent=1)
        )


if __name__ == "__main__":
    main()
