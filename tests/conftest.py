"""`ranks(W, fn, *args)` runs fn(*args) on W gloo ranks and returns their results, rank 0 first.

One pool of eight workers for the whole session, forked before torch starts a thread: a second,
where spawning eight Pythons takes forty.
"""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

POOL = 8
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Set before torch is imported: sums are split in the same way in every process, and two cores are
# few.
os.environ["OMP_NUM_THREADS"] = "1"


def _serve(rank: int, tasks: Any, results: Any) -> None:
    import torch
    import torch.distributed as dist

    # forked within a test, which may have its own filters
    warnings.resetwarnings()
    torch.set_num_threads(1)
    os.environ.update(
        ACCELERATE_USE_CPU="1", GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"
    )
    # else a rank with little to do is gone before another has connected to it
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    while (task := tasks.get()) is not None:
        world, store, fn, args = task
        try:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
            # what torchrun sets, for Accelerate
            if world > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(world),
                    LOCAL_WORLD_SIZE=str(world),
                )
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=120),
                )
            results.put((rank, fn(*args), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="session", autouse=True)
def ranks() -> Iterator[Ranks]:
    context = multiprocessing.get_context("fork")
    tasks = [context.Queue() for _ in range(POOL)]
    results = context.Queue()
    workers = [
        context.Process(target=_serve, args=(r, tasks[r], results), daemon=True)
        for r in range(POOL)
    ]
    for worker in workers:
        worker.start()
    folder = tempfile.TemporaryDirectory()
    number = iter(range(10**9))

    def run(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        store = os.path.join(folder.name, f"store{next(number)}")
        for queue in tasks[:world]:
            queue.put((world, store, fn, args))
        answers = sorted(
            (results.get(timeout=300) for _ in range(world)), key=lambda answer: answer[0]
        )
        errors = [error for _, _, error in answers if error]
        assert not errors, errors[0]
        return [value for _, value, _ in answers]

    yield run
    for queue in tasks:
        queue.put(None)
    for worker in workers:
        worker.join(10)
        # one that hangs, and heeds no SIGTERM since it has trained, would hold our exit for ever
        worker.kill()
    folder.cleanup()


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred real glyph pairs in three small shards, with a held-out set and class names."""
    from tests.shards_for_tests import write_glyphs

    folder = tmp_path_factory.mktemp("glyphs")
    write_glyphs(folder)
    return folder
