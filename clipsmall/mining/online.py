"""Mining while training: pools of a loader's batches, seen through the model as it is, and dealt
out again.
"""

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
from clipsmall.mining.assignment import Dealt, MiningRecipe, deal
from clipsmall.mining.false_negatives import Identity
from clipsmall.mining.pool import Pool
from clipsmall.mining.schedule import Stretch, turns
from clipsmall.mining.scored import Scored

NUMBERS = ("blocked", "duplicates", "threshold", "unseparated", "pool_loss", "mined_loss")


class PoolView(NamedTuple):
    """My pairs as the model sees them."""

    # (n, D) unit rows
    image: Tensor
    # (n, D)
    text: Tensor
    # ()
    scale: Tensor
    # ()
    bias: Tensor


class MiningPlan(NamedTuple):
    """How a pool is played, the same on every rank."""

    # (kept, B) int64 places in the pool
    batches: Tensor
    # (kept, B) int64 for the losses' masks
    caption_hash: Tensor
    # (len(NUMBERS),) float64
    numbers: Tensor
    # () int64 it was made for
    ranks: Tensor


class MinedBatches:
    """The batches of a loader, some of them dealt out again as batches that the model finds hard.

    A pool of m global batches is read, each rank its slices; every rank scores its own pairs, all
    embeddings are
    gathered, and the first rank makes one plan for all: mined by each rank for itself, batches of
    eight ranks lose most of their hardness. No pair moves: a mined batch takes B / W pairs of every
    rank. While the plan is made, in a thread beside the training, the first plain batches of the
    stretch are played; the next pool is read, a batch or a few with every step, while this one is
    played.

    The plan stands in the checkpoint until it is played, because it depends on the weights of a
    step that is gone; the pool itself is read again. A plan holds for any number of ranks that
    divides the one it was made for.

    Args:
        read: numbers of global batches -> those batches, my slices.
        stretches: of the whole run.
        score: pairs -> what the model makes of them, in eval mode, with no gradient and no trace
            left.
        recipe: how a pool is dealt out.
        progress: read when iteration starts.
        keep_plans: of a loader that brings a pool again. A stream's half-played pool is played on
            as it comes.
        reference: the same pairs as another model sees them, for `learnability`.
        pin: make batches that travel to a GPU beside its work.
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
        reference: Callable[[Identity], Scored] | None = None,
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
        # spent on scoring and on waiting for plans
        self.seconds = 0.0
        # of the pool that is being played
        self.numbers = dict[str, float]()
        # of the stretch that is being played
        self._plan: MiningPlan | None = None
        # on the first rank
        self._making: Future[Dealt] | None = None
        self._thread = ThreadPoolExecutor(1)
        self._device = torch.device("cpu")

    def __iter__(self) -> Iterator[LoadedBatch]:
        step = self.progress.step
        left = [stretch for stretch in self.stretches if stretch.step + stretch.steps > step]
        if not left:
            return
        played = step - left[0].step
        last = left[-1]
        # not mined, or a plan that could not be kept
        if played and self._plan is None:
            left[0] = Stretch(step, left[0].source + played, 0, 0, left[0].steps - played)
            played = 0
        start = left[0].source
        loaded = iter(self.read(range(start, last.source + last.reads)))
        # what comes next in the order of reading
        ahead = deque[LoadedBatch]()

        def following() -> LoadedBatch:
            return ahead.popleft() if ahead else next(loaded)

        for stretch, after in zip(left, [*left[1:], last._replace(pool=0)], strict=True):
            wanted = after.pool
            batches = (self._mined if stretch.pool else self._plain)(stretch, following, played)
            for number, batch in enumerate(batches, start=played + 1):
                yield batch
                while len(ahead) < wanted * number // stretch.steps:
                    ahead.append(next(loaded))
            played = 0

    def _plain(
        self, stretch: Stretch, following: Callable[[], LoadedBatch], played: int
    ) -> Iterator[LoadedBatch]:
        assert not played
        self.numbers = {}
        for _ in range(stretch.plain):
            yield following()

    def _mined(
        self, stretch: Stretch, following: Callable[[], LoadedBatch], played: int
    ) -> Iterator[LoadedBatch]:
        pool = Pool([following() for _ in range(stretch.pool)], self.pin)
        generator = np.random.default_rng((self.seed, stretch.step))
        order = turns(stretch, generator)
        if self._plan is None:
            self.numbers = {}
            self._begin(pool, generator)
        number = 0
        for turn, mined in enumerate(order):
            plain = None if mined else following()
            if turn >= played:
                batch = plain or self._play(pool, number)
                # a pool's skips are counted as it begins; one that is read again was counted before
                if turn == 0:
                    batch.skips.merge(pool.skips)
                yield batch
            elif mined:
                self._tell()
            number += mined
        self._plan = None

    def _begin(self, pool: Pool, generator: np.random.Generator) -> None:
        """Score my pairs, bring everybody's together, and have the first rank make the plan."""
        start = time.perf_counter()
        view = self.score(pool.pairs)
        self._device = view.image.device
        mine = (view.image, view.text, pool.pairs.index, pool.pairs.caption_hash, pool.image_hash)
        gathered = [pool.in_order(world.gather(x.to(self._device))).cpu().numpy() for x in mine]
        # the same on every rank
        if not (np.isfinite(gathered[0]).all() and np.isfinite(gathered[1]).all()):
            raise ValueError(
                f"the model's features are not finite at step {self.progress.step}, found by mining: training has "
                "diverged; lower optim.lr or optim.clip"
            )
        if world.rank() == 0:
            scored = Scored(gathered[0], gathered[1], float(view.scale), float(view.bias))
            identity = Identity(*gathered[2:])
            reference = self.reference(identity) if self.reference else None
            self._making = self._thread.submit(
                deal, self.recipe, scored, identity, pool.owner, generator, world.size(), reference
            )
        self.seconds += time.perf_counter() - start

    def _play(self, pool: Pool, number: int) -> LoadedBatch:
        if self._plan is None:
            start = time.perf_counter()
            none = torch.zeros(
                self.recipe.kept(pool.batches), self.recipe.batch_size, dtype=torch.int64
            )
            made = self._made() or MiningPlan(
                none, none, torch.zeros(len(NUMBERS), dtype=torch.float64), torch.tensor(0)
            )
            # the others bring zeros: the sum is the first rank's plan
            shared = (
                world.total(field.to(self._device)).cpu() if world.size() > 1 else field
                for field in made
            )
            self._plan = MiningPlan(*shared)
            self._making = None
            self.seconds += time.perf_counter() - start
        self._tell()
        return pool.take(self._plan.batches[number], self._plan.caption_hash[number])

    def _tell(self) -> None:
        assert self._plan is not None
        self.numbers = dict(zip(NUMBERS, self._plan.numbers.tolist(), strict=True))

    def _made(self) -> MiningPlan | None:
        """The first rank's plan, waited for; None on the others."""
        if self._making is None:
            return None
        dealt = self._making.result()
        numbers = torch.tensor([dealt.numbers[name] for name in NUMBERS], dtype=torch.float64)
        batches = torch.from_numpy(dealt.batches)
        hashes = torch.from_numpy(dealt.caption_hash)
        return MiningPlan(batches, hashes, numbers, torch.tensor(world.size()))

    def state_dict(self) -> dict[str, Tensor]:
        """The plan of a pool that is half played; {} between pools. The first rank's: others may
        not have it yet.
        """
        step = self.progress.step
        inside = any(
            each.pool and each.step < step < each.step + each.steps for each in self.stretches
        )
        inside = inside and self.keep_plans
        plan = (self._plan or self._made()) if inside else None
        return plan._asdict() if plan is not None else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError when the plan was made for ranks that cannot be merged into these."""
        plan = MiningPlan(**state) if state else None
        if plan is not None and int(plan.ranks) % world.size():
            raise ValueError(
                f"in the middle of a mined pool, dealt out for {int(plan.ranks)} ranks: continue with a number of "
                f"ranks that divides it, not {world.size()}"
            )
        self._plan = plan
