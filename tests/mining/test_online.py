"""Mining while training: one plan for all ranks, each pair once, and no plan made again on resume.

Seen to fail when: ranks make plans of their own; embeddings are gathered in rank order, not by
place; a pool is scored again by a run that resumes in the middle of it; the read-ahead queue is
emptied in another order; scoring leaves the model in eval mode.
"""

import contextlib
import copy
import io
import json
import shutil
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from clipsmall import train
from clipsmall.batch import Pairs, Progress
from clipsmall.build import mining as build_mining
from clipsmall.build.mining import mining_recipe, reference_scores
from clipsmall.config.reader import read
from clipsmall.data import LoadedBatch, Skips, open_catalog
from clipsmall.data.preprocess import ImageSpec
from clipsmall.distributed import world
from clipsmall.mining import Identity, MiningRecipe, ScoredPairs, assign_batches
from clipsmall.mining.online import NUMBERS, MinedBatches, PoolView
from clipsmall.mining.schedule import Schedule, Stretch, turns
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.storage import checkpoint
from data_tools import mine_shards
from tests.bench.mining import clustered
from tests.distributed.test_world import run_trainer
from tests.shards_for_tests import config
from tests.training.test_resume import last, losses, same_state

B = 16
POOL = 4
PLAIN = 3
STEPS = 24
SCHEDULE = Schedule(STEPS, POOL, POOL, POOL / (POOL + PLAIN), start=0.1, end=0.8, per_epoch=100)
SCORED, CONCEPT = clustered(100 * B)


@settings(deadline=None)
@given(
    st.integers(1, 200),
    st.integers(2, 9),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
    st.floats(0.05, 1),
    st.integers(1, 40),
    st.booleans(),
)
def test_stretches_fill_a_run(
    steps: int, pool: int, fraction: float, start: float, end: float, per_epoch: int, all_kept: bool
) -> None:
    kept = pool if all_kept else 1
    found = Schedule(steps, pool, kept, fraction, start, end, per_epoch).stretches()
    step = source = 0
    for each in found:
        assert (each.step, each.source) == (step, source)
        step = step + each.steps
        source = source + each.reads
        if each.pool:
            assert start * steps <= each.step < end * steps
            assert each.source // per_epoch == (each.source + pool - 1) // per_epoch
            assert (
                sorted(turns(each, np.random.default_rng(0)))
                == [False] * each.plain + [True] * kept
            )
    assert step == steps
    mined = [each for each in found if each.pool]
    # the share that was asked for, to half a batch in all
    if mined:
        plain = sum(each.plain for each in mined)
        assert abs(plain - len(mined) * kept * (1 / fraction - 1)) <= 0.5 + 1e-6


def batch(number: int) -> LoadedBatch:
    """My slice of global batch `number`: pairs number · B … of SCORED."""
    local = B // world.size()
    index = number * B + world.rank() * local + torch.arange(local)
    pairs = Pairs(
        index.view(-1, 1, 1, 1).expand(-1, 3, 1, 1), index.view(-1, 1), index, index // 2 * 7
    )
    return LoadedBatch(pairs, Skips(seen=local), index * 3)


def score(pairs: Pairs) -> PoolView:
    image, text = (torch.from_numpy(x)[pairs.index] for x in (SCORED.image, SCORED.text))
    return PoolView(image, text, torch.tensor(SCORED.scale), torch.tensor(0.0))


def mined(
    progress: Progress, recipe: MiningRecipe, view: Any = score, schedule: Schedule = SCHEDULE
) -> MinedBatches:
    return MinedBatches(
        lambda numbers: map(batch, numbers), schedule.stretches(), view, recipe, 0, progress
    )


GROUPS = MiningRecipe("groups", B, 4)
CHAIN = MiningRecipe("chain", B, 0)
OSGD = MiningRecipe("osgd", B, 0, keep=0.5)


def play(
    recipe: MiningRecipe, schedule: Schedule, start: int, until: int, state: Any
) -> tuple[list[Any], Any]:
    """Numbers, hashes and skips of each step from `start` on, and the state after `until`."""
    progress = Progress(step=start)
    batches = mined(progress, recipe, schedule=schedule)
    batches.load_state_dict(state)
    seen = []
    for loaded in islice(batches, until - start):
        # a pair's parts stay together
        assert (loaded.pairs.text[:, 0] == loaded.pairs.index).all()
        assert (loaded.image_hash == loaded.pairs.index * 3).all()
        progress.advance(B)
        seen.append(
            (loaded.pairs.index.tolist(), loaded.pairs.caption_hash.tolist(), loaded.skips.seen)
        )
    return seen, batches.state_dict()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("recipe", [GROUPS, CHAIN], ids=["groups", "chain"])
