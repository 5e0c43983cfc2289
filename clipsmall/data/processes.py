"""Runs work in processes that are not forks of this one and that end with it."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
# imported once, in the fork server
HEAVY = [
    "clipsmall.data.preprocess",
    "clipsmall.data.making.shard_writer",
    "pandas",
]


def _end_with_parent() -> None:
    """Exit when the parent is killed, which closes no queues; workers would wait forever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """Yield `function(task)` for all tasks as they finish; with one worker, in this process.

    Raises:
        RuntimeError: a worker was killed, usually because memory ran out.
        Whatever `function` raises; tasks not yet begun are then dropped.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    # a plain fork would copy the locks of this process's threads (pyarrow, tqdm, torch), held or
    # not
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(HEAVY)
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        for future in as_completed([executor.submit(function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed (out of memory?); try fewer --workers"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
