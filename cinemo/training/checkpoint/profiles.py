"""Power-function averages of weights, and how any length of them follows from a few (arXiv 2312.02696, section 3).

The average of exponent g after n steps weighs the weights of step s by (s^(g+1) - (s-1)^(g+1)) / n^(g+1), its profile:
it reaches back over a constant share of the training, however long that becomes. Its width is the deviation of the
profile as a share of n. A wanted profile is approximated by a sum of stored ones, by least squares; the same sum of
the stored averages is then the average of that width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NARROWEST, WIDEST = 0.005, 0.28  # the profile of width 1 / sqrt(12) = 0.289 is flat
_PLACES = 20_000  # of a training at which profiles are compared: each step, up to so many


def exponent(width: float) -> float:
    """g of a profile of this width: the only root above -1/2 of width^2 (g+2)^2 (g+3) = g + 1."""
    squares = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - squares, 12.0 - squares])
    return max(float(root.real) for root in roots if abs(root.imag) < 1e-6 * max(1.0, abs(root.real)))


def share_of_new(count: float, g: float) -> float:
    """How much of the newest weights step ``count`` (the first is 1) takes into the average."""
    return 1.0 - math.pow(1.0 - 1.0 / count, g + 1.0)


@dataclass(frozen=True)
class Profile:
    """Of the average of this width after ``steps`` optimiser steps."""

    width: float
    steps: int

    def up_to(self, places: np.ndarray) -> np.ndarray:
        """How much weight lies on the steps 1..s, for each s of ``places``."""
        reached = np.minimum(places / self.steps, 1.0)
        return np.asarray(reached ** (exponent(self.width) + 1.0))


def coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Of each stored average in the wanted one; they sum to 1. And what is left: the distance between the sum's profile
    and the wanted one, as a share of the latter's size (root of the sum of squares over steps).
    """
    last = max(profile.steps for profile in (*stored, wanted))
    places = np.unique(np.linspace(0, last, min(last, _PLACES) + 1).round())
    # Of several steps that are compared as one, each has the mean of their weight.
    scale = np.sqrt(np.diff(places))
    columns = np.stack([np.diff(profile.up_to(places)) / scale for profile in stored], axis=1)
    target = np.diff(wanted.up_to(places)) / scale
    anchor = int(np.argmin([abs(math.log(profile.width / wanted.width)) for profile in stored]))
    others = np.delete(columns, anchor, axis=1) - columns[:, anchor : anchor + 1]
    # What hardly changes the sum is left out: such coefficients are large, and multiply the rounding of what is stored.
    solved = np.linalg.lstsq(others, target - columns[:, anchor], rcond=1e-5)[0]
    found = np.insert(solved, anchor, 1.0 - solved.sum())
    off = float(np.linalg.norm(columns @ found - target) / np.linalg.norm(target))
    return found.tolist(), off
