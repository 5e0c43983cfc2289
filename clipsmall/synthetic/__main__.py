"""Free embeddings under six ways of choosing batches: the synthetic study of Cho et al. (2023,
arXiv 2307.05906).

    python -m clipsmall.synthetic [--pairs 8] [--width 16] [--batch_size 2] [--loss sigmoid] [--out runs/synthetic]

N pairs of free vectors, plain SGD, no data and no network: nothing but the choice of batches
differs. Writes curves.csv, heatmaps.safetensors (final cosines, one array for each selection and
seed), summary.json and curves.png.
"""

import argparse
import json
import sys
from math import comb, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from tqdm import tqdm

from clipsmall.cli import refuse
from clipsmall.mining.scored_pairs import Floats
from clipsmall.synthetic.free_embeddings import (
    LOGITS,
    LOSSES,
    SELECTIONS,
    FreeEmbeddings,
    target,
    train,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of all C(N, B): NcB and osgd_NcB look at each for every update
MOST_BATCHES = 20_000
# Okabe and Ito's, told apart by the colour-blind
COLOURS = dict(
    zip(SELECTIONS, ["#000000", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#009E73"], strict=True)
)


def options(words: list[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="selections: " + "; ".join(f"{name} = {what}" for name, what in SELECTIONS.items()),
    )
    parser.add_argument("--pairs", type=int, default=8, help="N [8]")
    parser.add_argument("--width", type=int, default=16, help="d, numbers of an embedding [16]")
    parser.add_argument("--batch_size", type=int, default=2, help="B, divides N [2]")
    parser.add_argument(
        "--steps", type=int, default=500, help="of N / B updates; full and NcB make one [500]"
    )
    parser.add_argument("--lr", type=float, default=0.5, help="of SGD [0.5]")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--loss", choices=LOSSES, default="softmax")
    parser.add_argument(
        "--scale", type=float, help="of the cosines [softmax and sinkhorn 1, sigmoid 5]"
    )
    parser.add_argument(
        "--bias", type=float, help="added to the scaled cosines; only sigmoid feels it [-2]"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic"))
    asked = parser.parse_args(words)
    scale, bias = LOGITS[asked.loss]
    asked.scale = scale if asked.scale is None else asked.scale
    asked.bias = bias if asked.bias is None else asked.bias
    return asked


def check(asked: argparse.Namespace) -> None:
    """Raises ValueError at the first thing that makes no study."""
    pairs = asked.pairs
    size = asked.batch_size
    if not 2 <= size <= pairs or pairs % size:
        raise ValueError(
            f"--batch_size {size}: must be 2 or more and divide the {pairs} of --pairs"
        )
    heavy = [name for name in asked.selections if name in ("NcB", "osgd_NcB")]
    if heavy and comb(pairs, size) > MOST_BATCHES:
        raise ValueError(
            f"--selections {' '.join(heavy)}: would look at C({pairs}, {size}) = {comb(pairs, size):,} batches for "
            f"every update, at most {MOST_BATCHES:,}: leave them out, or take fewer --pairs or another --batch_size"
        )
    for name in ("width", "steps", "lr", "scale"):
        value = getattr(asked, name)
        if not (value > 0 and isfinite(value)):
            raise ValueError(f"--{name} {value}: must be more than 0")
    if not isfinite(asked.bias):
        raise ValueError(f"--bias {asked.bias}: must be finite")
    if min(asked.seeds) < 0 or len(set(asked.seeds)) < len(asked.seeds):
        raise ValueError(
            f"--seeds {' '.join(map(str, asked.seeds))}: must be 0 or more, none twice"
        )
    if asked.out.exists() and not asked.out.is_dir():
        raise ValueError(f"--out {asked.out}: is a file; give a folder")


def study(asked: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Floats]]:
    """All curves, and the final cosines of each selection and seed. Every selection starts from the
    seed's numbers and draws its batches from a generator of its own, whichever others run."""
    rows = list[dict[str, Any]]()
    cosines = dict[str, Floats]()
    with tqdm(
        total=len(asked.selections) * len(asked.seeds) * (asked.steps + 1),
        unit="step",
        disable=None,
    ) as bar:
        for selection in asked.selections:
            for seed in asked.seeds:
                image, text = np.random.default_rng(seed).standard_normal(
                    (2, asked.pairs, asked.width)
                )
                free = FreeEmbeddings(image, text, asked.loss, asked.scale, asked.bias, asked.lr)
                own = np.random.default_rng([seed, *selection.encode()])
                for row in train(free, selection, asked.batch_size, asked.steps, own):
                    rows.append({"selection": selection, "seed": seed, **row})
                    bar.update()
                cosines[f"{selection}_{seed}"] = free.cosines().detach().numpy()
    return pd.DataFrame(rows).astype({"row_distance": float, "distance": float}), cosines


def summary(asked: argparse.Namespace, curves: pd.DataFrame) -> dict[str, Any]:
    """The options, the loss at the target, and mean and standard deviation over seeds at the
    end.
    """
    wanted = target(asked.pairs, asked.width)
    at_target = None
    if wanted is not None:
        points = wanted.numpy()
        at_target = FreeEmbeddings(points, points, asked.loss, asked.scale, asked.bias).full_loss()
    last = curves[curves.step == asked.steps].groupby("selection", sort=False)
    final = {
        str(name): mine[["row_distance", "distance", "diagonal", "full_loss"]]
        .agg(["mean", "std"])
        .to_dict()
        for name, mine in last
    }
    # NaN, of one seed or no target, as null
    plain = json.loads(pd.Series(final).to_json())
    return {
        "options": {**vars(asked), "out": str(asked.out)},
        "loss_at_target": at_target,
        "final": plain,
    }


def table(asked: argparse.Namespace, curves: pd.DataFrame) -> str:
    """Means over seeds: the distance (the loss, where there is none) on the way, and the end."""
    what = "full_loss" if curves.row_distance.isna().all() else "row_distance"
    steps = sorted({max(asked.steps * tenths // 10, 1) for tenths in (1, 2, 4, 10)})
    on_the_way = curves[curves.step.isin(steps)].pivot_table(what, "selection", "step", sort=False)
    on_the_way.columns = pd.Index([f"step {step}" for step in on_the_way])
    last = curves[curves.step == asked.steps].groupby("selection", sort=False)
    end = (
        last[["updates", "pairs", "full_loss", "diagonal"]]
        .mean()
        .astype({"updates": int, "pairs": int})
    )
    shown = f"{what.replace('_', ' ')}, mean over --seeds {' '.join(map(str, asked.seeds))}, and the end"
    return (
        f"{shown}\n{on_the_way.join(end).rename_axis(None).to_string(float_format='{:.4f}'.format)}"
    )


def draw(
    asked: argparse.Namespace,
    curves: pd.DataFrame,
    cosines: dict[str, Floats],
    at_target: float | None,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.7, 1])[:, 0]
    panels = upper.subplots(1, 1 if at_target is None else 2, squeeze=False)[0]
    lines(panels[-1], curves, "full_loss", f"{asked.loss} loss of the full batch")
    bottom, top = panels[-1].get_ylim()
    panels[-1].set_ylim(
        bottom, min(top, curves.full_loss[curves.step >= asked.steps // 5].max() * 1.02)
    )
    if at_target is not None:
        shape = "simplex" if asked.width >= asked.pairs - 1 else "cross-polytope"
        lines(panels[0], curves, "row_distance", f"distance to the {shape}, rows sorted")
        panels[0].set_yscale("log")
        panels[-1].axhline(at_target, color="0.4", linestyle="--", label=f"at the {shape}")
    upper.legend(
        *panels[-1].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    maps = lower.subplots(1, len(asked.selections), squeeze=False)[0]
    for axes, name in zip(maps, asked.selections, strict=True):
        image = axes.imshow(cosines[f"{name}_{asked.seeds[0]}"], cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(name, color=COLOURS[name])
        axes.set(xticks=[], yticks=[])
    lower.colorbar(image, ax=maps, shrink=0.8, label="cosine, image i and text j")
    figure.suptitle(
        f"{asked.pairs} pairs, width {asked.width}, batches of {asked.batch_size}, "
        f"lr {asked.lr:g}; mean and range over seeds {', '.join(map(str, asked.seeds))}, "
        f"cosines of seed {asked.seeds[0]} at the end"
    )
    figure.savefig(asked.out / "curves.png", dpi=110)


def lines(axes: "Axes", curves: pd.DataFrame, column: str, name: str) -> None:
    for selection, mine in curves.groupby("selection", sort=False):
        spread = mine.groupby("step")[column].agg(["mean", "min", "max"])
        colour = COLOURS[str(selection)]
        axes.plot(
            spread.index,
            spread["mean"],
            color=colour,
            label=f"{selection}: {SELECTIONS[str(selection)]}",
        )
        axes.fill_between(
            spread.index, spread["min"], spread["max"], color=colour, alpha=0.15, linewidth=0
        )
    axes.set(xlabel="step", ylabel=name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def main(words: list[str] | None = None) -> int:
    asked = options(words)
    try:
        check(asked)
        asked.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        refuse(error)
    curves, cosines = study(asked)
    found = summary(asked, curves)
    curves.to_csv(asked.out / "curves.csv", index=False, float_format="%.8g")
    save_file(
        {name: np.ascontiguousarray(each) for name, each in cosines.items()},
        asked.out / "heatmaps.safetensors",
    )
    (asked.out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(asked, curves, cosines, found["loss_at_target"])
    print(table(asked, curves))
    print(
        f"written to {asked.out}: curves.csv, heatmaps.safetensors, summary.json, curves.png",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
