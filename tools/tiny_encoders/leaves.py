"""Dead-leaves images: overlapping opaque shapes whose sizes follow a power law (Lee, Mumford and Huang, 2001).

They share edges, occlusion and scale invariance with photographs and show no scene at all, which an autoencoder trained
on a handful of videos lacks: without them it won 1.6 dB over block PCA on unseen clips, against 3.1 dB on its own.
"""

from __future__ import annotations

import cv2
import numpy as np

_EXPONENT = 2.0  # of the cumulative size distribution: the scale-invariant one
_COLOURS = 40


def dead_leaves(rng: np.random.Generator, palette_NC: np.ndarray, size: tuple[int, int] = (384, 576)) -> np.ndarray:
    """One image (H, W, 3) uint8: 250 to 900 textured, shaded leaves in colours drawn from ``palette_NC`` (N, 3)."""
    textures = [_noise(rng, size, slope) for slope in rng.uniform(0.6, 1.8, 3)]
    colours = palette_NC[rng.integers(len(palette_NC), size=_COLOURS)].astype(np.float32)
    image = colours[0] + textures[0][..., None] * rng.uniform(0, 35) * rng.uniform(0.7, 1.3, 3)
    for radius in _radii(rng, int(rng.integers(250, 900))):
        coverage = _shape(rng, radius, size)
        left, top, columns, rows = cv2.boundingRect(coverage)
        if not columns:
            continue
        window = slice(top, top + rows), slice(left, left + columns)
        mask = coverage[window].astype(np.float32) / 255
        if rng.random() < 0.15:  # out of focus
            mask = cv2.GaussianBlur(mask, (0, 0), float(rng.uniform(0.7, 4)))
        light = np.linspace(-1, 1, columns)[None] * rng.uniform(-40, 40)
        light = light + np.linspace(-1, 1, rows)[:, None] * rng.uniform(-40, 40)
        texture = textures[int(rng.integers(3))][window][..., None] * rng.uniform(0, 1) ** 2 * 60
        leaf = colours[int(rng.integers(_COLOURS))] + texture * rng.uniform(0.6, 1.4, 3) + light[..., None]
        image[window] = image[window] * (1 - mask[..., None]) + leaf * mask[..., None]
    if rng.random() < 0.25:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.5, 2.5)))
    if rng.random() < 0.5:  # uneven light over the scene
        image = image * (1 + 0.25 * _noise(rng, size, 2.2)[..., None] * rng.random())
    return np.asarray(np.clip(image, 0, 255), np.uint8)


def _radii(rng: np.random.Generator, count: int) -> np.ndarray:
    smallest, largest = rng.uniform(2, 6), rng.uniform(90, 260)
    low, high = smallest**-_EXPONENT, largest**-_EXPONENT
    radii: np.ndarray = (low + rng.random(count) * (high - low)) ** (-1 / _EXPONENT)
    return np.sort(radii)[::-1] if rng.random() < 0.3 else radii


def _shape(rng: np.random.Generator, radius: float, size: tuple[int, int]) -> np.ndarray:
    """Coverage (H, W) uint8 of an ellipse or a rough polygon at a random place, often cut by the border."""
    coverage = np.zeros(size, np.uint8)
    centre = rng.random(2) * size[::-1]
    stretch = float(np.exp(rng.uniform(-1.2, 1.2)))
    if rng.random() < 0.45:
        axes = 2 * radius * stretch, 2 * radius / stretch
        box = ((float(centre[0]), float(centre[1])), (float(axes[0]), float(axes[1])), float(rng.random() * 360))
        cv2.ellipse(coverage, box, 255, -1, cv2.LINE_AA)
        return coverage
    corners = int(rng.integers(3, 9))
    angles = np.sort(rng.random(corners)) * 2 * np.pi
    reach = radius * rng.uniform(0.5, 1.4, (corners, 1))
    points = centre + reach * np.stack([np.cos(angles) * stretch, np.sin(angles) / stretch], axis=1)
    cv2.fillPoly(coverage, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return coverage


def _noise(rng: np.random.Generator, size: tuple[int, int], slope: float) -> np.ndarray:
    """1/f^slope noise of unit deviation."""
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal(size)) / np.maximum(frequency, 2) ** slope
    noise = np.fft.irfft2(spectrum, size)
    return np.asarray(noise / noise.std(), np.float32)