def test_one_plan_for_all_ranks(ranks: Any, size: int, recipe: MiningRecipe) -> None:
    played = [seen for seen, _ in ranks(size, play, recipe, SCHEDULE, 0, STEPS, {})]
    steps = [
        [pair for rank in range(size) for pair in played[rank][step][0]] for step in range(STEPS)
    ]
    assert all(len(set(step)) == B for step in steps)
    # every pair of the run, once
    assert sorted(chain.from_iterable(steps)) == list(range(STEPS * B))
    first = SCHEDULE.stretches()[1]
    # the plan is that of one process that knows all embeddings and who holds which pair
    places = first.source * B + np.arange(POOL * B)
    scored = ScoredPairs(SCORED.image[places], SCORED.text[places], SCORED.scale)
    owner = np.arange(POOL * B) % B // (B // size)
    generator = np.random.default_rng((0, first.step))
    order = turns(first, generator)
    plan = assign_batches(
        recipe, scored, Identity(places, places // 2 * 7, places * 3), owner, generator, size
    )
    known = [sorted(places[members].tolist()) for members in plan.batches]
    assert known == [
        sorted(steps[first.step + turn]) for turn, is_mined in enumerate(order) if is_mined
    ]
    # what is not mined comes as it was read
    assert steps[0] == list(range(B))
    assert steps[first.step] == list(
        range((first.source + POOL) * B, (first.source + POOL + 1) * B)
    )
    # counted once, when a pool begins
    assert sum(seen for rank in range(size) for _, _, seen in played[rank]) == STEPS * B


def resumed_everywhere(recipe: MiningRecipe, schedule: Schedule) -> int:
    """How many of the steps have a plan to keep; within one process group, whose making would take
    longest.
    """
    whole, _ = play(recipe, schedule, 0, STEPS, {})
    inside = 0
    for step in range(STEPS + 1):
        before, state = play(recipe, schedule, 0, step, {})
        told = json.dumps({name: tensor.tolist() for name, tensor in state.items()}).encode()
        # the first rank's
        written = json.loads(world.gather_bytes(told, torch.device("cpu"))[0])
        inside += bool(written)
        after, _ = play(
            recipe,
            schedule,
            step,
            STEPS,
            {name: torch.tensor(value) for name, value in written.items()},
        )
        assert before + after == whole, step
    return inside


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("recipe", [GROUPS, OSGD], ids=["groups", "osgd"])
def test_resumed_anywhere_the_stream_goes_on(ranks: Any, size: int, recipe: MiningRecipe) -> None:
    schedule = SCHEDULE._replace(
        kept=recipe.batches_kept(POOL),
        fraction=recipe.batches_kept(POOL) / (recipe.batches_kept(POOL) + 2),
    )
    inside = ranks(size, resumed_everywhere, recipe, schedule)
    assert set(inside) == {sum(each.steps - 1 for each in schedule.stretches() if each.pool)}


def unscored(pairs: Pairs) -> PoolView:
    raise AssertionError("a plan that stands in the checkpoint was made again")


def test_a_pool_that_is_half_played_is_not_scored_again() -> None:
    first = SCHEDULE.stretches()[1]
    for step in range(first.step + 1, first.step + first.steps):
        _, state = play(GROUPS, SCHEDULE, 0, step, {})
        batches = mined(Progress(step=step), GROUPS, unscored)
        batches.load_state_dict(state)
        assert len(list(islice(batches, first.step + first.steps - step))) == first.steps - (
            step - first.step
        )


@pytest.mark.parametrize("fewer", [2, 1])
def test_a_plan_holds_for_fewer_ranks(ranks: Any, fewer: int) -> None:
    first = SCHEDULE.stretches()[1]
    step = first.step + 3
    until = first.step + first.steps
    whole = ranks(4, play, CHAIN, SCHEDULE, 0, until, {})
    state = ranks(4, play, CHAIN, SCHEDULE, 0, step, {})[0][1]
    again = ranks(fewer, play, CHAIN, SCHEDULE, step, until, state)
    for turn in range(until - step):
        before = sorted(pair for seen, _ in whole for pair in seen[step + turn][0])
        assert before == sorted(pair for seen, _ in again for pair in seen[turn][0])


def test_the_next_pool_is_read_while_this_one_is_played() -> None:
    read: list[int] = []
    schedule = SCHEDULE._replace(start=0, end=1)

    def noted(numbers: range) -> Any:
        for number in numbers:
            read.append(number)
            yield batch(number)

    batches = iter(MinedBatches(noted, schedule.stretches(), score, GROUPS, 0, Progress()))
    counts = []
    for _ in range(2 * (POOL + PLAIN)):
        next(batches)
        counts.append(len(read))
    # the pool, and a plain batch that is played beside the making of the plan
    assert counts[0] <= POOL + 1
    # nearly all of the next one, when this one ends
    assert counts[POOL + PLAIN - 1] == POOL + PLAIN + POOL - 1
    # no step waits for a whole pool
    assert max(after - before for before, after in pairwise(counts)) <= 2


def test_a_stream_goes_on_with_a_pool_as_it_comes() -> None:
    """A stream brings other pairs after a resume: a plan for those before would be played over
    them.
    """
    first = SCHEDULE.stretches()[1]
    step = first.step + 2
    batches = MinedBatches(
        lambda numbers: map(batch, numbers),
        SCHEDULE.stretches(),
        score,
        GROUPS,
        0,
        Progress(),
        False,
    )
    batches.progress.step = step
    assert batches.state_dict() == {}
    resumed = MinedBatches(
        lambda numbers: map(batch, numbers),
        SCHEDULE.stretches(),
        score,
        GROUPS,
        0,
        Progress(step),
        False,
    )
    played = [loaded.pairs.index.tolist() for loaded in islice(resumed, STEPS - step)]
    left = first.steps - 2
    assert played[:left] == [
        list(range((first.source + 2 + k) * B, (first.source + 3 + k) * B)) for k in range(left)
    ]
    assert len(played) == STEPS - step
    # mined again
    assert any(sorted(pairs) != list(range(min(pairs), min(pairs) + B)) for pairs in played[left:])


@pytest.mark.parametrize("size", [1, 2])
def test_features_that_are_not_finite_stop_the_run(ranks: Any, size: int) -> None:
    for said in ranks(size, diverged):
        assert "features that are not finite at step 3" in said


def diverged() -> str:
    def broken(pairs: Pairs) -> PoolView:
        view = score(pairs)
        return view._replace(text=view.text / (world.rank() != world.size() - 1))

    progress = Progress()
    try:
        for _ in mined(progress, GROUPS, broken):
            progress.advance(B)
    except ValueError as error:
        return str(error)
    return ""


# ---- in the trainer

MINING: dict[str, object] = {
    "mining.pool": 64,
    "mining.fraction": 0.5,
    "mining.start": 0.1,
    "mining.end": 0.9,
    "data.batch_size": 16,
    "optim.pairs": 16 * 30,
}


def told_of_mining(out: Path) -> list[list[float | None]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[row.get(name) for name in NUMBERS] for row in rows if "loss" in row]


@pytest.mark.parametrize("method", ["groups", "spectral", "osgd"])
def test_a_resumed_mined_run_is_the_uninterrupted_one(
    glyphs: Path, tmp_path: Path, method: str
) -> None:
    more = {"mining.keep": 0.5, "data.workers": 1} if method == "osgd" else {}
    out = tmp_path / "run"
    words = config(
        glyphs, out, **MINING, **more, **{"mining.method": method, "data.crop_scale": 0.8}
    )
    assert train.main(words) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "mined_loss" in row]
    assert told
    assert all(row["mined_loss"] > 0 and 0 <= row["blocked"] <= 0.05 for row in told)
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    plans = 0
    for step in (5, 10, 15, 20, 25):
        shutil.rmtree(out)
        shutil.copytree(whole, out)
        for folder in (out / "checkpoints").iterdir():
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        plans += bool(checkpoint.read_tensors(last(out), "mining"))
        assert train.main([*words, "--resume=auto"]) == 0
        assert losses(out) == losses(whole)
        assert told_of_mining(out) == told_of_mining(whole)
        same_state(last(out), last(whole))
    assert plans > 0


