"""Zero-shot classification of any model on any shards.

    python -m clipsmall.zero_shot runs/demo --data data/glyphs/test_unseen \\
        --classes data/glyphs/classnames.txt
    python -m clipsmall.zero_shot ViT-B-32 --pretrained laion2b_s34b_b79k --data imagenet/test \\
        --classes imagenet --templates openai

Prints top-1, top-5 and mean per-class accuracy with their chance levels, and writes a JSON file in
CLIP_benchmark's format. `python -m clipsmall.evaluate --tasks zero_shot` measures the same.
"""

import sys

from clipsmall.evaluation.command import run_single_task, single_task_parser
from clipsmall.evaluation.sets import DataSet, given_set


def main(words: list[str] | None = None) -> int:
    parser = single_task_parser("zero_shot", __doc__)
    parser.add_argument(
        "--classes",
        default="captions",
        help="imagenet, captions, labels (distinct ones of the data), or a file of lines",
    )
    parser.add_argument(
        "--templates",
        default="plain",
        help="plain, simple (7), openai (80), or a file of lines with {c}",
    )
    parser.add_argument(
        "--label",
        default="",
        help="json field of an image's class; default: .cls, else its caption",
    )
    options = parser.parse_args(words)

    def open_data(name: str) -> DataSet:
        return given_set(
            name,
            options.data,
            classes=options.classes,
            templates=options.templates,
            label=options.label,
        )

    return run_single_task("zero_shot", options, open_data)


if __name__ == "__main__":
    sys.exit(main())
