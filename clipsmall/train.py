"""Train a dual encoder.

    accelerate launch clipsmall/train.py --config configs/demo.yaml [--objective.name=sigmoid ...]
    torchrun --nproc_per_node 8 clipsmall/train.py --config configs/demo.yaml
    python -m clipsmall.train --config configs/demo.yaml

Exit codes: 0 done; 2 bad input; 143 or 130 stopped by SIGTERM or Ctrl-C, state saved, continue with --resume=auto.
(`accelerate launch` and `torchrun` report any failure of theirs as 1.)
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # started as a script: the package, not its inside

# Both before torch is imported. Threads that wait by spinning steal the cores of loader workers and of other
# programs: on two busy cores training went at 370 pairs/s, and at 1,310 with threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked: no threads before that

from accelerate import Accelerator
from torch import Tensor

from clipsmall import build, build_jobs, build_objective, build_queue, world
from clipsmall.batch import Embeddings, Pairs, Progress
from clipsmall.config import Config
from clipsmall.config_reader import read, refuse, written
from clipsmall.feed import Stop
from clipsmall.optim import check_finite
from clipsmall.report import Report
from clipsmall.run_folder import RunFolder
from clipsmall.shards import Skips
from clipsmall.state import RunState

Job = Callable[[Progress, dict[str, Tensor]], None]


def train(
    accelerator: Accelerator,
    model: Any,
    columns: Callable[[Embeddings], Embeddings],
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
        losses = objective(rows, columns(rows))  # compared with everybody's
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
    folder = RunFolder(config.out)
    resumed = build.resumed_folder(config, folder)
    folder.refuse_if_used(config.resume == "auto", resumed)
    evaluations = build_jobs.evaluations(config)
    model, state = build.run_state(config, accelerator, resumed, stop)
    if accelerator.is_main_process:
        folder.claim(written(config), state.progress.step, state.launch)
        describe(config, state)
    world.barrier()
    start_trackers(accelerator, written(config))
    report = Report(accelerator, folder.metrics, state.model, state.optimizer, state.feed, config.optim.pairs)
    save = build_jobs.save_job(config, state, folder, resumed)
    evaluate = build_jobs.evaluate_job(config, state, report, folder, evaluations)
    # evaluated before it is saved: a run that continues from a checkpoint has all lines up to it
    jobs: list[tuple[int, Job]] = [(config.run.log_every, report)]
    if config.run.evaluate_every:
        jobs.append((config.run.evaluate_every, evaluate))
    jobs.append((config.run.checkpoint_every, save))
    report.start(state.progress, config.compared)
    train(
        accelerator, model, build_objective.columns(config), state.objective, state.feed, state.optimizer,
        state.scheduler, config.optim.clip, state.progress, jobs,
    )  # fmt: skip
    save(state.progress, {})
    stop.end()  # all is saved: from here on a signal ends the run at once
    stopped = state.feed.stopped and state.progress.step < config.steps
    if not stopped:
        evaluate(state.progress, {})
    skips = state.feed.skips_of_all()
    report.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        summarise(state, skips, folder, stopped)
    return 128 + (stop.signal or signal.SIGTERM) if stopped else 0


def start_trackers(accelerator: Accelerator, config: str) -> None:
    """A tracker that cannot start (no login, no network) costs its curves, not the run: metrics.jsonl has them all."""
    try:
        accelerator.init_trackers("clipsmall", config={"run": config})
    except Exception as error:  # each tracker raises its own
        print(f"warning: trackers not started ({error}); metrics.jsonl goes on", file=sys.stderr)


def describe(config: Config, state: RunState) -> None:
    """The opening lines: what trains on what, and what is left out."""
    size = config.data.batch_size
    trainable = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    print(
        f"{config.objective.title}: {trainable / 1e6:.2f}M parameters; {state.source}; {world.size()} ranks x "
        f"{size // world.size()} = batch {size}"
        + (f", compared in {config.optim.accumulate} parts (naive accumulation)" if config.compared < size else "")
        + build_queue.told(state.objective)
        + (f", {state.model.chunk_size} at a time through the towers" if state.model.chunk_size else "")
        + (f"; continuing after step {state.progress.step}" if state.progress.step else ""),
        file=sys.stderr,
    )
    for words in build_queue.warnings(config, fresh=state.loaded.logit_scale is None):
        print(f"warning: {words}", file=sys.stderr)
    if idle := build_objective.without_effect(config):
        print(f"note: {', '.join(idle)}: no effect on {config.objective.title}", file=sys.stderr)


def summarise(state: RunState, skips: Skips, folder: RunFolder, stopped: bool) -> None:
    """The closing lines: how far, what was skipped, where the results are."""
    if skips.total:
        print(f"replaced by other pairs, as they could not be read: {skips}", file=sys.stderr)
    verb = "stopped; continue with --resume=auto" if stopped else "done"
    print(
        f"{verb}: {state.progress.pairs:,} pairs, {state.progress.step} steps; results in {folder.path}",
        file=sys.stderr,
    )


def main(words: list[str] | None = None) -> int:
    stop = Stop().listen()
    try:
        return run(read(sys.argv[1:] if words is None else words), stop)
    except ValueError as error:
        refuse(error)


if __name__ == "__main__":
    sys.exit(main())
