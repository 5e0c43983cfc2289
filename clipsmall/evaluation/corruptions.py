"""ImageNet-C's corruptions at five severities, made on the fly and deterministic for each image.

Hendrycks & Dietterich 2019, arXiv 1903.12261. Their images are 224 pixels wide (ImageNet-C) or 32
(CIFAR-C), and a corruption's strength depends on severity and width; `FAMILIES` has both widths.
For other widths the strength is interpolated linearly in the logarithm of the short side, and
constant below 32 and above 224. Each strength is one number; a second parameter of the original
follows from the first. Everything is numpy, scipy and Pillow, so results resemble the published
sets but are not identical: frost is drawn instead of photographed, and fog is filtered noise.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipsmall.evaluation import distortions as d
from clipsmall.evaluation.task import TaskOption

Five = tuple[float, float, float, float, float]

# Name -> function, five strengths at 32 pixels, five at 224. Lengths are in pixels; noise is for
# values from 0 to 1.
FAMILIES: dict[str, tuple[Callable[..., d.Picture], Five, Five]] = {
    "gaussian_noise": (
        d.gaussian_noise,
        (0.04, 0.06, 0.08, 0.09, 0.10),
        (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": (
        d.shot_noise,
        (0.002, 0.004, 0.01, 0.0133, 0.02),
        (0.0167, 0.04, 0.0833, 0.2, 0.333),
    ),
    "impulse_noise": (
        d.impulse_noise,
        (0.01, 0.02, 0.03, 0.05, 0.07),
        (0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": (d.defocus_blur, (0.75, 1.0, 1.25, 1.5, 1.75), (3, 4, 6, 8, 10)),
    "glass_blur": (d.glass_blur, (0.25, 0.35, 0.5, 0.7, 0.9), (0.7, 0.9, 1.2, 1.6, 2.0)),
    "motion_blur": (d.motion_blur, (1.0, 1.5, 2.0, 2.5, 3.0), (3, 5, 8, 12, 15)),
    "zoom_blur": (d.zoom_blur, (0.06, 0.11, 0.16, 0.21, 0.26), (0.11, 0.16, 0.21, 0.26, 0.33)),
    "snow": (d.snow, (0.1, 0.15, 0.2, 0.27, 0.35), (0.15, 0.22, 0.3, 0.4, 0.5)),
    "frost": (d.frost, (0.2, 0.3, 0.4, 0.5, 0.6), (0.35, 0.45, 0.55, 0.65, 0.75)),
    "fog": (d.fog, (0.2, 0.5, 0.75, 1.0, 1.5), (1.0, 1.5, 2.0, 2.5, 3.0)),
    "brightness": (d.brightness, (0.05, 0.10, 0.15, 0.20, 0.30), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (d.contrast, (0.25, 0.5, 0.6, 0.7, 0.85), (0.6, 0.7, 0.8, 0.9, 0.95)),
    "elastic_transform": (d.elastic_transform, (0.4, 0.6, 0.8, 1.0, 1.3), (2, 3, 4, 5.5, 7)),
    "pixelate": (d.pixelate, (0.05, 0.10, 0.15, 0.25, 0.35), (0.4, 0.5, 0.6, 0.7, 0.75)),
    "jpeg_compression": (d.jpeg_compression, (20, 35, 42, 50, 60), (75, 82, 85, 90, 93)),
    "speckle_noise": (
        d.speckle_noise,
        (0.06, 0.10, 0.12, 0.16, 0.20),
        (0.15, 0.20, 0.35, 0.45, 0.60),
    ),
    "gaussian_blur": (d.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "spatter": (d.spatter, (0.03, 0.06, 0.10, 0.15, 0.20), (0.05, 0.10, 0.16, 0.24, 0.32)),
    "saturate": (d.saturate, (0.25, 0.5, 0.75, 1.0, 1.5), (0.5, 1.0, 2.0, 4.0, 8.0)),
}
# The benchmark's fifteen; the last four of FAMILIES are its extra ones, meant for tuning.
COMMON = tuple(FAMILIES)[:15]
SEVERITIES = (1, 2, 3, 4, 5)
# Options of the tasks that corrupt images.
OPTIONS = {
    "corruptions": TaskOption(
        COMMON, "corruptions by name; default: ImageNet-C's fifteen", choices=tuple(FAMILIES)
    ),
    "severities": TaskOption(
        SEVERITIES, "severities of the corruptions, 1 to 5", choices=SEVERITIES
    ),
}


def strength(name: str, severity: int, side: int) -> float:
    """How strong a corruption is on images whose short side is `side` pixels."""
    _, small, large = FAMILIES[name]
    # 0 at 32 pixels, 1 at 224
    log_ratio = np.log(side / 32)
    log_range = np.log(224 / 32)
    position = float(np.clip(log_ratio / log_range, 0, 1))

    at_32 = small[severity - 1]
    at_224 = large[severity - 1]
    return (1 - position) * at_32 + position * at_224


@dataclass(frozen=True)
class Corruption:
    """(image, number) -> corrupted image, for `Encoder.images(change=)`.

    Images larger than `side` (the model's input size) are first reduced to it by their short side,
    as in the published sets: the model's resizing would average noise on larger images away.

    Raises:
        ValueError: no such corruption or severity.
    """

    name: str
    severity: int
    side: int

    def __post_init__(self) -> None:
        if self.name not in FAMILIES:
            raise ValueError(
                f"corruption {self.name!r}: unknown; choose from {', '.join(FAMILIES)}"
            )
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity {self.severity}: must be 1, 2, 3, 4 or 5")

    def __call__(self, image: Image.Image, number: int) -> Image.Image:
        short = min(image.size)
        if short > self.side:
            width, height = image.size
            new_width = max(1, round(width * self.side / short))
            new_height = max(1, round(height * self.side / short))
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        # All severities of an image share a seed: a higher one is the same damage, but stronger.
        family = zlib.crc32(self.name.encode())
        # seeds must be unsigned
        unsigned = number & 0xFFFFFFFFFFFFFFFF
        random = np.random.default_rng([unsigned, family])

        distort, _, _ = FAMILIES[self.name]
        pixels: NDArray[Any] = np.asarray(image, dtype=np.float64) / 255
        strong = strength(self.name, self.severity, min(image.size))
        corrupted = distort(pixels, strong, random)

        levels = (corrupted.clip(0, 1) * 255).round()
        return Image.fromarray(levels.astype(np.uint8))