def test_another_number_of_ranks_in_the_middle_of_a_pool(
    ranks: Any, glyphs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = config(glyphs, out, **MINING, **{"mining.method": "chain", "run.precision": "fp32"})
    ranks(2, run_trainer, words)
    whole = losses(out)
    folders = sorted((out / "checkpoints").iterdir())
    inside = [folder for folder in folders if checkpoint.read_tensors(folder, "mining")]
    assert inside
    assert len(inside) < len(folders)
    saved = inside[0]
    once = tmp_path / "once"
    for folder in folders:
        if folder > saved:
            shutil.rmtree(folder)
    shutil.copytree(out, once)
    # one rank: the plan of two holds
    assert train.main([*words, f"--out={once}", "--resume=auto"]) == 0
    plan_ends = next(
        each.step + each.steps
        for each in _stretches()
        if each.step < int(saved.name[5:]) < each.step + each.steps
    )
    for (step, loss), (_, known) in zip(losses(once), whole, strict=True):
        if step <= plan_ends:
            assert loss == pytest.approx(known, rel=1e-4), step
    for told in ranks(4, _refused, [*words, "--resume=auto"]):
        assert "planned for 2 ranks: continue with a number of ranks that divides it, not 4" in told


def _stretches() -> list[Stretch]:
    return Schedule(30, 4, 4, 0.5, 0.1, 0.9, 300 // 16).stretches()


def _refused(words: list[str]) -> str:
    """What a run that ends with code 2 says."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), pytest.raises(SystemExit, match="2"):
        run_trainer(words)
    return told.getvalue()


class NoisyTowers(torch.nn.Module):
    """With everything that a forward pass in training mode would change or draw."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = torch.nn.Sequential(
            torch.nn.Linear(12, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5)
        )

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.inside(pixels.flatten(1))

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inside(ids.float().repeat(1, 4))


@pytest.mark.parametrize("rows", [3, 100])
def test_pairs_are_scored_in_eval_mode_and_nothing_is_left_behind(rows: int) -> None:
    spec = ImageSpec(2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    encoder = DualEncoder(NoisyTowers(), spec, 20.0, -3.0, learn_bias=True).train()
    encoder.towers.inside[1].train()
    before = copy.deepcopy(encoder.state_dict())
    random = torch.get_rng_state()
    index = torch.arange(10)
    pixels = torch.randint(
        0, 256, (10, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pairs = Pairs(pixels, torch.arange(30).view(10, 3), index, index)
    seen = build_mining.score_pairs(encoder, Accelerator(cpu=True), rows, False, pairs)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert encoder.training
    assert encoder.towers.inside[2].training
    assert not seen.image.requires_grad
    encoder.eval()
    assert torch.allclose(seen.image, encoder.encode_image(pixels), atol=1e-6)
    assert torch.allclose(seen.text, encoder.encode_text(pairs.text), atol=1e-6)
    assert float(seen.scale) == pytest.approx(20.0)
    assert float(seen.bias) == -3.0
    relative = build_mining.score_pairs(encoder, Accelerator(cpu=True), rows, True, pairs)
    # as the objective sees it
    assert float(relative.bias) == pytest.approx(-60.0)


def test_scoring_leaves_no_trace(glyphs: Path, tmp_path: Path) -> None:
    """A run whose mined batches are those that were read is the plain run."""
    plain = tmp_path / "plain"
    mining = tmp_path / "mining"
    assert train.main(config(glyphs, plain, **{"optim.pairs": 16 * 12, "data.batch_size": 16})) == 0
    words = config(
        glyphs,
        mining,
        **{**MINING, "optim.pairs": 16 * 12, "mining.method": "shuffled", "mining.end": 0.2},
    )
    assert train.main(words) == 0
    before = [loss for step, loss in losses(mining) if step <= 2]
    assert before == [loss for step, loss in losses(plain) if step <= 2]
    rng = [checkpoint.read_state(last(out))["ranks"][0]["rng"] for out in (plain, mining)]
    assert rng[0] == rng[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"mining.method": "groups", "mining.group": 3},
            "mining.group=3 does not divide data.batch_size=16",
        ),
        ({"mining.method": "groups", "mining.group": 1}, "group=1: a single pair has no negatives"),
        (
            {"mining.method": "osgd", "mining.group": 4},
            "mining.group=4: osgd selects whole batches",
        ),
        (
            {"mining.method": "chain", "mining.pool": 4096},
            "not one pool of 256 batches (256 of them trained on)",
        ),
        (
            {"mining.method": "chain", "mining.start": 0.9, "mining.end": 0.5},
            "start=0.9 must be less than end=0.5",
        ),
        ({"mining.method": "chain", "optim.accumulate": 2}, "mining makes whole batches hard"),
        ({"mining.method": "graph"}, "mining.method"),
    ],
)
def test_bad_settings(
    glyphs: Path,
    tmp_path: Path,
    changes: dict[str, object],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(config(glyphs, tmp_path / "run", **{**MINING, **changes}))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_learnability_needs_scores_and_finds_them(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "scores"
    learnable = {
        **MINING,
        "mining.method": "learnability",
        "mining.keep": 0.5,
        "mining.reference": str(scores),
    }
    words = config(glyphs, tmp_path / "run", **learnable)
    with pytest.raises(SystemExit):
        train.main(words)
    assert "has no scores; run: python -m data_tools.mine_shards score" in capsys.readouterr().err
    assert train.main(config(glyphs, tmp_path / "other", **{"seed": 5, "optim.pairs": 96})) == 0
    scored = [
        "score",
        str(tmp_path / "other"),
        "--data",
        str(glyphs / "train"),
        "--scores",
        str(scores),
    ]
    assert mine_shards.main(scored) == 0
    # a pair is found by its number, in any order
    catalog = open_catalog(str(glyphs / "train"))
    folder = read(words).mining.reference
    found = reference_scores(folder, catalog)
    numbers = np.array([250, 3, 120])
    known = found(Identity(numbers, numbers, numbers))
    again = found(Identity(numbers[::-1], numbers, numbers))
    assert np.array_equal(known.image[::-1], again.image)
    paths = sorted(scores.glob("*.parquet"))
    row = next(
        row for path in paths for row in pq.read_table(path).to_pylist() if row["index"] == 250
    )
    assert np.allclose(known.image[0], np.array(row["image"], np.float32))
    whole = pq.read_table(paths[1])
    pq.write_table(whole.slice(1), paths[1])
    with pytest.raises(ValueError, match="1 of 300 pairs have no scores"):
        reference_scores(folder, catalog)
    pq.write_table(whole, paths[1])
    assert train.main(words) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any("mined_loss" in row for row in rows)


@pytest.mark.parametrize(("batch_size", "group"), [(30, 3), (6, 3), (10, 2), (7, 0), (8, 4)])
def test_groups_fit_any_batch(glyphs: Path, tmp_path: Path, batch_size: int, group: int) -> None:
    words = config(
        glyphs,
        tmp_path / "run",
        **{**MINING, "data.batch_size": batch_size, "mining.method": "groups"},
    )
    assert mining_recipe(read(words).mining, batch_size, "softmax").group == group


@pytest.mark.parametrize("size", [3, 6])
def test_a_mined_run_on_odd_ranks(ranks: Any, glyphs: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "run"
    odd = {**MINING, "data.batch_size": 12, "optim.pairs": 12 * 20, "mining.method": "groups"}
    assert ranks(size, run_trainer, config(glyphs, out, **odd)) == [0] * size
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("mined_loss" in row for row in rows)


def test_the_length_of_a_mined_run_stays(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pools lie at shares of it: a plan would be played over another pool."""
    words = config(
        glyphs, tmp_path / "run", **{**MINING, "optim.pairs": 16 * 12, "mining.method": "chain"}
    )
    assert train.main(words) == 0
    with pytest.raises(SystemExit):
        train.main([*words, "--resume=auto", f"--optim.pairs={16 * 24}"])
    assert "another run: optim.pairs was 192, now 384" in capsys.readouterr().err


def test_another_miner_is_another_run(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = config(
        glyphs, tmp_path / "run", **{**MINING, "optim.pairs": 16 * 12, "mining.method": "chain"}
    )
    assert train.main(words) == 0
    with pytest.raises(SystemExit):
        train.main([*words, "--resume=auto", "--mining.swaps=2"])
    assert "another run: mining.swaps was 0, now 2" in capsys.readouterr().err
