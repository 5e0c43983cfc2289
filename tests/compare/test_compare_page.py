"""A comparison's pictures and page: of any half-done study, nothing hidden, nothing from outside,
the same twice.
"""

import itertools
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from clipsmall import train
from clipsmall.compare import plots
from clipsmall.compare.compare_page import (
    ComparisonPage,
    comparison_facts,
    comparison_tables,
    render_comparison_page,
    unfinished_runs,
    write_comparison_page,
)
from clipsmall.compare.grid import NUMBERS, Comparison
from clipsmall.compare.model_samples import TestedSample, sample_models
from clipsmall.compare.plots import Frames, clean_label, comparison_figures, save_figures
from clipsmall.compare.run_tables import CURVES
from clipsmall.compare.stats import contrasts_with_baseline, pareto_front, summarise_runs
from clipsmall.compare.verdict import verdict_sentences
from clipsmall.data import open_catalog
from clipsmall.evaluation import Encoder
from clipsmall.model.saved import load_model
from clipsmall.pages.html_page import DASH, Query, Table
from clipsmall.report_page.gallery import logit_matrix
from tests.html_for_tests import EVIL, Reader, decoded, png
from tests.shards_for_tests import config

METRICS = {"recall@1": "here/image_retrieval_recall@1", "top-1": "here/acc1"}
GRID = {"objective": ["softmax", "sigmoid", "dcl"], "batch_size": [16, 32, 64]}


def comparison(
    axes: dict[str, Any] = GRID, seeds: int = 3, metrics: dict[str, str] = METRICS
) -> Comparison:
    given = {
        "title": "A study",
        "out": "x",
        "config": "x",
        "axes": axes,
        "seeds": list(range(seeds)),
    }
    return Comparison.model_validate(given | {"budget": {"pairs": 4000}, "metrics": metrics})


def frames(study: Comparison) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All runs done, with made-up numbers; sigmoid alone has a bias."""
    dice = np.random.default_rng(0)
    rows = []
    lines = []
    for at, (levels, seed) in enumerate(
        itertools.product(itertools.product(*study.axes.values()), study.seeds)
    ):
        first = {**dict(zip(study.axes, levels, strict=True)), "seed": seed}
        bias = -10.0 if "sigmoid" in levels else 0.0
        numbers = dict.fromkeys(NUMBERS, 1.0) | {
            "seconds": 9.0 + at,
            "memory": 0.1 + at // 3 / 9,
            "logit_bias": bias,
        }
        results = {metric: dice.uniform(0.2, 0.6) for metric in study.metrics}
        rows.append(first | {"state": "done", "error": "", "folder": "x"} | results | numbers)
        for pairs in (1000.0, 2000.0, 4000.0):
            measured = {metric: value * pairs / 4000 for metric, value in results.items()}
            lines.append(
                first | dict.fromkeys(CURVES, 1.0) | {"pairs": pairs, "logit_bias": bias} | measured
            )
    return pd.DataFrame(rows), pd.DataFrame(lines)


def shown(study: Comparison, runs: pd.DataFrame, curves: pd.DataFrame) -> ComparisonPage:
    summary = summarise_runs(runs, study.axes, study.metrics)
    tested = contrasts_with_baseline(runs, study.axes, study.metric, study.baseline_levels)
    return ComparisonPage(
        *(
            study.title,
            study.budget.words,
            comparison_facts(study, runs),
            verdict_sentences(study, runs, summary, tested),
        ),
        tables=comparison_tables(study, summary, tested),
        failures=unfinished_runs(study, runs),
        figures=comparison_figures(study, runs, curves),
    )


def unfinished(runs: pd.DataFrame, state: str, error: str = "") -> pd.DataFrame:
    """These runs with another state, as `outcomes` gives it."""
    return runs.assign(state=state, error=error, **dict.fromkeys(METRICS, math.nan))


def full(text: str = "a glyph") -> ComparisonPage:
    """Every section, `text` in each place that holds text."""
    asked = [
        Query(png(), text, "image_to_text", text, texts=[(text, 0.9, True)]),
        Query(png(), text, "text_to_image", text, images=[(png(), text, 0.9, False)]),
    ]
    figure = Figure()
    figure.add_subplot(title=clean_label(text))
    return ComparisonPage(
        *(text, text, [(text, text)], [text]),
        tables=[Table(text, text, [text], [[text]])],
        failures=[(text, "failed", text), (text, text, "")],
        figures={"a": (f"{text}: {text}", figure)},
        samples=[
            *(TestedSample(text, asked, np.eye(2), [text] * 2) for _ in range(2)),
            TestedSample(text, error=text),
        ],
        config=text,
        command=text,
    )


def lines(figure: Figure) -> list[list[float]]:
    """The heights of a figure's lines that have points and are drawn."""
    found = [
        np.asarray(line.get_ydata())
        for panel in figure.axes
        for line in panel.lines
        if line.get_linestyle() != "None"
    ]
    return [np.round(line, 6).tolist() for line in found if len(line) > 1]


