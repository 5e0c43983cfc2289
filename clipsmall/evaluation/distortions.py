"""The distortions behind the corruptions, each (pixels, strength, random generator) -> pixels.

Pixels are (H, W, 3), from 0 to 1.
"""

from io import BytesIO
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage, signal

# an NDArray[np.float64], which neither numpy nor scipy keep sight of
Picture = Any

# ---- noise ----


def gaussian_noise(x: Picture, sigma: float, random: Generator) -> Picture:
    return x + sigma * random.standard_normal(x.shape)


def shot_noise(x: Picture, one_photon: float, random: Generator) -> Picture:
    """Photons are counted, each worth `one_photon` of white."""
    return random.poisson(x / one_photon) * one_photon


def impulse_noise(x: Picture, fraction: float, random: Generator) -> Picture:
    """A fraction of all values turns black or white."""
    hit = random.random(x.shape) < fraction
    white = random.random(x.shape) < 0.5
    return np.where(hit, white, x)


def speckle_noise(x: Picture, sigma: float, random: Generator) -> Picture:
    return x + x * sigma * random.standard_normal(x.shape)


# ---- blur ----


def gaussian_blur(x: Picture, sigma: float, random: Generator) -> Picture:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _convolved(x: Picture, kernel: Picture) -> Picture:
    """With a kernel of odd sides, edges continued."""
    up = kernel.shape[0] // 2
    left = kernel.shape[1] // 2
    wide = np.pad(x, ((up, up), (left, left), (0, 0)), mode="edge")
    # sums to 1, the same for all channels
    weights = (kernel / kernel.sum())[:, :, None]
    convolved: Picture = signal.fftconvolve(wide, weights, mode="valid", axes=(0, 1))
    return convolved


def defocus_blur(x: Picture, radius: float, random: Generator) -> Picture:
    """A disc, softened by half a pixel."""
    reach = int(np.ceil(radius)) + 1
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    distance = np.hypot(rows, columns)
    disc = np.clip(radius + 0.5 - distance, 0, 1)
    return _convolved(x, disc)


def motion_blur(x: Picture, sigma: float, random: Generator) -> Picture:
    """A line at an angle within 45° of the horizontal, fading as a Gaussian to one side."""
    angle = random.uniform(-np.pi / 4, np.pi / 4)
    reach = int(np.ceil(2 * sigma)) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    along = np.linspace(0, 2 * sigma, 8 * reach)
    rows = along * np.sin(angle)
    columns = along * np.cos(angle)
    weights = np.exp(-((along / sigma) ** 2) / 2)
    for row, column, weight in zip(rows, columns, weights, strict=True):
        # shared among the four cells around the point, bilinearly
        r = int(np.floor(row))
        c = int(np.floor(column))
        fractions = np.outer([r + 1 - row, row - r], [c + 1 - column, column - c])
        kernel[reach + r : reach + r + 2, reach + c : reach + c + 2] += weight * fractions
    return _convolved(x, kernel)


def glass_blur(x: Picture, sigma: float, random: Generator) -> Picture:
    """Each pixel is taken from up to 2.5 sigma away, with a blur before and after."""
    h, w = x.shape[:2]
    soft = gaussian_blur(x, sigma, random)
    offsets = random.uniform(-1, 1, (2, h, w)) * 2.5 * sigma
    down, right = np.rint(offsets).astype(np.int64)
    rows = (down + np.arange(h)[:, None]).clip(0, h - 1)
    columns = (right + np.arange(w)).clip(0, w - 1)
    return gaussian_blur(soft[rows, columns], sigma, random)


def zoom_blur(x: Picture, zoom: float, random: Generator) -> Picture:
    """The mean of the image and of magnifications of its middle, up to 1 + `zoom`."""
    h, w = x.shape[:2]
    middle_row = (h - 1) / 2
    middle_column = (w - 1) / 2
    total = np.zeros_like(x)
    factors = np.linspace(1, 1 + zoom, 11)
    for factor in factors:
        rows = (np.arange(h) - middle_row) / factor + middle_row
        columns = (np.arange(w) - middle_column) / factor + middle_column
        total += _interpolated(x, *np.meshgrid(rows, columns, indexing="ij"))
    return total / len(factors)


def _interpolated(x: Picture, rows: Picture, columns: Picture) -> Picture:
    """The values at these places: bilinear, edges continued."""
    channels = []
    for channel in range(3):
        channels.append(
            ndimage.map_coordinates(x[..., channel], [rows, columns], order=1, mode="nearest")
        )
    return np.stack(channels, axis=-1)


# ---- weather ----


def _clouds(shape: tuple[int, ...], roughness: float, random: Generator) -> Picture:
    """(H, W) from 0 to 1: noise whose amplitudes fall with the frequency to the power of
    `roughness`.
    """
    h, w = shape[:2]
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w))
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(random.standard_normal((h, w)))
    clouds: Picture = np.fft.irfft2(noise * frequency**-roughness, s=(h, w))
    return (clouds - clouds.min()) / max(np.ptp(clouds), 1e-12)


