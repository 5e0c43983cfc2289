"""Online mining: pools of a loader's batches, scored with the current weights."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipsmall.batch import Pairs, Progress
from clipsmall.data import LoadedBatch
from clipsmall.distributed import world
from clipsmall.mining.assignment import BatchAssignment, MiningRecipe, assign_batches
from clipsmall.mining.false_negatives import Identity
from clipsmall.mining.pool import Pool
from clipsmall.mining.schedule import Stretch, turns
from clipsmall.mining.scored_pairs import ScoredPairs

# the numbers reported for a pool, see `BatchAssignment.numbers`
NUMBERS = ("blocked", "duplicates", "threshold", "unseparated", "pool_loss", "mined_loss")


class PoolView(NamedTuple):
    """The embeddings of this rank's pairs, with logit scale and bias."""

    # (n, D) unit rows
    image: Tensor
    # (n, D) unit rows
    text: Tensor
    # () logit scale
    scale: Tensor
    # () logit bias
    bias: Tensor


class MiningPlan(NamedTuple):
    """The mined batches of a pool, the same on every rank."""

    # (kept, B) int64 places in the pool
    batches: Tensor
    # (kept, B) int64 caption hashes, by which losses mask false negatives
    caption_hash: Tensor
    # (len(NUMBERS),) float64 values of NUMBERS
    numbers: Tensor
    # () int64 number of ranks that the plan was made for
    ranks: Tensor


