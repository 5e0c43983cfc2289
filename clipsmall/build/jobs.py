"""Config -> jobs: the side work of a run, each a callable that every rank calls at the same
step.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipsmall.batch import Progress
from clipsmall.config import Config
from clipsmall.data import open_catalog
from clipsmall.distributed import world
from clipsmall.evaluation import Encoder, Result, print_cells, retrieval, write_cell, zero_shot
from clipsmall.storage.run_folder import RunFolder
from clipsmall.training.metrics_log import MetricsLog
from clipsmall.training.state import RunState


def evaluations(config: Config) -> list[Callable[[Encoder], Result]]:
    """Shards are opened now, so that a missing one is told before training, not after."""
    found: list[Callable[[Encoder], Result]] = []
    for z in config.evaluate.zero_shot:
        catalog = open_catalog(z.data, captions=False)
        found.append(
            partial(
                zero_shot,
                catalog=catalog,
                name=z.name,
                classes=z.classes,
                templates=z.templates,
                label=z.label,
            )
        )
    for r in config.evaluate.retrieval:
        found.append(partial(retrieval, catalog=open_catalog(r.data), name=r.name))
    return found


def save_job(
    config: Config, state: RunState, folder: RunFolder, resumed: Path | None
) -> Callable[[Progress, Any], None]:
    """A job that writes a checkpoint, once a step at most."""
    ours = resumed is not None and folder.holds(resumed)
    saved = {state.progress.step} if ours else set[int]()

    def save(progress: Progress, losses: Any) -> None:
        if progress.step not in saved:
            state.save(folder.checkpoints, config.run.keep_checkpoints)
            saved.add(progress.step)

    return save


def evaluate_job(
    config: Config,
    state: RunState,
    report: MetricsLog,
    folder: RunFolder,
    jobs: list[Callable[[Encoder], Result]],
) -> Callable[[Progress, Any], None]:
    """A job that fills all cells, once a step: files, a line in metrics.jsonl, a table on the
    terminal.
    """
    device = state.accelerator.device
    encoder = Encoder(
        state.model, state.loaded.tokenize, device, config.evaluate.batch_size, config.data.workers
    )
    # agreed on by all ranks: a job that some of them skip would leave the others waiting
    done = {int(world.max_over_ranks(torch.tensor(folder.last_evaluation(), device=device)))}

    def run(progress: Progress, losses: Any) -> None:
        if progress.step in done:
            return
        done.add(progress.step)
        begun = time.perf_counter()
        cells = [job(encoder) for job in jobs]
        row: dict[str, Any] = {"step": progress.step, "pairs": progress.pairs}
        for cell in cells:
            row |= {f"{cell.dataset}/{name}": value for name, value in cell.metrics.items()}
            row |= {f"{cell.dataset}/{name}/chance": value for name, value in cell.chance.items()}
            if state.accelerator.is_main_process:
                write_cell(cell, folder.evaluations, Path(config.model.name).stem, folder.path.name)
        if cells:
            report.write(row)
            report.bar.write(print_cells(cells)) if state.accelerator.is_main_process else None
        report.leave_out(time.perf_counter() - begun)

    return run
