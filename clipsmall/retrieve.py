"""Image-text retrieval, both ways, of any model on any shards.

    python -m clipsmall.retrieve runs/demo --data data/glyphs/test_unseen
    python -m clipsmall.retrieve openai/clip-vit-base-patch32 --data data/coco/test

recall@1, 5 and 10 over all pairs, several captions an image and several images a caption; ties
count as a random order of the tied. The JSON cell is CLIP_benchmark's.
"""

import sys

from clipsmall.data import open_catalog
from clipsmall.evaluation import Encoder, Result, retrieval
from clipsmall.evaluation import command as commands


def main(words: list[str] | None = None) -> int:
    options = commands.parser("retrieve", __doc__).parse_args(words)

    def measure(encoder: Encoder, name: str) -> Result:
        return retrieval(encoder, open_catalog(options.data), name)

    return commands.evaluate(options, measure)


if __name__ == "__main__":
    sys.exit(main())
