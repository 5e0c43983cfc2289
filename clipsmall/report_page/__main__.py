"""Report a run as one HTML page: curves, results with chance levels, retrievals, logit matrix.

    python -m clipsmall.report_page runs/demo [--open]

Writes `report.html` to the run's folder. The page needs no network and no other files.
"""

import argparse
import json
import os
import sys
import webbrowser
from typing import Any

import pandas as pd
import torch

from clipsmall.cli import refuse
from clipsmall.config.reader import validated
from clipsmall.data import open_catalog
from clipsmall.evaluation.command import load_encoder
from clipsmall.evaluation.task import PageTable
from clipsmall.evaluation.tasks import TASKS
from clipsmall.pages.html_page import Table
from clipsmall.report_page.gallery import first_batch, gallery, gallery_sets, logit_matrix
from clipsmall.report_page.run_report import RunReport, write_run_report
from clipsmall.storage.run_folder import RunFolder
from clipsmall.storage.yaml_files import read_yaml


def metrics_table(folder: RunFolder) -> pd.DataFrame:
    """metrics.jsonl; raises ValueError when the run has not logged a step yet."""
    there = folder.metrics.exists() and folder.metrics.stat().st_size
    table = pd.read_json(folder.metrics, lines=True) if there else pd.DataFrame()
    if "loss" not in table:
        raise ValueError(
            f"{folder.path}: no metrics.jsonl with a step in it; is this the folder of a run?"
        )
    return table


def result_tables(folder: RunFolder, names: list[str]) -> list[Table]:
    """The results of a run as one table per task, data sets in the order of `names`."""
    results = []
    # skip partial files, which a killed process may leave behind
    for path in folder.evaluations.glob("[!.]*.json"):
        text = path.read_text()
        results.append(json.loads(text))

    def position(result: dict[str, Any]) -> int:
        dataset = result["dataset"]
        if dataset in names:
            return names.index(dataset)
        # data sets that the config does not name come last
        return len(names)

    results.sort(key=position)
    tables = []
    for task in TASKS.values():
        # one table for all data sets of a task
        own = [result for result in results if result["task"] == task.result_name]
        if own and task.page_table:
            tables.append(_wide_table(task.page_table, own))
        elif own:
            tables.append(_long_table(task.result_name, own))
    return tables


def _wide_table(layout: PageTable, results: list[dict[str, Any]]) -> Table:
    """One row per data set, each metric with its chance level."""
    several_rows = len(layout.rows) > 1
    columns = ["data"]
    if several_rows:
        columns.append("query")
    columns += layout.counts
    for metric in layout.metrics:
        columns.append(metric)
        if metric in layout.with_chance:
            columns.append(f"chance of {metric}")

    rows = []
    for result in results:
        for prefix, query in layout.rows.items():
            row: list[Any] = [result["dataset"]]
            if several_rows:
                row.append(query)
            row += [result["counts"].get(name) for name in layout.counts]

            for metric in layout.metrics:
                # the metric's name in the result
                full_name = prefix + metric
                row.append(result["metrics"].get(full_name))
                if metric in layout.with_chance:
                    row.append(result["chance"].get(full_name))
            rows.append(row)
    note = "Fractions of right answers, beside those of a guess."
    return Table(layout.title, note, columns, rows)


def _long_table(title: str, results: list[dict[str, Any]]) -> Table:
    """One row per data set and metric."""
    rows = []
    for result in results:
        for metric, value in result["metrics"].items():
            # not every metric has a chance level
            guess = result["chance"].get(metric)
            row = [result["dataset"], metric, value, guess]
            rows.append(row)

    note = "As python -m clipsmall.evaluate measures it."
    columns = ["data", "metric", "value", "of a guess"]
    return Table(title, note, columns, rows)


def run_report(folder: RunFolder) -> RunReport:
    """Everything the page shows. Raises ValueError for a folder that holds no run."""
    config = validated(read_yaml(str(folder.path / "run.yaml")))
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_type)
    encoder = load_encoder(str(folder.path), "", device, config.evaluate.batch_size)
    model = encoder.model
    table = metrics_table(folder)
    queries = []
    for data, name, classes in gallery_sets(config.evaluate):
        shown = open_catalog(data)
        queries += gallery(encoder, shown, name, classes)

    matrix = None
    labels = list[str]()
    # pairs of a stream cannot be read again
    if not config.data.streaming:
        catalog = open_catalog(config.data.train)
        window = config.data.shuffle_window
        rows = first_batch(catalog, config.seed, window, config.data.batch_size)
        scale = model.logit_scale.exp()
        made, labels = logit_matrix(encoder, catalog, rows, scale)
        matrix = made.numpy()

    # evaluation rows have no loss
    trained = table.dropna(subset="loss")
    last = trained.iloc[-1]
    # samples seen since the row before, or since the start
    pairs = trained["pairs"]
    pairs_of_row = pairs.diff().fillna(pairs)
    seconds_of_row = pairs_of_row / trained["pairs_per_second"]
    seconds = seconds_of_row.sum()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    names = [each.name for each in config.evaluate.all]

    return RunReport(
        title=f"{folder.path.name}: {config.objective.title} at batch {config.data.batch_size}",
        subtitle=f"{int(last['pairs']):,} pairs seen from {', '.join(config.data.train)}",
        facts=[
            ("objective", config.objective.title),
            ("batch size", f"{config.data.batch_size:,} pairs"),
            ("parameters", f"{parameters / 1e6:.2f} M"),
            ("pairs seen", f"{int(last['pairs']):,}"),
            ("training time", f"{seconds / 60:.1f} min"),
            ("speed", f"{trained['pairs_per_second'].median():,.0f} pairs/s"),
            ("final loss", f"{trained['loss'].tail(10).mean():.3f} (chance {last['chance']:.2f})"),
            ("logit scale", f"{last['logit_scale']:.1f}"),
        ],
        metrics=table,
        tables=result_tables(folder, names),
        gallery=queries,
        matrix=matrix,
        matrix_labels=labels,
        config=(folder.path / "run.yaml").read_text(encoding="utf-8"),
        command=(folder.path / "command.txt").read_text(encoding="utf-8"),
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.report_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument(
        "--open", action="store_true", help="show it in a browser, where there is a screen"
    )
    options = parser.parse_args(words)
    folder = RunFolder(options.run)
    path = folder.path / "report.html"
    try:
        write_run_report(run_report(folder), path)
    except ValueError as error:
        refuse(error)
    print(f"report: {path.resolve()}")
    screen = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    if options.open and screen:
        webbrowser.open(path.resolve().as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
