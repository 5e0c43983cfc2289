"""Loader processes, which ignore a SIGTERM from outside so that the trainer can still save."""

import os
import signal
import threading
from collections.abc import Iterable

import torch
from torch.utils.data import DataLoader, Dataset

from clipsmall.data.reader import LoadedBatch

# seconds that a worker runs on after SIGTERM if the sender is unknown (macOS)
LAST_SERVICE = 30


def _leave_with_the_trainer() -> None:
    """End this worker on a SIGTERM from the trainer; ignore one from anyone else."""
    trainer = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def outlive_the_signal(worker: int) -> None:
    """Make a worker ignore SIGTERM and Ctrl-C from outside, but obey a SIGTERM of the trainer.

    A scheduler's signal reaches the whole process group. The trainer answers it: it finishes its
    step, saves, and ends its workers. If a worker died first, torch would end the trainer, perhaps
    in the middle of a save; if it ignored SIGTERM altogether, the trainer, which sends one at its
    exit and waits, would hang.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_with_the_trainer, daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SERVICE))
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
        numbers: the global batches to load, in this order for any number of workers; None for a
            stream, which is endless and comes in another order for another number of workers.
        timeout: seconds without a batch from a worker after which an error is raised.
    """
    return DataLoader(
        batches,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        timeout=timeout if workers else 0,
        pin_memory=pin,
        worker_init_fn=outlive_the_signal,
        prefetch_factor=4 if workers else None,
        # a separate generator, because a loader must not draw from the global one
        generator=torch.Generator(),
    )
