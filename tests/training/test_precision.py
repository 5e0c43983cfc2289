"""Tests of fp16 and of steps that are not finite.

All ranks skip such a step alike, nothing remembers it, and a run of nothing else ends.

Accelerate gives no scaler on a CPU, so `half` puts a real one where Accelerate's own would be, and
float16 autocast with it; what overflows here, overflows in float16 arithmetic.

Seen to fail when: the guard looks at this rank's loss or gradient only; it lets fused AdamW's step
be called; a queue, SwAV's queue, a pair's numbers or running statistics take what is not finite;
the count of steps in a row is not reset; skipped steps are not counted from the optimizer's on
resume; the pairs of one rank only are written.
"""

import hashlib
import io
import json
import math
import shutil
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipsmall.build import run as build
from clipsmall.distributed import world
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.momentum import MovingAverage
from clipsmall.objectives import OBJECTIVES
from clipsmall.objectives.softmax import softmax
from clipsmall.storage import checkpoint
from clipsmall.storage.run_folder import RunFolder
from clipsmall.train import write_bad_batch
from clipsmall.training.optim import NonFiniteError
from clipsmall.training.state import RunState
from tests.distributed.test_world import run_trainer
from tests.shards_for_tests import config
from tests.training.test_resume import MEMORIES, last, losses, same_state

SCALE = 2.0**10
STEPS = 8
BATCH = 32
# step of this process -> (what goes wrong, on which rank)
Faults = dict[int, tuple[str, int]]


def short(glyphs: Path, out: Path, **changes: object) -> list[str]:
    ours = {
        "optim.pairs": BATCH * STEPS,
        "optim.lr": 1e-3,
        "optim.warmup_pairs": 0,
        "run.checkpoint_every": 1,
        "run.keep_checkpoints": 99,
    }
    return config(glyphs, out, **{**ours, **changes})


def half(patch: pytest.MonkeyPatch, scale: float) -> None:
    """Accelerate as it is on a GPU with mixed_precision=fp16."""
    made = build.accelerator

    def scaled(*given: Any) -> Any:
        accelerator = made(*given)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    patch.setattr(build, "accelerator", scaled)


def fused(patch: pytest.MonkeyPatch) -> None:
    """AdamW as it is on a GPU: it takes the scaler's verdict itself, so that the scaler always
    calls it.
    """
    made = torch.optim.AdamW
    patch.setattr(
        torch.optim, "AdamW", lambda groups, **given: made(groups, **{**given, "fused": True})
    )


def breaking(patch: pytest.MonkeyPatch, faults: Faults) -> None:
    """Features: the images of this rank's first pair are NaN, of averaged towers, too. Gradient:
    its rows' alone.
    """
    outputs = DualEncoder.outputs
    step = [0]

    def broken(self: DualEncoder, pairs: Any, towers: Any) -> tuple[Tensor, Tensor]:
        image, text = outputs(self, pairs, towers)
        step[0] += self.training and towers is self.towers
        kind, rank = faults.get(step[0], ("", -1))
        if kind == "features" and rank == world.rank() and self.training:
            image = image.clone()
            image[0] = torch.nan
        if kind == "gradient" and rank == world.rank() and image.requires_grad:
            image.register_hook(lambda gradient: gradient * torch.inf)
        return image, text

    def loss(rows: Any, columns: Any, **options: Any) -> dict[str, Tensor]:
        found = softmax(rows, columns, **options)
        if faults.get(step[0]) == ("loss", world.rank()):
            # its gradient is finite
            found["loss"] = found["loss"] + torch.inf
        return found

    patch.setattr(DualEncoder, "outputs", broken)
    # all else that builders ask of softmax stays: it takes queues and soft targets
    patch.setitem(OBJECTIVES, "softmax", replace(OBJECTIVES["softmax"], make=loss))


def digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(
        b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    ).hexdigest()


def watched(patch: pytest.MonkeyPatch, seen: list[dict[str, Any]]) -> None:
    """After every step, on every rank: what its weights, moments, memory, scale and lr are."""
    save = RunState.save

    def note(self: RunState, *given: Any) -> Any:
        memory = self.objective.state_dict() if isinstance(self.objective, torch.nn.Module) else {}
        moments, _ = checkpoint.split_optimizer(self.optimizer.state_dict())
        averages = [
            int(part.step) for part in self.model.modules() if isinstance(part, MovingAverage)
        ]
        tensors = {"weights": self.model.state_dict(), "moments": moments, "memory": memory}
        found = {name: digest(each) for name, each in tensors.items()}
        scaler = self.accelerator.scaler
        scale = scaler.state_dict() if scaler is not None else {}
        seen.append(
            found
            | {"scale": scale, "lr": self.scheduler.state_dict()["_last_lr"], "averages": averages}
        )
        return save(self, *given)

    patch.setattr(RunState, "save", note)


