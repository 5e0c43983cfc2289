"""Memory and time of a loss: ours in tiles, open_clip's, and ours as plain dense autograd.

    python -m tests.bench.losses [--sizes 1024 4096 16384] [--objectives softmax] [--memory 16]
                                 [--out FILE.json]

Forward and backward.

Every number comes from a fresh process of its own. Memory is the process's peak (VmHWM, what the
kernel saw, scratch space of matrix products included) less its level before the first loss, when
features and the thread pools are there already; the gradients of the features are thus in it. On a
GPU it is `max_memory_allocated`, likewise less the level. Time is the median of rounds in which the
sides take turns. One of the sides is a yardstick: x yᵀ alone, in blocks. "x 5" then means: as long
as five such products, where dense autograd's own products are three (S, and one for each gradient).
A side that would need more than --memory GiB is left out, and named.

Busy neighbours spoil the times, not the memory: OpenMP's threads wait for one another by spinning.
Beside any, say OMP_NUM_THREADS=1 (on two cores with a load of 8, x 5 became x 9).

The sides must agree on the loss. Beside the JSON lies a picture of both numbers against the batch.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipsmall.batch import Embeddings
from clipsmall.distributed import similarity
from clipsmall.objectives import OBJECTIVES
from tests.bench.sides import ROOT, Side

GIB = 2**30
Loss = Callable[[Embeddings], Tensor]


def dense_softmax(e: Embeddings) -> Tensor:
    scores = e.logit_scale * (e.image @ e.text.T)
    others = scores.masked_fill(e.caption_hash[:, None] == e.caption_hash, -torch.inf)
    gaps = [others.logsumexp(dim=dim) - scores.diagonal() for dim in (0, 1)]
    return (F.softplus(gaps[0]).mean() + F.softplus(gaps[1]).mean()) / 2


def dense_sigmoid(e: Embeddings) -> Tensor:
    scores = e.logit_scale * (e.image @ e.text.T) + e.logit_bias
    negative = F.softplus(scores).masked_fill(e.caption_hash[:, None] == e.caption_hash, 0.0)
    return negative.sum(dim=1).mean() + F.softplus(-scores.diagonal()).mean()


def open_clips(objective: str) -> Loss:
    import open_clip

    if objective == "softmax":
        return lambda e: open_clip.loss.ClipLoss()(e.image, e.text, e.logit_scale)
    return lambda e: open_clip.loss.SigLipLoss()(e.image, e.text, e.logit_scale, e.logit_bias)


def a_kernel(objective: str) -> Loss:
    """Other people's Triton kernels. inf_cl knows one direction only."""
    if objective == "softmax":
        from inf_cl import cal_flash_loss

        return lambda e: (
            (
                cal_flash_loss(e.logit_scale * e.image, e.text)
                + cal_flash_loss(e.logit_scale * e.text, e.image)
            ).mean()
            / 2
        )
    from siglip_kernel import fused_siglip_loss

    return lambda e: fused_siglip_loss(e.image, e.text, e.logit_scale.log(), e.logit_bias)


def loss_of(side: str, objective: str) -> Loss:
    if side == "ours":
        make: Any = OBJECTIVES[objective].make
        return lambda e: make(e, e)["loss"]
    if side == "dense":
        return {"softmax": dense_softmax, "sigmoid": dense_sigmoid}[objective]
    return open_clips(objective) if side == "open_clip" else a_kernel(objective)


# How many matrices of the batch are alive at the peak, as tests/meter.py counts them; masks make
# the fractions.
MATRICES = {
    ("softmax", "open_clip"): 4.0,
    ("softmax", "dense"): 7.5,
    ("sigmoid", "open_clip"): 5.0,
    ("sigmoid", "dense"): 5.0,
}


def embeddings(size: int, width: int, dtype: torch.dtype, device: str) -> Embeddings:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(size, width, generator=generator)
    # a loss of some nats, to compare the sides by
    text = image + 4 * torch.randn(size, width, generator=generator)
    numbers = torch.arange(size, device=device)
    scale, bias = (
        torch.tensor(value, device=device, requires_grad=True) for value in (20.0, -10.0)
    )
    features = (F.normalize(x, dim=1).to(device, dtype).requires_grad_() for x in (image, text))
    return Embeddings(*features, numbers, numbers, scale, bias)


def step(loss: Loss, e: Embeddings) -> float:
    """Forward and backward; the gradients are let go as an optimizer would."""
    value = loss(e)
    value.backward()
    for leaf in e[:2] + e[4:6]:
        leaf.grad = None  # type: ignore[union-attr]
    return value.item()


@torch.no_grad()
def product(e: Embeddings) -> float:
    """x yᵀ in blocks of a tile, into the same memory."""
    height, width = similarity.TILE[e.image.device.type]
    memory = e.image.new_empty(height * width)
    for x in e.image.split(height):
        for y in e.text.split(width):
            torch.mm(x, y.T, out=memory[: len(x) * len(y)].view(len(x), len(y)))
    return 0.0


