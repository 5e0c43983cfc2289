"""The self-check finds no fault where there is none, and else says what is wrong, and where.

Seen to fail when: reference and ranks are one code path (`single_process` that changes nothing);
the first step is left out, or the second repeats the first's pairs in place (memories of one rank
go unseen); passes share one objective; each rank judges for itself; random layers, or autocast
besides bf16, stay on; averaged towers are put into training mode; chunks are not; the noise of
rounding is not measured; something unclear counts as fine.
"""

import contextlib
import gc
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipsmall.batch import Embeddings, Pairs
from clipsmall.data.preprocess import ImageSpec
from clipsmall.distributed import world
from clipsmall.distributed.batch_norm import GlobalBatchNorm
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.momentum import MovingAverage
from clipsmall.objectives import OBJECTIVES, ObjectiveSpec
from clipsmall.objectives.fifo import Fifo
from clipsmall.objectives.gcl import Gcl
from clipsmall.objectives.softmax import softmax
from clipsmall.selfcheck import __main__ as selfcheck
from clipsmall.selfcheck import gradients as gradient_check
from clipsmall.selfcheck.gradients import (
    Difference,
    GradientRow,
    Judge,
    differences,
    disable_randomness,
    gradient_groups,
    gradient_table,
    low_precision_verdict,
)
from tests.shards_for_tests import config

Patches = Callable[[], Any]
CPU = torch.device("cpu")


