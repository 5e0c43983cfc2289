"""A step of a model whole and in chunks: peak memory and time against the batch.

    python -m tests.bench.chunks [--model ViT-B-32] [--sizes 16 32 64] [--chunk 8] [--out FILE.json]
    python -m tests.bench.chunks --model ViT-S-32 --image_size 1024 --sizes 256 --chunk 4 \\
                                 --whole 0 --steps 1 --anew

Forward, softmax, backward, with random weights and pixels; every number from a fresh process.
Memory is the process's peak less its level when model, gradients and pixels are there (on a GPU
`max_memory_allocated`); time is the better of two steps. "in all" is the peak itself: Python,
libraries, model, gradients and pixels (one byte a colour, in host memory) included, an optimizer's
memory not. Gradients are there before a step; with --anew each step makes its own, as training
does, and a step in chunks then needs no second copy of them (see tests/bench/gradcache.py). Whole
steps above --whole pairs are left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clipsmall.batch import Pairs
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.towers import Loaded
from clipsmall.model.towers.open_clip_towers import load_open_clip
from clipsmall.objectives.softmax import softmax
from tests.bench.losses import GIB, level
from tests.bench.sides import ROOT


def loaded(model: str, image_size: int) -> Loaded:
    """open_clip's model with fresh weights; for other images than its own (0) as its
    `force_image_size` makes it.
    """
    if not image_size:
        return load_open_clip(model, "", weights=True)
    import open_clip

    config = (
        json.loads(Path(model).read_text())
        if model.endswith(".json")
        else open_clip.get_model_config(model)
    )
    if config is None:
        raise ValueError(f"open_clip knows no model {model!r}")
    config["vision_cfg"]["image_size"] = image_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{Path(model).stem}-{image_size}.json"
        path.write_text(json.dumps(config))
        return load_open_clip(str(path), "", weights=True)


def built(task: dict[str, Any]) -> tuple[DualEncoder, Pairs]:
    """A model with gradients (of zero), and pairs no two of which are alike: coarse chequers,
    numbered captions.
    """
    torch.manual_seed(0)
    device = torch.device(task["device"])
    size = task["size"]
    chunk = task["chunk"]
    found = loaded(task["model"], task.get("image_size", 0))
    model = DualEncoder(found.towers, found.spec, 14.3, 0.0, False, chunk_size=chunk)
    model.to(device, getattr(torch, task.get("dtype", "float32"))).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    coarse = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8)
    numbers = torch.arange(size)
    # bytes stay bytes
    pixels = F.interpolate(coarse, size=found.spec.size)
    pairs = Pairs(
        pixels, found.tokenize([f"a photo of number {i}" for i in range(size)]), numbers, numbers
    )
    return model, pairs.to(device, images=not chunk)


def level_now(device: str) -> int:
    """Bytes in use; from here on the peak is counted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # VmHWM starts anew at VmRSS
    Path("/proc/self/clear_refs").write_text("5")
    return level("VmRSS")


def level_at_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else level("VmHWM")


def serve(task: dict[str, Any]) -> None:
    model, pairs = built(task)
    before = level_now(task["device"])
    times = []
    for _ in range(task["steps"]):
        if task["anew"]:
            model.zero_grad()
        start = time.perf_counter()
        rows = model(pairs)
        value = softmax(rows, rows)["loss"]
        value.backward()
        if task["device"] == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = level_at_peak(task["device"])
    found = {
        "seconds": min(times),
        "bytes": peak - before,
        "bytes_in_all": peak,
        "loss": value.item(),
    }
    print(json.dumps(found))


def measured(**task: Any) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.bench.chunks", "--serve", json.dumps(task)]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"error: {found.stderr[-2000:]}")
    return {**task, **json.loads(found.stdout.splitlines()[-1])}


def picture(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for chunk in sorted({row["chunk"] for row in rows}):
        mine = [row for row in rows if row["chunk"] == chunk]
        sizes = [row["size"] for row in mine]
        name = f"chunks of {chunk}" if chunk else "whole"
        axes[0].plot(sizes, [row["bytes"] / GIB for row in mine], "o-", label=name)
        axes[1].plot(sizes, [row["seconds"] / row["size"] for row in mine], "o-", label=name)
    for axis, label in zip(
        axes, ("GiB beside model, gradients and pixels", "seconds a pair"), strict=True
    ):
        axis.set_xlabel("batch")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--whole", type=int, default=64, help="largest batch to try whole")
    parser.add_argument(
        "--image_size", type=int, default=0, help="pixels a side; 0 = the model's own"
    )
    parser.add_argument("--steps", type=int, default=2, help="of which the fastest counts")
    parser.add_argument(
        "--memory", type=float, default=16.0, help="GiB that the largest process is held against"
    )
    parser.add_argument("--anew", action="store_true", help="let gradients go before each step")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "chunks.json")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    rows: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print("batch  chunk    GiB  in all  seconds    loss")
    common = {
        name: getattr(options, name) for name in ("model", "image_size", "steps", "anew", "device")
    }
    for size in options.sizes:
        for chunk in (0, options.chunk):
            if chunk or size <= options.whole:
                row = measured(size=size, chunk=chunk, **common)
                rows.append(row)
                batch = f"{size:>5}  {chunk or 'whole':>5}"
                gib = f"{row['bytes'] / GIB:5.2f}  {row['bytes_in_all'] / GIB:6.2f}"
                print(f"{batch}  {gib}  {row['seconds']:7.2f}  {row['loss']:.4f}", flush=True)
        options.out.write_text(
            json.dumps({"torch": torch.__version__, "results": rows}, indent=2) + "\n"
        )
    at = f" at {options.image_size} pixels" * bool(options.image_size)
    picture(rows, options.out.with_suffix(".png"), f"{options.model}{at}, {options.device}")
    most = max(row["bytes_in_all"] for row in rows)
    print(f"at most {most / GIB:.2f} GiB in all, of {options.memory:g}")
    print(f"{options.out} and {options.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
