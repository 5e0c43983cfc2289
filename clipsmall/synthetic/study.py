"""The study of Cho et al.: trains all selections from the same start, then makes table and plot."""

import argparse
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from clipsmall.mining.scored_pairs import Floats
from clipsmall.synthetic.free_embeddings import (
    SELECTIONS,
    FreeEmbeddings,
    known_optimum,
    train_free_embeddings,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colour-blind-safe palette.
COLOURS = dict(
    zip(SELECTIONS, ["#000000", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#009E73"], strict=True)
)


def run_study(options: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Floats]]:
    """All curves, and the final (N, N) cosines of each selection and seed.

    With the same seed, every selection starts from the same vectors. Each has its own generator for
    batches, so its result does not depend on which others run.

    Args:
        options: options of the command.
    """
    rows = list[dict[str, Any]]()
    cosines = dict[str, Floats]()
    runs = [(selection, seed) for selection in options.selections for seed in options.seeds]

    with tqdm(total=len(runs) * (options.steps + 1), unit="step", disable=None) as bar:
        for selection, seed in runs:
            free = _start(options, seed)
            generator = np.random.default_rng([seed, *selection.encode()])
            curve = train_free_embeddings(
                free, selection, options.batch_size, options.steps, generator
            )
            for row in curve:
                rows.append({"selection": selection, "seed": seed, **row})
                bar.update()

            cosines[f"{selection}_{seed}"] = free.cosines().detach().numpy()

    # a column of only None would have dtype object
    curves = pd.DataFrame(rows).astype({"row_distance": float, "distance": float})
    return curves, cosines


def _start(options: argparse.Namespace, seed: int) -> FreeEmbeddings:
    """Random start vectors for a seed."""
    generator = np.random.default_rng(seed)
    image, text = generator.standard_normal((2, options.pairs, options.width))
    return FreeEmbeddings(
        image,
        text,
        loss=options.loss,
        scale=options.scale,
        bias=options.bias,
        lr=options.lr,
    )


def summarise_study(options: argparse.Namespace, curves: pd.DataFrame) -> dict[str, Any]:
    """The options, the loss at the optimum, and mean and standard deviation over seeds at the end.

    Args:
        curves: of `run_study`.
    """
    optimum = known_optimum(options.pairs, options.width)
    loss_at_optimum = None
    if optimum is not None:
        points = optimum.numpy()
        there = FreeEmbeddings(points, points, options.loss, options.scale, options.bias)
        loss_at_optimum = there.full_loss()

    last = curves[curves.step == options.steps]
    columns = ["row_distance", "distance", "diagonal", "full_loss"]
    final = {}
    for name, rows in last.groupby("selection", sort=False):
        final[str(name)] = rows[columns].agg(["mean", "std"]).to_dict()

    # NaN (one seed, or no known optimum) becomes null
    without_nan = json.loads(pd.Series(final).to_json())
    return {
        "options": {**vars(options), "out": str(options.out)},
        "loss_at_target": loss_at_optimum,
        "final": without_nan,
    }


def study_table(options: argparse.Namespace, curves: pd.DataFrame) -> str:
    """Means over seeds, during training and at the end, as text.

    During training: the distance from the optimum, or the loss if no optimum is known.

    Args:
        curves: the curves of `run_study`.
    """
    optimum_is_unknown = curves.row_distance.isna().all()
    column = "full_loss" if optimum_is_unknown else "row_distance"

    # differences show early: after a tenth of the steps, two tenths, four tenths, and at the end
    steps = set[int]()
    for tenths in (1, 2, 4, 10):
        steps.add(max(options.steps * tenths // 10, 1))

    shown = curves[curves.step.isin(sorted(steps))]
    on_the_way = shown.pivot_table(column, "selection", "step", sort=False)
    on_the_way.columns = pd.Index([f"step {step}" for step in on_the_way])

    last = curves[curves.step == options.steps]
    columns = ["updates", "pairs", "full_loss", "diagonal"]
    end = last.groupby("selection", sort=False)[columns].mean()
    # the same for all seeds, so the means are integers
    end = end.astype({"updates": int, "pairs": int})

    table = on_the_way.join(end).rename_axis(None)
    seeds = " ".join(map(str, options.seeds))
    heading = f"{column.replace('_', ' ')}, mean over --seeds {seeds}, and the end"
    return f"{heading}\n{table.to_string(float_format='{:.4f}'.format)}"


def draw_study(
    options: argparse.Namespace,
    curves: pd.DataFrame,
    cosines: dict[str, Floats],
    loss_at_optimum: float | None,
) -> None:
    """Write curves.png: loss and distance over the steps, and the final cosines of the first seed.

    Args:
        curves, cosines: the results of `run_study`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.7, 1])[:, 0]
    _draw_curves(upper, options, curves, loss_at_optimum)
    _draw_cosines(lower, options, cosines)

    seeds = ", ".join(map(str, options.seeds))
    figure.suptitle(
        f"{options.pairs} pairs, width {options.width}, batches of {options.batch_size}, "
        f"lr {options.lr:g}; mean and range over seeds {seeds}, "
        f"cosines of seed {options.seeds[0]} at the end"
    )
    figure.savefig(options.out / "curves.png", dpi=110)


def _draw_curves(
    figure: "Figure | SubFigure",
    options: argparse.Namespace,
    curves: pd.DataFrame,
    loss_at_optimum: float | None,
) -> None:
    """The distance from the optimum, where it is known, and the loss."""
    # the loss is to the right of the distance, or the only panel
    columns = 1 if loss_at_optimum is None else 2
    panels = figure.subplots(1, columns, squeeze=False)[0]
    loss_panel = panels[-1]
    _draw_mean_and_range(loss_panel, curves, "full_loss", f"{options.loss} loss of the full batch")

    # the y range ignores the first steps, whose high loss would hide the differences
    settled = curves.full_loss[curves.step >= options.steps // 5].max()
    bottom, top = loss_panel.get_ylim()
    loss_panel.set_ylim(bottom, min(top, settled * 1.02))

    if loss_at_optimum is not None:
        shape = "simplex" if options.width >= options.pairs - 1 else "cross-polytope"
        name = f"distance to the {shape}, rows sorted"
        _draw_mean_and_range(panels[0], curves, "row_distance", name)
        panels[0].set_yscale("log")
        loss_panel.axhline(loss_at_optimum, color="0.4", linestyle="--", label=f"at the {shape}")

    # both panels have the same lines, but only the loss shows the optimum
    handles, names = loss_panel.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)


def _draw_cosines(
    figure: "Figure | SubFigure", options: argparse.Namespace, cosines: dict[str, Floats]
) -> None:
    """A heat map for each selection."""
    panels = figure.subplots(1, len(options.selections), squeeze=False)[0]
    first_seed = options.seeds[0]

    for axes, name in zip(panels, options.selections, strict=True):
        matrix = cosines[f"{name}_{first_seed}"]
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(name, color=COLOURS[name])
        axes.set(xticks=[], yticks=[])

    # all maps have the same range, so one colour bar suffices
    figure.colorbar(image, ax=panels, shrink=0.8, label="cosine, image i and text j")


def _draw_mean_and_range(axes: "Axes", curves: pd.DataFrame, column: str, name: str) -> None:
    """For each selection, a line (mean over seeds) and a band (minimum to maximum)."""
    for selection, rows in curves.groupby("selection", sort=False):
        over_seeds = rows.groupby("step")[column].agg(["mean", "min", "max"])
        steps = over_seeds.index
        colour = COLOURS[str(selection)]
        label = f"{selection}: {SELECTIONS[str(selection)]}"
        axes.plot(steps, over_seeds["mean"], color=colour, label=label)
        axes.fill_between(
            steps,
            over_seeds["min"],
            over_seeds["max"],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )

    axes.set(xlabel="step", ylabel=name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
