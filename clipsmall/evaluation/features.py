"""Features of a whole data set: the ranks divide the batches, and each gets all features."""

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
from clipsmall.model.digest import model_digest
from clipsmall.model.dual_encoder import DualEncoder

# (decoded image, its pair's number) -> the changed image
Change = Callable[[Image.Image, int], Image.Image]


class NoReadableImage(ValueError):
    """None of the requested images can be read; the message names the first shard."""


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

            image = decode(data)
            number = int(self.catalog.index[row])
            changed = self.change(image, number)
            # (H, W, 3) uint8 -> (3, H, W)
            pixels = np.array(self.transform.steps(changed))
            return row, torch.from_numpy(pixels).permute(2, 0, 1)
        except BadImage:
            return row, None


def _collate(samples: list[tuple[int, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """(n,) rows of the images that can be read, and (n, 3, side, side) the images."""
    rows = []
    images = []
    for row, image in samples:
        # None = cannot be read
        if image is not None:
            rows.append(row)
            images.append(image)

    row_numbers = torch.tensor(rows, dtype=torch.int64)
    if not images:
        return row_numbers, torch.empty(0)
    return row_numbers, torch.stack(images)


def _dummy_passes(batches: list[Any], encoded: int) -> int:
    """How many dummy batches this rank must run so that all ranks run the same number.

    With sharded towers (FSDP), a forward pass waits for all ranks.
    """
    # rounded up
    most = -(-len(batches) // world.size())
    return most - encoded


def _of_this_rank(batches: list[Any]) -> list[Any]:
    """Every `world.size()`-th batch.

    The batches are the same as in one process, so the features are the same bit for bit.
    """
    return batches[world.rank() :: world.size()]


@dataclass
class Texts:
    """Captions and labels of the good pairs of a catalog, by row."""

    captions: list[list[str]]
    labels: list[str | int]


@dataclass
class Encoder:
    """A model with preprocessing and tokenizer; encodes in eval mode."""

    model: DualEncoder
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device
    batch_size: int = 512
    workers: int = 0
    progress: bool = False
    # larger images count as broken
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")

    def images(
        self, catalog: Catalog, only: Sequence[int] | None = None, change: Change | None = None
    ) -> tuple[Tensor, Tensor]:
        """(n, D) unit features and (n,) their rows in the catalog, ascending.

        Images that cannot be read are left out.

        Args:
            only: these rows; None = all.
            change: applied to each decoded image before it is resized and cropped.

        Raises:
            NoReadableImage: every image is broken.
        """
        wanted = torch.arange(len(catalog)) if only is None else torch.tensor(only)
        batches = list(torch.split(wanted, self.batch_size))

        transform = ImageTransform(self.model.spec, max_pixels=self.max_pixels)
        loader = DataLoader(
            _Images(catalog, transform, change),
            batch_sampler=[batch.tolist() for batch in _of_this_rank(batches)],
            num_workers=self.workers,
            collate_fn=_collate,
            worker_init_fn=outlive_the_signal,
            # leave the global generator to training
            generator=torch.Generator(),
        )
        # a rank without an image still gathers a (0, D) tensor
        rows = [torch.empty(0, dtype=torch.int64)]
        parts = [torch.empty(0, self._width())]
        for batch_rows, images in self._bar(loader, "images"):
            # skip a batch in which no image can be read
            if len(batch_rows):
                rows.append(batch_rows)
                parts.append(self._encode(self.model.encode_image, images))
        side = self.model.spec.size
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        encoded = len(parts) - 1
        for _ in range(_dummy_passes(batches, encoded)):
            self._encode(self.model.encode_image, blank)

        features, found = self._gathered(torch.cat(rows), torch.cat(parts))
        if not len(found):
            raise NoReadableImage(
                f"{catalog.shards[0]} ...: none of {len(wanted)} images can be read"
            )
        return features, found

    def texts(self, captions: Sequence[str]) -> Tensor:
        """(n, D) unit features of n captions."""
        batches = list[Tensor]()
        if captions:
            all_rows = torch.arange(len(captions))
            batches = list(torch.split(all_rows, self.batch_size))

        # a rank without a batch still gathers a (0, D) tensor
        rows = [torch.empty(0, dtype=torch.int64)]
        parts = [torch.empty(0, self._width())]
        for batch_rows in self._bar(_of_this_rank(batches), "texts"):
            batch_captions = [captions[row] for row in batch_rows.tolist()]
            tokens = self.tokenize(batch_captions)
            rows.append(batch_rows)
            parts.append(self._encode(self.model.encode_text, tokens))

        encoded = len(parts) - 1
        for _ in range(_dummy_passes(batches, encoded)):
            self._width()

        features, _ = self._gathered(torch.cat(rows), torch.cat(parts))
        return features

    @torch.no_grad()
    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        on_device = inputs.to(self.device)
        features = encode(on_device).float().cpu()
        # back to the mode it was in
        self.model.train(was_training)
        return features

    def digest(self) -> str:
        """Digest of everything features depend on: weights, layers, preprocessing, tokenizer."""
        model = self.model
        probe = self.tokenize(["A photo of 2 cats, é!"]).tolist()
        return model_digest(
            model.named_modules(), model.state_dict(), model.retrieval_head, model.spec, probe
        )

    def _width(self) -> int:
        """D, found by encoding a text."""
        tokens = self.tokenize(["a"])
        features = self._encode(self.model.encode_text, tokens)
        return int(features.shape[1])

    def _gathered(self, rows: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and features of all ranks, sorted by row."""
        local_rows = rows.to(self.device)
        all_rows = world.gather_uneven(local_rows).cpu()

        local_features = features.to(self.device)
        all_features = world.gather_uneven(local_features).cpu()

        order = all_rows.argsort()
        return all_features[order], all_rows[order]

    def _bar(self, batches: Any, what: str) -> Any:
        return tqdm(
            batches,
            desc=f"encoding {what}",
            disable=not self.progress or world.rank() > 0,
            leave=False,
        )


def read_texts(catalog: Catalog, label: str = "", rows: Sequence[int] | None = None) -> Texts:
    """Captions and labels of every pair, or of some rows.

    A pair's label is its json field `label` if a field is given, else its `.cls` member (a number),
    else its first caption.

    Raises:
        ValueError: a pair without a label, or a label that is neither a name nor an integer.
    """
    if rows is None:
        rows = range(len(catalog))
    captions = []
    labels = list[str | int]()
    for row in rows:
        members = catalog.read_text(row)
        fields = fields_of(members.json)
        own_captions = captions_of(members.text, fields)
        try:
            labels.append(_label_of(fields, members.label, own_captions, label))
        except ValueError as error:
            raise ValueError(f"{catalog.name(row)}: {error}") from None
        captions.append(own_captions)
    return Texts(captions, labels)


def _label_of(
    fields: dict[str, Any], cls_member: bytes, captions: list[str], label: str
) -> str | int:
    if not label and not cls_member:
        if not captions:
            raise ValueError("has neither a .cls nor a caption; name a json field as label")
        return captions[0]
    found: Any = cls_member
    if label:
        if label not in fields:
            raise ValueError(f"its json has no field {label!r}; it has {', '.join(fields)}")
        found = fields[label]
    elif cls_member.strip().isdigit():
        found = int(cls_member)
    if not isinstance(found, str | int):
        raise ValueError(f"label {found!r} is neither a name nor a whole number")
    return found


def class_indices(labels: Sequence[str | int], classes: Sequence[str]) -> Tensor:
    """(n,) class indices: a number stays as it is, a name is looked up among the classes.

    Ignores letter case; of equal names the first counts.

    Raises:
        ValueError: a label that is not a class.
    """
    number_of = dict[str, int]()
    for class_number, name in enumerate(classes):
        number_of.setdefault(name.casefold(), class_number)

    numbers = []
    for label in labels:
        number = label if isinstance(label, int) else number_of.get(label.casefold(), -1)
        if not 0 <= number < len(classes):
            raise ValueError(
                f"label {label!r} is none of the {len(classes)} classes; check classes and label"
            )
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.int64)
