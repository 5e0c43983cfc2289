"""Mine batches before training: score all pairs, plan hard batches, perhaps repack the shards.

    python -m data_tools.mine_shards score runs/demo --data data/train
    python -m data_tools.mine_shards plan --data data/train --out plan.parquet --batch_size 256
    python -m data_tools.mine_shards repack --data data/train --plan plan.parquet --out data/mined

Several GPUs score together: torchrun --nproc_per_node 8 -m data_tools.mine_shards score ...
`python -m clipsmall.train --data.plan=plan.parquet` trains on a plan. Interrupt `score` and
`repack` at will: the same command goes on where it stopped.
"""

import argparse
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from clipsmall.cli import refuse
from clipsmall.data import open_catalog
from clipsmall.data.batch_plan import read_plan, write_plan
from clipsmall.data.making.repack import repack_shards
from clipsmall.data.making.shard_writer import PAIRS_PER_SHARD
from clipsmall.data.scores import all_scores, write_scores
from clipsmall.distributed import world
from clipsmall.evaluation.command import encoder_of, join_ranks
from clipsmall.evaluation.shard_scores import needs_scores, score_shard, scorer_of
from clipsmall.mining import MiningRecipe
from clipsmall.mining.hard_pairs import draw_hardest
from clipsmall.mining.plans import plan_batches
from clipsmall.mining.weights import WEIGHTS
from clipsmall.model.saved import load_model

# the methods of clipsmall.mining that use every pair
METHODS = (
    "groups",
    "chain",
    "kmeans",
    "spectral",
    "shuffled",
)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 130 interrupted; ends with 2 on wrong use."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "mine_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(required=True, metavar="score | plan | repack")
    with_defaults = argparse.ArgumentDefaultsHelpFormatter
    score_ = commands.add_parser(
        "score", help="a sidecar of scores for each shard", formatter_class=with_defaults
    )
    score_.set_defaults(run=score)
    score_.add_argument(
        "model", help="a run folder or checkpoint of ours, a HF folder or hub id, an open_clip name"
    )
    score_.add_argument("--pretrained", default="", help="weight tag of an open_clip model")
    score_.add_argument("--batch_size", type=int, default=256)
    score_.add_argument(
        "--workers", type=int, default=0, help="processes per rank that decode images"
    )
    score_.add_argument(
        "--rescore", action="store_true", help="replace the scores of another model"
    )
    plan_ = commands.add_parser(
        "plan", help="batches from the scores", formatter_class=with_defaults
    )
    plan_.set_defaults(run=plan)
    plan_.add_argument("--out", type=Path, required=True, help="plan.parquet")
    plan_.add_argument(
        "--batch_size", type=int, default=256, help="data.batch_size of the training"
    )
    plan_.add_argument("--method", choices=METHODS, default="groups")
    plan_.add_argument(
        "--group",
        type=int,
        help="pairs made hard for one another; 0 = a whole batch (groups: 4, else 0)",
    )
    plan_.add_argument(
        "--weights",
        choices=list(WEIGHTS),
        default="softmax",
        help="the loss for which batches are to be hard",
    )
    plan_.add_argument(
        "--swaps", type=int, default=MiningRecipe.swaps, help="rounds of exchanges that follow"
    )
    plan_.add_argument(
        "--near",
        type=float,
        default=MiningRecipe.near,
        help="pairs this similar (cosine) are duplicates; 1 = none are",
    )
    plan_.add_argument(
        "--guard",
        type=float,
        default=MiningRecipe.guard,
        help="fraction of sample pairs treated as likely false negatives and never put in one "
        "batch; 0 = none",
    )
    plan_.add_argument(
        "--fraction",
        type=float,
        default=0.5,
        help="fraction of mined batches; the others are random",
    )
    plan_.add_argument(
        "--window",
        type=int,
        default=8192,
        help="pairs mined together; memory grows with its square",
    )
    plan_.add_argument("--seed", type=int, default=0)
    repack_ = commands.add_parser(
        "repack", help="new shards in a plan's order", formatter_class=with_defaults
    )
    repack_.set_defaults(run=repack)
    repack_.add_argument("--plan", type=Path, required=True)
    repack_.add_argument("--out", type=Path, required=True, help="folder of the new shards")
    repack_.add_argument(
        "--pairs_per_shard", type=int, default=PAIRS_PER_SHARD, help="rounded to whole batches"
    )
    for command in (score_, plan_, repack_):
        command.add_argument(
            "--data",
            nargs="+",
            required=True,
            help="folders, globs or brace lists of indexed shards",
        )
    for command in (score_, plan_):
        command.add_argument(
            "--scores", type=Path, help="folder of the scores, if not beside the shards"
        )
    return made


