"""The grids of runs that `study` knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Study:
    """Runs by name; each is the words that a command line of clipsmall.train has beside the common ones."""

    title: str
    words: tuple[str, ...]
    runs: dict[str, tuple[str, ...]]
    metrics: dict[str, str]  # column of the table -> key in metrics.jsonl
    seeds: tuple[int, ...] = (0, 1, 2)


GLYPHS = {
    "seen names, top-1": "held-out face - seen names/acc1",
    "never-seen names, top-1": "held-out face - never-seen names/acc1",
    "never-seen, recall@10": "retrieval - never-seen names/image_retrieval_recall@10",
}
HARD = {
    **{name: GLYPHS[name] for name in ("seen names, top-1", "never-seen names, top-1")},
    "never-seen, recall@1": "retrieval - never-seen names/image_retrieval_recall@1",
    "never-seen, recall@10": GLYPHS["never-seen, recall@10"],
}
ICONS = {
    "recall@1": "icons of new sets/image_retrieval_recall@1",
    "recall@10": "icons of new sets/image_retrieval_recall@10",
}


def words(config: str, pairs: int) -> tuple[str, ...]:
    """One thread, sqrt-scaled learning rate, 5 % of the pairs warm up, no checkpoints on the way."""
    return (
        f"--config={config}", f"--optim.pairs={pairs}", f"--optim.warmup_pairs={pairs // 20}",
        "--optim.lr_scaling=sqrt", "--data.workers=0", "--run.log_every=100", "--run.checkpoint_every=1000000",
    )  # fmt: skip


ON_ICONS = (*words("configs/icons.yaml", 60_000), "--model.name=configs/towers/glyph.json")


def batch(size: int, *more: str) -> tuple[str, ...]:
    return (f"--data.batch_size={size}", *more)


TRICKS = {
    "softmax": batch(32),
    "accumulate 8": batch(256, "--optim.accumulate=8"),
    "chunked 256": batch(256, "--model.chunk_size=32"),
    "moco": batch(32, "--objective.queue=moco"),
    "xbm": batch(32, "--objective.queue=xbm"),
    "mined": batch(32, "--mining.method=groups"),
    "gcl": batch(32, "--objective=gcl"),
    "dcl": batch(32, "--objective=dcl"),
    "sigmoid": batch(32, "--objective=sigmoid"),
    "sinkhorn": batch(32, "--objective=sinkhorn"),
}

# the paper's: the whole run, whole batches, nothing kept apart but copies; pools of 40 batches
PAPER = ("--mining.fraction=1", "--mining.start=0", "--mining.end=1", "--mining.guard=0", "--mining.near=1",
         "--mining.pool=1280")  # fmt: skip
SELECTIONS = {
    "shuffle": (),
    # a forward pass is a third of a step, and 0.85 of the steps are mined; osgd, which scores ten batches for one that
    # it trains on, costs four times as much as shuffled ones
    "shuffle of equal FLOPs": ("--optim.pairs=77000", "--optim.warmup_pairs=3850"),
    "groups": ("--mining.method=groups",),
    "chain": ("--mining.method=chain",),
    "spectral": ("--mining.method=spectral", *PAPER),
    "osgd": ("--mining.method=osgd", *PAPER),
}
MINING = {
    f"{objective}, {selection}": batch(32, f"--objective={objective}", *more)
    for objective in ("softmax", "sigmoid", "sinkhorn")
    for selection, more in SELECTIONS.items()
}

BUDGETS = (25_000, 50_000, 100_000, 300_000)

STUDIES = {
    "batch32-glyphs": Study("glyphs, 100,000 pairs", words("configs/demo.yaml", 100_000), TRICKS, GLYPHS),
    "batch32-icons": Study(
        "icons, 60,000 pairs",
        ON_ICONS,
        TRICKS,
        ICONS,
    ),
    "mining-glyphs": Study("glyphs, 60,000 pairs", words("configs/demo.yaml", 60_000), MINING, HARD),
    "mining-icons": Study(
        "icons, 60,000 pairs",
        ON_ICONS,
        MINING,
        ICONS,
    ),
    # a batch of 32 that learns like 1,024: where 1,024 wins, with the learning rate tuned for both
    "trophy": Study(
        "glyphs, 300,000 pairs",
        words("configs/demo.yaml", 300_000),
        {
            "softmax 1,024, lr 3e-3": batch(1024, "--optim.lr=1.5e-3"),
            "softmax 1,024, lr 6e-3": batch(1024),
            "softmax 1,024, lr 12e-3": batch(1024, "--optim.lr=6e-3"),
            "softmax 32, lr 1e-3": batch(32),
            "softmax 32, lr 2e-3": batch(32, "--optim.lr=6e-3"),
            "moco 32, lr 1e-3": batch(32, "--objective.queue=moco"),
            "moco 32, m .99, lr 2e-3": batch(
                32, "--objective.queue=moco", "--objective.moco.momentum=0.99", "--optim.lr=6e-3"
            ),
            "dcl 32, lr 2e-3": batch(32, "--objective=dcl", "--optim.lr=6e-3"),
            "dcl + xbm 32, lr 2e-3": batch(32, "--objective=dcl", "--objective.queue=xbm", "--optim.lr=6e-3"),
            "dcl + moco 32, lr 2e-3": batch(32, "--objective=dcl", "--objective.queue=moco", "--optim.lr=6e-3"),
            "dcl + moco of 512 32, lr 2e-3": batch(
                32, "--objective=dcl", "--objective.queue=moco", "--objective.moco.size=512", "--optim.lr=6e-3"
            ),
        },
        GLYPHS,
    ),
    # a big batch hurts at a small budget: updates are what it lacks
    "crossover": Study(
        "softmax on glyphs",
        words("configs/demo.yaml", 300_000),
        {
            f"{size} at {pairs}": batch(size, f"--optim.pairs={pairs}", f"--optim.warmup_pairs={pairs // 20}")
            for pairs in BUDGETS
            for size in (32, 256, 1024)
        },
        GLYPHS,
        seeds=(0,),
    ),
}
