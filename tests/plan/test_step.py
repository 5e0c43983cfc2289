"""The planner: what it counts is there, its search finds the largest batch, and it prints that."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipsmall.config import Config
from clipsmall.config.reader import read
from clipsmall.distributed import world
from clipsmall.distributed.similarity import TILE
from clipsmall.model.towers import open_clip_towers
from clipsmall.objectives import OBJECTIVES
from clipsmall.plan import largest_batch as search
from clipsmall.plan.__main__ import main, memory_size
from clipsmall.plan.alternatives import plan_rows
from clipsmall.plan.cuda_kernels import as_on_cuda
from clipsmall.plan.fake_ranks import fake_ranks
from clipsmall.plan.largest_batch import MOST, Planner
from clipsmall.plan.meter import Meter
from clipsmall.plan.step import Machine, Step, measure_step
from tests.bench.plan import true_peak
from tests.bench.sides import ROOT
from tests.local_clip import local_clip

CPU = Machine("cpu", 1)
GPU = Machine("cuda", 1)
DEMO = [
    "--config",
    str(ROOT / "configs" / "demo.yaml"),
    f"--model.name={ROOT / 'configs/towers/glyph.json'}",
]
LORA = ("--tune.image=lora", "--tune.text=lora")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A HF CLIP of two layers, whose 257 patches make attention matrices large beside all else."""
    folder = tmp_path_factory.mktemp("planning") / "clip"
    return str(local_clip(folder, image_size=64, patch_size=4, width=32, heads=4, projection=16))


def config(*words: str, model: str = "") -> Config:
    return read([*DEMO, *([f"--model.name={model}"] if model else []), *words])


def parts(step: Step, *labels: str) -> int:
    return sum(step.bytes.get(label, 0) for label in labels)


# ---- the meter


def test_a_storage_counts_once_from_its_birth_to_its_end() -> None:
    with FakeTensorMode(), Meter() as meter:
        x = torch.empty(250)
        with meter.labelled("activations"):
            y = x + 1
            view = y.view(10, 25)[2:]
            del y
            assert meter.now["activations"] == 1000
            del view
        meter.restart()
        with meter.labelled("loss"):
            torch.empty(500)
            kept = torch.empty(100)
    assert dict(meter.peak) == {"weights": 1000, "loss": 2000}
    assert +meter.now == {"weights": 1000, "loss": 400}
    assert len(kept) == 100


def test_a_label_moves_its_bytes_and_the_host_is_not_counted() -> None:
    with FakeTensorMode(), Meter() as meter:
        x = torch.empty(250)
        y = torch.empty(250)
        meter.label([x], "gradients")
        meter.label([y], "host")
        meter.restart()
        z = torch.zeros_like(y)
    assert dict(meter.peak) == {"gradients": 1000}
    assert meter.now["host"] == 2000
    assert len(z) == 250


def test_flops_of_products_and_of_attention() -> None:
    with FakeTensorMode(), Meter() as meter:
        q = torch.empty(2, 3, 5, 7, requires_grad=True)
        _ = torch.empty(4, 5) @ torch.empty(5, 6)
        assert meter.flops == 2 * 4 * 5 * 6
        meter.restart()
        attended = F.scaled_dot_product_attention(q, q, q)
        assert meter.flops == 2 * (2 * 2 * 3 * 5 * 5 * 7)
        attended.sum().backward()
        # two products forward, five back
        assert meter.flops == 7 * (2 * 2 * 3 * 5 * 5 * 7)


def test_what_depends_on_numbers_gets_the_ordinary_step() -> None:
    with FakeTensorMode(), Meter():
        x = torch.empty(6)
        assert torch.isfinite(x).all()
        assert len(torch.unique(x)) == 6
        assert x[x > 0].shape == (6,)
        assert int(torch.zeros((), dtype=torch.int64) + x.long().sum()) > 10**9


# ---- a step

TRUE = [
    ("small", 128, []),
    ("small", 128, ["--objective=sigmoid", "--model.chunk_size=32"]),
    ("small", 64, ["--objective.queue=moco", "--objective.moco.size=16384"]),
    ("hf", 16, ["--model.attention=eager"]),
    ("hf", 16, ["--model.checkpoint_activations=true", *LORA]),
    ("hf", 16, ["--run.precision=bf16", "--model.chunk_size=4"]),
]


@pytest.mark.parametrize(
    ("model", "rows", "words"), TRUE, ids=[" ".join([row[0], *row[2]]) for row in TRUE]
)
def test_the_peak_is_what_the_allocator_gives_out(
    clip: str, model: str, rows: int, words: list[str]
) -> None:
    given = config(*words, model=clip if model == "hf" else "")
    assert measure_step(given, CPU, rows).total == pytest.approx(true_peak(given, rows), rel=0.1)


