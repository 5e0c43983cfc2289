"""Towers sharded over ranks train, evaluate, save and resume as whole ones in one process.

Seen to fail when: see the note of each test.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel  # noqa: F401  before the ranks are forked: an import of 20 s, once

from clipsmall import train
from clipsmall.batch import Pairs
from clipsmall.build import objective as build_objective
from clipsmall.build import run as build
from clipsmall.config.reader import validated
from clipsmall.data import open_catalog
from clipsmall.distributed import world
from clipsmall.evaluation import Encoder
from clipsmall.storage import checkpoint
from clipsmall.training import fsdp
from clipsmall.training.fsdp import full_tensor, is_block, local_part
from clipsmall.training.optim import clipped_norm
from tests import ROOT
from tests.distributed.test_world import run_trainer
from tests.local_clip import local_clip
from tests.shards_for_tests import config
from tests.training.test_resume import last, losses

B = 16
STEPS = 3
CLIP = 0.5
TOWERS = ("text_model", "vision_model")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CPU = torch.device("cpu")


@contextmanager
def environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(local_clip(tmp_path_factory.mktemp("models"), width=32, layers=2, context_length=12))


CASES: dict[str, dict[str, Any]] = {
    "softmax": {"objective": {"name": "softmax"}},
    "sigmoid": {"objective": {"name": "sigmoid"}},
    "lora": {"tune": {"image": "lora", "text": 1, "lora": {"rank": 2}}},
    "all sharded": {"tune": {"logit_scale": False}},
    "chunks": {"model": {"chunk_size": 3}},
    "anew": {"model": {"checkpoint_activations": True}},
    "chunks anew": {"model": {"chunk_size": 3, "checkpoint_activations": True}},
    "averaged and heads": {"objective": {"name": {"softmax": 1, "byol": 0.3}}},
}


def unscaled() -> Any:
    return SimpleNamespace(unscale_gradients=lambda: None)


def trained(name: str, case: str) -> dict[str, Any]:
    """Three steps in float64: losses, gradient norms, final weights, and what this rank held of
    towers and moments.
    """
    torch.manual_seed(0)
    tree: dict[str, Any] = {
        "data": {"train": ["x"], "batch_size": B},
        "optim": {"pairs": B * STEPS, "lr": 1e-2},
    }
    run = validated(
        {**tree, **CASES[case], "model": {"name": name, **CASES[case].get("model", {})}}
    )
    loaded = build.loaded_towers(run, SimpleNamespace(captions=list), None)  # type: ignore[arg-type]
    if run.model.checkpoint_activations is True:
        loaded.towers.checkpoint_activations()
    setting = build.run_context(run, loaded, torch.arange(100))
    model = build.dual_encoder(run, loaded, setting).double().train()
    model.chunk_size = run.model.chunk_size  # type: ignore[assignment]
    fsdp.shard_towers(model, CPU)
    objective = build.objective(run, setting)
    columns = build_objective.columns_of_exchange(run.objective.exchange)
    optimizer = build.optimizer(run, model)
    for group in optimizer.param_groups:
        # one kernel over whole and sharded tensors, as on a GPU
        group["fused"] = True
    local = B // world.size()
    found = {"losses": list[float](), "norms": list[float]()}
    mine = slice(world.rank() * local, (world.rank() + 1) * local)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 49_000, (B, 12), generator=generator)
        ids[:, -3:] = 49_407
        image = torch.randint(0, 256, (B, 3, 32, 32), generator=generator, dtype=torch.uint8)
        numbers = torch.randperm(100, generator=generator)[:B]
        rows = model(Pairs(*(field[mine] for field in (image, ids, numbers, numbers))))
        loss = objective(rows, columns(rows))["loss"]
        loss.backward()
        found["losses"].append(world.mean_over_ranks(loss).item())
        found["norms"].append(clipped_norm(unscaled(), model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    moments = [
        s["exp_avg"]
        for p, s in optimizer.state.items()
        if any(p is q for q in model.towers.parameters())
    ]
    return {
        **found,
        "weights": {
            name: full_tensor(t.detach()).numpy() for name, t in model.state_dict().items()
        },
        "held": [held(list(model.towers.parameters())), held(moments)],
        "gathered": [
            name for name, part in model.towers.named_modules() if hasattr(part, "reshard")
        ],
        "whole": [name for name, p in model.named_parameters() if local_part(p) is p],
    }


def held(tensors: list[Tensor]) -> float:
    """Bytes there are of bytes there would be."""
    return sum(local_part(t).untyped_storage().nbytes() for t in tensors) / sum(
        t.nbytes for t in tensors
    )


EXPECTED: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("case", "world_size"),
    [("softmax", 2), ("softmax", 4), ("sigmoid", 4), *((case, 2) for case in list(CASES)[2:])],
)
def test_sharded_towers_train_as_one_process(
    ranks: Any, clip: str, case: str, world_size: int
) -> None:
    """Fails when: scale and heads are not averaged; a norm is that of one share, or the scale's is
    added once a rank; shares are not clipped; towers are one piece; text is no pass; averaged
    towers stay whole or gathered; AdamW's kernel gets whole and sharded tensors (heads)."""
    if case not in EXPECTED:
        EXPECTED[case] = trained(clip, case)
    expected = EXPECTED[case]
    assert expected["held"] == [1, 1]
    assert min(expected["norms"]) > CLIP
    for found in ranks(world_size, trained, clip, case):
        for key in ("losses", "norms"):
            assert found[key] == pytest.approx(expected[key], rel=1e-9)
        assert found["weights"].keys() == expected["weights"].keys()
        for name, value in expected["weights"].items():
            torch.testing.assert_close(
                torch.from_numpy(found["weights"][name]),
                torch.from_numpy(value),
                rtol=1e-9,
                atol=1e-9,
                msg=name,
            )
        assert found["held"] == pytest.approx([1 / world_size, 1 / world_size], rel=0.05)
        assert found["gathered"] == [
            "",
            *(f"model.{tower}.encoder.layers.{n}" for tower in TOWERS for n in range(2)),
        ]
        assert found["whole"] == [name for name in expected["whole"] if "towers." not in name]


