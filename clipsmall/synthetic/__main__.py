"""Compare six ways to choose batches, on free vectors instead of a model: no data, no network.

    python -m clipsmall.synthetic --loss sigmoid --out runs/synthetic

This is the synthetic study of Cho et al. (2023, arXiv 2307.05906): N pairs of free vectors are
trained by plain SGD, and only the choice of batches differs. It prints a table and writes
curves.csv, curves.png, summary.json and heatmaps.safetensors (final cosines, one array per
selection and seed).
"""

import argparse
import json
import sys
from math import comb, isfinite
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from clipsmall.cli import refuse
from clipsmall.synthetic.free_embeddings import LOGITS, LOSSES, SELECTIONS
from clipsmall.synthetic.study import draw_study, run_study, study_table, summarise_study

# Most batches C(N, B): NcB and osgd_NcB compute all of them in every update.
MOST_BATCHES = 20_000


def main(words: list[str] | None = None) -> int:
    options = _options(words)
    try:
        _check_options(options)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        refuse(error)

    curves, cosines = run_study(options)
    summary = summarise_study(options, curves)

    curves.to_csv(options.out / "curves.csv", index=False, float_format="%.8g")
    # safetensors takes only contiguous arrays
    arrays = {name: np.ascontiguousarray(array) for name, array in cosines.items()}
    save_file(arrays, options.out / "heatmaps.safetensors")
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw_study(options, curves, cosines, summary["loss_at_target"])

    print(study_table(options, curves))
    # to stderr, as the table on stdout may be piped
    files = "curves.csv, heatmaps.safetensors, summary.json, curves.png"
    print(f"written to {options.out}: {files}", file=sys.stderr)
    return 0


def _options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m clipsmall.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="selections: " + "; ".join(f"{name} = {what}" for name, what in SELECTIONS.items()),
    )
    parser.add_argument("--pairs", type=int, default=8, help="N, the number of pairs [8]")
    parser.add_argument("--width", type=int, default=16, help="d, numbers per vector [16]")
    parser.add_argument("--batch_size", type=int, default=2, help="B, must divide N [2]")
    parser.add_argument(
        "--steps",
        type=int,
        default=500,
        help="steps of N / B updates each; one update for full and NcB [500]",
    )
    parser.add_argument("--lr", type=float, default=0.5, help="learning rate of SGD [0.5]")
    parser.add_argument(
        "--selections",
        nargs="+",
        choices=SELECTIONS,
        default=list(SELECTIONS),
        help="how batches are chosen, explained below [all]",
    )
    parser.add_argument("--loss", choices=LOSSES, default="softmax", help="[softmax]")
    parser.add_argument(
        "--scale", type=float, help="factor of the cosines [sigmoid 5, the others 1]"
    )
    parser.add_argument(
        "--bias",
        type=float,
        help="added to the scaled cosines; matters for sigmoid only [sigmoid -2, the others 0]",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="seeds of start vectors and batches [0 1 2]",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/synthetic"), help="folder [runs/synthetic]"
    )
    options = parser.parse_args(words)
    scale, bias = LOGITS[options.loss]

    if options.scale is None:
        options.scale = scale

    if options.bias is None:
        options.bias = bias

    return options


def _check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for the first invalid option."""
    _check_batches(options.pairs, options.batch_size, options.selections)
    for name in ("width", "steps", "lr", "scale"):
        value = getattr(options, name)
        if not (value > 0 and isfinite(value)):
            raise ValueError(f"--{name} {value}: must be more than 0")

    if not isfinite(options.bias):
        raise ValueError(f"--bias {options.bias}: must be finite")

    seeds = options.seeds
    some_twice = len(set(seeds)) < len(seeds)
    if min(seeds) < 0 or some_twice:
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: must be 0 or more, none twice")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out}: is a file; give a folder")


def _check_batches(pairs: int, size: int, selections: list[str]) -> None:
    """Raises ValueError for a batch size that does not fit, or too many batches."""
    if not 2 <= size <= pairs or pairs % size:
        raise ValueError(
            f"--batch_size {size}: must be 2 or more and divide the {pairs} of --pairs"
        )

    heavy = [name for name in selections if name in ("NcB", "osgd_NcB")]
    batches = comb(pairs, size)
    if heavy and batches > MOST_BATCHES:
        raise ValueError(
            f"--selections {' '.join(heavy)}: would look at C({pairs}, {size}) = {batches:,} "
            f"batches for every update, at most {MOST_BATCHES:,}: "
            "leave them out, or take fewer --pairs or another --batch_size"
        )


if __name__ == "__main__":
    sys.exit(main())
