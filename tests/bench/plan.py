"""The planner's peaks next to true ones, which the profiler reports.

    python -m tests.bench.plan [--only WORDS] [--out FILE.json]

Each setting runs one step twice: abstractly, as `python -m clipsmall.plan --device cpu` does, and
with real tensors through the same loop, where PyTorch's allocator reports every block it gives and
takes back. Random weights.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from clipsmall.config import Config
from clipsmall.config.reader import read
from clipsmall.plan.meter import Meter
from clipsmall.plan.step import Machine, Stage, measure_step, of_batch
from tests.bench.sides import ROOT

ALONE = Machine("cpu", 1)
# options of a config, and the batch
SETTINGS: list[tuple[str, int, list[str]]] = [
    ("ViT-B-32", 16, []),
    ("ViT-B-32", 32, []),
    ("ViT-B-32", 32, ["--objective=sigmoid"]),
    ("ViT-B-32", 32, ["--run.precision=bf16"]),
    ("ViT-B-32", 32, ["--model.chunk_size=8"]),
    ("ViT-B-32", 32, ["--model.chunk_size=8", "--run.precision=bf16"]),
    ("ViT-B-32", 32, ["--model.checkpoint_activations=true"]),
    ("ViT-B-32", 16, ["--objective.queue=moco", "--objective.moco.size=65536"]),
    ("ViT-B-32", 32, ["--tune.image=frozen"]),
    ("hf", 32, []),
    ("hf", 32, ["--model.attention=eager"]),
    ("hf", 32, ["--tune.image=lora", "--tune.text=lora"]),
    (
        "hf",
        32,
        ["--tune.image=lora", "--tune.text=lora", "--model.chunk_size=8", "--run.precision=bf16"],
    ),
    ("hf", 32, ["--tune.image=lora", "--tune.text=lora", "--model.checkpoint_activations=true"]),
]


def true_peak(config: Config, rows: int) -> int:
    """Bytes alive together in the second step, of all that was made since before the model was."""
    torch.manual_seed(0)
    # what a former session made must not be taken back in this one
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        # a meter that is not entered counts nothing
        stage = Stage(of_batch(config, rows), ALONE, Meter(), hollow=False)
        stage.first_step()
        if hasattr(stage.objective, "past"):
            stage.objective.past.seen.fill_(stage.objective.past.size)
        with torch.profiler.record_function("second step"):
            stage.second_step(rows)
    results: Any = seen.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    begun = next(event.start_ns() for event in events if event.name() == "second step")
    alive = peak = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            if event.start_ns() >= begun:
                peak = max(peak, alive)
    return peak


def compared(words: list[str], rows: int) -> dict[str, Any]:
    config = read(["--config", str(ROOT / "configs" / "demo.yaml"), *words])
    planned = measure_step(config, ALONE, rows)
    true = true_peak(config, rows)
    return {
        "options": words,
        "rows": rows,
        "planned": planned.total,
        "true": true,
        "parts": planned.bytes,
    }


def hf_clip(folder: Path) -> str:
    """HF's CLIP of ViT-B/32's size, without its vocabulary."""
    from tests.local_clip import local_clip

    return str(
        local_clip(
            folder, image_size=224, patch_size=32, width=512, layers=8, heads=8, projection=512
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="settings whose options hold this")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "plan.json")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    print(f"{'setting':<80} batch  planned     true  ratio")
    with tempfile.TemporaryDirectory() as folder:
        hf = ""
        for model, rows, words in SETTINGS:
            if options.only not in f"{model} {' '.join(words)}":
                continue
            hf = hf_clip(Path(folder)) if model == "hf" and not hf else hf
            row = compared([f"--model.name={hf if model == 'hf' else model}", *words], rows)
            found.append(row | {"model": model})
            title = f"{model} {' '.join(word.removeprefix('--') for word in words)}"
            sizes = f"{row['planned'] / 2**30:8.3f} {row['true'] / 2**30:8.3f}"
            print(f"{title:<80} {rows:>5} {sizes}  {row['planned'] / row['true']:.3f}", flush=True)
            options.out.write_text(
                json.dumps({"torch": torch.__version__, "results": found}, indent=2) + "\n"
            )


if __name__ == "__main__":
    main()