def test_pictures_of_a_whole_grid_and_what_they_show() -> None:
    study = comparison()
    runs, curves = frames(study)
    drawn = comparison_figures(study, runs, curves)
    assert list(drawn) == [
        "recall-1-against-batch-size",
        "top-1-against-batch-size",
        "recall-1-against-memory-of-a-training-step",
        "recall-1-against-training-time",
        "recall-1-while-training",
        "logit-scale-at-the-end-against-batch-size",
        "logit-bias-at-the-end-against-batch-size",
        "logit-scale-while-training",
        "logit-bias-while-training",
    ]
    means = runs.groupby(["objective", "batch_size"])["recall@1"].mean()
    against = lines(drawn["recall-1-against-batch-size"][1])
    for level in study.axes["objective"]:
        assert np.round([means[level, size] for size in ("16", "32", "64")], 6).tolist() in against
    settings = runs.groupby(["objective", "batch_size"])[["memory", "recall@1"]].mean()
    best = settings[pareto_front(settings["memory"], settings["recall@1"])].sort_values("memory")
    (panel,) = drawn["recall-1-against-memory-of-a-training-step"][1].axes
    (front,) = [line.get_xydata() for line in panel.lines if line.get_drawstyle() == "steps-post"]
    # MiB
    np.testing.assert_allclose(front, best * [1024, 1])
    (panel,) = drawn["logit-bias-at-the-end-against-batch-size"][1].axes
    # those without a bias are left out
    assert {float(y) for line in panel.lines for y in line.get_ydata()} == {-10.0}
    # it would keep every figure
    assert "pyplot" not in Path(plots.__file__).read_text()


