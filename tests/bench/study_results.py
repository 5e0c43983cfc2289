"""What the runs of a study came to: a table with mean and spread over seeds."""

import json
from pathlib import Path

import pandas

from tests.bench.studies import Study


def results(study: Study, out: Path) -> pandas.DataFrame:
    """One row a finished run: name, seed, the study's metrics in per cent, and seconds."""
    rows = []
    for name in study.runs:
        for seed in study.seeds:
            folder = out / f"{name}-{seed}"
            if (folder / "seconds").exists():
                lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
                found = [json.loads(line) for line in lines]
                last = next(row for row in reversed(found) if any(key in row for key in study.metrics.values()))
                measured = {column: 100 * last[key] for column, key in study.metrics.items()}
                rows.append(
                    {"run": name, "seed": seed, **measured, "seconds": json.loads((folder / "seconds").read_text())}
                )
    return pandas.DataFrame(rows)


def tell(study: Study, out: Path) -> None:
    found = results(study, out)
    if found.empty:
        print("no run has finished")
        return
    print(study.title)
    grouped = found.drop(columns="seed").groupby("run", sort=False)
    mean, spread, runs = grouped.mean(), grouped.std(), grouped.size()
    table = mean.map(lambda value: f"{value:.1f}") + spread.map(
        lambda value: f" ± {value:.1f}" if value == value else ""
    )
    table["seconds"] = mean["seconds"].map(lambda value: f"{value:.0f}")
    table["runs"] = runs
    print(table.to_string())
