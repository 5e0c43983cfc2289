"""For each model of a comparison: retrievals for the same queries, and a matrix of logits."""

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
from clipsmall.pages.html_page import Query
from clipsmall.report_page.gallery import gallery, gallery_sets, logit_matrix
from clipsmall.storage.yaml_files import read_yaml

# Queries per direction.
QUERIES = 3
ANSWERS = 3
# Rows and columns of the matrix of logits.
PAIRS = 32


@dataclass
class TestedSample:
    """One model's retrievals and logits.

    All models of a page have the same queries, in the same order, and the same labels.
    """

    title: str
    gallery: list[Query] = field(default_factory=list)
    # (PAIRS, PAIRS): images down, texts across
    matrix: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    # the captions of the matrix
    labels: list[str] = field(default_factory=list)
    # the logit scale: factor of the cosines
    scale: float = 1.0
    # why the model cannot be shown; "" if it can
    error: str = ""

    @property
    def found(self) -> int:
        """The number of images whose highest logit is that of their own caption."""
        if not len(self.matrix):
            return 0

        best = self.matrix.argmax(axis=1)
        found = [self.labels[text] == label for text, label in zip(best, self.labels, strict=True)]
        return sum(found)


def sample_models(models: Sequence[tuple[str, Path]]) -> list[TestedSample]:
    """One sample per model, loaded one at a time; if a model cannot be loaded, `error` says why.

    Args:
        models: (title, run folder). The data are the evaluation sets of the first model's run.yaml.

    Raises:
        ValueError: that run.yaml or its data cannot be read.
    """
    if not models:
        return []

    config = validated(read_yaml(str(models[0][1] / "run.yaml")))
    samples = []
    for title, folder in models:
        try:
            samples.append(_sample(title, folder, config))
        except ValueError as error:
            samples.append(TestedSample(title, error=str(error)))

    asked = []
    for sample in samples:
        if not sample.error:
            asked.append([(query.image, query.text) for query in sample.gallery])

    assert all(queries == asked[0] for queries in asked), "the same data give the same queries"
    return samples


def _sample(title: str, folder: Path, config: Config) -> TestedSample:
    # without this check, `load_model` would ask the hub for the name
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder}: holds no checkpoints")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(str(folder), "", device, config.evaluate.batch_size)
    scale = encoder.model.logit_scale.exp()
    sample = TestedSample(title, scale=scale.item())

    for data, name, classes in gallery_sets(config.evaluate):
        catalog = open_catalog(data)
        queries = gallery(encoder, catalog, name, classes)
        for direction in ("image_to_text", "text_to_image"):
            asked = [query for query in queries if query.direction == direction]
            sample.gallery += asked[:QUERIES]

        # the matrix is of the first data set
        if not sample.labels:
            rows = permutation(len(catalog), 1)[:PAIRS].tolist()
            matrix, sample.labels = logit_matrix(encoder, catalog, rows, scale)
            sample.matrix = matrix.numpy()

    for query in sample.gallery:
        query.texts = query.texts[:ANSWERS]
        query.images = query.images[:ANSWERS]

    return sample
