"""What the runs of a study came to: a table with mean and spread over seeds, and a plot."""

import json
import math
from pathlib import Path
from typing import Any

import pandas

from tests.bench.studies import Study


def results(study: Study, out: Path) -> pandas.DataFrame:
    """One row a finished run: name, seed, the study's metrics in per cent, final scale, and seconds."""
    rows = []
    for name in study.runs:
        for seed in study.seeds:
            folder = out / f"{name}-{seed}"
            if (folder / "seconds").exists():
                lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
                found = [json.loads(line) for line in lines]
                last = next(row for row in reversed(found) if any(key in row for key in study.metrics.values()))
                scale = next((row["logit_scale"] for row in reversed(found) if "loss" in row), math.nan)
                measured = {column: 100 * last[key] for column, key in study.metrics.items()}
                took = json.loads((folder / "seconds").read_text())
                rows.append({"run": name, "seed": seed, **measured, "scale": scale, "seconds": took})
    return pandas.DataFrame(rows)


def tell(study: Study, out: Path) -> None:
    """Prints the table, and puts it beside the runs as CSV and PNG."""
    found = results(study, out)
    if found.empty:
        print("no run has finished")
        return
    print(study.title)
    grouped = found.drop(columns="seed").groupby("run", sort=False)
    mean, spread = grouped.mean(), grouped.std()
    table = mean.map("{:.1f}".format) + spread.map(lambda value: f" ± {value:.1f}" if value == value else "")
    table["seconds"] = mean["seconds"].map("{:.0f}".format)
    table["runs"] = grouped.size()
    print(table.to_string())
    found.to_csv(out / "results.csv", index=False)
    curves = all(" at " in name for name in study.runs)
    (draw_curves if curves else draw_runs)(study, found, out / "results.png")
    print(out / "results.png")


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw_runs(study: Study, found: pandas.DataFrame, path: Path) -> None:
    """A line a run, a panel a metric: each seed a dot, their mean a bar."""
    names = list(dict.fromkeys(found["run"]))
    figure, axes = pyplot().subplots(
        1, len(study.metrics), figsize=(4.2 * len(study.metrics) + 1, 0.35 * len(names) + 1.2), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axis, metric in zip(axes[0], study.metrics, strict=True):
        for place, name in enumerate(names):
            values = found.loc[found["run"] == name, metric]
            axis.barh(place, values.mean(), color="tab:blue", alpha=0.35)
            axis.plot(values, [place] * len(values), "o", color="tab:blue", markersize=4)
        axis.axvline(found.loc[found["run"] == names[0], metric].mean(), color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(f"{metric}, %")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.suptitle(study.title, fontsize="medium")
    figure.savefig(path, dpi=120)


def draw_curves(study: Study, found: pandas.DataFrame, path: Path) -> None:
    """Runs named `batch at pairs`: a curve a batch size over the pairs seen."""
    split = found["run"].str.split(" at ", expand=True).astype(int)
    figure, axes = pyplot().subplots(
        1, len(study.metrics), figsize=(4.2 * len(study.metrics), 3.6), layout="constrained"
    )
    for axis, metric in zip(axes, study.metrics, strict=True):
        for size in sorted(set(split[0])):
            mine = found[split[0] == size]
            axis.plot(split[1][mine.index], mine[metric], "o-", label=f"batch {size:,}")
        axis.set_xscale("log")
        seen = sorted(set(split[1]))
        axis.set_xticks(seen, [f"{pairs // 1000}k" for pairs in seen])
        axis.minorticks_off()
        axis.set_xlabel("pairs seen")
        axis.set_ylabel(f"{metric}, %")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(study.title, fontsize="medium")
    figure.savefig(path, dpi=120)
