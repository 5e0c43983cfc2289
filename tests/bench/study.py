"""What tricks for small batches are worth: a grid of training runs, their table and their plots.

    python -m tests.bench.study batch32-glyphs [--out runs/study] [--jobs 2]      # runs what is missing, then tells
    python -m tests.bench.study batch32-glyphs --tell                             # tells only

Every run is `clipsmall.train` in a process of its own with one thread, resumable; several of these commands may work on
one study at a time (another machine's, too, on a shared disk). Run from the repository's root.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.sides import ROOT
from tests.bench.studies import STUDIES, Study
from tests.bench.study_results import tell


def run(study: Study, name: str, seed: int, out: Path) -> None:
    """One run, unless it is done or another process is at it; a lock ends with its process."""
    folder = out / f"{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not (folder / "seconds").exists():
            train([*study.words, *study.runs[name], f"--seed={seed}"], f"{name}, seed {seed}", folder)


def train(words: list[str], title: str, folder: Path) -> None:
    start = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "clipsmall.train", *words, f"--out={folder / 'run'}", "--resume=auto"]
    with (folder / "log").open("w") as log:
        found = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    took = time.time() - start
    if found.returncode == 0:
        (folder / "seconds").write_text(json.dumps(took))
    print(f"{title}: {f'failed, see {folder}/log' if found.returncode else 'done'}, {took:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--seeds", type=int, nargs="+", help="run these only")
    parser.add_argument("--only", nargs="+", help="these runs only")
    parser.add_argument("--tell", action="store_true", help="run nothing")
    options = parser.parse_args()
    study, out = STUDIES[options.study], options.out / options.study
    if not options.tell:
        with ThreadPoolExecutor(options.jobs) as pool:
            todo = [(name, seed) for seed in options.seeds or study.seeds for name in options.only or study.runs]
            list(pool.map(lambda each: run(study, *each, out), todo))
    tell(study, out)


if __name__ == "__main__":
    main()
