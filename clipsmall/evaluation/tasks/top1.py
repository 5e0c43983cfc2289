"""Cho et al.'s two top-1 retrieval tasks, and their counterparts between images and texts."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from clipsmall.evaluation.corruptions import COMMON, OPTIONS, SEVERITIES, Corruption
from clipsmall.evaluation.features import Change
from clipsmall.evaluation.recall import Relevance, recalls
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.task import Task
from clipsmall.evaluation.top_k import in_top_k, refuse_non_finite, scores
from clipsmall.evaluation.view import DataView

NAME = "top1"


@dataclass(frozen=True)
class Augmented:
    """A random SimCLR view of an image (arXiv 2002.05709, §A).

    The same for every call with the same image and `view`. Crop of 8 to 100 % of the area, flip,
    colour jitter (0.4, 0.4, 0.2, 0.1; probability 0.8), grey (probability 0.2), blur.
    """

    view: int
    side: int
    # a corruption that is applied first
    before: Change | None = None

    def __call__(self, image: Image.Image, number: int) -> Image.Image:
        if self.before is not None:
            image = self.before(image, number)
        # a tenth of the side, made odd
        kernel = max(3, self.side // 10 | 1)
        crop = v2.RandomResizedCrop(
            self.side, scale=(0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC
        )
        steps = v2.Compose(
            [
                crop,
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.GaussianBlur(kernel, sigma=(0.1, 2.0)),
            ]
        )
        # each corruption has views of its own, as in the paper
        corruption = zlib.crc32(repr(self.before).encode())
        seed = (number * 1_000_003 + corruption * 2 + self.view) % 2**63
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed: Image.Image = steps(image)
        return changed


@dataclass(frozen=True)
class InTurn:
    """Applies one of several corruptions to each image, chosen by the image's number."""

    changes: tuple[Corruption, ...]

    def __call__(self, image: Image.Image, number: int) -> Image.Image:
        return self.changes[number % len(self.changes)](image, number)


def top1(
    view: DataView,
    corruptions: Sequence[str] = COMMON,
    severities: Sequence[int] = (1, 3, 5),
    limit: int = 1000,
) -> Result:
    """recall@1, averaged over both directions (Cho et al., arXiv 2307.05906, §5).

    - `top1_accuracy`: two random views of every image; does one find the other among all images?
    - `corrupted_top1_accuracy/S`: every corruption of one image at severity S, two random views of
      each; does a view find the other view of its corruption? All negatives are hard. Chance is
      1 / number of corruptions.
    - `cross_modal_top1_accuracy`: images and captions instead of two views.
    - `cross_modal_corrupted_top1_accuracy/S`: captions and corrupted images, where the images take
      the corruptions in turn.

    Ties are broken at random, in expectation. The paper multiplies projector outputs as they are;
    here embeddings are normalised, as in this model's loss. The corrupted task uses `limit` images,
    evenly spaced. The cross-modal metrics need captions.
    """
    catalog = view.data.catalog
    side = view.encoder.model.spec.size
    rows = list(range(len(catalog)))
    # rounded up
    step = -(-len(rows) // limit)
    some = rows[::step]

    def augmented(only: list[int], number: int, before: Change | None = None) -> Tensor:
        change = Augmented(number, side, before)
        features, _ = view.encoder.images(catalog, only, change)
        refuse_non_finite(features, "image")
        return features

    def corrupted(damage: list[Corruption], number: int) -> Tensor:
        """(images, corruptions, D)"""
        parts = []
        for corruption in damage:
            features = augmented(some, number, corruption)
            parts.append(features)
        return torch.stack(parts, dim=1)

    result = Result(view.data.name, NAME, {})
    result.counts = {
        "images": len(view.images),
        "skipped": view.skipped,
        "corruptions": len(corruptions),
    }
    first_views = augmented(rows, 0)
    second_views = augmented(rows, 1)
    result.metrics["top1_accuracy"] = both_ways(first_views, second_views)
    result.chance["top1_accuracy"] = 1 / len(view.images)

    with_captions = bool(catalog.caption_hash.any())
    if with_captions:
        images = view.images[view.captioned]
        result.metrics["cross_modal_top1_accuracy"] = cross_modal(
            images, view.texts, view.captions[1]
        )

    for severity in severities:
        name = f"corrupted_top1_accuracy/{severity}"
        damage = [Corruption(corruption, severity, side) for corruption in corruptions]
        first = corrupted(damage, 0)
        second = corrupted(damage, 1)
        result.metrics[name] = among_corruptions(first, second)
        result.chance[name] = 1 / len(damage)
        result.counts["images_corrupted"] = len(first)
        if with_captions:
            changed = view.changed(InTurn(tuple(damage)))
            images = changed.images[view.captioned]
            result.metrics[f"cross_modal_{name}"] = cross_modal(
                images, view.texts, view.captions[1]
            )
    return result


def both_ways(first: Tensor, second: Tensor) -> float:
    """(n, D), (n, D) features of two views -> recall@1, averaged over both directions."""
    own = torch.arange(len(first))
    return cross_modal(first, second, Relevance(own, own, len(first), len(first)))


def cross_modal(images: Tensor, texts: Tensor, belongs: Relevance) -> float:
    """(n, D), (m, D) -> recall@1, averaged over both directions."""
    of_images = recalls(images, texts, belongs, "image")
    of_texts = recalls(texts, images, belongs, "text")
    # recall@1 of each direction
    both = (of_images[1], of_texts[1])
    return sum(both) / 2


def among_corruptions(first: Tensor, second: Tensor) -> float:
    """(n, C, D), (n, C, D) two views of C corruptions of n images -> recall@1 among the C.

    Averaged over images and both directions.
    """
    corruptions = first.shape[1]
    # the right answer is the other view of the same corruption
    own = torch.eye(corruptions, dtype=torch.bool)
    unit_first = F.normalize(first, dim=-1)
    unit_second = F.normalize(second, dim=-1)

    found = []
    for one, other in zip(unit_first, unit_second, strict=True):
        # (C, C) cosines between the two views of one image, in both directions
        forth_cosines = scores(one, other)
        back_cosines = scores(other, one)
        forth = in_top_k(forth_cosines, own, (1,)).mean().item()
        back = in_top_k(back_cosines, own, (1,)).mean().item()
        found.append(forth + back)

    # `found` holds two directions per image
    return sum(found) / len(found) / 2


_CORRUPTED = tuple(f"corrupted_top1_accuracy/{severity}" for severity in SEVERITIES)
_PLAIN = ("top1_accuracy", *_CORRUPTED)
TASK = Task(
    NAME,
    top1,
    options=OPTIONS,
    multilabel=True,
    metrics=(*_PLAIN, *(f"cross_modal_{name}" for name in _PLAIN)),
)
