"""Reader throughput: our indexed reader against open_clip's own webdataset pipeline.

    python -m tests.bench.reader [--shards FOLDER] [--size 64] [--workers 0 1 2] [--pairs N]
                                 [--out FILE.json]

Same shards, batch size, workers, picture size, interpolation and tokenizer (open_clip's
`SimpleTokenizer`). Ours delivers uint8, which the model normalises, so the normalisation of every
batch to float32 is within our timed loop. A round times N pairs after a warm-up of N / 4; the sides
take turns, round for round, each in a process of
its own that lives through all rounds, and the first round of each is thrown away: it fills the page
cache. Both run with OMP_NUM_THREADS=1, as loader workers do: on shared cores OpenMP's threads wait
for one another by spinning (900 pairs/s became 100 beside one busy neighbour).

open_clip_train 3.3.0 does not run on webdataset 1.0 (its `group_by_keys_nothrow` meets the
end-of-shard marker that 1.0 sends, and dies of a KeyError), so its side runs in `.venv-bench`: made
on first use, it holds the webdataset 0.2.86 that open_clip pins, and finds everything else in the
environment that runs the bench.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from tests.bench.sides import ROOT, Side

THEIRS = ROOT / ".venv-bench"
PINNED = "webdataset==0.2.86"


def our_batches(shards: Path, size: int, batch: int, workers: int) -> Iterator[tuple[Any, Any]]:
    """Endless (B, 3, H, W) float32 and (B, 77) int64, the normalisation made here, in the trainer's
    process.
    """
    import open_clip
    import torch

    from clipsmall.data import GlobalBatches, Order, batch_loader, open_catalog
    from clipsmall.data.preprocess import ImageSpec, ImageTransform

    catalog = open_catalog(str(shards))
    spec = ImageSpec(size)
    order = Order(catalog.sizes, seed=0)
    batches = GlobalBatches(
        catalog, order, ImageTransform(spec), open_clip.SimpleTokenizer(), batch
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (spec.mean, spec.std))
    for pairs, _ in batch_loader(batches, range(1 << 40), workers):
        yield pairs.image.float().sub_(mean).div_(std), pairs.text


def their_batches(shards: Path, size: int, batch: int, workers: int) -> Iterator[tuple[Any, Any]]:
    """The same from `get_wds_dataset`, as its training loop gets it."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    from clipsmall.data.preprocess import ImageSpec

    spec = ImageSpec(size)
    transform = open_clip.image_transform(size, is_train=False, mean=spec.mean, std=spec.std)
    options = SimpleNamespace(
        train_data="::".join(str(path) for path in sorted(shards.glob("*.tar"))),
        train_num_samples=1 << 40,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    data = get_wds_dataset(options, transform, is_train=True, tokenizer=open_clip.SimpleTokenizer())
    yield from data.dataloader


SIDES: dict[str, Callable[[Path, int, int, int], Iterator[tuple[Any, Any]]]] = {
    "ours": our_batches,
    "theirs": their_batches,
}


def serve(side: str) -> None:
    """A round for every JSON line on stdin; answers with pairs a second, in a line of its own."""
    import torch
    import webdataset

    print(
        json.dumps({"torch": torch.__version__, "webdataset": webdataset.__version__}), flush=True
    )
    for line in sys.stdin:
        task = json.loads(line)
        batches = SIDES[side](Path(task["shards"]), task["size"], task["batch"], task["workers"])
        steps = -(-task["pairs"] // task["batch"])
        for _ in range(1 + steps // 4):
            image, text = next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            image, text = next(batches)
        seconds = time.perf_counter() - start
        batches.close()  # type: ignore[attr-defined]  # ends the workers
        assert image.shape == (task["batch"], 3, task["size"], task["size"])
        assert (image.dtype, text.shape) == (torch.float32, (task["batch"], 77))
        print(json.dumps(steps * task["batch"] / seconds), flush=True)


def their_python() -> str:
    """The interpreter of `.venv-bench`, which is made if it is not there."""
    python = THEIRS / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (THEIRS / "made").exists():
        print(f"making {THEIRS.name} with {PINNED} ...", file=sys.stderr)
        venv.create(THEIRS, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", PINNED], check=True)
        found = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        (Path(found.stdout.strip()) / "main.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        (THEIRS / "made").touch()
    return str(python)


def started(name: str) -> Side:
    """Asked with a task, it answers pairs a second; its first words are its versions."""
    python = sys.executable if name == "ours" else their_python()
    return Side(
        [python, "-m", "tests.bench.reader", "--serve", name],
        {**os.environ, "OMP_NUM_THREADS": "1"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, default=ROOT / "data" / "glyphs" / "train")
    parser.add_argument("--size", type=int, default=64, help="pixels of the pictures handed out")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=10_000, help="timed in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of each side, beside the first")
    parser.add_argument("--out", type=Path, help="JSON for the numbers")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if not list(options.shards.glob("*.tar")):
        raise SystemExit(
            f"error: {options.shards}: no shards; make some: "
            "python -m data_tools.glyphs data/glyphs"
        )
    sides = {name: started(name) for name in SIDES}
    rows = []
    head = f"{'workers':>7}  {'ours':>8}  {'open_clip':>9}  ratio"
    print(f"{head}  (pairs/s, median of {options.rounds} rounds)")
    for workers in options.workers:
        task = {name: getattr(options, name) for name in ("size", "batch", "pairs")}
        task |= {"shards": str(options.shards.resolve()), "workers": workers}
        # the first only warms up
        turns = range(options.rounds + 1)
        measured = [{name: float(side.ask(task)) for name, side in sides.items()} for _ in turns][
            1:
        ]
        ours, theirs = (median(row[name] for row in measured) for name in SIDES)
        print(f"{workers:>7}  {ours:>8,.0f}  {theirs:>9,.0f}  {ours / theirs:>5.2f}", flush=True)
        rows.append(
            {
                "workers": workers,
                "ours": ours,
                "theirs": theirs,
                "ratio": ours / theirs,
                "rounds": measured,
            }
        )
    versions = {name: side.hello for name, side in sides.items()}
    for side in sides.values():
        side.close()
    if options.out:
        settings = {name: getattr(options, name) for name in ("size", "batch", "pairs")}
        record = {"shards": options.shards.name, **settings, "versions": versions, "results": rows}
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
