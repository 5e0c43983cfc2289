"""Features of a whole data set: each rank encodes its batches, every rank gets all rows, none
twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clipsmall.data import Catalog, captions_of, fields_of, outlive_the_signal
from clipsmall.data.preprocess import MAX_PIXELS, BadImage, ImageTransform, decode
from clipsmall.distributed import world
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.storage import checkpoint

# of a decoded picture and its pair's number
Change = Callable[[Image.Image, int], Image.Image]


class NoReadableImage(ValueError):
    """Not one image of those asked for can be read; the message names the first shard."""


class _Images(Dataset[tuple[int, Tensor | None]]):
    def __init__(self, catalog: Catalog, transform: ImageTransform, change: Change | None) -> None:
        self.catalog = catalog
        self.transform = transform
        self.change = change

    def __getitem__(self, row: int) -> tuple[int, Tensor | None]:
        try:
            data = self.catalog.read(row).image
            if self.change is None:
                return row, self.transform(data)
            changed = self.change(decode(data), int(self.catalog.index[row]))
            return row, torch.from_numpy(np.array(self.transform.steps(changed))).permute(2, 0, 1)
        except BadImage:
            return row, None


def _collate(samples: list[tuple[int, Tensor | None]]) -> tuple[Tensor, Tensor]:
    good = [(row, image) for row, image in samples if image is not None]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return torch.tensor([row for row, _ in good], dtype=torch.int64), images


def _lacking(batches: list[Any], encoded: int) -> int:
    """Passes that this rank has yet to make until it has made as many as any other: where towers
    are sharded, a rank that passes alone waits for ever."""
    return -(-len(batches) // world.size()) - encoded


def _mine(batches: list[Any]) -> list[Any]:
    """Whole batches are dealt to ranks, cut as one process would: the features are the same to the
    bit.
    """
    return batches[world.rank() :: world.size()]


@dataclass
class Texts:
    """Captions and labels of the good pairs of a catalog, by row."""

    captions: list[list[str]]
    labels: list[str | int]


@dataclass
class Encoder:
    """A model with what it needs to see data sets; put into eval mode for the duration of each
    call.
    """

    model: DualEncoder
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    batch_size: int = 512
    workers: int = 0
    progress: bool = False
    # of an image; larger ones count as broken
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")

    def images(
        self, catalog: Catalog, only: Sequence[int] | None = None, change: Change | None = None
    ) -> tuple[Tensor, Tensor]:
        """(n, D) unit features and (n,) their rows in the catalog, ascending; broken images are not
        among them.

        Args:
            only: these rows; None = all. change: what happens to a picture before it is resized and
                cropped.

        Raises:
            NoReadableImage: every image is broken.
        """
        wanted = torch.arange(len(catalog)) if only is None else torch.tensor(only)
        batches = list(torch.split(wanted, self.batch_size))
        loader = DataLoader(
            _Images(catalog, ImageTransform(self.model.spec, max_pixels=self.max_pixels), change),
            batch_sampler=[batch.tolist() for batch in _mine(batches)],
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=outlive_the_signal,
            # the global one belongs to training
            generator=torch.Generator(),
        )
        width = self._width()
        rows = [torch.empty(0, dtype=torch.int64)]
        parts = [torch.empty(0, width)]
        for here, images in self._bar(loader, "images"):
            if len(here):
                rows.append(here)
                parts.append(self._encode(self.model.encode_image, images))
        side = self.model.spec.size
        for _ in range(_lacking(batches, len(parts) - 1)):
            self._encode(self.model.encode_image, torch.zeros(1, 3, side, side, dtype=torch.uint8))
        features, found = self._gathered(torch.cat(rows), torch.cat(parts))
        if not len(found):
            raise NoReadableImage(
                f"{catalog.shards[0]} ...: none of {len(wanted)} images can be read"
            )
        return features, found

    def texts(self, captions: Sequence[str]) -> Tensor:
        """(n, D) unit features of n captions."""
        batches = (
            list(torch.split(torch.arange(len(captions)), self.batch_size)) if captions else []
        )
        rows = [torch.empty(0, dtype=torch.int64)]
        parts = [torch.empty(0, self._width())]
        for here in self._bar(_mine(batches), "texts"):
            rows.append(here)
            parts.append(
                self._encode(
                    self.model.encode_text, self.tokenize([captions[i] for i in here.tolist()])
                )
            )
        for _ in range(_lacking(batches, len(parts) - 1)):
            self._width()
        return self._gathered(torch.cat(rows), torch.cat(parts))[0]

    @torch.no_grad()
    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        training = self.model.training
        self.model.eval()
        features = encode(inputs.to(self.device)).float().cpu()
        self.model.train(training)
        return features

    def digest(self) -> str:
        """Of all that features depend on: weights and layers, preprocessing, tokens."""
        model = self.model
        probe = self.tokenize(["A photo of 2 cats, é!"]).tolist()
        return checkpoint.model_digest(
            model.named_modules(), model.state_dict(), model.through, model.spec, probe
        )

    def _width(self) -> int:
        return int(self._encode(self.model.encode_text, self.tokenize(["a"])).shape[1])

    def _gathered(self, rows: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        rows = world.gather_uneven(rows.to(self.device)).cpu()
        features = world.gather_uneven(features.to(self.device)).cpu()
        order = rows.argsort()
        return features[order], rows[order]

    def _bar(self, batches: Any, what: str) -> Any:
        return tqdm(
            batches,
            desc=f"encoding {what}",
            disable=not self.progress or world.rank() > 0,
            leave=False,
        )


def read_texts(catalog: Catalog, label: str = "", rows: Sequence[int] | None = None) -> Texts:
    """Captions and labels of every pair, or of some rows.

    A label is the json field `label` if that is named, else the `.cls` member (a number), else the
    first caption.

    Raises:
        ValueError: a pair without a label, or with one that is neither a name nor a whole number.
    """
    captions = []
    labels = list[str | int]()
    for row in range(len(catalog)) if rows is None else rows:
        members = catalog.read_text(row)
        fields = fields_of(members.json)
        captions.append(captions_of(members.text, fields))
        if label and label not in fields:
            raise ValueError(
                f"{catalog.name(row)}: its json has no field {label!r}; it has {', '.join(fields)}"
            )
        if not label and not members.label and not captions[-1]:
            raise ValueError(
                f"{catalog.name(row)}: has neither a .cls nor a caption; name a json field as label"
            )
        number = members.label.strip()
        found = (
            fields[label]
            if label
            else int(number)
            if number.isdigit()
            else members.label or captions[-1][0]
        )
        if not isinstance(found, str | int):
            raise ValueError(
                f"{catalog.name(row)}: label {found!r} is neither a name nor a whole number"
            )
        labels.append(found)
    return Texts(captions, labels)


def class_indices(labels: Sequence[str | int], classes: Sequence[str]) -> Tensor:
    """(n,) class numbers: a number as it is, a name by its place among the classes (blind to letter
    case).

    Raises:
        ValueError: a label that is no class.
    """
    places = {name.casefold(): place for place, name in reversed(list(enumerate(classes)))}
    found = np.array(
        [label if isinstance(label, int) else places.get(label.casefold(), -1) for label in labels],
        dtype=np.int64,
    )
    if (odd := np.flatnonzero((found < 0) | (found >= len(classes)))).size:
        raise ValueError(
            f"label {labels[int(odd[0])]!r} is none of the {len(classes)} classes; check classes and label"
        )
    return torch.from_numpy(found)
