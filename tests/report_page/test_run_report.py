"""The report page: safe with any caption, readable numbers, nothing outside the file, whole or not
written.
"""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

import clipsmall
from clipsmall.pages.html_page import Query, Table
from clipsmall.report_page.run_report import (
    RunReport,
    evaluation_plots,
    finite_series,
    render_run_report,
    training_plots,
    write_run_report,
)
from tests.html_for_tests import EVIL, Reader, decoded, png

ACC1 = "zero_shot/seen/acc1"
CHANCE = "zero_shot/seen/chance"


def frame() -> pd.DataFrame:
    steps = np.arange(1, 41)
    rows = pd.DataFrame(
        {"step": steps, "pairs": steps * 256, "loss": 5 / steps, "lr": 1e-3, "data_wait": 0.02}
    )
    rows["chance"] = math.log(256)
    return pd.concat(
        [rows, pd.DataFrame({"step": 40, "pairs": [5120, 10240], ACC1: [0.2, 0.593], CHANCE: 0.01})]
    )


def full(text: str = "a glyph") -> RunReport:
    """A report with every section, `text` in each place that holds text."""
    return RunReport(
        # title, subtitle, facts, metrics
        *(text, text, [(text, text)], frame()),
        tables=[
            Table(text, text, [text, "top-1"], [[text, 0.593]]),
            Table("no rows", "", [], []),
        ],
        gallery=[
            Query(
                png(), text, "image_to_text", text, texts=[(text, 0.9, True), (text, 0.1, False)]
            ),
            Query(png(), text, "text_to_image", text, images=[(png(), text, 0.9, False)]),
        ],
        matrix=np.eye(3),
        matrix_labels=[text] * 3,
        config=text,
        command=text,
    )


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(render_run_report(full()))


# titles, with a star where a line is dashed
def curves(rows: pd.DataFrame) -> list[str]:
    plots = [*training_plots(rows), *evaluation_plots(rows)]
    return [title + "*" * (b"stroke-dasharray" in decoded(source)) for title, _, source in plots]


def test_a_script_in_any_text_stays_text() -> None:
    html = render_run_report(full(EVIL))
    assert EVIL not in html
    assert (len(Reader(html).all("script")), Reader(html).texts.count(EVIL)) == (1, 16)


def test_a_quote_cannot_leave_its_attribute() -> None:
    tags = Reader(render_run_report(full('" onerror="alert(1)'))).tags
    assert not [attributes for _, attributes in tags if "onerror" in attributes]


def test_nothing_is_loaded_from_outside_the_file(reader: Reader) -> None:
    for _, attributes in reader.tags:
        for name in attributes.keys() & {"src", "href", "srcset", "action", "data", "poster"}:
            assert attributes[name].startswith(("data:", "#")), attributes
    (policy,) = [meta["content"] for meta in reader.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'; img-src data:;" in policy
    templates = list(Path(clipsmall.__file__).parent.rglob("*.jinja"))
    assert len(templates) > 3
    for template in templates:
        assert not re.search(r"https?://|url\(|@import", template.read_text(encoding="utf-8"))


def test_every_link_has_its_section_and_an_empty_report_has_none(reader: Reader) -> None:
    targets = {f"#{attributes['id']}" for _, attributes in reader.tags if "id" in attributes}
    assert {link["href"] for link in reader.all("a")} == targets
    assert len(reader.all("h2")) == len(targets) == 6
    empty = Reader(render_run_report(RunReport("Empty run", tables=[Table("t", "", ["set"], [])])))
    for tag in ("a", "h2", "h3", "table", "img", "figure", "details", "dl"):
        assert reader.all(tag), tag
        assert not empty.all(tag), tag
    assert "no rows" not in reader.texts
    assert not Reader(render_run_report(RunReport("run", command="train"))).all("details")


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("top-1", 0.593, "59.3 %"),
        ("zero_shot_acc", np.float32(1), "100.0 %"),
        ("chance", 0.00014, "0.014 %"),
        ("chance", math.log(256), "5.545"),
        ("images", 5512, "5,512"),
        ("gradient accumulation", 1, "1"),
        ("top-1", float("nan"), "\N{EN DASH}"),
        ("top-1", None, "\N{EN DASH}"),
        ("top-1", "59.3 %", "59.3 %"),
    ],
)
def test_numbers_read_well_and_stand_right(column: str, value: object, text: str) -> None:
    table = Table("t", "", ["set", column], [["seen", value]])
    html = render_run_report(RunReport("run", tables=[table]))
    assert f'<td>seen</td>\n<td class="number">{text}</td>' in html
    assert f'<th scope="col">set</th>\n<th scope="col" class="number">{column}</th>' in html


