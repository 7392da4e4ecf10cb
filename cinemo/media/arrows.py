"""Drawn arrows to a dense motion field (Controllable Longer Image Animation, arXiv 2405.17306, equations 5-7).

Fields are float64 (2, H, W): channel 0 to the right, 1 downwards, in pixels a frame. An arrow is a row x0, y0, x1, y1
in pixels: what is at its start moves towards its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cinemo.types import InputError

SIGMA_AT_512 = 170.0  # pixels, where the shorter side has 512
MAX_ARROWS = 64


@dataclass(frozen=True)
class Spread:
    """How arrows reach the pixels around them.

    Attributes:
        average: the mean of the arrows by weight, so that two parallel ones move no faster than one and one of no
            length pins what is around it; else their weighted sum (equation 6).
        keep: what must exceed ``threshold`` for a pixel to move: the largest weight of an arrow there, or the length
            of the vector. The paper compares a vector with a number (equation 7).
        threshold: the paper's R.
    """

    average: bool
    keep: Literal["weight", "length"]
    threshold: float = 0.05


PAPER = Spread(average=False, keep="length")
"""Equations 6 and 7. At 512x512 an arrow of ten pixels in the middle reaches every pixel of the picture."""
PRODUCT = Spread(average=True, keep="weight")
"""The default, as single-image fluid animation does it (arXiv 2112.03051)."""


def check_arrows(arrows: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """Arrows as (N, 4) float64.

    Raises:
        InputError: not four finite numbers each, a start outside a picture of ``size`` (height, width), too many.
    """
    if len(arrows) > MAX_ARROWS:
        raise InputError(f"arrows: got {len(arrows)}, expected at most {MAX_ARROWS}")
    height, width = size
    for number, arrow in enumerate(arrows):
        if len(arrow) != 4 or not all(np.isfinite(arrow)):
            raise InputError(f"arrow {number + 1}: got {list(arrow)}, expected four numbers x0,y0,x1,y1")
        x, y = arrow[:2]
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise InputError(
                f"arrow {number + 1}: starts at {x:g},{y:g}, expected a place in the picture, which is {width}x{height}"
            )
    return np.array(arrows, np.float64).reshape(len(arrows), 4)


def sparse_field(arrows_N4: np.ndarray, strength_N: np.ndarray | float, size: tuple[int, int]) -> np.ndarray:
    """The way of each arrow times its strength at the pixel where it starts, zeros elsewhere (equation 5).

    The paper has the end in the place of the way, which is no displacement. Arrows that start together add.
    """
    field_2HW = np.zeros((2, *size))
    for (x, y), way in _hints(arrows_N4, strength_N, size).items():
        field_2HW[:, y, x] = way
    return field_2HW


def dense_field(
    arrows_N4: np.ndarray,
    strength_N: np.ndarray | float,
    size: tuple[int, int],
    spread: Spread = PRODUCT,
    sigma: float | None = None,
    mask_HW: np.ndarray | None = None,
) -> np.ndarray:
    """The field of all pixels: each arrow acts around its start with weight exp(-(distance / sigma)^2).

    Args:
        arrows_N4: see `check_arrows`. Zeros come of none.
        strength_N: a factor for each, or one for all: 1 / (F - 1) where an arrow says the way over F frames.
        size: (height, width).
        sigma: pixels; None: 170 at a shorter side of 512, in proportion.
        mask_HW: 0..1, what may move; None: everything.
    """
    height, width = size
    if mask_HW is not None and mask_HW.shape != size:
        raise InputError(f"mask is {mask_HW.shape[1]}x{mask_HW.shape[0]}, expected {width}x{height}")
    field_2HW, total, largest = np.zeros((2, *size)), np.zeros(size), np.zeros(size)
    sigma = SIGMA_AT_512 * min(size) / 512 if sigma is None else sigma
    rows, columns = np.arange(height), np.arange(width)
    for (x, y), way in _hints(arrows_N4, strength_N, size).items():
        weight = np.outer(np.exp(-(((rows - y) / sigma) ** 2)), np.exp(-(((columns - x) / sigma) ** 2)))
        field_2HW += way[:, None, None] * weight
        total += weight
        np.maximum(largest, weight, out=largest)
    if spread.average:
        field_2HW /= np.maximum(total, np.finfo(np.float64).tiny)
    measure = largest if spread.keep == "weight" else np.hypot(*field_2HW)
    field_2HW *= measure > spread.threshold
    return field_2HW if mask_HW is None else field_2HW * mask_HW


def _hints(
    arrows_N4: np.ndarray, strength_N: np.ndarray | float, size: tuple[int, int]
) -> dict[tuple[int, int], np.ndarray]:
    """By pixel (x, y), the sum of the ways that start there; a way of no length is a hint as well."""
    hints: dict[tuple[int, int], np.ndarray] = {}
    height, width = size
    for (x0, y0, x1, y1), strength in zip(arrows_N4, np.broadcast_to(strength_N, len(arrows_N4)), strict=True):
        pixel = min(max(round(x0), 0), width - 1), min(max(round(y0), 0), height - 1)
        hints[pixel] = hints.get(pixel, np.zeros(2)) + strength * np.array([x1 - x0, y1 - y0])
    return hints
