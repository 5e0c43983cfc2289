"""Image-text retrieval, both ways, of any model on any shards.

    python -m clipsmall.retrieve runs/demo --data data/glyphs/test_unseen
    python -m clipsmall.retrieve openai/clip-vit-base-patch32 --data data/coco/test

Prints recall@1, 5 and 10 over all pairs. An image may have several captions, and a caption several
images; ties are broken at random, in expectation. Writes a JSON file in CLIP_benchmark's format.
`python -m clipsmall.evaluate --tasks retrieval` measures the same.
"""

import sys

from clipsmall.evaluation.command import run_single_task, single_task_parser
from clipsmall.evaluation.sets import DataSet, given_set


def main(words: list[str] | None = None) -> int:
    options = single_task_parser("retrieve", __doc__).parse_args(words)

    def open_data(name: str) -> DataSet:
        return given_set(name, options.data, only_captioned=True)

    return run_single_task("retrieval", options, open_data)


if __name__ == "__main__":
    sys.exit(main())