def test_what_is_not_done_is_in_no_picture() -> None:
    study = comparison()
    runs, curves = frames(study)
    # with results of its last attempt
    runs.loc[runs["objective"] == "dcl", "state"] = "running"
    figure = comparison_figures(study, runs, curves)["recall-1-against-batch-size"][1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["softmax", "sigmoid"]
    means = runs[runs["objective"] == "dcl"].groupby("batch_size", sort=False)["recall@1"].mean()
    assert np.round(means, 6).tolist() not in lines(figure)


def test_a_learning_curve_is_the_mean_where_all_its_seeds_are() -> None:
    study = comparison({"objective": ["softmax"], "batch_size": [16]})
    runs, curves = frames(study)
    # seed 2 is still under way
    curves = curves[(curves["seed"] != 2) | (curves["pairs"] < 4000)]
    drawn = lines(comparison_figures(study, runs, curves)["recall-1-while-training"][1])
    means = curves.groupby("pairs")["recall@1"].mean().round(6).tolist()
    assert means[:2] in drawn
    assert means not in drawn
    once = curves.assign(
        **{metric: curves[metric].where(curves["pairs"] == 1000) for metric in METRICS}
    )
    assert "recall-1-while-training" not in comparison_figures(study, runs, once)


@pytest.mark.parametrize(
    ("axes", "seeds"),
    [
        ({"objective": ["softmax", "sigmoid"]}, 1),
        ({"batch_size": [32, 16]}, 2),
        ({"trick": {"$x_$": None, "_": None, "\x00": None, "": None}, "batch_size": [0, 16]}, 1),
        ({"batch_size": ["nan", 16], "objective": ["softmax", "dcl"]}, 2),
        (
            {
                "objective": ["softmax", "dcl"],
                "batch_size": [16, 32],
                "trick": ["none", "queue"],
                "width": [1, 2],
            },
            1,
        ),
        (
            {
                "objective": [f"objective number {number} of many" for number in range(12)],
                "batch_size": [32],
            },
            1,
        ),
    ],
)
def test_any_grid_half_done_has_its_page(axes: dict[str, Any], seeds: int) -> None:
    study = comparison(axes, seeds)
    runs, curves = frames(study)
    for keep in (0, 1, len(runs) - 1):
        broken = unfinished(runs.iloc[keep:], "failed", "out of memory")
        some = pd.concat([runs.iloc[:keep], broken]).assign(memory=math.nan)
        html = render_comparison_page(shown(study, some, curves.iloc[: 2 * keep]))
        assert html.count("✗ failed") == html.count("<pre>out of memory</pre>")
        assert "✗ failed" in html
        for image in Reader(html).all("img"):
            assert ElementTree.fromstring(decoded(image["src"])).tag.endswith("svg")


def test_levels_keep_their_look_and_no_two_share_it() -> None:
    study = comparison({"objective": [f"{number}" for number in range(20)]})
    looks = [
        Frames(study, *frames(study)).look({"objective": level})
        for level in study.axes["objective"]
    ]
    assert len({tuple(look.values()) for look in looks}) == 20
    assert (
        len({look["color"] for look in looks[:8]})
        == len({look["marker"] for look in looks[:8]})
        == 8
    )


def test_runs_that_are_not_done_stand_in_a_table_of_their_own() -> None:
    study = comparison()
    runs, _ = frames(study)
    states = [("missing", ""), ("failed", f"{EVIL} at line 9"), ("failed", "killed"), ("unfit", "")]
    parts = [
        unfinished(runs.iloc[[at]], state, error)
        for at, (state, error) in zip((0, 3, 4, 8), states, strict=True)
    ]
    some = pd.concat([runs.drop(index=[0, 3, 4, 8]), *parts]).sort_index()
    assert unfinished_runs(study, some) == [
        ("objective softmax, batch size 32, seed 0", "failed", f"{EVIL} at line 9"),
        ("objective softmax, batch size 32, seed 1", "failed", "killed"),
        ("objective softmax, batch size 16, seed 0", "not run yet", ""),
        ("objective softmax, batch size 64, seed 2", "does not fit the memory", ""),
    ]
    texts = Reader(render_comparison_page(shown(study, some, frames(study)[1]))).texts
    assert {f"{EVIL} at line 9", "killed", "23 of 27", "✗ failed", "not run yet"} <= set(texts)
    assert unfinished_runs(study, runs) == []


def test_the_tables_say_mean_spread_best_and_difference() -> None:
    study = comparison(seeds=2)
    runs, curves = frames(study)
    runs["recall@1"] = (
        0.4
        + 0.01 * runs["seed"]
        + 0.1 * (runs["objective"] == "dcl") * (runs["batch_size"] == "32")
    )
    runs.loc[(runs["objective"] == "dcl") & (runs["batch_size"] == "32"), "recall@1"] += [
        0.0,
        0.001,
    ]
    runs.loc[(runs["objective"] == "softmax") & (runs["seed"] == 1), ["state", "recall@1"]] = [
        "failed",
        math.nan,
    ]
    glance, every = shown(study, runs.assign(memory=0.5), curves).tables
    assert glance.rows[2] == [
        "dcl",
        ("40.5 ± 0.7", "number best"),
        ("50.6 ± 0.8", "number best"),
        ("40.5 ± 0.7", "number best"),
    ]
    assert glance.rows[0][1:] == [("40.0", "number")] * 3
    rows = {
        (row[0].text, row[1].text): dict(zip(every.columns, row, strict=True)) for row in every.rows
    }
    assert [row["recall@1"].look for row in rows.values()].count("number best") == 1
    best = rows["dcl", "32"]
    assert (best["runs"].text, best["recall@1 against softmax"].text, best["memory, MiB"].text) == (
        "2 of 2",
        "+10.0",
        "512",
    )
    assert best["p"].text.endswith(" *")
    assert [rows["softmax", "32"][name].text for name in ("runs", "p")] == ["1 of 2", DASH]
    for cell in (cell for row in every.rows for cell in row if cell.look and cell.text != DASH):
        assert re.match(r"[-+]?[\d.]", cell.text), (
            "the page sorts by the number that a cell begins with"
        )
    bootstrap = summarise_runs(runs, study.axes, study.metrics, "bootstrap")
    untested = contrasts_with_baseline(runs, study.axes, "recall@1", {})
    glance = comparison_tables(study, bootstrap, untested)[0]
    assert "(50.0 to 51.1)" in glance.rows[2][2].text


def test_a_script_in_any_text_stays_text() -> None:
    html = render_comparison_page(full(EVIL))
    assert EVIL not in html
    reader = Reader(html)
    assert (len(reader.all("script")), len(reader.all("style"))) == (1, 1)
    assert sum(text.count(EVIL) for text in reader.texts) > 25
    tags = Reader(render_comparison_page(full('" onerror="alert(1)'))).tags
    assert not [attributes for _, attributes in tags if "onerror" in attributes]


def test_nothing_is_loaded_from_outside_and_every_link_has_its_section() -> None:
    reader = Reader(render_comparison_page(full()))
    for _, attributes in reader.tags:
        for name in attributes.keys() & {"src", "href", "srcset", "action", "data", "poster"}:
            assert attributes[name].startswith(("data:", "#")), attributes
    (policy,) = [meta["content"] for meta in reader.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'; img-src data:;" in policy
    targets = {f"#{attributes['id']}" for _, attributes in reader.tags if "id" in attributes}
    assert {link["href"] for link in reader.all("a")} == targets
    assert len(reader.all("h2")) == len(targets) == 7
    empty = Reader(render_comparison_page(ComparisonPage("Nothing yet")))
    assert not [
        tag
        for tag, _ in empty.tags
        if tag in {"a", "h2", "h3", "table", "img", "figure", "ul", "dl"}
    ]


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    study = comparison(
        {"objective": ["softmax", "dcl"], "batch_size": [16, 32]}, metrics={"recall@1": "here/acc1"}
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made = shown(study, *frames(study))
        save_figures(made.figures, tmp_path / name)
        write_comparison_page(made, tmp_path / name / "compare.html")
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [file.name for file in one] == sorted(
        [*(f"{stem}.png" for stem in made.figures), "compare.html"]
    )
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_models_answer_the_same_queries_side_by_side(glyphs: Path, tmp_path: Path) -> None:
    test = (
        f"[{{name: unseen face, data: [{glyphs / 'test'}], classes: {glyphs / 'classnames.txt'}}}]"
    )
    for name, seed, size in (("one", 0, 32), ("two", 1, 16)):
        changes = {
            "evaluate.zero_shot": test,
            "seed": seed,
            "data.batch_size": size,
            "optim.pairs": 128,
        }
        assert train.main(config(glyphs, tmp_path / name, **changes)) == 0
    models = [(name, tmp_path / name) for name in ("one", "two", "gone")]
    one, two, gone = sample_models(models)
    assert (gone.error, gone.gallery) == (f"{tmp_path / 'gone'}: holds no checkpoints", [])
    assert [(q.image, q.text, q.direction) for q in one.gallery] == [
        (q.image, q.text, q.direction) for q in two.gallery
    ]
    assert [len(query.texts) for query in one.gallery] == [3, 3, 3, 0, 0, 0]
    assert [len(query.images) for query in one.gallery] == [0, 0, 0, 3, 3, 3]
    assert one.gallery[0].texts != two.gallery[0].texts
    assert one.labels == two.labels
    assert one.matrix.shape == (32, 32)
    assert not np.allclose(one.matrix, two.matrix)
    assert np.abs(one.matrix).max() <= one.scale * 1.0001
    rights = [
        one.labels[int(np.argmax(row))] == one.labels[at] for at, row in enumerate(one.matrix)
    ]
    assert one.found == sum(rights)
    html = render_comparison_page(ComparisonPage("Two models", samples=[one, two, gone]))
    assert len(Reader(html).all("article")) == 6
    assert f"{one.found} of 32 images" in html
    assert "holds no checkpoints" in html
    assert sample_models([]) == []
    model, loaded = load_model(str(tmp_path / "one"))
    encoder = Encoder(model, loaded.tokenize, torch.device("cpu"))
    catalog = open_catalog([str(glyphs / "test")])
    matrix, captions = logit_matrix(encoder, catalog, [7, 2, 5], torch.tensor(10.0))
    other, others = logit_matrix(encoder, catalog, [2, 5, 7], torch.tensor(10.0))
    assert captions == [others[2], others[0], others[1]]
    torch.testing.assert_close(matrix, other[[2, 0, 1]][:, [2, 0, 1]])