def test_all_that_a_step_holds_is_told_apart() -> None:
    step = measure_step(config("--objective.queue=moco", "--objective.moco.size=4096"), GPU, 32)
    weights = parts(step, "weights")
    assert parts(step, "optimizer") == pytest.approx(2 * weights, rel=0.01)
    assert parts(step, "averaged towers") == pytest.approx(weights, rel=0.01)
    assert parts(step, "memory") == pytest.approx(4096 * (2 * 128 * 4 + 16), rel=0.01)
    assert parts(step, "pixels") == pytest.approx(32 * (3 * 32 * 32 + 16 * 8 + 16), rel=0.01)
    assert parts(step, "activations") > 0


def test_adapters_need_little_beside_the_weights(clip: str) -> None:
    full, adapted = (measure_step(config(*words, model=clip), GPU, 2) for words in ([], LORA))
    assert parts(adapted, "optimizer", "gradients") < 0.2 * parts(full, "optimizer")
    assert parts(adapted, "weights") > parts(full, "weights")


def test_lean_attention_checkpoints_and_chunks_save_what_they_promise(clip: str) -> None:
    def activations(*words: str) -> int:
        return parts(measure_step(config(*words, model=clip), GPU, 16), "activations")

    eager = activations("--model.attention=eager")
    lean = activations()
    # layers, pairs, heads: a softmax in float32 and its half copy
    matrices = 2 * 16 * 4 * 257 * 257 * (4 + 2)
    assert eager - lean > 0.9 * matrices
    assert activations("--model.checkpoint_activations=true") < 0.75 * lean
    assert activations("--model.chunk_size=4", *LORA) < 0.4 * activations(*LORA)


def test_recomputation_costs_flops_as_it_should(clip: str) -> None:
    whole, cut = (
        measure_step(config(f"--model.chunk_size={n}", model=clip), GPU, 8).flops for n in (0, 4)
    )
    assert cut / whole == pytest.approx(4 / 3, rel=0.03)


def test_ranks_bring_columns_and_buckets() -> None:
    alone, eight = (
        measure_step(config(), Machine("cuda", ranks), 64, hollow=True) for ranks in (1, 8)
    )
    assert parts(eight, "loss") > 4 * parts(alone, "loss")
    step = measure_step(config(), Machine("cuda", 8), 32)
    assert parts(step, "DDP's buckets") == pytest.approx(parts(step, "optimizer") / 2, rel=0.01)


def test_columns_of_the_host_are_not_on_the_device() -> None:
    there, here = (
        measure_step(config(f"--objective.exchange={name}"), Machine("cuda", 64), 64, hollow=True)
        for name in ("host", "gather")
    )
    columns = 64 * 64 * 128 * 4
    assert parts(here, "loss") - parts(there, "loss") > columns


def test_pixels_that_travel_stay_in_the_host() -> None:
    one, eight = (
        measure_step(config("--model.chunk_size=8"), Machine("cuda", n), 32) for n in (1, 8)
    )
    assert parts(eight, "pixels") - parts(one, "pixels") == 32 * 3 * 32 * 32


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_is_planned(name: str) -> None:
    words = (
        [f"--objective={{softmax: 1, {name}: 0.5}}"]
        if name in ("superclass", "softmax")
        else [f"--objective={name}"]
    )
    words = ["--objective=softmax"] if name == "softmax" else words
    small = ["--objective.swav.prototypes=16", "--optim.pairs=4096"]
    assert measure_step(config(*words, *small), Machine("cuda", 2), 16).total > 0


def test_no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = open_clip_towers.load_open_clip

    def watched(name: str, tag: str, weights: bool = True) -> Any:
        asked.append(weights or bool(tag))
        return real(name, tag, weights)

    monkeypatch.setattr(open_clip_towers, "load_open_clip", watched)
    measure_step(config("--model.pretrained=openai", model="RN50"), GPU, 2)
    assert asked == [False]


# ---- how CUDA differs


def test_cuda_computes_norms_in_float32_and_keeps_dropout_as_bytes() -> None:
    meter = Meter()
    with FakeTensorMode(), meter, as_on_cuda(meter), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.empty(4, 8, dtype=torch.bfloat16)
        assert F.layer_norm(x, (8,)).dtype == F.softmax(x, dim=1).dtype == torch.float32
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            F.dropout(x.float().requires_grad_(), 0.5, True)
        assert [each.dtype for each in kept] == [torch.bool]


def test_cuda_drops_attention_without_its_matrix() -> None:
    """The CPU's lean kernel knows no dropout, and would fall back to the whole matrix."""
    meter = Meter()
    with FakeTensorMode(), meter, as_on_cuda(meter):
        q = torch.empty(1, 2, 512, 8, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).sum().backward()
    assert sum(meter.peak.values()) < 2 * 512 * 512 * 4


def test_a_run_that_is_shorter_than_a_batch_is_planned_all_the_same() -> None:
    assert measure_step(config("--optim.pairs=256"), GPU, 512).rows == 512


