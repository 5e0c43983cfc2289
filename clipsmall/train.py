"""Train a dual encoder.

    accelerate launch clipsmall/train.py --config configs/demo.yaml [--objective.name=sigmoid ...]
    torchrun --nproc_per_node 8 clipsmall/train.py --config configs/demo.yaml
    python -m clipsmall.train --config configs/demo.yaml

Exit codes: 0 done; 2 bad input, or a loss or gradient that is not finite (see bad_batch.json); 143
or 130 stopped by SIGTERM or Ctrl-C, state saved, continue with --resume=auto.
(`accelerate launch` and `torchrun` exit with 1 when any of their processes fails.)
"""

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Started as a script, Python searches the package's own folder; it must search the parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Both variables must be set before torch is imported. Threads that wait by spinning take cores from
# loader workers and other programs: on two busy cores training ran at 370 pairs/s with spinning
# threads and at 1,310 with sleeping ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Loader workers are forked, and no threads may be running before the fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from accelerate import Accelerator
from torch import Tensor

from clipsmall.batch import Embeddings, Pairs, Progress
from clipsmall.build import jobs as build_jobs
from clipsmall.build import objective as build_objective
from clipsmall.build import queue as build_queue
from clipsmall.build import run as build
from clipsmall.build import tuning as build_tuning
from clipsmall.cli import refuse
from clipsmall.config import Config
from clipsmall.config.reader import config_yaml, read
from clipsmall.data import Catalog, Skips, open_catalog
from clipsmall.distributed import world
from clipsmall.storage.run_folder import RunFolder
from clipsmall.training import fsdp
from clipsmall.training.feed import Stop
from clipsmall.training.metrics_log import MetricsLog
from clipsmall.training.optim import Guard, NonFiniteError, clipped_norm, skipped_steps
from clipsmall.training.state import RunState

# a function called on every rank every few steps
Job = Callable[[Progress, dict[str, Tensor]], None]


def train(
    accelerator: Accelerator,
    model: Any,
    columns: Callable[[Embeddings], Embeddings],
    objective: Callable[..., dict[str, Tensor]],
    batches: Iterable[Pairs],
    guard: Guard,
    optimizer: Any,
    scheduler: Any,
    clip: float,
    progress: Progress,
    jobs: list[tuple[int, Job]],
) -> None:
    """The whole training loop: pairs -> towers -> columns -> objective -> optimizer -> jobs.

    Args:
        model: maps this rank's pairs to their embeddings (the rows); in training mode.
        columns: maps rows to the embeddings they are compared with, those of all ranks.
        objective: maps (rows, columns) to `loss`, the mean over this rank's rows, and terms to log.
        clip: maximum norm of the gradient.
        jobs: pairs (every, job); a job is called after every `every` steps.

    Raises:
        NonFiniteError: `guard` ended the run because a loss or gradient was not finite.
    """
    for pairs in batches:
        rows = model(pairs)
        losses = objective(rows, columns(rows))
        accelerator.backward(losses["loss"])
        losses["grad_norm"] = clipped_norm(accelerator, model.parameters(), clip)
        # finite only if loss and gradient are finite on all ranks, so all ranks decide alike
        together = world.mean_over_ranks(losses["loss"] + losses["grad_norm"])
        guard.step(optimizer, losses, together, rows)
        scheduler.step()
        optimizer.zero_grad()
        progress.advance(len(pairs.index) * world.size())
        for every, job in jobs:
            if progress.step % every == 0:
                job(progress, losses)


def run_training(config: Config, stop: Stop) -> int:
    """Build everything, train, evaluate; returns the exit code.

    Nothing is written until everything is built, so a run that cannot start leaves no folder.
    """
    accelerator = build.accelerator(config.run, config.out, config.model.chunk_size)
    folder = RunFolder(config.out)
    resumed = build.resumed_folder(config, folder, accelerator.device)
    folder.refuse_if_used(config.resume == "auto", resumed)
    evaluations = build_jobs.evaluation_requests(config.evaluate)
    model, state = build.run_state(config, accelerator, resumed, stop)

    if accelerator.is_main_process:
        folder.claim(config_yaml(config), state.progress.step, state.launch)
        print_description(config, state)
    world.barrier()
    start_trackers(accelerator, config_yaml(config))

    report = MetricsLog(
        accelerator, folder.metrics, state.model, state.optimizer, state.feed, config.optim.pairs
    )
    save = build_jobs.save_job(state, folder, resumed, config.run.keep_checkpoints)
    evaluate = build_jobs.evaluate_job(
        evaluations,
        state,
        report,
        folder,
        model_name=Path(config.model.name).stem,
        batch_size=config.evaluate.batch_size,
        workers=config.data.workers,
    )
    # a run shorter than log_every still logs its last step
    log_every = min(config.run.log_every, config.steps)
    jobs: list[tuple[int, Job]] = [(log_every, report)]
    # Evaluate before saving: the log then has every result up to the checkpoint it resumes from.
    if config.run.evaluate_every:
        jobs.append((config.run.evaluate_every, evaluate))
    jobs.append((config.run.checkpoint_every, save))

    report.start(state.progress, config.compared)
    bad_steps = skipped_steps(state.progress.step, state.optimizer)
    guard = Guard(accelerator.scaler, config.run.max_bad_steps, state.model, bad_steps)
    try:
        train(
            accelerator,
            model,
            build_objective.columns_of_exchange(config.objective.exchange),
            state.objective,
            state.feed,
            guard,
            state.optimizer,
            state.scheduler,
            config.optim.clip,
            state.progress,
            jobs,
        )
    except NonFiniteError as error:
        # the step that failed was not counted
        step = state.progress.step + 1
        catalog = None if config.data.streaming else open_catalog(config.data.train)
        where = write_bad_batch(catalog, error, step, folder)
        raise ValueError(f"step {step}: {error}, {where}") from None

    save(state.progress, {})
    # everything is saved; from here on a signal may end the process immediately
    stop.end()
    stopped = state.feed.stopped and state.progress.step < config.steps
    if not stopped:
        evaluate(state.progress, {})
    skips = state.feed.all_skips()
    report.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        print_summary(state, skips, guard.bad_steps, folder, stopped)
    return 128 + (stop.signal or signal.SIGTERM) if stopped else 0