def test_any_column_may_be_missing_and_chance_is_dashed_where_known() -> None:
    drawn = ["Loss*", "Learning rate", "Fraction of time waiting for data", "zero shot · acc1*"]
    assert curves(frame()) == drawn
    for column, title in [
        ("lr", drawn[1]),
        ("data_wait", drawn[2]),
        ("loss", drawn[0]),
        (ACC1, drawn[3]),
    ]:
        assert curves(frame().drop(columns=column)) == [other for other in drawn if other != title]
    assert curves(frame()[["step", "pairs", "loss", ACC1]]) == ["Loss", "zero shot · acc1"]
    # one measurement is no curve
    assert curves(frame()[:-1]) == drawn[:-1]
    assert curves(frame()[["step", "pairs"]]) == curves(pd.DataFrame()) == []


def test_rows_without_numbers_leave_no_curve() -> None:
    rows = frame().assign(loss=math.nan, lr=None, grad_norm=math.inf, data_wait="text", skipped=0)
    assert curves(rows) == ["zero shot · acc1*"]
    assert finite_series(frame(), ACC1).to_dict() == {5120: 0.2, 10240: 0.593}


def test_a_repeated_stretch_counts_once_in_order() -> None:
    rows = pd.DataFrame({"pairs": [10, 20, 30, 20, 30], "loss": [5.0, 4.0, 9.0, 3.0, math.nan]})
    assert list(finite_series(rows, "loss").items()) == [(10, 5.0), (20, 3.0), (30, 9.0)]


def test_the_chance_of_a_first_guess_is_not_that_of_five() -> None:
    rows = frame()[["pairs", ACC1, CHANCE]].rename(columns={ACC1: "zero_shot/seen/acc5"})
    assert curves(rows) == ["zero shot · acc5"]
    assert curves(rows.assign(**{"zero_shot/seen/acc5/chance": 0.05})) == ["zero shot · acc5*"]
    assert (
        curves(frame().rename(columns={ACC1: "a set/acc1", CHANCE: "a set/acc1/chance"}))[-1]
        == "acc1*"
    )


@pytest.mark.parametrize("label", ["a\x00b", "$x_$ and $\\frac$", "-->", "漢字", "\ud800", EVIL])
def test_any_caption_can_label_the_matrix(label: str) -> None:
    report = RunReport("run", matrix=np.eye(2) - 0.5, matrix_labels=[label, "plain"])
    svg = decoded(Reader(render_run_report(report)).all("img")[0]["src"])
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert b"plain" in svg


def test_the_gallery_marks_right_and_wrong_in_words_and_by_group(reader: Reader) -> None:
    assert [reader.texts.count(mark) for mark in ("✓ correct", "✗ wrong")] == [1, 2]
    assert {"Image → text · a glyph", "Text → image · a glyph"} <= set(reader.texts)


def test_a_failed_page_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, data: bytes) -> None:
        path.open("wb").write(data[:99])
        raise OSError("disk full")

    write_run_report(RunReport("lone \ud800 surrogate"), path := tmp_path / "report.html")
    with pytest.raises(TypeError):
        write_run_report(RunReport("new", matrix=np.zeros((2, 2, 2, 2))), path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        write_run_report(RunReport("new"), path)
    assert "lone ? surrogate</h1>" in path.read_text(encoding="utf-8")