def test_tiles_are_those_of_the_device() -> None:
    before = dict(TILE)
    step = measure_step(config(), GPU, 4096, hollow=True)
    assert parts(step, "loss") > 4096 * 4096 * 4
    assert before == TILE
    assert world.size() == 1


def test_fake_ranks_gather_and_reduce() -> None:
    with fake_ranks(4), FakeTensorMode():
        x = torch.empty(3, 2, requires_grad=True)
        gathered = world.gather(x)
        assert gathered.shape == (12, 2)
        gathered.sum().backward()
        assert x.grad is not None
        assert world.sum_over_ranks(x).shape == (3, 2)
        assert [start for start, _, _ in world.ring(x)] == [0, 9, 6, 3]


# ---- the search


def pretend(monkeypatch: pytest.MonkeyPatch, bytes_of: Any) -> list[int]:
    """Put `rows -> bytes` in place of abstract steps; returns the rows that were tried."""
    tried: list[int] = []

    def made(given: Config, machine: Machine, rows: int, hollow: bool = False) -> Step:
        tried.append(rows)
        return Step(rows, {"weights": 1000, "activations": bytes_of(rows) - 1000}, rows)

    monkeypatch.setattr(search, "measure_step", made)
    return tried


@pytest.mark.parametrize(
    "bytes_of", [lambda n: 1000 + 7 * n, lambda n: max(9000 + 3 * n, 1000 + 40 * n)]
)
@pytest.mark.parametrize("begin", [1, 8, 500])
def test_the_largest_batch_fits_and_hardly_more_would(
    monkeypatch: pytest.MonkeyPatch, bytes_of: Any, begin: int
) -> None:
    tried = pretend(monkeypatch, bytes_of)
    found = Planner(GPU, 16_000).largest(config(), begin)
    assert found.bytes == bytes_of(found.rows) <= 16_000
    assert bytes_of(found.rows + 1) > 16_000 or found.bytes > 0.98 * 16_000
    assert len(tried) <= 8


def test_nothing_fits_and_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda n: 20_000 + n)
    assert Planner(GPU, 16_000).largest(config(), 8).rows == 0
    assert Planner(GPU, 10**9).largest(config(), 8).rows == MOST


def test_a_batch_in_chunks_is_as_predicted(clip: str) -> None:
    planner = Planner(GPU, 2**40)
    given = config("--model.chunk_size=4", model=clip)
    assert planner.peak(given, 24) == pytest.approx(measure_step(given, GPU, 24).total, rel=0.05)


def test_rows_differ_and_the_first_is_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(given: Config, machine: Machine, rows: int, hollow: bool = False) -> Step:
        model = given.model
        trained = 100 if given.tune.image == "lora" else 2000
        once = min(rows, model.chunk_size or rows)
        pair = (
            10
            if hollow
            else 1200
            if model.attention == "eager"
            else 100
            if model.checkpoint_activations
            else 700
        )
        return Step(
            rows,
            {"weights": 1000 + trained, "activations": once * pair + rows},
            rows * (1 + (once < rows)),
        )

    monkeypatch.setattr(search, "measure_step", made)
    rows = list(plan_rows(Planner(GPU, 16_000), config(*LORA), 8))
    assert [(row.title, row.largest.rows) for row in rows if "chunks" not in row.title] == [
        ("as configured: LoRA r=16, SDPA", 21),
        ("LoRA r=16, eager attention", 12),
        ("LoRA r=16, SDPA, checkpointing", 147),
        ("full, SDPA", 18),
    ]
    chunked = {row.title: row for row in rows if "chunks" in row.title}
    assert list(chunked) == ["LoRA r=16, SDPA, chunks of 16", "LoRA r=16, SDPA, chunks of 8"]
    assert all(row.largest.rows > 200 and row.flops == 2 for row in chunked.values())


# ---- the command


def test_the_command_says_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *DEMO,
        "--data.batch_size=256",
        "--world_size=2",
        "--device=cpu",
        "--memory=1000MiB",
        "--reserve=900MiB",
    ]
    assert main([*words, "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert "\nFits: 128 pairs a device need" in out
    assert "What buys most is --model.chunk_size=" in out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["settings"][0]["rows"] == 128
    assert found["at_peak"]["weights"] > 0
    assert main([*words, "--reserve=980MiB"]) == 1
    assert "Does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory=lots"], "no amount of memory"),
        (["--world_size=3"], "not divisible by --world_size=3"),
        (["--memory=1GiB", "--reserve=2GiB"], "takes all of it"),
        (["--model.nam=x"], "did you mean model.name"),
        (["--model.name=nothing"], "no tower JSON"),
    ],
)
def test_bad_input_leaves_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*DEMO, *words])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_amounts_of_memory() -> None:
    assert [memory_size(text) for text in ("16GiB", "24 GB", "1.5MiB", "7")] == [
        2**34,
        24 * 10**9,
        3 * 2**19,
        7,
    ]
