"""Train a dual encoder.

    accelerate launch clipsmall/train.py --config configs/demo.yaml [--objective.name=sigmoid ...]
    torchrun --nproc_per_node 8 clipsmall/train.py --config configs/demo.yaml
    python -m clipsmall.train --config configs/demo.yaml

Exit codes: 0 done; 2 bad input; 143 or 130 stopped by SIGTERM or Ctrl-C, state saved, continue with --resume=auto.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # started as a script: the package, not its inside

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked after its threads would start

import torch
from accelerate import Accelerator
from torch import Tensor

from clipsmall import build, world
from clipsmall.batch import Pairs, Progress
from clipsmall.config import Config, read, refuse, written
from clipsmall.feed import Stop
from clipsmall.optim import check_finite
from clipsmall.report import Report, truncate_metrics
from clipsmall.run_folder import RunFolder
from clipsmall.shards import open_catalog
from clipsmall.state import RunState

Job = Callable[[Progress, dict[str, Tensor]], None]


def train(
    accelerator: Accelerator,
    model: Any,
    objective: Callable[..., dict[str, Tensor]],
    batches: Iterable[Pairs],
    optimizer: Any,
    scheduler: Any,
    clip: float,
    progress: Progress,
    jobs: list[tuple[int, Job]],
) -> None:
    """Training, whole: pairs -> towers -> columns -> objective -> optimizer -> jobs."""
    for pairs in batches:
        rows = model(pairs)  # my embeddings, scale, bias
        losses = objective(rows, world.columns(rows))  # compared with everybody's
        accelerator.backward(losses["loss"])
        losses["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), clip)
        check_finite(losses["loss"], losses["grad_norm"], pairs.index, accelerator.scaler is not None)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.advance(len(pairs.index) * world.size())
        for every, job in jobs:
            if progress.step % every == 0:
                job(progress, losses)


def run(config: Config, stop: Stop) -> int:
    """Build everything, train, evaluate; returns the exit code. Nothing is written before all is built."""
    accelerator = build.accelerator(config)
    torch.manual_seed(config.seed)
    folder = RunFolder(config.out)
    folder.refuse_if_used(config.resume)
    resumed = build.resumed_folder(config, folder)
    catalog = open_catalog(config.data.train)
    evaluations = build.evaluations(config)
    loaded = build.loaded_towers(config, catalog, resumed)
    encoder = build.dual_encoder(config, loaded)
    batches = build.global_batches(config, catalog, loaded)
    progress = Progress()
    feed = build.feed(config, batches, progress, accelerator.device, stop)
    model, optimizer = accelerator.prepare(encoder.to(accelerator.device), build.optimizer(config, encoder))
    scheduler = build.scheduler(config, optimizer.optimizer)
    objective = build.objective(config)
    state = RunState(
        accelerator, encoder, loaded, optimizer, scheduler, objective, feed, progress,
        config.model_dump(mode="json"), catalog.fingerprint,
    )  # fmt: skip
    if resumed is not None:
        state.load(resumed)
    if accelerator.is_main_process:
        folder.claim(written(config))
        truncate_metrics(folder.metrics, progress.step)
        describe(config, batches, encoder, progress)
    world.barrier()
    accelerator.init_trackers("clipsmall", config={"run": written(config)})
    report = Report(
        accelerator, folder.metrics, encoder, optimizer.optimizer, feed, config.data.batch_size, config.optim.pairs
    )
    report.start(progress)
    evaluate = build.evaluate_job(config, state, report, folder, evaluations)
    saved = [progress.step if resumed else -1]

    def save(progress: Progress, losses: Any = None) -> None:
        if saved[0] != progress.step:
            state.save(folder.checkpoints, config.run.keep_checkpoints)
            saved[0] = progress.step

    jobs: list[tuple[int, Job]] = [(config.run.log_every, report), (config.run.checkpoint_every, save)]
    if config.run.evaluate_every:
        jobs.append((config.run.evaluate_every, evaluate))
    train(accelerator, model, objective, feed, optimizer, scheduler, config.optim.clip, progress, jobs)
    save(progress)
    if not feed.stopped:
        evaluate(progress, {})
    report.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        summarise(feed, folder, progress)
    return 128 + (stop.signal or signal.SIGTERM) if feed.stopped else 0


def describe(config: Config, batches: Any, encoder: Any, progress: Progress) -> None:
    """The opening lines: what trains on what, and what is left out."""
    catalog, size = batches.catalog, config.data.batch_size
    trainable = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    left = sum(catalog.left_out.values())
    print(
        f"{config.objective.name}: {trainable / 1e6:.2f}M parameters, {len(catalog):,} pairs in {len(catalog.shards)} shards"
        + (f" ({left} known to be bad are left out: {catalog.left_out})" if left else "")
        + f"; {world.size()} ranks × {size // world.size()} = batch {size}, each pair against {size - 1} others"
        + f"; an epoch is {batches.per_epoch} batches, {len(catalog) % size} pairs wait for another epoch"
        + (f"; continuing after step {progress.step}" if progress.step else ""),
        file=sys.stderr,
    )


def summarise(feed: Any, folder: RunFolder, progress: Progress) -> None:
    """The closing lines: how far, what was skipped, where the results are."""
    if feed.skips.total:
        print(f"skipped on this rank: {feed.skips}; each was replaced by a later pair", file=sys.stderr)
    verb = "stopped; continue with --resume=auto" if feed.stopped else "done"
    print(f"{verb}: {progress.pairs:,} pairs, {progress.step} steps; results in {folder.path}", file=sys.stderr)


def main(words: list[str] | None = None) -> int:
    stop = Stop().listen()
    try:
        return run(read(sys.argv[1:] if words is None else words), stop)
    except ValueError as error:
        refuse(error)


if __name__ == "__main__":
    sys.exit(main())
