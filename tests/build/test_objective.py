"""What a config makes of objectives: weights, options, scale and bias at the start, notes.

Seen to fail when: a mix forgets its weights; options, or mask_duplicates, do not reach the
objective; a loaded bias is not divided by the scale for `relative_bias`.
"""

import math
from typing import Any

import pytest
import torch

from clipsmall.build import objective as build_objective
from clipsmall.build import run as build
from clipsmall.config.reader import read
from clipsmall.model.towers import Loaded
from clipsmall.model.towers.small import SmallConfig, WordTokenizer, load_small
from clipsmall.objectives import OBJECTIVES
from clipsmall.objectives.options import given_to_heads
from tests.objectives.pair_losses import SETTING, call, embeddings, with_duplicates
from tests.shards_for_tests import TOWERS


def run(*words: str) -> Any:
    return read(["--data.train=[x]", "--data.batch_size=17", *words])


def loaded(scale: float | None = None, bias: float | None = None) -> Loaded:
    towers = SmallConfig.model_validate(TOWERS)
    found = load_small(towers, WordTokenizer.train(["a b"], towers.text))
    found.logit_scale = scale
    found.logit_bias = bias
    return found


def test_a_mix_is_the_weighted_sum_of_its_parts() -> None:
    e = with_duplicates(embeddings(17), [(0, 5)])
    made = build.objective(run("--objective={softmax: 1, sigmoid: 0.25, vse++: 2}"), SETTING)
    losses = made(e, e)
    parts = {name: call(name, e)["loss"] for name in ("softmax", "sigmoid", "vse++")}
    for name, value in parts.items():
        torch.testing.assert_close(losses[name], value.detach())
    torch.testing.assert_close(
        losses["loss"], parts["softmax"] + 0.25 * parts["sigmoid"] + 2 * parts["vse++"]
    )
    assert losses["effective_negatives"] == losses["softmax/effective_negatives"]
    assert {"softmax/accuracy", "sigmoid/positive"} <= losses.keys()
    half = build.objective(run("--objective={softmax: 0.5}"), SETTING)
    torch.testing.assert_close(half(e, e)["loss"], parts["softmax"] / 2)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("softmax", "softmax.intra_modal", "true"),
        ("dcl", "dcl.intra_modal", "true"),
        ("dclw", "dcl.sigma", "0.1"),
        ("sigmoid", "sigmoid.relative_bias", "true"),
        ("triplet", "triplet.margin", "0.5"),
        ("vse++", "triplet.warmup", "0"),
        ("spectral", "spectral.mu", "1"),
        ("align_uniform", "align_uniform.t", "1"),
        ("sinkhorn", "sinkhorn.iterations", "1"),
        ("sinkhorn_targets", "sinkhorn_targets.alpha", "0.1"),
        ("bce", "bce.mode", "one"),
        ("hsic", "hsic.gamma", "2"),
        *(
            (name, "mask_duplicates", "false")
            for name in ("softmax", "dcl", "sigmoid", "sinkhorn", "bce")
        ),
    ],
)
def test_options_reach_their_objective(name: str, option: str, value: str) -> None:
    e = with_duplicates(embeddings(17), [(0, 5), (0, 6), (2, 9)])
    plain, changed = (
        build.objective(run(f"--objective={name}", *words), SETTING)(e, e)["loss"].item()
        for words in ([], [f"--objective.{option}={value}"])
    )
    assert plain != changed


def test_every_option_of_the_config_is_taken_by_an_objective_or_head() -> None:
    """A field that neither takes would be ignored in silence."""
    taken: dict[str, set[str]] = {}
    for spec in OBJECTIVES.values():
        given = run().objective.options(spec.section)
        its = set(spec.taken(given))
        for head in given_to_heads(spec.heads, given).values():
            its |= set(head)
        taken[spec.section] = taken.get(spec.section, set()) | its
    for section, names in taken.items():
        assert set(run().objective.options(section)) == names, section


def test_where_scale_and_bias_start() -> None:
    prior = -math.log(16)
    for words, weights, scale, bias in (
        (["--objective=softmax"], loaded(), 1 / 0.07, 0.0),
        (["--objective=sigmoid"], loaded(), 10.0, prior),
        (["--objective=bce"], loaded(), 10.0, 0.0),
        (["--objective=triplet"], loaded(), 1.0, 0.0),
        (["--objective={sigmoid: 1, softmax: 1}"], loaded(), 10.0, prior),
        (["--objective={softmax: 1, sigmoid: 1}"], loaded(), 1 / 0.07, prior),
        (
            ["--objective=sigmoid", "--objective.sigmoid.relative_bias=true"],
            loaded(),
            10.0,
            prior / 10,
        ),
        (
            ["--objective=sigmoid", "--objective.sigmoid.relative_bias=true"],
            loaded(100.0, -13.0),
            100.0,
            -0.13,
        ),
        (
            ["--objective=softmax", "--objective.sigmoid.relative_bias=true"],
            loaded(100.0, -13.0),
            100.0,
            -13.0,
        ),
        (
            ["--objective=sigmoid", "--objective.queue=moco", "--objective.moco.size=100"],
            loaded(),
            10.0,
            -math.log(116),
        ),
        # met later
        (["--objective=sigmoid", "--objective.queue=xbm"], loaded(), 10.0, prior),
        (
            ["--objective=sigmoid", "--model.logit_bias=-10", "--model.logit_scale=5"],
            loaded(100.0, -13.0),
            5.0,
            -10.0,
        ),
    ):
        given = run(*words)
        section = given.objective
        start = build_objective.initial_scale(section, given.model.logit_scale, weights)
        assert start == pytest.approx(scale)
        start = build_objective.initial_bias(
            section, given.model.logit_bias, weights, SETTING, start
        )
        assert start == pytest.approx(bias)


@pytest.mark.parametrize(
    ("words", "scale", "bias"),
    [
        (["--objective=softmax"], True, False),
        (["--objective=sigmoid"], True, True),
        (["--objective=vicreg"], False, False),
        (["--objective={vicreg: 1, bce: 1}"], True, True),
        (["--objective=gcl"], True, False),
        (["--objective=gcl", "--objective.gcl.variant=sogclr"], False, False),
    ],
)
def test_what_gets_no_gradient_is_frozen(words: list[str], scale: bool, bias: bool) -> None:
    weights = loaded()
    made = build.dual_encoder(
        run(*words), weights, build.run_context(run(*words), weights, torch.arange(9))
    )
    assert (made.logit_scale.requires_grad, made.logit_bias.requires_grad) == (scale, bias)


def test_options_without_effect_are_named() -> None:
    assert (
        build_objective.without_effect(
            run("--objective=dclw", "--objective.dcl.sigma=0.1").objective
        )
        == []
    )
    words = ("--objective.gcl.gamma=0.5", "--objective.triplet.margin=0.3")
    assert build_objective.without_effect(run(*words).objective) == [
        "objective.gcl",
        "objective.triplet",
    ]
