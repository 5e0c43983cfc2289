"""Cho et al.'s two retrieval tasks, and what they become between images and texts."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from clipsmall.evaluation.corruptions import COMMON, Corruption
from clipsmall.evaluation.features import Change
from clipsmall.evaluation.hits import hits, refuse_non_finite, scores
from clipsmall.evaluation.results import Result
from clipsmall.evaluation.retrieval import Relevance, recalls
from clipsmall.evaluation.view import DataView


@dataclass(frozen=True)
class Augmented:
    """A random view of a picture as SimCLR makes it (arXiv 2002.05709, §A), the same for a picture
    and `view` always.

    Crop of 8 to 100 % of the area, flip, colours shaken (0.4, 0.4, 0.2, 0.1; 4 of 5), grey (1 of
    5), blur.
    """

    view: int
    side: int
    # a corruption, which comes first
    before: Change | None = None

    def __call__(self, image: Image.Image, number: int) -> Image.Image:
        if self.before is not None:
            image = self.before(image, number)
        kernel = max(3, self.side // 10 | 1)
        steps = v2.Compose(
            [
                v2.RandomResizedCrop(
                    self.side, scale=(0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC
                ),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.GaussianBlur(kernel, sigma=(0.1, 2.0)),
            ]
        )
        # each corruption's views are drawn anew, as the paper's are
        told = repr(self.before).encode()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((number * 1_000_003 + zlib.crc32(told) * 2 + self.view) % 2**63)
            changed: Image.Image = steps(image)
        return changed


def top1(
    view: DataView,
    corruptions: Sequence[str] = COMMON,
    severities: Sequence[int] = (1, 3, 5),
    limit: int = 1000,
) -> Result:
    """R@1, both ways averaged, ties as a random order (Cho et al., arXiv 2307.05906, §5).

    - `top1_accuracy`: two random views of every image; does one find the other among all?
    - `corrupted_top1_accuracy/S`: all corruptions of one image at severity S, two random views of
    each; does a view
      find the other of its own corruption among these? Pure hard negatives; a guess is right once
      in as many.
    - `cross_modal_top1_accuracy`: images and captions instead of two views; and
      `cross_modal_corrupted_top1_accuracy/S`: corrupted images (each by one corruption, in turn)
      and captions.

    The paper multiplies projector outputs as they are; here rows are of length one, as this model
    compares them. The corrupted task is measured on `limit` images, evenly chosen. Data without
    captions has no cross-modal part.
    """
    catalog = view.data.catalog
    encoder = view.encoder
    side = view.encoder.model.spec.size
    rows = torch.arange(len(catalog)).tolist()
    few = rows[:: -(-len(rows) // limit)]
    cell = Result(
        view.data.name, "top1", {}, counts={"images": len(view.images), "skipped": view.skipped}
    )
    cell.counts["corruptions"] = len(corruptions)

    def seen(only: list[int], number: int, before: Change | None = None) -> Tensor:
        found = encoder.images(catalog, only, Augmented(number, side, before))[0]
        refuse_non_finite(found, "image")
        return found

    cell.metrics["top1_accuracy"] = both_ways(seen(rows, 0), seen(rows, 1))
    cell.chance["top1_accuracy"] = 1 / len(view.images)
    with_captions = bool(catalog.caption_hash.any())
    if with_captions:
        images = view.images[view.captioned]
        texts = view.texts
        belongs = view.captions[1]
        cell.metrics["cross_modal_top1_accuracy"] = cross_modal(images, texts, belongs)
    for severity in severities:
        damage = [Corruption(name, severity, side) for name in corruptions]
        first, second = (
            torch.stack([seen(few, v, each) for each in damage], dim=1) for v in (0, 1)
        )
        name = f"corrupted_top1_accuracy/{severity}"
        cell.metrics[name], cell.chance[name] = among_corruptions(first, second), 1 / len(damage)
        cell.counts["images_corrupted"] = len(first)
        if with_captions:
            changed = view.changed(InTurn(tuple(damage)))
            found = cross_modal(changed.images[view.captioned], texts, belongs)
            cell.metrics[f"cross_modal_{name}"] = found
    return cell


@dataclass(frozen=True)
class InTurn:
    """Each picture by one of several corruptions, by its number."""

    changes: tuple[Corruption, ...]

    def __call__(self, image: Image.Image, number: int) -> Image.Image:
        return self.changes[number % len(self.changes)](image, number)


def both_ways(first: Tensor, second: Tensor) -> float:
    """(n, D), (n, D) of two views -> the mean of both directions' R@1."""
    own = torch.arange(len(first))
    return cross_modal(first, second, Relevance(own, own, len(first), len(first)))


def cross_modal(images: Tensor, texts: Tensor, belongs: Relevance) -> float:
    ways = recalls(images, texts, belongs, "image")[1], recalls(texts, images, belongs, "text")[1]
    return sum(ways) / 2


def among_corruptions(first: Tensor, second: Tensor) -> float:
    """(n, C, D), (n, C, D) of two views of C corruptions of n images -> R@1 among the C, both ways,
    over images.
    """
    own = torch.eye(first.shape[1], dtype=torch.bool)
    found = [
        hits(scores(a, b), own, (1,)).mean().item() + hits(scores(b, a), own, (1,)).mean().item()
        for a, b in zip(F.normalize(first, dim=-1), F.normalize(second, dim=-1), strict=True)
    ]
    return sum(found) / len(found) / 2
