"""A run as one HTML page: curves, result tables beside chance, what the model retrieves, the logit matrix.

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
from torch import Tensor

from clipsmall import page
from clipsmall.config import Config
from clipsmall.config_reader import read_yaml, refuse, validated
from clipsmall.evaluation import Encoder
from clipsmall.evaluation.features import read_texts
from clipsmall.evaluation.prompts import classes
from clipsmall.run_folder import RunFolder
from clipsmall.saved_model import load_model
from clipsmall.shards import Catalog, caption_hash, open_catalog
from clipsmall.shards.order import Order, permutation

QUERIES, ANSWERS, CANDIDATES, MATRIX = 8, 5, 10_000, 256
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
    if not folder.metrics.exists() or not folder.metrics.stat().st_size:
        raise ValueError(f"{folder.path}: no metrics.jsonl with a step in it; is this the folder of a run?")
    return pd.read_json(folder.metrics, lines=True)


def result_tables(folder: RunFolder, names: list[str]) -> list[page.Table]:
    """The JSON cells as a table a task, each metric beside its chance level, data sets in the order of `names`."""
    cells = [json.loads(path.read_text()) for path in folder.evaluations.glob("*.json")]
    cells.sort(key=lambda cell: names.index(cell["dataset"]) if cell["dataset"] in names else len(names))
    note = "Shares of right answers, beside those of a guess."
    found = []
    for title, task, metrics, counts, prefixes in TABLES:
        columns = ["data", *(["query"] if len(prefixes) > 1 else []), *counts]
        for metric in metrics:
            columns += [metric, f"chance of {metric}"] if metric != "mean_per_class_recall" else [metric]
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
            found.append(page.Table(title, note, columns, rows))
    return found


def gallery(encoder: Encoder, catalog: Catalog, name: str, class_file: str) -> list[page.Query]:
    """A few images with the names they find, and a few captions with the images they find.

    Searched are at most CANDIDATES pairs, evenly spread over the data set.
    """
    candidates = list(range(0, len(catalog), -(-len(catalog) // CANDIDATES)))
    captions = dict(zip(candidates, read_texts(catalog, rows=candidates).captions, strict=True))
    hashes = {row: {caption_hash(caption) for caption in of_one} for row, of_one in captions.items()}
    features, rows = encoder.images(catalog, candidates)
    names = classes(class_file, list(captions.values()), [])
    names_features = encoder.texts(names)
    shown = permutation(len(rows), 0)[:QUERIES].tolist()
    queries = []
    for place in shown:
        row = int(rows[place])
        own = catalog.read(row).image
        best, order = (features[place] @ names_features.T).topk(min(ANSWERS, len(names)))
        found = [
            (names[i], score, caption_hash(names[i]) in hashes[row])
            for score, i in zip(best.tolist(), order.tolist(), strict=True)
        ]
        queries.append(page.Query(own, captions[row][0], "image_to_text", name, texts=found))
    texts = encoder.texts([captions[int(rows[place])][0] for place in shown])
    for place, text in zip(shown, texts, strict=True):
        row = int(rows[place])
        wanted = caption_hash(captions[row][0])
        best, order = (text @ features.T).topk(min(ANSWERS, len(features)))
        images = []
        for score, i in zip(best.tolist(), rows[order].tolist(), strict=True):
            images.append((catalog.read(i).image, captions[i][0], score, wanted in hashes[i]))
        queries.append(page.Query(catalog.read(row).image, captions[row][0], "text_to_image", name, images=images))
    return queries


@torch.no_grad()
def logit_matrix(config: Config, encoder: Encoder, catalog: Catalog, scale: Tensor) -> tuple[Tensor, list[str]]:
    """The first MATRIX pairs of the first global batch: scaled cosines, images down and texts across; captions."""
    shuffled = Order(catalog.sizes, config.seed, config.data.shuffle_window)
    rows = shuffled.rows(0, torch.arange(min(MATRIX, config.data.batch_size)).numpy()).tolist()
    captions = [of_one[0] for of_one in read_texts(catalog, rows=rows).captions]
    images, found = encoder.images(catalog, sorted(rows))
    images = images[[found.tolist().index(row) for row in rows]]
    return scale.cpu() * images @ encoder.texts(captions).T, captions


def report(folder: RunFolder) -> page.Report:
    """Everything the page shows. Raises ValueError for a folder that holds no run."""
    config = validated(read_yaml(str(folder.path / "run.yaml")))
    model, loaded = load_model(str(folder.path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder(model.to(device).eval(), loaded.tokenize, device, config.evaluate.batch_size)
    table = metrics(folder)
    queries = [
        query
        for z in config.evaluate.zero_shot
        if not z.label
        for query in gallery(encoder, open_catalog(z.data), z.name, z.classes)
    ]
    for r in [] if queries else config.evaluate.retrieval:
        queries += gallery(encoder, open_catalog(r.data), r.name, "captions")
    matrix, labels = logit_matrix(config, encoder, open_catalog(config.data.train), model.logit_scale.exp())
    trained = table.dropna(subset="loss") if "loss" in table else table
    last = trained.iloc[-1]
    seconds = (trained["pairs"].diff() / trained["pairs_per_second"]).sum()
    names = [z.name for z in config.evaluate.zero_shot] + [r.name for r in config.evaluate.retrieval]
    return page.Report(
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
        matrix=matrix.numpy(),
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
    parser.add_argument("--open", action="store_true", help="show it in a browser, where there is a screen")
    options = parser.parse_args(words)
    folder = RunFolder(options.run)
    try:
        page.write(report(folder), path := folder.path / "report.html")
    except ValueError as error:
        refuse(error)
    print(f"report: {path.resolve()}")
    if options.open and (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(path.resolve().as_uri())
    return 0


if __name__ == "__main__":
    sys.exit(main())
