"""Draw the glyph shards of the demo: characters of matplotlib's fonts, with their Unicode names.

    python -m data_tools.glyphs data/glyphs

writes three folders of shards. Whole faces are held out (a style never trained on), and a tenth of
the captions (names never trained on, made of words that were):

    train/         captions of the nine tenths, in the training faces
    test_seen/     the same captions, in the held-out faces
    test_unseen/   the held-out captions, in the held-out faces

Every picture's json holds `face`, `codepoint`, `script` (first word of the name) and `case`.
"""

import argparse
import sys
from pathlib import Path

from clipsmall.cli import refuse
from clipsmall.data.making.glyphs import make_glyph_shards


def main(words: list[str] | None = None) -> int:
    """Returns the exit code 0; ends with 2 where nothing can be written."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.glyphs", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "out",
        type=Path,
        help="folder to write train/, test_seen/, test_unseen/ and classnames.txt to",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args(words)
    if (options.out / "classnames.txt").exists():
        print(f"{options.out}: made before, left as it is")
        return 0
    try:
        pairs_of_splits = make_glyph_shards(options.out, options.workers)
    except (ValueError, OSError) as error:
        refuse(error)
    for split, pairs in pairs_of_splits.items():
        print(f"{options.out / split}: {pairs:,} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
