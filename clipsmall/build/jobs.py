"""Builds the jobs: the side work of a run, which every rank calls at the same step."""

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
    """Everything that the run evaluates, with its data sets opened.

    Before training, so that a missing shard or a wrong option shows at once, not hours later.

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
            # opened, or refused if there are no training images
            assert len(data.training)
        # a class without an image is no reason to end a run
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
        keep: how many checkpoints stay.
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
    """A job that measures all results, at most once per step.

    It writes their files and one line in metrics.jsonl, and prints a table.

    Args:
        asked: what `evaluation_requests` returns.
        model_name: of the model in file names.
        batch_size: images or captions that go through a tower at a time.
        workers: processes of each rank that decode images.
    """
    device = state.accelerator.device
    encoder = Encoder(state.model, state.loaded.tokenize, device, batch_size, workers)
    # agreed on by all ranks: a job that some of them skip would leave the others waiting
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
    """The results of the model as it is now; tasks in a row on one data set share its features."""
    results = []
    view: DataView | None = None
    for request in asked:
        if view is None or view.data != request.data:
            view = DataView(encoder, request.data, empty_classes=True)
        results.append(measure(view, request))
    return results
