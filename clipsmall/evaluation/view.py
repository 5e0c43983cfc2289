"""One model's features, captions and labels of one data set, computed lazily and only once."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipsmall.evaluation import prompts
from clipsmall.evaluation.classification import class_features
from clipsmall.evaluation.features import Change, Encoder, Texts, class_indices, read_texts
from clipsmall.evaluation.multilabel import read_targets
from clipsmall.evaluation.recall import Relevance, relevance
from clipsmall.evaluation.sets import DataSet
from clipsmall.evaluation.top_k import refuse_non_finite


@dataclass
class DataView:
    """A model on a data set: everything that several tasks use, computed on first use.

    `change` is applied to each image first; `empty_classes` allows classes without an image.
    """

    encoder: Encoder
    data: DataSet
    empty_classes: bool = False
    change: Change | None = None
    # task -> its model fitted to the training images, reused for changed images
    learned: dict[str, Any] = field(default_factory=dict)

    def changed(self, change: Change) -> "DataView":
        """A view with changed images; text features, classes and fitted models are shared."""
        other = copy.copy(self)
        other.__dict__.pop("encoded", None)
        other.change = change
        return other

    @cached_property
    def encoded(self) -> tuple[Tensor, Tensor]:
        """(n, D) features of the images that can be read, and (n,) their rows in the catalog."""
        catalog = self.data.catalog
        features, rows = self.encoder.images(catalog, change=self.change)
        # NaN would look like a merely bad model
        refuse_non_finite(features, "image")
        return features, rows

    @property
    def images(self) -> Tensor:
        """(n, D) features of the images that can be read."""
        return self.encoded[0]

    @property
    def skipped(self) -> int:
        """The number of images without features: unreadable, or left out of the catalog."""
        return self.data.catalog.total - len(self.images)

    @property
    def uncaptioned(self) -> int:
        """The number of images that are unreadable or have no caption."""
        return self.data.catalog.total - len(self.captioned)

    @cached_property
    def words(self) -> Texts:
        """Captions and labels of all rows of the catalog."""
        return read_texts(self.data.catalog, self.data.label)

    @cached_property
    def captioned(self) -> Tensor:
        """The positions in `images` of those that have a caption."""
        captions = self.words.captions
        rows = self.encoded[1].tolist()
        positions = []
        for position, row in enumerate(rows):
            if captions[row]:
                positions.append(position)
        if not positions:
            raise ValueError(f"{self.data.name}: no image has a caption; this task needs some")
        return torch.tensor(positions)

    @cached_property
    def captions(self) -> tuple[list[str], Relevance]:
        """The distinct captions, and which captioned images each belongs to."""
        rows = self.encoded[1][self.captioned].tolist()
        return relevance([self.words.captions[row] for row in rows])

    @cached_property
    def texts(self) -> Tensor:
        """(m, D) features of the distinct captions."""
        features = self.encoder.texts(self.captions[0])
        refuse_non_finite(features, "text")
        return features

    @cached_property
    def names(self) -> list[str]:
        """Class names. Raises ValueError if there are none."""
        if self.data.kind == "retrieval":
            raise ValueError(
                f"{self.data.name}: a retrieval set (dataset_type.txt); it has no classes"
            )
        # a .npy holds no class names: a multi-label set needs a list
        words = Texts([], []) if self.data.kind == "multilabel" else self.words
        names = prompts.class_names(self.data.classes, words.captions, words.labels)
        if not names:
            raise ValueError(
                f"{self.data.name}: no class names; give a classnames.txt beside it, or --classes"
            )
        return names

    @cached_property
    def all_targets(self) -> Tensor:
        """(N, C) bool, for a multi-label set: which classes each image of the catalog shows."""
        return read_targets(self.data.catalog, len(self.names))

    @cached_property
    def classes(self) -> list[str]:
        """`names`; raises ValueError if one has no image, unless `empty_classes`."""
        names = self.names
        if self.data.kind == "multilabel":
            # (C,)
            is_shown = self.all_targets.any(dim=0)
            numbers = is_shown.nonzero()[:, 0]
        else:
            numbers = class_indices(self.words.labels, names)

        with_image = set(numbers.tolist())
        empty = [name for number, name in enumerate(names) if number not in with_image]
        if empty and not self.empty_classes and self.data.classes != "captions":
            raise ValueError(
                f"{self.data.name}: class {empty[0]!r} has no image, like {len(empty)} of "
                f"{len(names)} classes in {self.data.classes}; take them out, or allow it by "
                "--empty_classes"
            )
        return names

    @cached_property
    def labels(self) -> Tensor:
        """(n,) class indices of `images`."""
        numbers = class_indices(self.words.labels, self.classes)
        return numbers[self.encoded[1]]

    @property
    def targets(self) -> Tensor:
        """(n, C) bool, for a multi-label set: which classes `images` show."""
        return self.all_targets[self.encoded[1]]

    @cached_property
    def class_features(self) -> Tensor:
        """(C, D) features of the classes."""
        classes = self.classes
        templates = prompts.prompt_templates(self.data.templates)
        features = class_features(self.encoder, classes, templates)
        refuse_non_finite(features, "class")
        return features

    @cached_property
    def training(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """(N, D) features and (N,) labels of training images, (n,) labels of `images`, classes.

        The last is the number of classes.

        Raises:
            ValueError: a test image is of a class that no training image has.
        """
        catalog = self.data.training
        features, rows = self.encoder.images(catalog)
        refuse_non_finite(features, "train image")
        # labels of training and test images, ignoring letter case
        words = read_texts(catalog, self.data.label)
        all_learned = [str(label) for label in words.labels]
        learned = [all_learned[row].casefold() for row in rows.tolist()]
        all_asked = [str(label) for label in self.words.labels]
        asked = [all_asked[row] for row in self.encoded[1].tolist()]
        names = sorted(set(learned))
        number_of = {name: number for number, name in enumerate(names)}
        unknown = [name for name in asked if name.casefold() not in number_of]
        if unknown:
            raise ValueError(
                f"{self.data.name}: {len(unknown)} images are of classes without a train image, "
                f"as {unknown[0]!r}; learn from other shards than {', '.join(self.data.train)} "
                "(--train)"
            )
        learned_numbers = [number_of[name] for name in learned]
        asked_numbers = [number_of[name.casefold()] for name in asked]
        return (
            features,
            torch.tensor(learned_numbers),
            torch.tensor(asked_numbers),
            len(names),
        )
