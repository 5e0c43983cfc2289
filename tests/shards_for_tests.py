"""Small real shards and towers for tests."""

import json
from pathlib import Path

from clipsmall.data.making.glyphs import draw_glyph, glyph_samples, glyphs_of
from clipsmall.data.making.shard_writer import write_shard

TOWERS = {
    "kind": "small",
    "embed_dim": 16,
    "image": {"size": 16, "widths": [4, 8, 8]},
    "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "vocab_size": 512},
}


def write_glyphs(folder: Path, pairs: int = 300, shards: int = 3) -> None:
    """`train` (`pairs` of one face over `shards`), `test` (60 of another face), classnames.txt,
    towers.json.
    """
    glyphs = [g for g in glyphs_of("DejaVuSans") if draw_glyph(g)][:pairs]
    size = pairs // shards
    for number in range(shards):
        write_shard(
            folder / "train",
            number,
            glyph_samples(glyphs[number * size : (number + 1) * size], number * size),
        )
    test = [g for g in glyphs_of("DejaVuSerif") if draw_glyph(g)][:60]
    write_shard(folder / "test", 0, glyph_samples(test, 0))
    (folder / "classnames.txt").write_text(
        "".join(f"{name}\n" for name in sorted({g.name for g in glyphs + test}))
    )
    (folder / "towers.json").write_text(json.dumps(TOWERS))


def config(glyphs: Path, out: Path, **changes: object) -> list[str]:
    """Command-line words of a tiny run on `write_glyphs`' shards."""
    words = {
        "out": str(out),
        "data.train": f"[{glyphs / 'train'}]",
        "data.batch_size": 32,
        "data.workers": 0,
        "data.shuffle_window": 128,
        "model.name": str(glyphs / "towers.json"),
        "optim.pairs": 32 * 24,
        "optim.warmup_pairs": 64,
        "optim.lr": 3e-3,
        "run.log_every": 1,
        "run.checkpoint_every": 5,
        "run.keep_checkpoints": 10,
        **changes,
    }
    return [f"--{name}={value}" for name, value in words.items()]
