"""Builds the jobs of a run (saving, evaluation), which every rank calls at the same step."""

import time
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from clipsmall.batch import Progress
from clipsmall.config.schema import EvaluateSection, TaskSection
from clipsmall.distributed import world
from clipsmall.evaluation import Encoder, Result, results_text
from clipsmall.evaluation.sets import given_set
from clipsmall.evaluation.suite import TaskRequest, measure, option_values, requests, write_result
from clipsmall.evaluation.tasks import TASKS
from clipsmall.evaluation.view import DataView
from clipsmall.storage.run_folder import RunFolder
from clipsmall.training.metrics_log import MetricsLog
from clipsmall.training.state import RunState


def evaluation_requests(section: EvaluateSection) -> list[TaskRequest]:
    """All evaluations of the run, with their data sets opened.

    Called before training, so that a missing shard or a wrong option shows at once.

    Raises:
        ValueError: no such task or option, or a data set that cannot be opened.
    """
    found: list[TaskRequest] = []
    for number, each in enumerate(section.tasks):
        _refuse_unknown(each, f"evaluate.tasks.{number}")
    for each in section.all:
        task = TASKS[each.task]
        data = given_set(
            each.name,
            each.data,
            each.train,
            each.kind,
            each.classes,
            each.templates,
            each.label,
            only_captioned=task.matches == "captions",
        )
        if task.learns:
            # opens the labelled training images; an error if there are none
            assert len(data.training)
        # a class without images must not end a training run
        options = option_values(**each.options, empty_classes=True)
        found += requests(data, [each.task], options)
    return found


def _refuse_unknown(section: TaskSection, where: str) -> None:
    """Raises ValueError, as the config's reader would, for an unknown task or option."""
    if section.task not in TASKS:
        _refuse_name(section.task, list(TASKS), f"{where}.task", "task")
    known = TASKS[section.task].options
    for name, value in section.options.items():
        if name not in known:
            _refuse_name(name, list(known), where, f"key or option of {section.task}")
        known[name].value(f"{where}.{name}", value)


def _refuse_name(name: str, known: list[str], where: str, what: str) -> None:
    near = get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; there is {', '.join(known) or 'none'}"
    raise ValueError(f"{where}: no such {what}: {name!r}{hint}")


def save_job(
    state: RunState, folder: RunFolder, resumed: Path | None, keep: int
) -> Callable[[Progress, Any], None]:
    """A job that writes a checkpoint, at most once per step.

    Args:
        resumed: the checkpoint that the run continues from.
        keep: number of checkpoints to keep.
    """
    ours = resumed is not None and folder.holds(resumed)
    saved = {state.progress.step} if ours else set[int]()

    def save(progress: Progress, losses: Any) -> None:
        if progress.step not in saved:
            state.save(folder.checkpoints, keep)
            saved.add(progress.step)

    return save


def evaluate_job(
    asked: list[TaskRequest],
    state: RunState,
    report: MetricsLog,
    folder: RunFolder,
    *,
    model_name: str,
    batch_size: int,
    workers: int,
) -> Callable[[Progress, Any], None]:
    """A job that runs all evaluations, at most once per step.

    It writes the result files and one line in metrics.jsonl, and prints a table.

    Args:
        asked: the result of `evaluation_requests`.
        model_name: name of the model in file names.
        batch_size: images or captions encoded at a time.
        workers: image-decoding processes per rank.
    """
    device = state.accelerator.device
    encoder = Encoder(state.model, state.loaded.tokenize, device, batch_size, workers)
    # all ranks must agree: if some skipped the job, the others would wait for them
    last = torch.tensor(folder.last_evaluation(), device=device)
    done = {int(world.max_over_ranks(last))}
    is_main = state.accelerator.is_main_process

    def run(progress: Progress, losses: Any) -> None:
        if progress.step in done:
            return
        done.add(progress.step)
        begun = time.perf_counter()
        results = _measured(encoder, asked)
        row: dict[str, Any] = {"step": progress.step, "pairs": progress.pairs}
        for request, result in zip(asked, results, strict=True):
            for name, value in result.metrics.items():
                row[request.entry.log_name(result.dataset, name)] = value
            for name, value in result.chance.items():
                row[request.entry.log_name(result.dataset, name) + "/chance"] = value
            if is_main:
                write_result(request, result, folder.evaluations, model_name, folder.path.name)
        if results:
            report.write(row)
        if results and is_main:
            report.bar.write(results_text(results))
        report.leave_out(time.perf_counter() - begun)

    return run


def _measured(encoder: Encoder, asked: list[TaskRequest]) -> list[Result]:
    """Results with the current weights; consecutive tasks on one data set share its features."""
    results = []
    view: DataView | None = None
    for request in asked:
        if view is None or view.data != request.data:
            view = DataView(encoder, request.data, empty_classes=True)
        results.append(measure(view, request))
    return results