def checked(
    runs: list[list[str]], patches: Patches = contextlib.nullcontext
) -> list[tuple[int, str]]:
    """Exit code and output of each, one after another in one process group."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    found = []
    try:
        # Accelerate collects garbage after every pass: half a second
        with patches(), mock.patch.object(world, "leave"), mock.patch.object(gc, "collect"):
            for words in runs:
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    code = selfcheck.main(words)
                found.append((code, said.getvalue()))
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
    return found


def rows(said: str) -> dict[tuple[str, str], tuple[float, str]]:
    """(what is compared, group) -> ratio of the norms, verdict."""
    found = {}
    what = ""
    for line in said.splitlines()[2:]:
        cells = re.split(r"\s{2,}", line)
        if len(cells) >= 5:
            what = cells[0] or what
            found[what, cells[1]] = float(cells[2]), cells[-1]
    return found


EVERY = [
    *({"objective.name": name} for name in OBJECTIVES if name != "superclass"),
    {"objective.name": "{softmax: 1, superclass: 0.3}"},
    {"objective.name": "{gcl: 1, byol: 0.2, swav: 0.1}"},
    {"objective.name": "vicreg", "objective.vicreg.widths": "[24,12]"},
    {"objective.exchange": "ring"},
    {"objective.exchange": "host"},
    {"objective.queue": "xbm"},
    {"objective.queue": "moco", "objective.moco.in_batch": "false"},
    {"optim.accumulate": 2},
]
SWAV = {"objective.swav.prototypes": 16, "objective.swav.queue": 32}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("part", range(4))
def test_every_objective_is_exact(
    ranks: Any, glyphs: Path, tmp_path: Path, part: int, world_size: int
) -> None:
    runs = [config(glyphs, tmp_path / "out", **SWAV, **changes) for changes in EVERY[part::4]]
    for rank, found in enumerate(ranks(world_size, checked, runs)):
        for words, (code, said) in zip(runs, found, strict=True):
            assert code == 0, (words, said)
            # the first rank speaks, alone
            assert ("all exact" in said) == (rank == 0), said
            if rank == 0:
                assert len({what for what, _ in rows(said)}) == 2
                assert {verdict for _, verdict in rows(said).values()} == {"exact"}, said
    assert not (tmp_path / "out").exists()


# ---- deliberately wrong


def without_sum(ctx: Any, grad: Tensor) -> Tensor:
    return grad.contiguous().chunk(world.size())[world.rank()]


def wrong_gather() -> Any:
    return mock.patch.object(world._AllGather, "backward", staticmethod(without_sum))


def of_columns(rows: Embeddings, columns: Embeddings) -> dict[str, Tensor]:
    """The whole loss on every rank, of columns alone, as most write it: all its gradient goes
    through the gather.
    """
    logits = rows.logit_scale * columns.image @ columns.text.T
    return {"loss": F.cross_entropy(logits, torch.arange(len(logits)))}


@contextlib.contextmanager
def wrong_gather_of_columns() -> Iterator[None]:
    with wrong_gather(), mock.patch.dict(OBJECTIVES, softmax=ObjectiveSpec(of_columns, "softmax")):
        yield


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_gather_whose_backward_does_not_sum_is_caught(
    ranks: Any, glyphs: Path, tmp_path: Path, world_size: int
) -> None:
    words = config(glyphs, tmp_path / "out")
    (code, said), *_ = ranks(world_size, checked, [words], wrong_gather_of_columns)[0]
    assert code == 1
    found = rows(said)
    for (what, group), (ratio, verdict) in found.items():
        if "tower" in group:
            assert ratio == pytest.approx(1 / world_size, abs=1e-6), (what, group)
            assert f"(= 1/W, W = {world_size} ranks" in verdict
        else:
            assert verdict == "exact"
    assert {"image tower", "text tower"} <= {group for _, group in found}
    assert "WRONG: world.gather, image tower, text tower; 4 of 8 rows" in said
    # our softmax takes images from the rows: only texts come through the gather
    found_by_rank = ranks(world_size, checked, [words], wrong_gather)
    assert {code for ((code, _),) in found_by_rank} == {1}
    said = found_by_rank[0][0][1]
    wrong = {group for (_, group), (_, verdict) in rows(said).items() if verdict != "exact"}
    assert wrong == {"text tower"}
    assert "world.gather: its backward does not give the sum over ranks" in said


def scale_times_ranks(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True
) -> dict[str, Tensor]:
    scale = rows.logit_scale
    return softmax(
        rows._replace(logit_scale=scale + (world.size() - 1) * (scale - scale.detach())), columns
    )


def wrong_scale() -> Any:
    return mock.patch.dict(OBJECTIVES, softmax=ObjectiveSpec(scale_times_ranks, "softmax"))


def test_a_scale_whose_gradient_is_w_times_too_large_is_caught(
    ranks: Any, glyphs: Path, tmp_path: Path
) -> None:
    (code, said), *_ = ranks(4, checked, [config(glyphs, tmp_path / "out")], wrong_scale)[0]
    assert code == 1
    for (_, group), (ratio, verdict) in rows(said).items():
        if group == "logit_scale":
            assert ratio == pytest.approx(4)
            assert verdict.startswith("4 x the gradient of one process (= W, W = 4 ranks")
        else:
            assert verdict == "exact"
    assert "WRONG: logit_scale; 2 of 8 rows" in said


def dropping(tower: Any, inputs: Tensor, size: int, device: torch.device) -> Tensor:
    parts = [tower(part) for part in torch.split(inputs, size or len(inputs))]
    return torch.cat([*(part.detach() for part in parts[:-1]), parts[-1]])


def wrong_chunks() -> Any:
    return mock.patch("clipsmall.model.dual_encoder.in_chunks", dropping)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_chunk_without_gradient_is_caught(
    ranks: Any, glyphs: Path, tmp_path: Path, world_size: int
) -> None:
    (code, said), *_ = ranks(world_size, checked, [config(glyphs, tmp_path / "out")], wrong_chunks)[
        0
    ]
    assert code == 1
    for (what, group), (_, verdict) in rows(said).items():
        if "chunks" in what and "tower" in group:
            assert verdict.startswith("direction differs")
        else:
            assert verdict == "exact"
    assert "WRONG: image tower, text tower; 2 of 8 rows" in said


def own_pairs_only(self: Fifo, index: Tensor, caption: Tensor, **features: Tensor) -> None:
    mine = torch.arange(len(index)).chunk(world.size())[world.rank()]
    push(self, index[mine], caption[mine], **{name: rows[mine] for name, rows in features.items()})


push = Fifo.push


def wrong_memory() -> Any:
    return mock.patch.object(Fifo, "push", own_pairs_only)


def own_spots_only(
    self: Gcl, spots: Tensor, met: Tensor, log_u: Tensor, slopes: Tensor | None
) -> None:
    with torch.no_grad():
        self.log_u[spots[met]] = log_u[met].to(self.log_u.dtype)
        self.step += 1


def wrong_gcl() -> Any:
    return mock.patch.object(Gcl, "_remember", own_spots_only)


@pytest.mark.parametrize(
    ("patches", "changes"),
    [(wrong_memory, {"objective.queue": "xbm"}), (wrong_gcl, {"objective.name": "gcl"})],
)
def test_a_memory_of_one_rank_only_is_caught(
    ranks: Any, glyphs: Path, tmp_path: Path, patches: Patches, changes: dict[str, object]
) -> None:
    """The first step alone would be exact."""
    found = ranks(2, checked, [config(glyphs, tmp_path / "out", **changes)], patches)
    assert [code for ((code, _),) in found] == [1, 1]


def broken_on_one_rank(
    rows: Embeddings, columns: Embeddings, mask_duplicates: bool = True
) -> dict[str, Tensor]:
    found = softmax(rows, columns)
    return {
        **found,
        "loss": found["loss"] * (math.nan if world.size() > 1 and world.rank() == 1 else 1.0),
    }


def wrong_number() -> Any:
    return mock.patch.dict(OBJECTIVES, softmax=ObjectiveSpec(broken_on_one_rank, "softmax"))


def test_numbers_that_are_none_are_named_and_all_ranks_agree(
    ranks: Any, glyphs: Path, tmp_path: Path
) -> None:
    found = ranks(2, checked, [config(glyphs, tmp_path / "out")], wrong_number)
    assert [code for ((code, _),) in found] == [1, 1]
    assert "not finite: 1 of 1 numbers" in found[0][0][1]


def test_what_cannot_be_told_is_not_fine(
    glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_check, "MARGIN", 1e15)
    (code, said), *_ = checked([config(glyphs, tmp_path / "out")])
    assert code == 1
    assert "6 of 8 rows are lost in rounding; try --dtype=float64" in said


# ---- precision, models, input


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_precision_is_compared_loosely_and_beside_it_all_is_exact(
    glyphs: Path, tmp_path: Path, dtype: str
) -> None:
    words = config(glyphs, tmp_path / "out", **{"run.precision": "bf16", "dtype": dtype})
    (code, said), *_ = checked([words])
    assert code == 0, said
    assert f"{dtype} on cpu" in said
    for (what, group), (_, verdict) in rows(said).items():
        expected = (
            r"cosine 0\.99\d\d|cosine 1\.0000|(0\.9|1\.0)\d* x"
            if what.endswith("bf16")
            else "exact"
        )
        assert re.fullmatch(expected, verdict), (what, group, verdict)
    assert len({what for what, _ in rows(said)}) == 3


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@pytest.mark.parametrize(
    ("vision", "said_of_chunks"),
    [
        ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "chunks: refused, as BatchNorm"),
        (
            {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "patch_dropout": 0.5},
            "chunks of 10",
        ),
    ],
)
def test_batch_norm_and_random_layers(
    glyphs: Path, tmp_path: Path, vision: dict[str, Any], said_of_chunks: str
) -> None:
    (tmp_path / "tiny.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT})
    )
    words = config(glyphs, tmp_path / "out", **{"model.name": str(tmp_path / "tiny.json")})
    (code, said), *_ = checked([words])
    assert code == 0, said
    assert said_of_chunks in said
    assert {group for _, group in rows(said)} == {
        "loss",
        "image tower",
        "text tower",
        "logit_scale",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.batch_sise=3"], "did you mean data.batch_size"),
        (["--objective=superclass"], "does not train the text tower"),
        (["--pairs=4000"], "more than the 300 pairs"),
        (["--data.train=[/nowhere]"], "/nowhere"),
    ],
)
def test_bad_input_ends_with_2(
    glyphs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        checked([[*config(glyphs, tmp_path / "out"), *words]])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def refused(words: list[str]) -> tuple[Any, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
        checked([words])
    return left.value.code, said.getvalue()


def test_pairs_that_cannot_be_shared_out_are_refused(
    ranks: Any, glyphs: Path, tmp_path: Path
) -> None:
    words = config(glyphs, tmp_path / "out")
    code, said = ranks(4, refused, [*words, "--pairs=6"])[0]
    assert code == 2
    assert "--pairs=6 is not divisible by 4" in said


def seen_alone() -> list[Any]:
    x = torch.full((1, 2), float(world.rank()), requires_grad=True)
    with pytest.raises(RuntimeError), world.single_process():
        raise RuntimeError
    with world.single_process():
        with world.single_process():
            pass
        inside = [
            world.rank(),
            world.size(),
            len(world.gather(x)),
            world.differentiable_sum(x).sum().item(),
            world.mean_over_ranks(x)[0, 0].item(),
        ]
        inside += [world.gather_bytes(b"x", CPU), [place for place, _, _ in world.ring(x)]]
    return [inside, world.size(), len(world.gather(x))]


def test_a_rank_can_be_alone(ranks: Any) -> None:
    for rank, (inside, size, gathered) in enumerate(ranks(2, seen_alone)):
        assert inside == [0, 1, 1, 2 * rank, rank, [b"x"], [0]]
        assert (size, gathered) == (2, 2)


class Towers(nn.Module):
    """Two modalities that share a layer, with dropout; one parameter is idle."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 4)
        self.b = nn.Embedding(9, 4)
        self.shared = nn.Linear(4, 4)
        self.idle = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.dropout = nn.Dropout(0.5)
        self.norm = GlobalBatchNorm(4)

    def image(self, pixels: Tensor) -> Tensor:
        return self.norm(self.shared(self.dropout(self.a(pixels.flatten(1)))))  # type: ignore[no-any-return]

    def text(self, ids: Tensor) -> Tensor:
        return self.shared(self.b(ids).mean(dim=1)) + self.frozen  # type: ignore[no-any-return]


