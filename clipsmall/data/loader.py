"""Loader processes: whole batches, in order, that outlive a SIGTERM long enough for the trainer to
save.
"""

import os
import signal
import threading
from collections.abc import Iterable

import torch
from torch.utils.data import DataLoader, Dataset

from clipsmall.data.reader import LoadedBatch

# seconds that a worker serves on after SIGTERM, where nobody can tell who sent it (macOS)
LAST_SERVICE = 30


def _leave_with_the_trainer() -> None:
    """SIGTERM from the trainer means leave; from anyone else it is the trainer's to answer."""
    trainer = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def outlive_the_signal(worker: int) -> None:
    """SIGTERM and Ctrl-C reach the whole process group; the trainer finishes its step and saves,
    then ends its workers.

    Workers must not die of it (torch would end the trainer, perhaps in the middle of a save), nor
    be deaf to it: at interpreter exit they are sent SIGTERM and waited for.
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
        timeout: seconds without an answer of a worker that end the run with an error, instead of a
            hang.
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
        # its own: a loader must not draw from the global one
        generator=torch.Generator(),
    )