class MinedBatches:
    """The batches of a loader, some of them replaced by mined, hard batches.

    Each rank reads its slices of a pool of m global batches and scores them. All embeddings are
    gathered, and the first rank makes one plan for all ranks; if each rank mined for itself,
    batches over eight ranks would lose most of their hardness. Pairs stay on their rank: a mined
    batch has B / W pairs of every rank. While a thread makes the plan, the model trains on the
    first plain batches of the stretch. While it trains on a pool, the next pool is read, one or a
    few batches per step.

    As long as some of its batches are left, the plan is saved in checkpoints, because it depends on
    the weights of an earlier step; the pool itself is read again. A plan can be resumed on any
    number of ranks that divides the number it was made for.

    All ranks must iterate together.

    Args:
        read: maps numbers of global batches to this rank's slices of them.
        stretches: the stretches of the whole run.
        score: maps pairs to their embeddings in eval mode, without gradient; it must leave the
            model unchanged.
        recipe: how a pool is turned into batches.
        seed: the run's seed; random numbers depend only on it and a stretch's first step.
        progress: the progress of the run, read when iteration starts.
        keep_plans: whether checkpoints contain plans: True for a loader that can read a pool
            again. For a stream, the rest of a pool's stretch is plain after a restart.
        reference: maps pairs to their embeddings by the reference model, for `learnability`.
        pin: return batches in pinned memory, so that copying to a GPU overlaps with computing.
    """

    def __init__(
        self,
        read: Callable[[range], Iterable[LoadedBatch]],
        stretches: list[Stretch],
        score: Callable[[Pairs], PoolView],
        recipe: MiningRecipe,
        seed: int,
        progress: Progress,
        keep_plans: bool = True,
        reference: Callable[[Identity], ScoredPairs] | None = None,
        pin: bool = False,
    ) -> None:
        self.read = read
        self.stretches = stretches
        self.score = score
        self.recipe = recipe
        self.seed = seed
        self.progress = progress
        self.reference = reference
        self.pin = pin
        self.keep_plans = keep_plans
        # seconds spent on scoring and on waiting for plans
        self.seconds = 0.0
        # NUMBERS of the pool in use; {} in a plain stretch
        self.numbers = dict[str, float]()
        # the plan of the pool in use
        self._plan: MiningPlan | None = None
        # the plan being made; on the first rank only
        self._making: Future[BatchAssignment] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._device = torch.device("cpu")

    def __iter__(self) -> Iterator[LoadedBatch]:
        # 1. Find where to continue: the remaining stretches; the first may be partly done.
        step = self.progress.step
        left = [stretch for stretch in self.stretches if stretch.step + stretch.steps > step]
        if not left:
            return
        done = step - left[0].step

        # Without a saved plan, the rest of a partly done stretch is plain.
        if done and self._plan is None:
            left[0] = Stretch(step, left[0].source + done, 0, 0, left[0].steps - done)
            done = 0

        # 2. Start reading all remaining batches, in order; some are read ahead of time.
        last = left[-1]
        reader = iter(self.read(range(left[0].source, last.source + last.reads)))
        ahead = deque[LoadedBatch]()

        def next_read() -> LoadedBatch:
            return ahead.popleft() if ahead else next(reader)

        # 3. Go through the stretches. Every step also reads a few batches of the next pool.
        pools_after = [stretch.pool for stretch in left[1:]] + [0]
        for stretch, next_pool in zip(left, pools_after, strict=True):
            if stretch.pool:
                batches = self._mined_stretch(stretch, next_read, done)
            else:
                batches = self._plain_stretch(stretch, next_read)

            for number, batch in enumerate(batches, start=done + 1):
                yield batch
                while len(ahead) < next_pool * number // stretch.steps:
                    ahead.append(next(reader))

            done = 0

    def _plain_stretch(
        self, stretch: Stretch, next_read: Callable[[], LoadedBatch]
    ) -> Iterator[LoadedBatch]:
        self.numbers = {}
        for _ in range(stretch.plain):
            yield next_read()

    def _mined_stretch(
        self, stretch: Stretch, next_read: Callable[[], LoadedBatch], done: int
    ) -> Iterator[LoadedBatch]:
        """done: steps made before a restart; they are not repeated, but their batches are read."""
        # 1. Read the pool, and start making a plan unless a checkpoint contained one.
        pool = Pool([next_read() for _ in range(stretch.pool)], self.pin)
        generator = np.random.default_rng((self.seed, stretch.step))
        order = turns(stretch, generator)
        if self._plan is None:
            self.numbers = {}
            self._begin_plan(pool, generator)

        # 2. Yield mined and plain batches in the order of `turns`.
        mined_so_far = 0
        for turn, is_mined in enumerate(order):
            plain = None if is_mined else next_read()
            if turn >= done:
                batch = plain or self._mined_batch(pool, mined_so_far)

                # Bad pairs skipped while reading the pool are counted with its first mined batch,
                # so a pool that is read again after a restart is not counted twice.
                if turn == 0:
                    batch.skips.merge(pool.skips)
                yield batch
            elif is_mined:
                self._set_numbers()

            mined_so_far += is_mined

        self._plan = None

    def _begin_plan(self, pool: Pool, generator: np.random.Generator) -> None:
        """Score local pairs, gather all embeddings, and let the first rank start on the plan."""
        start = time.perf_counter()
        view = self.score(pool.pairs)
        self._device = view.image.device
        local = (view.image, view.text, pool.pairs.index, pool.pairs.caption_hash, pool.image_hash)
        gathered = []
        for field in local:
            of_all_ranks = world.gather(field.to(self._device))
            gathered.append(pool.in_order(of_all_ranks).cpu().numpy())

        image, text, *identity_fields = gathered

        # all ranks check the same gathered features, so all raise together
        if not (np.isfinite(image).all() and np.isfinite(text).all()):
            raise ValueError(
                f"mining found features that are not finite at step {self.progress.step}: "
                "training has diverged; lower optim.lr or optim.clip"
            )

        if world.rank() == 0:
            scored = ScoredPairs(image, text, float(view.scale), float(view.bias))
            identity = Identity(*identity_fields)
            reference = self.reference(identity) if self.reference else None
            self._making = self._thread.submit(
                assign_batches,
                self.recipe,
                scored,
                identity,
                pool.owner,
                generator,
                world.size(),
                reference,
            )

        self.seconds += time.perf_counter() - start

    def _mined_batch(self, pool: Pool, number: int) -> LoadedBatch:
        """This rank's pairs of the plan's batch `number`."""
        if self._plan is None:
            start = time.perf_counter()
            self._plan = self._share_plan(pool)
            self._making = None
            self.seconds += time.perf_counter() - start

        self._set_numbers()
        return pool.take(self._plan.batches[number], self._plan.caption_hash[number])

    def _share_plan(self, pool: Pool) -> MiningPlan:
        """Wait for the first rank's plan; returns it on every rank."""
        plan = self._finished_plan()
        if plan is None:
            # the other ranks contribute zeros, so the sum over ranks is the first rank's plan
            kept = self.recipe.batches_kept(pool.batches)
            zeros = torch.zeros(kept, self.recipe.batch_size, dtype=torch.int64)
            no_numbers = torch.zeros(len(NUMBERS), dtype=torch.float64)
            plan = MiningPlan(zeros, zeros, no_numbers, torch.tensor(0))

        if world.size() == 1:
            return plan
        shared = [world.sum_over_ranks(field.to(self._device)).cpu() for field in plan]
        return MiningPlan(*shared)

    def _set_numbers(self) -> None:
        assert self._plan is not None
        self.numbers = dict(zip(NUMBERS, self._plan.numbers.tolist(), strict=True))

    def _finished_plan(self) -> MiningPlan | None:
        """Wait for the plan being made; returns it on the first rank, None on the others."""
        if self._making is None:
            return None
        made = self._making.result()
        # as tensors, for the checkpoint and for sending to the other ranks
        numbers = [made.numbers[name] for name in NUMBERS]
        return MiningPlan(
            batches=torch.from_numpy(made.batches),
            caption_hash=torch.from_numpy(made.caption_hash),
            numbers=torch.tensor(numbers, dtype=torch.float64),
            ranks=torch.tensor(world.size()),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The plan of the pool in use; {} between pools.

        Only the first rank's is valid, because other ranks may not have the plan yet.
        """
        if not self.keep_plans or not self._inside_pool():
            return {}
        plan = self._plan or self._finished_plan()
        return plan._asdict() if plan is not None else {}

    def _inside_pool(self) -> bool:
        step = self.progress.step
        for stretch in self.stretches:
            if stretch.pool and stretch.step < step < stretch.step + stretch.steps:
                return True
        return False

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the plan of a checkpoint.

        Raises:
            ValueError: it was made for a number of ranks that is not a multiple of the present one.
        """
        plan = MiningPlan(**state) if state else None
        if plan is not None and int(plan.ranks) % world.size():
            raise ValueError(
                f"the run stopped inside a mined pool planned for {int(plan.ranks)} ranks: "
                f"continue with a number of ranks that divides it, not {world.size()}"
            )

        self._plan = plan
