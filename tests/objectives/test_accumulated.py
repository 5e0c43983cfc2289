"""Naive accumulation: the gradient that adding up small batches gives, and no more negatives than
theirs.

Seen to fail when: parts are made of neighbours (other ranks, other parts); a part's loss is summed
instead of averaged; columns of all parts are compared.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clipsmall import train
from clipsmall.build import chunks as build_chunks
from clipsmall.build import run as build
from clipsmall.config.reader import read
from clipsmall.model.towers.small import SmallConfig, WordTokenizer, load_small
from clipsmall.objectives.accumulated import Accumulated
from clipsmall.objectives.softmax import softmax
from tests.model.test_chunks import gradients, noisy
from tests.shards_for_tests import TOWERS, config


def test_it_is_the_mean_of_small_batches_gradients() -> None:
    model, pairs = noisy(12)
    # no dropout: two passes are compared
    model.eval()
    for k in range(3):
        small_batch = model(type(pairs)(*(field[k::3] for field in pairs)))
        (softmax(small_batch, small_batch)["loss"] / 3).backward()
    expected = gradients(model)
    model.zero_grad()
    rows = model(pairs)
    made = Accumulated(softmax, 3)(rows, rows)
    made["loss"].backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-14)
    assert made["effective_negatives"] == 3
    model.zero_grad()
    whole = model(pairs)
    softmax(whole, whole)["loss"].backward()
    both = [
        torch.cat([g.flatten() for g in found.values()]) for found in (gradients(model), expected)
    ]
    # another loss
    assert F.cosine_similarity(*both, dim=0) < 0.99


def run(*words: str) -> Any:
    return read(["--data.train=[x]", "--data.batch_size=32", *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.accumulate=5"], "does not cut data.batch_size=32"),
        (["--optim.accumulate=32"], "equal parts of two pairs or more"),
    ],
)
def test_batches_that_cannot_be_cut(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as stopped:
        run(*words)
    assert said in capsys.readouterr().err + str(stopped.value)


def test_what_it_asks_of_a_run() -> None:
    given = run("--optim.accumulate=4", "--objective=sigmoid")
    towers = SmallConfig.model_validate(TOWERS)
    loaded = load_small(towers, WordTokenizer.train(["a b"], towers.text))
    setting = build.run_context(given, loaded, None)
    # what an objective sees of the run
    assert (setting.batch_size, setting.steps) == (
        8,
        given.steps * 4,
    )
    model = build.dual_encoder(given, loaded, setting)
    for asked, size in ((0, 8), (3, 3)):
        found = build_chunks.chunk_size(asked, 32, 4, None, loaded, model)  # type: ignore[arg-type]
        assert found == size
    for words in (["--objective=byol"], ["--objective.queue=xbm"]):
        with pytest.raises(ValueError, match=r"use model\.chunk_size"):
            build.objective(run("--optim.accumulate=4", *words), setting)


def test_the_log_says_how_many_negatives_a_pair_meets(glyphs: Path, tmp_path: Path) -> None:
    changes = {
        "data.batch_size": 32,
        "optim.pairs": 64,
        "optim.accumulate": 4,
        "objective.mask_duplicates": "false",
    }
    assert train.main(config(glyphs, tmp_path / "run", **changes)) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    found = [row for row in rows if "loss" in row]
    assert {row["effective_negatives"] for row in found} == {7.0}
    # ln 8
    assert found[0]["chance"] == pytest.approx(2.0794415)