def write_bad_batch(
    catalog: Catalog | None, error: NonFiniteError, step: int, folder: RunFolder
) -> str:
    """Write `bad_batch.json`, which lists all pairs of the global batch that ended the run.

    Every rank must call. Returns the end of the error message, which says where to look.

    Args:
        catalog: the catalog of the training data, for the names of pairs; None for streamed data,
            whose pairs have only numbers.
    """
    index = error.index.cpu()
    # JSON has no NaN and no infinity
    numbers: dict[str, Any] = {}
    for name, value in error.numbers.items():
        numbers[name] = value if math.isfinite(value) else str(value)
    mine = {
        "loss": numbers.pop("loss"),
        "not_finite": index[error.broken.cpu()].tolist(),
        "index": index.tolist(),
        "names": names_of(catalog, index) if catalog is not None else [],
    }
    gathered = world.gather_bytes(json.dumps(mine).encode(), error.index.device)
    ranks = [json.loads(each) for each in gathered]
    path = folder.path / "bad_batch.json"
    if world.rank() == 0:
        content = {"step": step, **numbers, "ranks": ranks}
        path.write_text(json.dumps(content, indent=2) + "\n")
    broken = [number for rank in ranks for number in rank["not_finite"]]
    everyone = [number for rank in ranks for number in rank["index"]]
    # if all features are finite, any pair of the batch may be the cause
    first = (broken or everyone)[:8]
    return f"or look at the pairs with index {first} …: {path} names all of that batch"


def names_of(catalog: Catalog, index: Tensor) -> list[str]:
    """The names (`shard:key`) of pairs, given their numbers."""
    numbers = catalog.index
    order = numbers.argsort()
    found = numbers.searchsorted(index.numpy(), sorter=order)
    return [catalog.name(row) for row in order[found]]


def start_trackers(accelerator: Accelerator, config: str) -> None:
    """Start TensorBoard and the like, or warn.

    A tracker that cannot start (no login, no network) does not end the run: metrics.jsonl has the
    same numbers.
    """
    try:
        accelerator.init_trackers("clipsmall", config={"run": config})
    except Exception as error:
        # every tracker raises its own exception types
        print(
            f"warning: trackers not started ({error}); metrics.jsonl is still written",
            file=sys.stderr,
        )


def print_description(config: Config, state: RunState) -> None:
    """Print the opening lines: model, data, batch, and options that have no effect."""
    size = config.data.batch_size
    trainable = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    ranks = world.size()
    parts = [
        f"{config.objective.title}: {trainable / 1e6:.2f}M parameters train",
        f"; {state.data_description}",
        f"; {ranks} ranks x {size // ranks} = batch {size}",
        fsdp.sharding_description(state.model),
    ]
    if config.compared < size:
        parts.append(f", compared in {config.optim.accumulate} parts (naive accumulation)")
    parts.append(build_queue.queue_description(state.objective))
    if state.model.chunk_size:
        parts.append(f", {state.model.chunk_size} at a time through the towers")
    if state.progress.step:
        parts.append(f"; continuing after step {state.progress.step}")
    print("".join(parts), file=sys.stderr)

    for line in [*build_tuning.trained_parts(state.model), f"  {build_tuning.computation(state)}"]:
        print(line, file=sys.stderr)
    warnings = build_queue.warnings(
        config.objective,
        size,
        fresh=state.loaded.logit_scale is None,
        streaming=config.data.streaming,
    )
    for words in warnings:
        print(f"warning: {words}", file=sys.stderr)
    if idle := build_objective.without_effect(config.objective):
        print(f"note: {', '.join(idle)}: no effect on {config.objective.title}", file=sys.stderr)


def print_summary(
    state: RunState, skips: Skips, bad_steps: int, folder: RunFolder, stopped: bool
) -> None:
    """Print the closing lines: pairs seen, skipped pairs and steps, and the results folder."""
    if skips.total:
        print(f"replaced by other pairs, as they could not be read: {skips}", file=sys.stderr)
    if bad_steps:
        print(
            f"skipped, as the gradient was not finite: {bad_steps} of {state.progress.step} steps",
            file=sys.stderr,
        )
    verb = "stopped; continue with --resume=auto" if stopped else "done"
    progress = state.progress
    print(
        f"{verb}: {progress.pairs:,} pairs, {progress.step} steps; results in {folder.path}",
        file=sys.stderr,
    )


def main(words: list[str] | None = None) -> int:
    stop = Stop().listen()
    try:
        config = read(sys.argv[1:] if words is None else words)
        try:
            return run_training(config, stop)
        except OSError as error:
            if not error.errno:
                raise ValueError(str(error)) from error
            # when the disk is full in the middle of a file, the error has no file name
            file = error.filename or config.out
            raise ValueError(
                f"{file}: {error.strerror}; fix this, then continue with --resume=auto"
            ) from error
    except ValueError as error:
        refuse(error)


if __name__ == "__main__":
    sys.exit(main())