def score(args: argparse.Namespace) -> None:
    """Score the shards that have no scores yet, each on one rank."""
    state = join_ranks()
    catalog = open_catalog(args.data)
    if args.scores:
        _refuse_equal_names(catalog.shards, args.scores)
    model, loaded = load_model(args.model, args.pretrained)
    scorer = scorer_of(model, args.model, args.pretrained)
    main_rank = world.rank() == 0
    sizes = catalog.sizes
    encoder = encoder_of(
        model, loaded, state.device, args.batch_size, args.workers, progress=main_rank
    )
    # numbers of shards; one without a good pair has nothing to score
    filled = [number for number, size in enumerate(sizes) if size]
    missing = []
    for number in filled:
        if needs_scores(catalog.shards[number], args.scores, scorer, args.rescore):
            missing.append(number)
    # every rank lists the missing files before any rank writes, so all lists are the same
    world.barrier()
    start = time.time()
    broken = 0
    mine = missing[world.rank() :: world.size()]
    total = sum(sizes[number] for number in mine)
    with tqdm(total=total, unit="pair", desc="score", disable=not main_rank) as bar:
        for number in mine:
            shard = catalog.shards[number]
            table, unreadable = score_shard(encoder, catalog, number)
            write_scores(shard, args.scores, table, scorer)
            if unreadable:
                note = f"{shard}: {unreadable} images cannot be read, they get no scores"
                tqdm.write(note, file=sys.stderr)
            broken += unreadable
            bar.update(sizes[number])
    broken = int(world.sum_over_ranks(torch.tensor([broken], device=state.device)).item())
    if main_rank:
        pairs = sum(sizes[number] for number in missing) - broken
        seconds = time.time() - start
        print(
            f"scored {pairs:,} pairs of {len(missing)} shards in {seconds:.0f} s, "
            f"{pairs / seconds:,.0f} pairs/s on {world.size()} ranks; "
            f"{len(filled) - len(missing)} shards had their scores, "
            f"{broken} images cannot be read"
        )
    world.leave()


def _refuse_equal_names(shards: list[Path], folder: Path) -> None:
    """Refuse two shards with the same name: in one folder their scores would be one file."""
    counts = Counter(shard.name for shard in shards)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"--scores={folder}: two shards are named {name}; leave the scores beside the shards"
        )


def plan(args: argparse.Namespace) -> None:
    """Make a plan from the scores of all shards."""
    if args.group is None:
        args.group = MiningRecipe.group if args.method == "groups" else 0
    names = ("method", "batch_size", "group", "weights", "swaps", "near", "guard")
    recipe = MiningRecipe(**{name: getattr(args, name) for name in names})
    catalog = open_catalog(args.data)
    table = all_scores(catalog, args.scores)
    pairs, numbers = plan_batches(catalog, table, recipe, args.fraction, args.window, args.seed)
    about = {
        "scorer": table.scorer._asdict(),
        "recipe": asdict(recipe),
        "fraction": args.fraction,
        "window": args.window,
        "seed": args.seed,
        "numbers": numbers,
    }
    write_plan(args.out, pairs, catalog.fingerprint, about)
    sheet = args.out.with_suffix(".png")
    title = f"the hardest groups of {recipe.size} in {args.out.name}, to {table.scorer.model}"
    draw_hardest(sheet, catalog, table, pairs, recipe.size, title)
    # pairs that are in no batch
    unscored = len(catalog) - len(table.row)
    over = len(table.row) - pairs.size
    left_out = f"{over} pairs fill none"
    if unscored:
        left_out += f", {unscored} have no scores"
    print(
        f"batches       {len(pairs):,} of {args.batch_size}: {numbers['mined_batches']:,} mined, "
        f"the others random; {left_out}\n"
        f"mean loss     {numbers['mined_loss']:.4f} mined, {numbers['random_loss']:.4f} random "
        f"({recipe.weights})\n"
        f"kept apart    {numbers['blocked']:.2%} of sample pairs, as likely false negatives or "
        f"copies; {numbers['unseparated']:.0f} could not be\n"
        f"look at       {sheet}: are these really negatives?\n"
        f"plan          {args.out}; train on it with --data.plan={args.out} "
        f"--data.batch_size={args.batch_size}"
    )


def repack(args: argparse.Namespace) -> None:
    """Write new shards in the order of a plan."""
    catalog = open_catalog(args.data)
    planned = read_plan(args.plan, catalog)
    rows = planned.rows
    shards = repack_shards(catalog, planned, args.out, args.pairs_per_shard)
    print(
        f"{rows.size:,} pairs in {shards} shards in {args.out}; {len(catalog) - rows.size} pairs "
        f"are in no batch; train on them with --data.train={args.out} "
        f"--data.batch_size={rows.shape[1]} --data.shuffle_window=0"
    )


if __name__ == "__main__":
    sys.exit(main())
