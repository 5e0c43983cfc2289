"""Models of a comparison side by side: what each retrieves for the same queries, its logits of the
same pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clipsmall.config import Config
from clipsmall.config.reader import validated
from clipsmall.data import open_catalog
from clipsmall.data.order import permutation
from clipsmall.evaluation.command import load_encoder
from clipsmall.report_page.gallery import gallery, gallery_sets, logit_matrix
from clipsmall.report_page.page import Query
from clipsmall.storage.yaml_files import read_yaml

QUERIES = 3
ANSWERS = 3
PAIRS = 32


@dataclass
class TestedSample:
    """One model. All models of a page have the same queries in the same order, and the same
    labels.
    """

    title: str
    gallery: list[Query] = field(default_factory=list)
    # images down, texts across
    matrix: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    # their captions
    labels: list[str] = field(default_factory=list)
    scale: float = 1.0
    # why it cannot be shown
    error: str = ""

    @property
    def found(self) -> int:
        """Images of the matrix whose highest logit is that of a text with their caption."""
        best = self.matrix.argmax(axis=1) if len(self.matrix) else []
        return sum(
            self.labels[text] == label for text, label in zip(best, self.labels, strict=True)
        )


def samples(models: Sequence[tuple[str, Path]]) -> list[TestedSample]:
    """A sample a model, loaded one after the other; one that cannot be loaded says why.

    Args:
        models: (title, run folder). The data are those that the first one's run.yaml evaluates on.

    Raises:
        ValueError: that run.yaml or its data cannot be read.
    """
    if not models:
        return []
    config = validated(read_yaml(str(models[0][1] / "run.yaml")))
    found = []
    for title, folder in models:
        try:
            found.append(_sample(title, folder, config))
        except ValueError as error:
            found.append(TestedSample(title, error=str(error)))
    asked = [
        [(query.image, query.text) for query in sample.gallery]
        for sample in found
        if not sample.error
    ]
    assert all(queries == asked[0] for queries in asked), "the same data give the same queries"
    return found


def _sample(title: str, folder: Path, config: Config) -> TestedSample:
    # `load_model` would ask the hub for such a name
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder}: holds no checkpoints")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(str(folder), "", device, config.evaluate.batch_size)
    model = encoder.model
    shown = TestedSample(title, scale=model.logit_scale.exp().item())
    for data, name, classes in gallery_sets(config.evaluate):
        catalog = open_catalog(data)
        queries = gallery(encoder, catalog, name, classes)
        for direction in ("image_to_text", "text_to_image"):
            shown.gallery += [query for query in queries if query.direction == direction][:QUERIES]
        if not shown.labels:
            rows = permutation(len(catalog), 1)[:PAIRS].tolist()
            matrix, shown.labels = logit_matrix(encoder, catalog, rows, model.logit_scale.exp())
            shown.matrix = matrix.numpy()
    for query in shown.gallery:
        query.texts = query.texts[:ANSWERS]
        query.images = query.images[:ANSWERS]
    return shown
