"""A data set as a model sees it: every feature is made when a task first asks for it, and once."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipsmall.evaluation import prompts
from clipsmall.evaluation.classification import class_features
from clipsmall.evaluation.features import Change, Encoder, Texts, class_indices, read_texts
from clipsmall.evaluation.hits import refuse_non_finite
from clipsmall.evaluation.multilabel import read_targets
from clipsmall.evaluation.retrieval import Relevance, relevance
from clipsmall.evaluation.sets import DataSet


@dataclass
class DataView:
    """A model and a data set, and what tasks share of the two.

    `change` is what happens to pictures first; `empty_classes` allows classes without an image.
    """

    encoder: Encoder
    data: DataSet
    empty_classes: bool = False
    change: Change | None = None
    # from the train images; for changed pictures, too
    learned: dict[str, Any] = field(default_factory=dict)

    def changed(self, change: Change) -> "DataView":
        """The same data set with other pictures: texts, classes and what was learned are shared."""
        other = copy.copy(self)
        other.__dict__.pop("encoded", None)
        other.change = change
        return other

    @cached_property
    def encoded(self) -> tuple[Tensor, Tensor]:
        found, rows = self.encoder.images(self.data.catalog, change=self.change)
        refuse_non_finite(found, "image")
        return found, rows

    @property
    def images(self) -> Tensor:
        """(n, D) features of the images that can be read."""
        return self.encoded[0]

    @property
    def skipped(self) -> int:
        """Images of the data set that are not among them."""
        return self.data.catalog.total - len(self.images)

    @property
    def uncaptioned(self) -> int:
        """Images of the data set that are not among the `captioned`."""
        return self.data.catalog.total - len(self.captioned)

    # ---- captions ----

    @cached_property
    def words(self) -> Texts:
        return read_texts(self.data.catalog, self.data.label)

    @cached_property
    def captioned(self) -> Tensor:
        """Places among `images` of those with a caption."""
        captions = self.words.captions
        places = [place for place, row in enumerate(self.encoded[1].tolist()) if captions[row]]
        if not places:
            raise ValueError(f"{self.data.name}: no image has a caption; this task needs some")
        return torch.tensor(places)

    @cached_property
    def captions(self) -> tuple[list[str], Relevance]:
        """The distinct captions, and which belong to which of the captioned images."""
        rows = self.encoded[1][self.captioned].tolist()
        return relevance([self.words.captions[row] for row in rows])

    @cached_property
    def texts(self) -> Tensor:
        """(m, D) features of the distinct captions."""
        found = self.encoder.texts(self.captions[0])
        refuse_non_finite(found, "text")
        return found

    # ---- classes ----

    @cached_property
    def names(self) -> list[str]:
        """Class names. Raises ValueError for none."""
        if self.data.kind == "retrieval":
            raise ValueError(
                f"{self.data.name}: a retrieval set (dataset_type.txt); it has no classes"
            )
        # a .npy names no class: without a list of them there are none
        words = Texts([], []) if self.data.kind == "multilabel" else self.words
        names = prompts.classes(self.data.classes, words.captions, words.labels)
        if not names:
            raise ValueError(
                f"{self.data.name}: no class names; give a classnames.txt beside it, or --classes"
            )
        return names

    @cached_property
    def all_targets(self) -> Tensor:
        """(N, C) bool, of a multi-label set: which classes each image of the catalog shows."""
        return read_targets(self.data.catalog, len(self.names))

    @cached_property
    def classes(self) -> list[str]:
        """`names`; raises ValueError (without `empty_classes`) where one has no image."""
        names = self.names
        if self.data.kind == "multilabel":
            here = set(self.all_targets.any(dim=0).nonzero()[:, 0].tolist())
        else:
            here = set(class_indices(self.words.labels, names).tolist())
        empty = [name for place, name in enumerate(names) if place not in here]
        if empty and not self.empty_classes and self.data.classes != "captions":
            raise ValueError(
                f"{self.data.name}: class {empty[0]!r} has no image, like {len(empty)} of {len(names)} classes in "
                f"{self.data.classes}; take them out, or allow it by --empty_classes"
            )
        return names

    @cached_property
    def labels(self) -> Tensor:
        """(n,) class numbers of `images`."""
        numbers = class_indices(self.words.labels, self.classes)
        return numbers[self.encoded[1]]

    @property
    def targets(self) -> Tensor:
        """(n, C) bool, of a multi-label set: which classes `images` show."""
        return self.all_targets[self.encoded[1]]

    @cached_property
    def class_features(self) -> Tensor:
        """(C, D)."""
        found = class_features(self.encoder, self.classes, prompts.templates(self.data.templates))
        refuse_non_finite(found, "class")
        return found

    # ---- what probes learn from ----

    @cached_property
    def training(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """(N, D) features and (N,) labels to learn from, (n,) labels of `images`, and how many
        classes.

        Raises:
            ValueError: an image to classify is of a class that none of those to learn from has.
        """
        catalog = self.data.training
        features, rows = self.encoder.images(catalog)
        refuse_non_finite(features, "train image")
        told = [str(label) for label in read_texts(catalog, self.data.label).labels]
        names = sorted({told[row].casefold() for row in rows.tolist()})
        asked = [str(label) for label in self.words.labels]
        known = set(names)
        strange = [
            asked[row] for row in self.encoded[1].tolist() if asked[row].casefold() not in known
        ]
        if strange:
            raise ValueError(
                f"{self.data.name}: {len(strange)} images are of classes without a train image, as {strange[0]!r}; "
                f"learn from other shards than {self.data.train} (--train)"
            )
        places = {name: place for place, name in enumerate(names)}
        here = torch.tensor([places[asked[row].casefold()] for row in self.encoded[1].tolist()])
        return (
            features,
            torch.tensor([places[told[row].casefold()] for row in rows.tolist()]),
            here,
            len(names),
        )