def test_parameters_are_grouped_by_what_depends_on_them() -> None:
    model = DualEncoder(Towers(), ImageSpec(2), 10.0, 0.0, False, heads={"tokens": nn.Linear(4, 2)})
    numbers = torch.arange(2)
    pairs = Pairs(
        torch.zeros(2, 3, 2, 2, dtype=torch.uint8),
        torch.ones(2, 3, dtype=torch.int64),
        numbers,
        numbers,
    )
    assert gradient_groups(model, pairs) == {
        "loss": ["loss"],
        "image tower": [
            "towers.a.weight",
            "towers.a.bias",
            "towers.norm.weight",
            "towers.norm.bias",
        ],
        "text tower": ["towers.b.weight"],
        "both towers": ["towers.shared.weight", "towers.shared.bias"],
        "towers": ["towers.idle"],
        "head tokens": ["heads.tokens.weight", "heads.tokens.bias"],
        "logit_scale": ["logit_scale"],
    }
    model.towers.requires_grad_(False)
    assert set(gradient_groups(model, pairs)) == {"loss", "head tokens", "logit_scale"}


def test_random_layers_are_off_and_batch_norms_see_the_batch() -> None:
    towers = Towers()
    model = nn.ModuleList([towers, MovingAverage(towers, 0.9, 0)]).eval()
    disable_randomness(model)
    assert {name for name, part in model.named_modules() if part.training} == {"0.norm"}


