"""A run as one HTML page: curves, result tables beside chance, what the model retrieves, the logit
matrix.

    python -m clipsmall.report_page runs/demo [--open]

writes `report.html` into the run's folder. It works from disk, alone, without a network.
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
from clipsmall.config.reader import read_yaml, validated
from clipsmall.data import open_catalog
from clipsmall.evaluation import Encoder
from clipsmall.model.saved import load_model
from clipsmall.pages.html_page import Table
from clipsmall.report_page.gallery import batch_rows, gallery, logit_matrix, shown_sets
from clipsmall.report_page.run_report import RunReport, write_run_report
from clipsmall.storage.run_folder import RunFolder

TABLES: list[tuple[str, str, list[str], list[str], dict[str, str]]] = [
    (
        "Zero-shot classification",
        "zeroshot_classification",
        ["acc1", "acc5", "mean_per_class_recall"],
        ["images", "classes"],
        {"": ""},
    ),
    (
        "Retrieval",
        "zeroshot_retrieval",
        ["recall@1", "recall@5", "recall@10"],
        ["images", "captions"],
        {"image_retrieval_": "caption → image", "text_retrieval_": "image → caption"},
    ),
]


def metrics(folder: RunFolder) -> pd.DataFrame:
    """metrics.jsonl; raises ValueError when the run has not logged a step yet."""
    there = folder.metrics.exists() and folder.metrics.stat().st_size
    table = pd.read_json(folder.metrics, lines=True) if there else pd.DataFrame()
    if "loss" not in table:
        raise ValueError(
            f"{folder.path}: no metrics.jsonl with a step in it; is this the folder of a run?"
        )
    return table


def result_tables(folder: RunFolder, names: list[str]) -> list[Table]:
    """The JSON cells as a table a task, each metric beside its chance level, data sets in the order
    of `names`.
    """
    cells = [json.loads(path.read_text()) for path in folder.evaluations.glob("[!.]*.json")]
    cells.sort(
        key=lambda cell: names.index(cell["dataset"]) if cell["dataset"] in names else len(names)
    )
    note = "Shares of right answers, beside those of a guess."
    found = []
    for title, task, metrics, counts, prefixes in TABLES:
        columns = ["data", *(["query"] if len(prefixes) > 1 else []), *counts]
        for metric in metrics:
            columns += (
                [metric, f"chance of {metric}"] if metric != "mean_per_class_recall" else [metric]
            )
        rows = []
        for cell in cells:
            for prefix, query in prefixes.items() if cell["task"] == task else ():
                row: list[Any] = [cell["dataset"], *([query] if query else [])]
                row += [cell["counts"].get(name) for name in counts]
                for name in columns[len(row) :]:
                    source = cell["chance" if name.startswith("chance of ") else "metrics"]
                    row.append(source.get(prefix + name.removeprefix("chance of ")))
                rows.append(row)
        if rows:
            found.append(Table(title, note, columns, rows))
    return found


def report(folder: RunFolder) -> RunReport:
    """Everything the page shows. Raises ValueError for a folder that holds no run."""
    config = validated(read_yaml(str(folder.path / "run.yaml")))
    model, loaded = load_model(str(folder.path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder(model.to(device).eval(), loaded.tokenize, device, config.evaluate.batch_size)
    table = metrics(folder)
    sets = shown_sets(config)
    queries = [
        query
        for data, name, names in sets
        for query in gallery(encoder, open_catalog(data), name, names)
    ]
    matrix = None
    labels = list[str]()
    # of a stream nothing can be looked up
    if not config.data.streaming:
        catalog = open_catalog(config.data.train)
        made, labels = logit_matrix(
            encoder, catalog, batch_rows(config, catalog), model.logit_scale.exp()
        )
        matrix = made.numpy()
    trained = table.dropna(subset="loss")
    last = trained.iloc[-1]
    seconds = (trained["pairs"].diff().fillna(trained["pairs"]) / trained["pairs_per_second"]).sum()
    names = [z.name for z in config.evaluate.zero_shot] + [
        r.name for r in config.evaluate.retrieval
    ]
    return RunReport(
        title=f"{folder.path.name}: {config.objective.title} at batch {config.data.batch_size}",
        subtitle=f"{int(last['pairs']):,} pairs seen from {', '.join(config.data.train)}",
        facts=[
            ("objective", config.objective.title),
            ("batch size", f"{config.data.batch_size:,} pairs"),
            ("parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"),
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
    try:
        write_run_report(report(folder), path := folder.path / "report.html")
    except ValueError as error:
        refuse(error)
    print(f"report: {path.resolve()}")
    if options.open and (
        sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        webbrowser.open(path.resolve().as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
