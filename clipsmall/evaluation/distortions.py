"""The distortions behind the corruptions, each (pixels, strength, random generator) -> pixels.

Pixels are (H, W, 3), from 0 to 1.
"""

from io import BytesIO
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage, signal

# An NDArray[np.float64]; typed Any because numpy's and scipy's annotations lose the dtype.
Picture = Any


def gaussian_noise(x: Picture, sigma: float, random: Generator) -> Picture:
    noise = random.standard_normal(x.shape)
    return x + sigma * noise


def shot_noise(x: Picture, one_photon: float, random: Generator) -> Picture:
    """Poisson noise: photons are counted, and each adds `one_photon` (1 is white)."""
    expected = x / one_photon
    photons = random.poisson(expected)
    return photons * one_photon


def impulse_noise(x: Picture, fraction: float, random: Generator) -> Picture:
    """A fraction of all values turns black or white."""
    # for each value, a number that decides whether it is hit, and whether it turns white
    chances = random.random(x.shape)
    hit = chances < fraction
    colours = random.random(x.shape)
    white = colours < 0.5
    return np.where(hit, white, x)


def speckle_noise(x: Picture, sigma: float, random: Generator) -> Picture:
    noise = random.standard_normal(x.shape)
    # in proportion to the value
    return x + x * sigma * noise


def gaussian_blur(x: Picture, sigma: float, random: Generator) -> Picture:
    # not across the channels
    sigmas = (sigma, sigma, 0)
    return ndimage.gaussian_filter(x, sigmas, mode="nearest")


def _convolved(x: Picture, kernel: Picture) -> Picture:
    """Convolve with a kernel of odd sides; edge pixels are repeated."""
    up = kernel.shape[0] // 2
    left = kernel.shape[1] // 2
    margins = ((up, up), (left, left), (0, 0))
    wide = np.pad(x, margins, mode="edge")

    # sums to 1, the same for all channels
    weights = kernel / kernel.sum()
    weights = weights[:, :, None]
    convolved: Picture = signal.fftconvolve(wide, weights, mode="valid", axes=(0, 1))
    return convolved


def defocus_blur(x: Picture, radius: float, random: Generator) -> Picture:
    """A disc, softened by half a pixel."""
    reach = int(np.ceil(radius)) + 1
    end = reach + 1
    rows, columns = np.mgrid[-reach:end, -reach:end]
    # 1 inside, 0 outside, and between them over one pixel
    distance = np.hypot(rows, columns)
    inside = radius + 0.5 - distance
    disc = np.clip(inside, 0, 1)
    return _convolved(x, disc)


def motion_blur(x: Picture, sigma: float, random: Generator) -> Picture:
    """A line at an angle within 45° of the horizontal, fading as a Gaussian to one side."""
    angle = random.uniform(-np.pi / 4, np.pi / 4)
    # the kernel reaches two sigmas from its middle
    length = 2 * sigma
    reach = int(np.ceil(length)) + 1
    side = 2 * reach + 1
    kernel = np.zeros((side, side))

    # points of the line, and their weights
    along = np.linspace(0, length, 8 * reach)
    rows = along * np.sin(angle)
    columns = along * np.cos(angle)
    distances = along / sigma
    weights = np.exp(-(distances**2) / 2)

    for row, column, weight in zip(rows, columns, weights, strict=True):
        # spread bilinearly over the four cells around the point
        r = int(np.floor(row))
        c = int(np.floor(column))
        of_rows = [r + 1 - row, row - r]
        of_columns = [c + 1 - column, column - c]
        # (2, 2)
        fractions = np.outer(of_rows, of_columns)

        top = reach + r
        left = reach + c
        kernel[top : top + 2, left : left + 2] += weight * fractions

    return _convolved(x, kernel)


def glass_blur(x: Picture, sigma: float, random: Generator) -> Picture:
    """Each pixel comes from up to 2.5 sigma away; blurred before and after."""
    h, w = x.shape[:2]
    soft = gaussian_blur(x, sigma, random)
    # (H, W) whole pixels down and to the right
    offsets = random.uniform(-1, 1, (2, h, w)) * 2.5 * sigma
    whole = np.rint(offsets)
    down, right = whole.astype(np.int64)

    # the source of each pixel, clipped at the edges
    own_rows = np.arange(h)[:, None]
    own_columns = np.arange(w)
    rows = (down + own_rows).clip(0, h - 1)
    columns = (right + own_columns).clip(0, w - 1)
    moved = soft[rows, columns]
    return gaussian_blur(moved, sigma, random)