def fog(x: Picture, amount: float, random: Generator) -> Picture:
    """Clouds are added, then all is dimmed so far that the brightest stays as it was."""
    brightest = max(float(x.max()), 1e-3)
    clouds = _clouds(x.shape, 1.7, random)[..., None]
    return (x + amount * clouds) * brightest / (brightest + amount)


def frost(x: Picture, amount: float, random: Generator) -> Picture:
    """Bluish white crystals, thickest where ridges of two cloud fields meet the edges of a
    third.
    """
    first = _clouds(x.shape, 1.0, random)
    second = _clouds(x.shape, 1.3, random)
    where = _clouds(x.shape, 1.8, random)
    # a ridge is where a field has its middle value
    to_ridge = np.minimum(np.abs(first - 0.5), np.abs(second - 0.5))
    needles = np.clip(1 - 6 * to_ridge, 0, 1)
    thickness = np.clip(0.35 + 0.65 * needles, 0, 1)
    ice = thickness * np.clip(0.4 + where, 0, 1)
    cover = (amount * ice)[..., None]
    bluish_white = np.array([0.88, 0.94, 1.0])
    return x * (1 - cover) + cover * bluish_white


def snow(x: Picture, amount: float, random: Generator) -> Picture:
    """Flakes that fall aslant in front of a whitened, greyer picture."""
    h, w = x.shape[:2]
    size = max(0.5, min(h, w) / 224 * 1.5)
    ranks = _smooth_ranks(h, w, size, random)
    flakes = np.clip((ranks - 1 + amount / 4) / 0.02, 0, 1)
    streaks = motion_blur(np.repeat(flakes[..., None], 3, axis=2), 2 * size, random)
    grey = np.maximum(x, x.mean(axis=2, keepdims=True) * 1.5 + 0.25)
    return (1 - amount) * x + amount * grey + streaks


def spatter(x: Picture, fraction: float, random: Generator) -> Picture:
    """Drops of muddy water on the lens, which cover a fraction of it."""
    h, w = x.shape[:2]
    size = max(0.7, min(h, w) / 224 * 4)
    ranks = _smooth_ranks(h, w, size, random)
    cover = np.clip((ranks - 1 + fraction) / 0.05, 0, 1)[..., None]
    mud = np.array([0.25, 0.17, 0.08])
    return x * (1 - cover) + cover * mud


def _smooth_ranks(h: int, w: int, size: float, random: Generator) -> Picture:
    """(H, W) of a smooth random field: each pixel's rank, from 0 to 1."""
    field = ndimage.gaussian_filter(random.standard_normal((h, w)), size, mode="wrap")
    return field.ravel().argsort().argsort().reshape(h, w) / (h * w)


# ---- digital ----


def brightness(x: Picture, more: float, random: Generator) -> Picture:
    """Value + `more`, hue and saturation kept: all channels by one factor, up to white in the
    brightest.
    """
    value = x.max(axis=2, keepdims=True)
    lighter = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * lighter / np.maximum(value, 1e-9), lighter)


def saturate(x: Picture, more: float, random: Generator) -> Picture:
    """Saturation × (1 + more)."""
    value = x.max(axis=2, keepdims=True)
    low = x.min(axis=2, keepdims=True)
    saturation = (value - low) / np.maximum(value, 1e-9)
    factor = np.clip(saturation * (1 + more), 0, 1) / np.maximum(saturation, 1e-9)
    return value - (value - x) * np.where(saturation > 0, factor, 1)


def contrast(x: Picture, less: float, random: Generator) -> Picture:
    """(1 − less) of each channel's distance from its mean is left."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * (1 - less) + mean


def elastic_transform(x: Picture, pixels: float, random: Generator) -> Picture:
    """Pixels are pulled about by a smooth field of `pixels` on average."""
    h, w = x.shape[:2]
    moves: list[Any] = []
    for _ in range(2):
        field = ndimage.gaussian_filter(
            random.uniform(-1, 1, (h, w)), 0.04 * min(h, w), mode="reflect"
        )
        moves.append(field / max(np.sqrt((field**2).mean()), 1e-12) * pixels)
    rows = np.arange(h)[:, None] + moves[0]
    columns = np.arange(w) + moves[1]
    return _interpolated(x, rows, columns)


def pixelate(x: Picture, less: float, random: Generator) -> Picture:
    """Sides of 1 − `less` as many pixels, and large again."""
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    fewer = [max(1, round(length * (1 - less))) for length in image.size]
    small = image.resize(fewer, Image.Resampling.BOX)
    large = small.resize(image.size, Image.Resampling.NEAREST)
    return np.asarray(large, dtype=np.float64) / 255


def jpeg_compression(x: Picture, loss: float, random: Generator) -> Picture:
    """JPEG of quality 100 − `loss`."""
    out = BytesIO()
    Image.fromarray((x * 255).round().astype(np.uint8)).save(out, "JPEG", quality=round(100 - loss))
    return np.asarray(Image.open(out), dtype=np.float64) / 255
