"""Ways to train on a big batch in little memory, next to the plain step: gradient, memory, time.

    python -m tests.bench.gradcache [--model ViT-B-32] [--size 32] [--chunk 8] [--dtype float32]
                                    [--out FILE.json]

One model, the same weights, pixels and captions for all sides:
  whole        the plain step: what the others should equal
  chunked      ours: model.chunk_size
  two-pass     GradCache as its paper has it, by hand: `two_pass`
  accum-freq   open_clip's --accum-freq k, k = size / chunk: `train_one_epoch` of the installed
               open_clip_train itself
  accumulate   the mean of the small batches' losses: each pair meets the negatives of its own
               small batch only

A gradient is held against `whole`'s by cosine, ratio of lengths, and length of the difference over
`whole`'s length (float32 rounds at 1e-6; --dtype float64 tells more), for image tower, text tower
and logit_scale.

Every number is from a fresh process. Time is the best of the rounds, in which the sides take turns.
Memory is the peak beside model, gradients and pixels. "kept": gradients are there before the step,
as in tests/bench/chunks.py. "anew": they are let go before it, as optimizer.zero_grad() does and
our trainer. It matters: where one backward pass meets a parameter k times, its k gradients are
summed up before they join what is there. So `chunked` holds the model's gradients twice if they are
kept, once if not.

accum-freq asks for the loss of the whole batch k times, each time with other features live. A
feature is live once, so the towers' gradient is right; logit_scale is live every time, so its
gradient is k times too long. Nor are random numbers replayed (no such layers here, but open_clip
has patch dropout, and timm towers stochastic depth): then a live feature and its cached self come
from different masks, the k losses are those of k different batches of features, and their summed
gradient is that of none of them. Ours and `two-pass` replay.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from clipsmall.batch import Embeddings, Pairs
from clipsmall.model.dual_encoder import DualEncoder, unit
from clipsmall.objectives.softmax import softmax
from tests.bench.chunks import built, level_at_peak, level_now
from tests.bench.losses import GIB
from tests.bench.sides import ROOT, Side

# answers with a dict, "loss" in it
Loss = Callable[..., Any]
WAYS = "kept", "anew"


def chunked(model: DualEncoder, pairs: Pairs, size: int, loss: Loss) -> None:
    model.chunk_size = size
    rows = model(pairs)
    loss(rows, rows)["loss"].backward()


def whole(model: DualEncoder, pairs: Pairs, size: int, loss: Loss) -> None:
    chunked(model, pairs, 0, loss)


def accumulate(model: DualEncoder, pairs: Pairs, size: int, loss: Loss) -> None:
    model.chunk_size = 0
    for part in zip(*(field.split(size) for field in pairs), strict=True):
        rows = model(Pairs(*part))
        (loss(rows, rows)["loss"] * len(rows.image) / len(pairs.image)).backward()


def two_pass(model: DualEncoder, pairs: Pairs, size: int, loss: Loss) -> None:
    """GradCache as its paper has it (arXiv 2101.06983, §3.2): features, their gradients, then a
    second pass.
    """

    def image(pixels: Tensor) -> Tensor:
        return model.towers.image(model.normalised(pixels.to(model.mean.device)))  # type: ignore[no-any-return]

    work = [(image, part) for part in pairs.image.split(size)]
    work += [(model.towers.text, part) for part in pairs.text.split(size)]
    states = []
    leaves = []
    with torch.no_grad():
        for tower, part in work:
            states.append((torch.get_rng_state(), get_device_states(model.mean)))
            leaves.append(tower(part).requires_grad_())
    half = len(leaves) // 2
    rows = rows_of(model, pairs, torch.cat(leaves[:half]), torch.cat(leaves[half:]))
    loss(rows, rows)["loss"].backward()
    for (tower, part), (state, states_there), leaf in zip(work, states, leaves, strict=True):
        torch.set_rng_state(state)
        set_device_states(*states_there)
        (tower(part) * leaf.grad).sum().backward()


def rows_of(model: DualEncoder, pairs: Pairs, image: Tensor, text: Tensor) -> Embeddings:
    scale = model.logit_scale.exp()
    return Embeddings(
        unit(image), unit(text), pairs.index, pairs.caption_hash, scale, model.logit_bias
    )


class AsOpenClips(nn.Module):
    """Our model, called and answering as open_clip's CLIP with output_dict (open_clip 3.3,
    model.py, line 459).
    """

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.towers = model.towers
        self.logit_scale = model.logit_scale

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        image = unit(self.towers.image(images))
        text = unit(self.towers.text(texts))
        return {
            "image_features": image,
            "text_features": text,
            "logit_scale": self.logit_scale.exp(),
        }


class Loader(list[tuple[Tensor, Tensor]]):
    """What `train_one_epoch` asks of a loader: one step's micro-batches, pixels as floats."""

    def __init__(self, model: DualEncoder, pairs: Pairs, size: int) -> None:
        images = (model.normalised(part.to(model.mean.device)) for part in pairs.image.split(size))
        super().__init__(zip(images, pairs.text.split(size), strict=True))
        self.num_batches = len(self)
        self.num_samples = len(pairs.text)


def accum_freq(model: DualEncoder, pairs: Pairs, size: int, loss: Loss) -> None:
    """The step in open_clip_train 3.3, train.py, lines 114-162. Its loss is open_clip's."""
    from open_clip_train.train import train_one_epoch

    loader = Loader(model, pairs, size)
    args = SimpleNamespace(
        accum_freq=len(loader), device=str(model.mean.device), precision="fp32", distill=False
    )
    args.skip_scheduler = True
    args.horovod = False
    args.grad_clip_norm = None
    # rank 0 would log
    args.rank = 1
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    # gradients are zero before and stay to be seen
    idle = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    train_one_epoch(AsOpenClips(model), data, loss, 0, idle, None, None, None, args)