def zoom_blur(x: Picture, zoom: float, random: Generator) -> Picture:
    """The mean of the image and of magnifications of its middle, up to 1 + `zoom`."""
    h, w = x.shape[:2]
    middle_row = (h - 1) / 2
    middle_column = (w - 1) / 2
    # distances from the middle
    from_row = np.arange(h) - middle_row
    from_column = np.arange(w) - middle_column

    total = np.zeros_like(x)
    factors = np.linspace(1, 1 + zoom, 11)
    for factor in factors:
        # a magnified image takes its pixels from nearer to the middle
        rows = from_row / factor + middle_row
        columns = from_column / factor + middle_column
        row_grid, column_grid = np.meshgrid(rows, columns, indexing="ij")
        total += _interpolated(x, row_grid, column_grid)
    return total / len(factors)


def _interpolated(x: Picture, rows: Picture, columns: Picture) -> Picture:
    """The values at these coordinates: bilinear; edge pixels are repeated."""
    channels = []
    for channel in range(3):
        channels.append(
            ndimage.map_coordinates(x[..., channel], [rows, columns], order=1, mode="nearest")
        )
    return np.stack(channels, axis=-1)


def _clouds(shape: tuple[int, ...], roughness: float, random: Generator) -> Picture:
    """(H, W) noise from 0 to 1, with amplitudes that fall as frequency to the power `roughness`."""
    h, w = shape[:2]
    # (H, W/2 + 1): length of the frequency vector; the mean, of frequency 0, is dropped
    down = np.fft.fftfreq(h)[:, None]
    across = np.fft.rfftfreq(w)
    frequency = np.hypot(down, across)
    frequency[0, 0] = np.inf

    white = random.standard_normal((h, w))
    noise = np.fft.rfft2(white)
    amplitudes = frequency**-roughness
    clouds: Picture = np.fft.irfft2(noise * amplitudes, s=(h, w))

    # from 0 to 1; an image of one pixel has no range
    above_least = clouds - clouds.min()
    value_range = max(np.ptp(clouds), 1e-12)
    return above_least / value_range


def fog(x: Picture, amount: float, random: Generator) -> Picture:
    """Clouds are added, then the image is dimmed so that its maximum stays the same."""
    brightest = max(float(x.max()), 1e-3)
    clouds = _clouds(x.shape, 1.7, random)
    # (H, W, 1), the same for all channels
    clouds = clouds[..., None]
    foggy = x + amount * clouds
    return foggy * brightest / (brightest + amount)


def frost(x: Picture, amount: float, random: Generator) -> Picture:
    """Bluish white crystals, thickest where ridges of two cloud fields meet edges of a third."""
    first = _clouds(x.shape, 1.0, random)
    second = _clouds(x.shape, 1.3, random)
    where = _clouds(x.shape, 1.8, random)
    # a ridge is where a field has its middle value
    to_first = np.abs(first - 0.5)
    to_second = np.abs(second - 0.5)
    to_ridge = np.minimum(to_first, to_second)

    needles = np.clip(1 - 6 * to_ridge, 0, 1)
    thickness = np.clip(0.35 + 0.65 * needles, 0, 1)
    density = np.clip(0.4 + where, 0, 1)
    ice = thickness * density

    # (H, W, 1), the same for all channels
    cover = (amount * ice)[..., None]
    bluish_white = np.array([0.88, 0.94, 1.0])
    return x * (1 - cover) + cover * bluish_white


def snow(x: Picture, amount: float, random: Generator) -> Picture:
    """Flakes falling at an angle in front of a whitened, greyer picture."""
    h, w = x.shape[:2]
    # 1.5 pixels for a short side of 224
    size = max(0.5, min(h, w) / 224 * 1.5)

    # flakes cover a quarter of `amount`
    ranks = _smooth_ranks(h, w, size, random)
    above_threshold = ranks - 1 + amount / 4
    flakes = np.clip(above_threshold / 0.02, 0, 1)
    white_flakes = np.repeat(flakes[..., None], 3, axis=2)
    streaks = motion_blur(white_flakes, 2 * size, random)

    # (H, W, 1), lighter than the picture
    mean = x.mean(axis=2, keepdims=True)
    whitened = mean * 1.5 + 0.25
    grey = np.maximum(x, whitened)
    return (1 - amount) * x + amount * grey + streaks


