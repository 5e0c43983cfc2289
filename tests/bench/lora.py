"""Fine-tuning of a small CLIP: what each amount of training brings, on drawings it never saw.

    python -m tests.bench.lora [--out runs/lora] [--data data/lora] [--shared ../shared/data]

A HF `CLIPModel` (ViT of 3 blocks at 64 px, CLIP's own BPE tokenizer) is first trained on icons and
exported to HF's
format: that is the checkpoint a user would download. Then it is tuned on emoji of all vendors but
openmoji, with the same pairs for each amount, and asked to retrieve openmoji's. Finished runs are
kept; the table is lora.csv and a plot.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from tests.bench.sides import ROOT
from tests.local_clip import local_clip

METRICS = ("image_retrieval_recall@1", "image_retrieval_recall@10", "text_retrieval_recall@10")
AMOUNTS: dict[str, list[str]] = {
    "lora, rank 16": ["--tune.image=lora", "--tune.text=lora", "--optim.lr=3e-3"],
    "full": ["--optim.lr=1e-3"],
    "lora, rank 16, projections": [
        "--tune.image=lora",
        "--tune.text=lora",
        "--tune.projections=true",
        "--optim.lr=3e-3",
    ],
    "image frozen (LiT)": ["--tune.image=frozen", "--optim.lr=1e-3", "--data.crop_scale=1"],
    "last block of each": ["--tune.image=1", "--tune.text=1", "--optim.lr=1e-3"],
    "lora, rank 4": [
        "--tune.image=lora",
        "--tune.text=lora",
        "--tune.lora.rank=4",
        "--optim.lr=3e-3",
    ],
    "full, layer_decay 0.7": ["--optim.lr=1e-3", "--optim.layer_decay=0.7"],
    "text frozen": ["--tune.text=frozen", "--optim.lr=1e-3"],
}


def run(*words: object) -> float:
    """One of our commands, in a process of its own with one thread; returns its seconds."""
    start = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, env=environment, stdout=sys.stderr
    )
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, words))}")
    return time.time() - start


def make_data(data: Path, shared: Path) -> None:
    if not (data / "test").exists():
        csv = shared / "emoji/emoji.csv"
        images = shared / "emoji/emoji.zip"
        for name, sign in (("train", "!="), ("test", "==")):
            where = f'vendor {sign} "openmoji"'
            run(
                "data_tools.make_shards",
                csv,
                data / name,
                "--images",
                images,
                "--where",
                where,
                "--workers",
                1,
            )
    if not (data / "icons").exists():
        icons = shared / "icons"
        run(
            "data_tools.make_shards",
            icons / "icons.csv",
            data / "icons",
            "--images",
            icons / "icons.zip",
            "--workers",
            1,
        )


def pretrained(out: Path, data: Path, pairs: int) -> Path:
    """The checkpoint to tune, in HF's format."""
    folder = out / "base"
    if not folder.exists():
        random = local_clip(
            out / "random",
            image_size=64,
            patch_size=16,
            width=96,
            layers=3,
            heads=3,
            projection=96,
            context_length=24,
        )
        if not (out / "pretraining/checkpoints").exists():
            run(
                "clipsmall.train",
                f"--out={out / 'pretraining'}",
                f"--data.train=[{data / 'icons'}]",
                f"--model.name={random}",
                "--optim.lr=1e-3",
                f"--optim.pairs={pairs}",
                "--data.crop_scale=0.7",
                "--data.batch_size=128",
                "--optim.weight_decay=0.05",
            )
        run("clipsmall.export", out / "pretraining", "--to", folder, "--name", "icons-clip")
    return folder


def retrieval(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(next(folder.glob("*retrieval*.json")).read_text())[
        "metrics"
    ]
    return found


def tuned(
    name: str, words: list[str], base: Path, out: Path, data: Path, pairs: int
) -> dict[str, Any]:
    folder = out / name.replace(" ", "-").replace(",", "")
    if not (folder / "seconds").exists():
        seconds = run(
            "clipsmall.train",
            f"--out={folder}",
            "--resume=auto",
            f"--data.train=[{data / 'train'}]",
            f"--model.name={base}",
            f"--optim.pairs={pairs}",
            "--optim.warmup_pairs=4096",
            "--optim.weight_decay=0.05",
            "--data.batch_size=128",
            f"--evaluate.retrieval=[{{name: openmoji, data: [{data / 'test'}]}}]",
            "--data.crop_scale=0.7",
            *words,
        )
        (folder / "seconds").write_text(str(round(seconds)))
    return {
        "tuned": name,
        **retrieval(folder / "eval"),
        "seconds": int((folder / "seconds").read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--data", type=Path, default=Path("data/lora"))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--pretraining_pairs", type=int, default=300_000)
    parser.add_argument("--pairs", type=int, default=60_000)
    args = parser.parse_args()
    make_data(args.data, args.shared)
    base = pretrained(args.out, args.data, args.pretraining_pairs)
    if not list((args.out / "before").glob("*.json")):
        run("clipsmall.retrieve", base, "--data", args.data / "test", "--out", args.out / "before")
    rows = [{"tuned": "not at all", **retrieval(args.out / "before"), "seconds": 0}]
    for name, words in AMOUNTS.items():
        rows.append(tuned(name, words, base, args.out, args.data, args.pairs))
        table = pd.DataFrame(rows)[["tuned", *METRICS, "seconds"]]
        table.to_csv(args.out / "lora.csv", index=False)
        print(table.to_string(index=False), flush=True)
    axes = table.set_index("tuned")[list(METRICS)].iloc[::-1].plot.barh(figsize=(8, 5))
    axes.set_xlabel("share of openmoji's 1,776 pairs")
    plt.tight_layout()
    plt.savefig(args.out / "lora.png", dpi=120)


if __name__ == "__main__":
    main()
