"""Loader processes: whole batches, in order, that outlive a SIGTERM long enough for the trainer to save."""

import signal
from collections.abc import Iterable

import torch
from torch.utils.data import DataLoader, Dataset

from clipsmall.shards.reader import LoadedBatch

LAST_SERVICE = 30  # seconds a worker serves on after SIGTERM, while the trainer finishes its step and saves


def _outlive_the_signal(worker: int) -> None:
    """SIGTERM and Ctrl-C reach the whole process group; the trainer answers them, its workers leave after it."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SERVICE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def batch_loader(
    batches: Dataset[LoadedBatch],
    numbers: Iterable[int] | None,
    workers: int,
    timeout: float = 600.0,
    pin: bool = False,
) -> DataLoader[LoadedBatch]:
    """A DataLoader over whole batches.

    Args:
        batches: GlobalBatches, or a stream.
        numbers: the global batches to load, in this order for any number of workers; None for a stream, which is
            endless and comes in another order for another number of workers.
        timeout: seconds without an answer of a worker that end the run with an error, instead of a hang.
    """
    return DataLoader(
        batches,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        timeout=timeout if workers else 0,
        pin_memory=pin,
        worker_init_fn=_outlive_the_signal,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # its own: a loader must not draw from the global one
    )