def clip_loss(output_dict: bool, **inputs: Tensor) -> dict[str, Tensor]:
    from open_clip.loss import ClipLoss

    return {"loss": ClipLoss()(**inputs)}


SIDES = {
    "whole": whole,
    "chunked": chunked,
    "two-pass": two_pass,
    "accum-freq": accum_freq,
    "accumulate": accumulate,
}


def step(side: str, model: DualEncoder, pairs: Pairs, size: int) -> list[float]:
    """Adds the side's gradients to the model's; the losses that were asked for."""
    values: list[Tensor] = []

    def loss(*args: Any, **inputs: Any) -> dict[str, Tensor]:
        found = clip_loss(**inputs) if side == "accum-freq" else softmax(*args)
        values.append(found["loss"].detach())
        return found

    SIDES[side](model, pairs, size, loss)
    return [value.item() for value in values]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def against(found: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Of image tower, text tower and logit_scale: cosine, ratio of lengths, relative difference.
    Sums in float64.
    """

    def part_of(name: str) -> str:
        return "logit_scale" if name == "logit_scale" else "image" if ".visual." in name else "text"

    assert found.keys() == whole.keys()
    answer = {}
    for part in ("image", "text", "logit_scale"):
        both = [
            (found[name].double(), whole[name].double()) for name in whole if part_of(name) == part
        ]
        mine, theirs = (sum(x[i].square().sum() for x in both) ** 0.5 for i in (0, 1))
        cosine = sum((x * y).sum() for x, y in both) / (mine * theirs)
        difference = sum((x - y).square().sum() for x, y in both) ** 0.5 / theirs
        answer[part] = {
            "cosine": float(cosine),
            "ratio": float(mine / theirs),
            "difference": float(difference),
        }
    return answer


def serve(task: dict[str, Any]) -> None:
    """Ready after the first line; then a step for every "step" on stdin, and for a file's name the
    gradients of the last step held against those in the file, which `whole` writes."""
    # before memory is counted, on every side
    import_module("open_clip_train.train")
    model, pairs = built(task)
    before = level_now(task["device"])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "step":
            model.zero_grad(set_to_none=task["way"] == "anew")
            start = time.perf_counter()
            losses = step(task["side"], model, pairs, task["chunk"])
            if task["device"] == "cuda":
                torch.cuda.synchronize()
            answer: Any = {"seconds": time.perf_counter() - start, "losses": losses}
            answer["bytes"] = level_at_peak(task["device"]) - before
        else:
            mine = {name: value.cpu() for name, value in gradients(model).items()}
            if task["side"] == "whole":
                save_file(mine, asked)
            answer = against(mine, load_file(asked))
        print(json.dumps(answer), flush=True)


def compare(task: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """A row for every side."""
    rows: dict[str, dict[str, Any]] = {
        name: {"side": name, "seconds": torch.inf, "bytes": {}} for name in SIDES
    }
    words = [sys.executable, "-m", "tests.bench.gradcache", "--serve"]
    for way in WAYS:
        tasks = {name: json.dumps({**task, "side": name, "way": way}) for name in SIDES}
        sides = {name: Side([*words, tasks[name]], dict(os.environ)) for name in SIDES}
        for _ in range(rounds):
            for name, side in sides.items():
                turn = side.ask("step")
                row = rows[name]
                row |= {"seconds": min(row["seconds"], turn["seconds"]), "losses": turn["losses"]}
                # the peak so far
                row["bytes"][way] = turn["bytes"]
        with tempfile.TemporaryDirectory() as folder:
            for name, side in sides.items():
                rows[name]["gradient"] = side.ask(str(Path(folder) / "whole.safetensors"))
                side.close()
    return list(rows.values())


def show(row: dict[str, Any]) -> str:
    parts = [
        f"{x['cosine']:9.6f} {x['ratio']:8.5f} {x['difference']:7.0e}"
        for x in row["gradient"].values()
    ]
    losses = row["losses"]
    memory = "".join(f"{row['bytes'][way] / GIB:6.2f}" for way in WAYS)
    head = f"{row['side']:>10} {len(losses):>6} {sum(losses) / len(losses):8.5f}"
    return f"{head}  {'  '.join(parts)}  {memory} {row['seconds']:8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip, or a model JSON")
    parser.add_argument("--size", type=int, default=32, help="the batch")
    parser.add_argument(
        "--chunk", type=int, default=8, help="pairs of a chunk or micro-batch; divides the batch"
    )
    parser.add_argument("--rounds", type=int, default=1, help="steps of each side, kept and anew")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench" / "gradcache.json")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if options.size % options.chunk or options.size == options.chunk:
        parser.error("--chunk must divide --size, and be smaller")
    task = {name: getattr(options, name) for name in ("model", "size", "chunk", "dtype", "device")}
    rows = compare(task, options.rounds)
    columns = "   ".join(
        f"{part + ': cosine, ratio, off':>24}" for part in ("image", "text", "scale")
    )
    print(f"{'side':>10} {'losses':>6} {'mean':>8}  {columns}  {'kept':>6}{'anew':>6}  seconds")
    print("\n".join(map(show, rows)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **task,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    options.out.write_text(json.dumps({**record, "results": rows}, indent=2) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