def trained(
    words: list[str], faults: Faults, scale: float | None = SCALE
) -> tuple[Any, str, list[dict[str, Any]]]:
    """The whole trainer on this rank: exit code, what it says, and its state after every step."""
    said = io.StringIO()
    seen = list[dict[str, Any]]()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        if scale is not None:
            half(patch, scale)
        fused(patch)
        breaking(patch, faults)
        watched(patch, seen)
        try:
            code: Any = run_trainer(words)
        except SystemExit as left:
            code = left.code
    return code, said.getvalue(), seen


def rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "loss" in row]


def alike(answers: list[Any]) -> list[dict[str, Any]]:
    """The states of all ranks, which are the same to the bit."""
    assert [code for code, _, _ in answers] == [0] * len(answers), answers[0][1]
    assert all(seen == answers[0][2] for _, _, seen in answers)
    return list(answers[0][2])


def taken(states: list[dict[str, Any]], what: str) -> list[int]:
    """The steps, counted from 1, after which it is not what it was before; of the first nothing is
    known.
    """
    return [n for n in range(2, len(states) + 1) if states[n - 1][what] != states[n - 2][what]]


# ---- a step that is skipped ----


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gradient", "features", "loss"])
def test_a_bad_step_of_one_rank_is_skipped_by_all(
    ranks: Any, glyphs: Path, tmp_path: Path, world_size: int, kind: str
) -> None:
    """Averaged towers and a queue beside them; AdamW fused, as on a GPU."""
    changes = {"objective.queue": "moco", "objective.moco.size": 100}
    words = short(glyphs, tmp_path / "run", **changes)
    states = alike(ranks(world_size, trained, words, {3: (kind, world_size - 1), 6: (kind, 0)}))
    good = [2, 4, 5, 7, 8]
    assert taken(states, "weights") == taken(states, "moments") == good
    assert [state["averages"] for state in states] == [[1], [2], [2], [3], [4], [4], [5], [6]]
    # a loss says nothing against the scale
    halved = 1.0 if kind == "loss" else 0.5
    assert [state["scale"]["scale"] / SCALE for state in states] == [
        1,
        1,
        *[halved] * 3,
        *[halved**2] * 3,
    ]
    # the schedule follows the pairs
    assert taken(states, "lr") == list(range(2, STEPS + 1))
    assert taken(states, "memory") == (good if kind == "features" else list(range(2, STEPS + 1)))
    logged = rows(tmp_path / "run")
    assert [row["bad_steps"] for row in logged] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["loss_scale"] / SCALE for row in logged] == [
        1,
        1,
        1,
        *[halved] * 3,
        *[halved**2] * 2,
    ]
    bad = [row["step"] for row in logged if row["loss" if kind == "loss" else "grad_norm"] is None]
    assert bad == [3, 6]
    assert all(
        (row["loss"] is None) is (row["step"] in bad and kind != "gradient") for row in logged
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_scale_too_large_is_found_out_and_training_goes_on(
    ranks: Any, glyphs: Path, tmp_path: Path, world_size: int
) -> None:
    """Real float16 overflows, in every step until the scale is right."""
    words = short(glyphs, tmp_path / "run", **{"optim.pairs": BATCH * 24, "optim.lr": 3e-3})
    answers = ranks(world_size, trained, words, {}, 2.0**20)
    states = alike(answers)
    logged = rows(tmp_path / "run")
    bad = [row["step"] for row in logged if row["grad_norm"] is None]
    assert bad[:3] == [1, 2, 3]
    assert 3 <= len(bad) <= 14
    assert taken(states, "weights") == [step for step in range(2, 25) if step not in bad]
    assert logged[-1]["bad_steps"] == len(bad)
    assert states[-1]["scale"]["scale"] == 2.0 ** (20 - len(bad))
    assert all(row["loss"] is not None for row in logged)
    assert sum(row["loss"] for row in logged[-4:]) < sum(row["loss"] for row in logged[:4])
    assert f"not finite: {len(bad)} of 24 steps" in answers[0][1]


# ---- what remembers ----


def finite_but(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor = tensor.double()
        # −inf: not met yet
        known = tensor if not name.endswith("log_u") else tensor[tensor != -math.inf]
        assert known.isfinite().all(), name


@pytest.mark.parametrize("name", [*MEMORIES, "simsiam", "vicreg"])
def test_nothing_remembers_features_that_are_not_finite(
    ranks: Any, glyphs: Path, tmp_path: Path, name: str
) -> None:
    """One pair's image is NaN on the second of two ranks; the run goes on, resumes, and ends as if
    uninterrupted.
    """
    options = tmp_path / "options.yaml"
    given = MEMORIES.get(name, "{vicreg: {widths: [24, 12]}}" if name == "vicreg" else "{}")
    options.write_text(f"objective: {given}\n")
    changes = ["--config", str(options), f"--objective.name={name}"]
    out = tmp_path / "run"
    straight = tmp_path / "straight"
    alike(ranks(2, trained, changes + short(glyphs, straight), {4: ("features", 1)}))
    found = {what: checkpoint.read_tensors(last(straight), what) for what in ("model", "objective")}
    for tensors in found.values():
        finite_but(tensors)
    for key, value in found["objective"].items():
        # of the good steps; nn's texts have a queue of their own
        if key.endswith(("seen", "written")):
            assert value == (STEPS - (key != "texts.seen")) * BATCH, key
    assert [row["loss"] is None for row in rows(straight)] == [
        step == 4 for step in range(1, STEPS + 1)
    ]
    # just before, right after, later
    for step in (3, 4, 5):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(straight, out)
        for folder in (out / "checkpoints").iterdir():
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        alike(
            ranks(
                2,
                trained,
                [*changes, *short(glyphs, out), "--resume=auto"],
                {4 - step: ("features", 1)},
            )
        )
        same_state(last(out), last(straight))
        assert losses(out) == losses(straight)
        assert [row["bad_steps"] for row in rows(out)] == [
            row["bad_steps"] for row in rows(straight)
        ]


# ---- the end of it ----


def ended(answers: list[Any], out: Path) -> dict[str, Any]:
    """All ranks left together, and alike; what the file says of the last batch."""
    assert [code for code, _, _ in answers] == [2] * len(answers)
    found: dict[str, Any] = json.loads((out / "bad_batch.json").read_text())
    for _, said, seen in answers:
        assert f"step {found['step']}: loss or gradient not finite" in said
        assert str(out / "bad_batch.json") in said
        assert len(seen) == found["step"] - 1
        assert seen == answers[0][2]
    assert len(found["ranks"]) == len(answers)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_endless_stream_of_bad_steps_ends_with_its_pairs(
    ranks: Any, glyphs: Path, tmp_path: Path, world_size: int
) -> None:
    words = short(glyphs, tmp_path / "run", **{"run.max_bad_steps": 3})
    answers = ranks(
        world_size, trained, words, dict.fromkeys(range(3, 99), ("features", world_size - 1))
    )
    found = ended(answers, tmp_path / "run")
    states = answers[0][2]
    assert taken(states, "weights") == [2]
    assert (found["step"], found["bad_steps"], found["grad_norm"], found["loss_scale"]) == (
        5,
        3,
        "nan",
        SCALE / 4,
    )
    pairs = [pair for each in found["ranks"] for pair in each["index"]]
    assert len(pairs) == len(set(pairs)) == BATCH
    names = [name for each in found["ranks"] for name in each["names"]]
    assert [int(name.rpartition(":")[2]) for name in names] == [key_of(pair) for pair in pairs]
    assert all(str(glyphs / "train") in name for name in names)
    broken = [each["not_finite"] for each in found["ranks"]]
    assert broken == [[]] * (world_size - 1) + [found["ranks"][-1]["index"][:1]]
    assert all(f"the pairs with index {broken[-1]} …" in said for _, said, _ in answers)
    assert all("in 3 steps on end (run.max_bad_steps)" in said for _, said, _ in answers)
    assert [row["loss"] is None for row in rows(tmp_path / "run")] == [False, False, True, True]


def key_of(pair: int) -> int:
    """Three shards of 100 pairs; a key is the shard's number and the place within."""
    return pair // 100 * 10_000 + pair % 100


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("kind", ["gradient", "features", "loss"])
def test_without_a_scaler_all_ranks_end_at_the_first(
    ranks: Any, glyphs: Path, tmp_path: Path, world_size: int, kind: str
) -> None:
    answers = ranks(
        world_size, trained, short(glyphs, tmp_path / "run"), {3: (kind, world_size - 1)}, None
    )
    found = ended(answers, tmp_path / "run")
    assert found["step"] == 3
    assert "loss_scale" not in found
    assert [each["not_finite"] != [] for each in found["ranks"]][-1] is (kind == "features")
    assert [len(each["index"]) for each in found["ranks"]] == [BATCH // world_size] * world_size
    assert "bad_steps" not in rows(tmp_path / "run")[-1]
    index = found["ranks"][0]["index"]
    # whose fault it was is not known
    if kind != "features":
        assert f"index {index[:8]} …" in answers[0][1]


def test_bad_steps_apart_from_one_another_do_not_end_a_run(
    ranks: Any, glyphs: Path, tmp_path: Path
) -> None:
    words = short(glyphs, tmp_path / "run", **{"run.max_bad_steps": 2})
    states = alike(ranks(2, trained, words, dict.fromkeys((2, 4, 6, 8), ("gradient", 1))))
    assert taken(states, "weights") == [3, 5, 7]


def test_a_stream_has_numbers_and_no_names(tmp_path: Path) -> None:
    numbers = {"loss": math.nan, "grad_norm": 2.0}
    error = NonFiniteError("not finite", numbers, torch.tensor([7, 9]), torch.tensor([False, True]))
    said = write_bad_batch(None, error, 5, RunFolder(str(tmp_path)))
    assert "index [9] …" in said
    assert json.loads((tmp_path / "bad_batch.json").read_text()) == {
        "step": 5,
        "grad_norm": 2.0,
        "ranks": [{"loss": "nan", "not_finite": [9], "index": [7, 9], "names": []}],
    }