def test_blocks_are_found_whole() -> None:
    assert is_block("model.vision_model.encoder.layers.11")
    assert is_block("model.visual.trunk.stages.2")
    assert is_block("model.transformer.resblocks.0")
    assert not is_block("model.visual.trunk.stages.2.blocks.0")
    assert not is_block("model.vision_model.encoder.layers")
    assert not is_block("model.vision_model.encoder.layers.11.mlp")


# ---- the whole trainer ----


def run_sharded(words: list[str]) -> tuple[int, bool]:
    """Exit code, and whether it said that towers are sharded."""
    with environment(**FSDP), redirect_stderr(StringIO()) as said:
        return run_trainer(words), "weights on each (FSDP)" in said.getvalue()


def cut(out: Path, step: int) -> None:
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def scores(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" not in row]


def test_a_run_goes_from_sharded_to_whole_and_back(
    ranks: Any, glyphs: Path, tmp_path: Path
) -> None:
    """2 ranks with FSDP, 1 without from step 10, 4 with from step 15. Test pairs come in 3 batches:
    ranks have uneven numbers of them. Fails when: moments or weights are loaded whole, or saved as
    shares; only the main rank gathers them (waits for ever); the trainer does not shard."""
    changes = {
        "evaluate.retrieval": f"[{{name: held_out, data: [{glyphs / 'test'}]}}]",
        "evaluate.batch_size": 25,
        "run.evaluate_every": 8,
    }
    straight = tmp_path / "straight"
    out = tmp_path / "run"
    assert train.main(config(glyphs, straight, **changes)) == 0
    # rank 0 says it
    assert ranks(2, run_sharded, config(glyphs, out, **changes)) == [
        (0, True),
        (0, False),
    ]
    assert_same(out, straight)
    cut(out, 10)
    assert ranks(1, run_trainer, config(glyphs, out, **changes, resume="auto")) == [0]
    assert_same(out, straight)
    cut(out, 15)
    assert ranks(4, run_sharded, config(glyphs, out, **changes, resume="auto"))[0] == (0, True)
    assert_same(out, straight)


def assert_same(out: Path, straight: Path) -> None:
    """Curves and scores as of one process in float32; the same names and shapes in the
    checkpoint.
    """
    assert [step for step, _ in losses(out)] == list(range(1, 25))
    for (_, mine), (_, theirs) in zip(losses(out), losses(straight), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert scores(out) == scores(straight)
    for stem in ("model", "optimizer"):
        left, right = (checkpoint.read_tensors(last(folder), stem) for folder in (out, straight))
        assert left.keys() == right.keys()
        for key, value in right.items():
            torch.testing.assert_close(left[key], value, rtol=1e-2, atol=1e-3, msg=key)


class Spoilt:
    """A catalog of which the first batch of images is broken."""

    def __init__(self, shards: str, broken: int) -> None:
        self.catalog = open_catalog([shards])
        self.broken = broken

    def __len__(self) -> int:
        return len(self.catalog)

    def read(self, row: int) -> Any:
        found = self.catalog.read(row)
        return found._replace(image=b"") if row < self.broken else found


def encoded(shards: str, size: int) -> tuple[Tensor, Tensor]:
    """Four batches of images, the first broken, and three of captions, the last of one, through
    small towers.
    """
    from tests.build.test_tuning import config_of

    torch.manual_seed(0)
    run = config_of(f"{shards}/../towers.json")
    loaded = build.loaded_towers(run, SimpleNamespace(captions=lambda: ["a b c"]), None)  # type: ignore[arg-type]
    model = build.dual_encoder(run, loaded, build.run_context(run, loaded, None))
    fsdp.shard_towers(model, CPU)
    encoder = Encoder(model, loaded.tokenize, CPU, size)
    images, rows = encoder.images(Spoilt(shards, size), only=range(4 * size))  # type: ignore[arg-type]
    assert rows.tolist() == list(range(size, 4 * size))
    return images, encoder.texts(["a b", "c"] * size + ["c a"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_with_fewer_batches_pass_as_often(ranks: Any, glyphs: Path, world_size: int) -> None:
    """Fails, after two minutes of waiting, when ranks pass as often as they have batches, or good
    ones.
    """
    images, texts = encoded(str(glyphs / "test"), 4)
    for found in ranks(world_size, encoded, str(glyphs / "test"), 4):
        torch.testing.assert_close(found[0], images)
        torch.testing.assert_close(found[1], texts)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("given", "precision", "chunk_size", "says"),
    [
        ({"FSDP_VERSION": "1"}, "no", 0, "fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "no", 0, "fsdp_offload_params"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "no", 0, "every rank loads"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "no", 0, r"model\.checkpoint_activations"),
        ({}, "fp16", 0, "use bf16"),
        ({}, "bf16", "auto", "give a number"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    given: dict[str, str], precision: str, chunk_size: Any, says: str
) -> None:
    with environment(**FSDP):
        assert fsdp.asked()
        fsdp.check_settings("bf16", 4)
        with environment(**given), pytest.raises(ValueError, match=says):
            fsdp.check_settings(precision, chunk_size)
    assert not fsdp.asked()


class Adapted(nn.Module):
    """What peft makes of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.MultiheadAttention(4, 1)


def refuses_adapted_attention() -> str:
    model: Any = SimpleNamespace(towers=nn.ModuleDict({"attn": Adapted()}))
    with pytest.raises(ValueError, match=r"tune\.lora\.targets: attn hides") as refused:
        fsdp.shard_towers(model, CPU)
    return str(refused.value)


def test_adapters_in_attention_of_torch_are_refused(ranks: Any) -> None:
    assert "c_fc" in ranks(2, refuses_adapted_attention)[0]


def test_what_the_launch_file_asks_for_is_taken() -> None:
    """By the names under which Accelerate's launcher hands it to the ranks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "launch" / "fsdp.yaml"), "train.py"]
    args = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    given = prepare_multi_gpu_env(args)
    with environment(**{name: value for name, value in given.items() if "FSDP" in name}):
        assert fsdp.asked()
        fsdp.check_settings(args.mixed_precision, 0)
        assert {name for name in fsdp.UNSUPPORTED if name in os.environ} == set(fsdp.UNSUPPORTED)


def refuses_batch_norm() -> str:
    model = SimpleNamespace(modules=lambda: [nn.BatchNorm1d(2)])
    with environment(**FSDP), pytest.raises(ValueError, match="FSDP") as refused:
        build.synchronised(model)  # type: ignore[arg-type]
    return str(refused.value)


def test_batch_norm_is_refused(ranks: Any) -> None:
    assert "BatchNorm" in ranks(2, refuses_batch_norm)[0]
