"""Train a dual encoder.

    accelerate launch clipsmall/train.py --config configs/demo.yaml [--objective.name=sigmoid ...]
    torchrun --nproc_per_node 8 clipsmall/train.py --config configs/demo.yaml
    python -m clipsmall.train --config configs/demo.yaml

Exit codes: 0 done; 2 bad input, or a loss or gradient that is not finite (see bad_batch.json); 143
or 130 stopped by SIGTERM or Ctrl-C, state saved, continue with --resume=auto.
(`accelerate launch` and `torchrun` report any failure of theirs as 1.)
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
    # started as a script: the package, not its inside
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Both before torch is imported. Threads that wait by spinning steal the cores of loader workers and
# of other
# programs: on two busy cores training went at 370 pairs/s, and at 1,310 with threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# loader workers are forked: no threads before that
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from accelerate import Accelerator
from torch import Tensor

from clipsmall.batch import Embeddings, Pairs, Progress
from clipsmall.build import (
    jobs as build_jobs,
)
from clipsmall.build import (
    objective as build_objective,
)
from clipsmall.build import (
    queue as build_queue,
)
from clipsmall.build import (
    run as build,
)
from clipsmall.build import (
    tuning as build_tuning,
)
from clipsmall.cli import refuse
from clipsmall.config import Config
from clipsmall.config.reader import read, written
from clipsmall.data import Skips, open_catalog
from clipsmall.distributed import world
from clipsmall.storage.run_folder import RunFolder
from clipsmall.training import fsdp as sharded
from clipsmall.training.feed import Stop
from clipsmall.training.metrics_log import MetricsLog
from clipsmall.training.optim import Guard, NonFiniteError, clipped_norm, skipped
from clipsmall.training.state import RunState

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
    """Training, whole: pairs -> towers -> columns -> objective -> optimizer -> jobs."""
    for pairs in batches:
        # my embeddings, scale, bias
        rows = model(pairs)
        # compared with everybody's
        losses = objective(rows, columns(rows))
        accelerator.backward(losses["loss"])
        losses["grad_norm"] = clipped_norm(accelerator, model.parameters(), clip)
        # all ranks alike
        guard.step(
            optimizer, losses, world.mean_over_ranks(losses["loss"] + losses["grad_norm"]), rows
        )
        scheduler.step()
        optimizer.zero_grad()
        progress.advance(len(pairs.index) * world.size())
        for every, job in jobs:
            if progress.step % every == 0:
                job(progress, losses)


def run(config: Config, stop: Stop) -> int:
    """Build everything, train, evaluate; returns the exit code. Nothing is written before all is
    built.
    """
    accelerator = build.accelerator(config)
    folder = RunFolder(config.out)
    resumed = build.resumed_folder(config, folder, accelerator.device)
    folder.refuse_if_used(config.resume == "auto", resumed)
    evaluations = build_jobs.evaluations(config)
    model, state = build.run_state(config, accelerator, resumed, stop)
    if accelerator.is_main_process:
        folder.claim(written(config), state.progress.step, state.launch)
        describe(config, state)
    world.barrier()
    start_trackers(accelerator, written(config))
    report = MetricsLog(
        accelerator, folder.metrics, state.model, state.optimizer, state.feed, config.optim.pairs
    )
    save = build_jobs.save_job(config, state, folder, resumed)
    evaluate = build_jobs.evaluate_job(config, state, report, folder, evaluations)
    # evaluated before it is saved: a run that continues from a checkpoint has all lines up to it
    # short runs log a step, too
    jobs: list[tuple[int, Job]] = [(min(config.run.log_every, config.steps), report)]
    if config.run.evaluate_every:
        jobs.append((config.run.evaluate_every, evaluate))
    jobs.append((config.run.checkpoint_every, save))
    report.start(state.progress, config.compared)
    bad_steps = skipped(state.progress.step, state.optimizer)
    guard = Guard(accelerator.scaler, config.run.max_bad_steps, state.model, bad_steps)
    try:
        train(
            accelerator,
            model,
            build_objective.columns(config),
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
        step = state.progress.step + 1
        raise ValueError(
            f"step {step}: {error}, {bad_batch(config, error, step, folder)}"
        ) from None
    save(state.progress, {})
    # all is saved: from here on a signal ends the run at once
    stop.end()
    stopped = state.feed.stopped and state.progress.step < config.steps
    if not stopped:
        evaluate(state.progress, {})
    skips = state.feed.skips_of_all()
    report.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        summarise(state, skips, guard.bad_steps, folder, stopped)
    return 128 + (stop.signal or signal.SIGTERM) if stopped else 0


def bad_batch(config: Config, error: NonFiniteError, step: int, folder: RunFolder) -> str:
    """Write `bad_batch.json`, all ranks' pairs of the batch that ended the run; returns in words
    where to look.

    Every rank must call. Pairs have names where shards are indexed; a stream numbers them as they
    come.
    """
    index = error.index.cpu()
    names = list[str]()
    if not config.data.streaming:
        catalog = open_catalog(config.data.train)
        order = catalog.index.argsort()
        names = [
            catalog.name(row)
            for row in order[catalog.index.searchsorted(index.numpy(), sorter=order)]
        ]
    numbers = {
        name: value if math.isfinite(value) else str(value) for name, value in error.numbers.items()
    }
    mine = {
        "loss": numbers.pop("loss"),
        "not_finite": index[error.broken.cpu()].tolist(),
        "index": index.tolist(),
    }
    said = json.dumps(mine | {"names": names}).encode()
    ranks = [json.loads(each) for each in world.gather_bytes(said, error.index.device)]
    path = folder.path / "bad_batch.json"
    if world.rank() == 0:
        path.write_text(json.dumps({"step": step, **numbers, "ranks": ranks}, indent=2) + "\n")
    broken = [number for rank in ranks for number in rank["not_finite"]]
    first = (broken or [number for rank in ranks for number in rank["index"]])[:8]
    return f"or look at the pairs with index {first} …: {path} names all of that batch"


def start_trackers(accelerator: Accelerator, config: str) -> None:
    """A tracker that cannot start (no login, no network) costs its curves, not the run:
    metrics.jsonl has them all.
    """
    try:
        accelerator.init_trackers("clipsmall", config={"run": config})
    except Exception as error:
        # each tracker raises its own
        print(f"warning: trackers not started ({error}); metrics.jsonl goes on", file=sys.stderr)


def describe(config: Config, state: RunState) -> None:
    """The opening lines: what trains on what, and what is left out."""
    size = config.data.batch_size
    trainable = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    print(
        f"{config.objective.title}: {trainable / 1e6:.2f}M parameters train; {state.source}; {world.size()} ranks x "
        f"{size // world.size()} = batch {size}"
        + sharded.told(state.model)
        + (
            f", compared in {config.optim.accumulate} parts (naive accumulation)"
            if config.compared < size
            else ""
        )
        + build_queue.told(state.objective)
        + (
            f", {state.model.chunk_size} at a time through the towers"
            if state.model.chunk_size
            else ""
        )
        + (f"; continuing after step {state.progress.step}" if state.progress.step else ""),
        file=sys.stderr,
    )
    print(
        "\n".join([*build_tuning.table(state.model), f"  {build_tuning.means(state)}"]),
        file=sys.stderr,
    )
    for words in build_queue.warnings(config, fresh=state.loaded.logit_scale is None):
        print(f"warning: {words}", file=sys.stderr)
    if idle := build_objective.without_effect(config):
        print(f"note: {', '.join(idle)}: no effect on {config.objective.title}", file=sys.stderr)


def summarise(
    state: RunState, skips: Skips, bad_steps: int, folder: RunFolder, stopped: bool
) -> None:
    """The closing lines: how far, what was skipped, where the results are."""
    if skips.total:
        print(f"replaced by other pairs, as they could not be read: {skips}", file=sys.stderr)
    if bad_steps:
        print(
            f"skipped, as the gradient was not finite: {bad_steps} of {state.progress.step} steps",
            file=sys.stderr,
        )
    verb = "stopped; continue with --resume=auto" if stopped else "done"
    print(
        f"{verb}: {state.progress.pairs:,} pairs, {state.progress.step} steps; results in {folder.path}",
        file=sys.stderr,
    )


def main(words: list[str] | None = None) -> int:
    stop = Stop().listen()
    try:
        config = read(sys.argv[1:] if words is None else words)
        try:
            return run(config, stop)
        except OSError as error:
            # in the middle of a file a full disk names none
            place = f"{error.filename or config.out}: {error.strerror}; once repaired, continue with --resume=auto"
            raise ValueError(place if error.errno else str(error)) from error
    except ValueError as error:
        refuse(error)


if __name__ == "__main__":
    sys.exit(main())
