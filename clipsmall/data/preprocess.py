"""From bytes to pixels: images are decoded safely to RGB, resized and cropped, as uint8."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

# Pillow's own limit: a quarter GiB of RGB
MAX_PIXELS = 89_478_485
# 1×20,000 pixels scaled to a short side of 224 would take 5 GB
MAX_ASPECT = 50
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow warns of broken EXIF blocks and odd MPO headers whose pixels are good, for each file and
# worker
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):
    """An image is unusable; the message is a short reason, by which such images are counted."""


@dataclass(frozen=True)
class ImageSpec:
    """The input of an image tower: `size` (pixels, square), resizing, and mean and std of pixels.

    resize: `shortest` scales the short side and crops the middle (CLIP); `squash` scales both sides
    (SigLIP).
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a still or animated image: its first frame, upright, in 8-bit RGB.

    Sizes are checked in the header, before pixels are decoded. EXIF rotation is applied,
    16-bit grey is scaled (Pillow's own conversion clips it to white), transparency becomes white.

    Raises:
        BadImage: with one of a handful of reasons.
    """
    try:
        image: Image.Image = Image.open(BytesIO(data))
    except Image.DecompressionBombError:
        raise BadImage("too many pixels") from None
    except Exception:
        # Pillow's plugins raise nearly anything on hostile bytes
        raise BadImage("not an image") from None
    if image.width * image.height > max_pixels:
        raise BadImage("too many pixels")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadImage(f"over {MAX_ASPECT} times as long as wide")
    try:
        image.load()
    except Exception:
        raise BadImage("truncated or broken image") from None
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:
        # with a broken EXIF block the rotation is unknown, but the pixels are good
        image = image.copy()
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow -> 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        brightest = values.max(initial=0)
        scale = 1.0
        if brightest > 255 or image.mode.startswith("I;16"):
            scale = 257.0
        if image.mode == "F" and 0 < brightest <= 1:
            # fractions, not 0 to 255
            scale = 1 / 255
        grey = (values / scale).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class ImageTransform:
    """Bytes -> (3, size, size) uint8, by an ImageSpec.

    Args:
        spec: what the tower expects.
        crop_scale: smallest fraction of the area that a random crop keeps; 1.0 = the fixed
            evaluation crop.
        max_pixels: larger pictures are refused from their header.
    """

    def __init__(
        self, spec: ImageSpec, crop_scale: float = 1.0, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.random = crop_scale < 1.0
        self.max_pixels = max_pixels
        mode = v2.InterpolationMode(spec.interpolation)
        self.steps: Callable[[Image.Image], Image.Image]
        if self.random:
            self.steps = v2.RandomResizedCrop(
                spec.size, scale=(crop_scale, 1.0), interpolation=mode
            )
        elif spec.resize == "squash":
            self.steps = v2.Resize((spec.size, spec.size), interpolation=mode)
        else:
            self.steps = v2.Compose(
                [v2.Resize(spec.size, interpolation=mode), v2.CenterCrop(spec.size)]
            )

    def __call__(self, data: bytes) -> Tensor:
        """Raises BadImage as `decode` does."""
        pixels = np.asarray(self.steps(decode(data, self.max_pixels)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