def spatter(x: Picture, fraction: float, random: Generator) -> Picture:
    """Drops of muddy water that cover a fraction of the lens."""
    h, w = x.shape[:2]
    # 4 pixels for a short side of 224
    size = max(0.7, min(h, w) / 224 * 4)

    # the highest ranks, with a soft edge
    ranks = _smooth_ranks(h, w, size, random)
    above_threshold = ranks - 1 + fraction
    drops = np.clip(above_threshold / 0.05, 0, 1)
    cover = drops[..., None]
    mud = np.array([0.25, 0.17, 0.08])
    return x * (1 - cover) + cover * mud


def _smooth_ranks(h: int, w: int, size: float, random: Generator) -> Picture:
    """(H, W) the rank of each pixel in a smooth random field, from 0 to 1."""
    noise = random.standard_normal((h, w))
    field = ndimage.gaussian_filter(noise, size, mode="wrap")

    # the argsort of an argsort is the rank
    order = field.ravel().argsort()
    ranks = order.argsort()
    return ranks.reshape(h, w) / (h * w)


def brightness(x: Picture, more: float, random: Generator) -> Picture:
    """Add `more` to the HSV value; all channels are scaled by one factor, clipped at white."""
    value = x.max(axis=2, keepdims=True)
    lighter = np.clip(value + more, 0, 1)
    # black has no hue to keep, and must not divide by 0
    not_zero = np.maximum(value, 1e-9)
    scaled = x * lighter / not_zero
    return np.where(value > 0, scaled, lighter)


def saturate(x: Picture, more: float, random: Generator) -> Picture:
    """Saturation × (1 + more)."""
    value = x.max(axis=2, keepdims=True)
    low = x.min(axis=2, keepdims=True)
    saturation = (value - low) / np.maximum(value, 1e-9)

    # the factor for the other channels' distance from the brightest one
    wanted = np.clip(saturation * (1 + more), 0, 1)
    factor = wanted / np.maximum(saturation, 1e-9)
    # grey stays grey
    factor = np.where(saturation > 0, factor, 1)
    return value - (value - x) * factor


def contrast(x: Picture, less: float, random: Generator) -> Picture:
    """Each channel's distance from its mean is multiplied by 1 − `less`."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * (1 - less) + mean


def elastic_transform(x: Picture, pixels: float, random: Generator) -> Picture:
    """Pixels are displaced by a smooth field, by `pixels` on average."""
    h, w = x.shape[:2]
    smoothness = 0.04 * min(h, w)
    # (H, W) down, and to the right
    moves: list[Any] = []
    for _ in range(2):
        noise = random.uniform(-1, 1, (h, w))
        field = ndimage.gaussian_filter(noise, smoothness, mode="reflect")
        root_mean_square = np.sqrt((field**2).mean())
        unit = field / max(root_mean_square, 1e-12)
        moves.append(unit * pixels)

    own_rows = np.arange(h)[:, None]
    own_columns = np.arange(w)
    rows = own_rows + moves[0]
    columns = own_columns + moves[1]
    return _interpolated(x, rows, columns)


def pixelate(x: Picture, less: float, random: Generator) -> Picture:
    """Scale the sides by 1 − `less`, then enlarge to the original size."""
    image = _as_image(x)
    left = 1 - less
    fewer = []
    for length in image.size:
        fewer.append(max(1, round(length * left)))
    small = image.resize(fewer, Image.Resampling.BOX)
    large = small.resize(image.size, Image.Resampling.NEAREST)
    pixels = np.asarray(large, dtype=np.float64)
    return pixels / 255


def jpeg_compression(x: Picture, loss: float, random: Generator) -> Picture:
    """JPEG of quality 100 − `loss`."""
    file = BytesIO()
    image = _as_image(x)
    quality = round(100 - loss)
    image.save(file, "JPEG", quality=quality)

    decoded = Image.open(file)
    pixels = np.asarray(decoded, dtype=np.float64)
    return pixels / 255


def _as_image(x: Picture) -> Image.Image:
    """Pixels from 0 to 1 as an 8-bit image."""
    levels = (x * 255).round()
    return Image.fromarray(levels.astype(np.uint8))
