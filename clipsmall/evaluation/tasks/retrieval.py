"""Retrieval both ways over all pairs: several captions per image, several images per caption."""

from clipsmall.evaluation.recall import both_recalls
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import PageTable, Task
from clipsmall.evaluation.view import DataView

NAME = "zeroshot_retrieval"


def retrieval(view: DataView) -> Result:
    """Recall@1, 5 and 10, both ways; see `both_recalls`.

    Raises:
        ValueError: no image has a caption, features that are not finite.
    """
    images = view.images[view.captioned]
    texts = view.texts
    belongs = view.captions[1]
    return both_recalls(images, texts, belongs, view.data.name, NAME, view.uncaptioned)


TASK = Task(
    NAME,
    retrieval,
    matches="captions",
    default_for=lambda data: data.has_captions,
    main=(("image_retrieval_recall@1", "text_retrieval_recall@1"),),
    repeatable=True,
    metrics=tuple(f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)),
    short_in_log=True,
    datacomp_key="retrieval/{dataset}",
    page_table=PageTable(
        "Retrieval",
        metrics=("recall@1", "recall@5", "recall@10"),
        with_chance=("recall@1", "recall@5", "recall@10"),
        counts=("images", "captions"),
        rows={"image_retrieval_": "caption → image", "text_retrieval_": "image → caption"},
    ),
)
