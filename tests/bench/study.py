"""What tricks for small batches are worth: a grid of training runs, their table and their plots.

    python -m tests.bench.study batch32-glyphs [--out runs/study] [--jobs 2]      # runs what is missing, then tells
    python -m tests.bench.study batch32-glyphs --tell                             # tells only

Every run is `clipsmall.train` in a process of its own with one thread, resumable; several of these commands may work on
one study at a time (another machine's, too, on a shared disk). Run from the repository's root.
"""

import argparse
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


def claimed(folder: Path) -> bool:
    """Whether this process may run it: nobody else does, or whoever did is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "claimed"
    try:
        with mark.open("x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        return False


def run(study: Study, name: str, seed: int, out: Path) -> None:
    folder = out / f"{name}-{seed}"
    if (folder / "seconds").exists() or not claimed(folder):
        return
    words = [*study.words, *study.runs[name], f"--seed={seed}", f"--out={folder / 'run'}", "--resume=auto"]
    start = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-m", "clipsmall.train", *words]
            found = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        if found.returncode == 0:
            (folder / "seconds").write_text(json.dumps(time.time() - start))
        print(f"{name} seed {seed}: {found.returncode or 'done'}, {time.time() - start:.0f} s", flush=True)
    finally:
        (folder / "claimed").unlink()


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