def level(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel tells no {name}: this bench runs on Linux")


def serve(task: dict[str, Any]) -> None:
    """Ready after the first line; a round for every line on stdin: seconds, loss, and bytes at the
    peak so far.
    """
    on_gpu = task["device"] == "cuda"
    run: Callable[[Embeddings], float] = product
    if task["side"] != "product":
        run = partial(step, loss_of(task["side"], task["objective"]))
    make = {
        "width": task["width"],
        "dtype": getattr(torch, task["dtype"]),
        "device": task["device"],
    }
    # libraries, thread pools, kernels
    run(embeddings(256, **make))
    e = embeddings(task["size"], **make)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # VmHWM starts anew at VmRSS
        Path("/proc/self/clear_refs").write_text("5")
        before = level("VmRSS")
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        value = run(e)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if on_gpu else level("VmHWM")
        print(json.dumps({"seconds": seconds, "loss": value, "bytes": peak - before}), flush=True)


def started(**task: Any) -> Side:
    """Of one side at one size; asked with anything, it measures a round."""
    return Side(
        [sys.executable, "-m", "tests.bench.losses", "--serve", json.dumps(task)], dict(os.environ)
    )


def sides_of(objective: str, device: str) -> list[str]:
    kernel = {"softmax": "inf_cl", "sigmoid": "siglip_kernel"}[objective]
    there = device == "cuda" and importlib.util.find_spec(kernel) is not None
    return ["ours", "open_clip", "dense", *(["kernel"] if there else [])]


def compare(objective: str, size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every side."""
    task = {"objective": objective, "size": size, "width": options.width, "dtype": options.dtype}
    task["device"] = options.device
    item = getattr(torch, options.dtype).itemsize
    rows = []
    sides = {"product": started(side="product", **task)}
    for name in sides_of(objective, options.device):
        needed = MATRICES.get((objective, name), 0.0) * size**2 * item / GIB
        row = {
            "objective": objective,
            "side": name,
            "size": size,
            "features": 2 * size * options.width * item,
        }
        rows.append(row)
        if needed > options.memory:
            row["skipped"] = f"needs about {needed:.2g} GiB"
        else:
            sides[name] = started(side=name, **task)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    # minutes each
    for _ in range(options.repeats if size <= 32_768 else 1):
        for name, side in sides.items():
            turns[name].append(side.ask("a round"))
    for side in sides.values():
        side.close()
    products = [turn["seconds"] for turn in turns["product"]]
    for row in rows:
        if "skipped" not in row:
            mine = turns[str(row["side"])]
            times = [turn["seconds"] for turn in mine]
            row |= {
                "bytes": max(turn["bytes"] for turn in mine),
                "seconds": median(times),
                "loss": mine[0]["loss"],
            }
            row["products"] = median(a / b for a, b in zip(times, products, strict=True))
            row["rounds"] = {"seconds": times, "product": products}
            near = 1e-4 if options.dtype == "float32" else 0.05
            ours = rows[0]["loss"]
            assert abs(row["loss"] - ours) <= near * abs(ours), (
                f"{row['side']} says {row['loss']}, ours {ours}"
            )  # type: ignore[operator]
    return rows


def show(row: dict[str, Any]) -> str:
    head = f"{row['objective']:>9} {row['size']:>7,} {row['side']:>10}"
    if "skipped" in row:
        return f"{head}  left out: {row['skipped']}"
    mib = row["bytes"] / 2**20, row["features"] / 2**20
    return (
        f"{head} {mib[0]:>10,.1f} {mib[1]:>9,.1f} {row['seconds']:>9.3f}   x {row['products']:.1f}"
    )


def picture(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Peak memory and time against the batch, both logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    colours = {
        "ours": "tab:blue",
        "open_clip": "tab:red",
        "dense": "tab:gray",
        "kernel": "tab:green",
    }
    styles = {"softmax": "o-", "sigmoid": "s--"}
    for objective, side in dict.fromkeys((row["objective"], row["side"]) for row in rows):
        mine = [
            r
            for r in rows
            if (r["objective"], r["side"]) == (objective, side) and "skipped" not in r
        ]
        for axis, value, unit in zip(axes, ("bytes", "seconds"), (2**20, 1), strict=True):
            at = [r["size"] for r in mine], [max(r[value] / unit, 1e-4) for r in mine]
            axis.loglog(
                *at,
                styles[objective],
                color=colours[side],
                label=f"{objective}, {side}",
                markersize=4,
            )
    sizes = sorted({row["size"] for row in rows})
    axes[0].loglog(
        sizes,
        [features(rows, size) / 2**20 for size in sizes],
        "k:",
        label="the features themselves",
    )
    axes[0].set_ylabel("MiB beside the features, at the peak")
    axes[1].set_ylabel("seconds, forward and backward")
    for axis in axes:
        axis.set_xlabel("batch")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def features(rows: list[dict[str, Any]], size: int) -> int:
    return next(row["features"] for row in rows if row["size"] == size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument(
        "--objectives", nargs="+", default=["softmax", "sigmoid"], choices=["softmax", "sigmoid"]
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds of each side; one above 32,768"
    )
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of the features"
    )
    parser.add_argument("--memory", type=float, default=16.0, help="GiB that a side may need")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "losses.json")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    print("objective   batch       side   peak MiB  features   seconds   in products")
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, threads: {torch.get_num_threads()}"
    )
    record = {name: getattr(options, name) for name in ("width", "dtype", "memory", "repeats")}
    rows: list[dict[str, Any]] = []
    record |= {"device": where, "torch": torch.__version__, "results": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for objective in options.objectives:
        for size in options.sizes:
            found = compare(objective, size, options)
            rows += found
            print("\n".join(map(show, found)), flush=True)
            options.out.write_text(json.dumps(record, indent=2) + "\n")
    picture(rows, options.out.with_suffix(".png"), f"{options.dtype}, D = {options.width}, {where}")
    print(f"{options.out} and {options.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