def seen_by_each() -> str:
    reference = {"x": torch.ones(4), "y": None, "z": torch.ones(2)}
    found = {
        "x": torch.ones(4) * (1 + world.rank()),
        "y": torch.ones(1) if world.rank() == 0 else None,
        "z": None,
    }
    named = {"one": ["x"], "two": ["y"], "three": ["z"]}
    return json.dumps(
        {group: asdict(d) for group, d in differences(found, reference, named, CPU).items()}
    )


def test_the_rank_that_differs_most_decides(ranks: Any) -> None:
    answers = ranks(3, seen_by_each)
    assert len(set(answers)) == 1
    found = {group: Difference(**d) for group, d in json.loads(answers[0]).items()}
    assert (
        found["one"].norm,
        found["one"].reference,
        found["one"].apart,
        found["one"].numbers,
    ) == (6, 2, 4, 4)
    assert (found["two"].extra, found["two"].missing, found["three"].missing) == (1, 0, 1)


EXACT = Difference(1.0, 1.0, 1.0, 0.0, 0.0, 10, 0, 0, 0)


@pytest.mark.parametrize(
    ("d", "noise", "state", "words"),
    [
        (EXACT, 1e-15, "exact", "exact"),
        (
            Difference(1.0, 1.0, 1.0, 1e-7, 1e-7, 10, 0, 0, 0),
            1e-15,
            "wrong",
            "direction differs|1 x",
        ),
        (
            Difference(1.0, 1.0, 1.0, 1e-7, 1e-7, 10, 0, 0, 0),
            1e-7,
            "exact",
            "exact",
            # rounding does as much
        ),
        (
            Difference(0.5, 1.0, 1.0, 0.5, 0.5, 10, 0, 0, 0),
            1e-15,
            "wrong",
            r"0\.5 x the gradient .*half",
        ),
        (Difference(1.0, 1.0, -1.0, 2.0, 2.0, 10, 0, 0, 0), 1e-15, "wrong", "-1 x the gradient"),
        (
            Difference(1.0, 1.0, 0.9, 0.4, 0.4, 10, 0, 0, 0),
            1e-15,
            "wrong",
            r"direction differs \(cosine 0\.9000\)",
        ),
        (
            Difference(1.0, 1.0, 0.9, 0.4, 0.4, 10, 0, 0, 0),
            0.1,
            "unclear",
            r"rounding alone makes 10\.0%",
        ),
        (Difference(0.0, 1.0, math.nan, 1.0, 1.0, 10, 0, 0, 0), 1e-15, "wrong", "0 x the gradient"),
        (
            Difference(1.0, 0.0, math.nan, 1.0, 1.0, 10, 0, 0, 0),
            0.0,
            "wrong",
            "where one process has none",
        ),
        (Difference(0.0, 0.0, math.nan, 0.0, 0.0, 10, 0, 0, 0), 0.0, "idle", "no gradient"),
        (
            Difference(2e-17, 1e-17, 0.3, 3e-17, 3e-17, 10, 0, 0, 0),
            1e-17,
            "idle",
            "no gradient but rounding",
        ),
        (Difference(1.0, 1.0, 1.0, 0.0, 0.0, 10, 0, 1, 0), 1e-15, "wrong", "1 with one it has not"),
        (Difference(1.0, 1.0, 1.0, 0.0, 0.0, 10, 0, 0, 3), 1e-15, "wrong", "not finite: 3 of 10"),
    ],
)
def test_what_a_difference_means(d: Difference, noise: float, state: str, words: str) -> None:
    shaken = Difference(d.reference, d.reference, 1.0, noise, noise, 10, 0, 0, 0)
    judge = Judge({"loss": EXACT, "image tower": EXACT, "x": shaken}, torch.float64)
    verdict = judge.verdict("x", d, {"half": 0.5})
    assert verdict.state == state, verdict
    assert re.search(words, verdict.words), verdict
    assert verdict.words in gradient_table([GradientRow("one", "x", d, verdict)])


def test_a_lower_precision_is_wrong_only_without_direction() -> None:
    assert low_precision_verdict(Difference(0.5, 1.0, 0.95, 0.6, 0.5, 10, 0, 0, 0)).state == "near"
    assert low_precision_verdict(Difference(1.0, 1.0, 0.85, 0.6, 0.5, 10, 0, 0, 0)).state == "wrong"
    assert (
        low_precision_verdict(Difference(0.0, 1.0, math.nan, 1.0, 0.5, 10, 0, 0, 0)).state
        == "wrong"
    )
    assert low_precision_verdict(Difference(1.0, 1.0, -1.0, 2.0, 2.0, 1, 0, 0, 0)).state == "near"
    assert low_precision_verdict(Difference(1.0, 1.0, 1.0, 0.0, 0.0, 10, 0, 0, 1)).state == "wrong"
    assert (
        low_precision_verdict(Difference(0.0, 0.0, math.nan, 0.0, 0.0, 10, 0, 0, 0)).state == "idle"
    )
