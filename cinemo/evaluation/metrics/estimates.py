"""Figures with their uncertainty: an interval, and for distances between sets what half of the videos give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from cinemo.evaluation.metrics.distributions import (
    GROUPS,
    Population,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from cinemo.types import InputError

HALVES = 20
_RESAMPLES = 2000
_LEVEL = 0.975  # two-sided 95%


@dataclass(frozen=True)
class Estimate:
    """``low``, ``high``: 95% interval, None where too few videos give one. ``at_half``: the same figure with half as
    many videos (mean over several halves), of distances between sets, which fall as their number grows. ``is_linear``:
    whether they fall as 1 / N, which takes more rows than features, in halves too."""

    value: float
    low: float | None
    high: float | None
    videos: int
    at_half: float | None = None
    is_linear: bool = True

    @property
    def extrapolated(self) -> float | None:
        """To infinitely many videos, where the bias is proportional to 1 / N (arXiv 1911.07023)."""
        return 2 * self.value - self.at_half if self.at_half is not None and self.is_linear else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"extrapolated": self.extrapolated}


def mean_of(values: Mapping[str, float], seed: int = 0) -> Estimate:
    """Mean of a figure by video id, with the interval of a bootstrap over videos.

    Percentiles (Efron 1979), as much further out as Student's t is for so few videos (Hesterberg, arXiv 1411.5279).
    Of 2 to 4 videos it is still too narrow: it ends at what was seen.
    """
    if not values:
        raise InputError("mean of no videos, expected at least one")
    ordered = np.array([values[video] for video in sorted(values)], np.float64)
    mean = math.fsum(ordered) / len(ordered)
    if len(ordered) < 2:
        return Estimate(mean, None, None, len(ordered))
    draws = np.random.default_rng(seed)
    resampled = [float(ordered[draws.integers(len(ordered), size=len(ordered))].mean()) for _ in range(_RESAMPLES)]
    count = len(ordered)
    tail = float(norm.cdf(-math.sqrt(count / (count - 1)) * student.ppf(_LEVEL, count - 1)))
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Estimate(mean, float(low), float(high), len(ordered))


def frechet(real: Population, generated: Population) -> Estimate:
    """`frechet_distance` of two sets: FID, FVD, whatever the extractor makes it."""
    estimate = _from_halves(
        lambda groups: frechet_distance(real.moments(groups), generated.moments(groups)), real, generated
    )
    fewest = min((real.moments(), generated.moments()), key=lambda moments: moments.rows)
    return replace(estimate, is_linear=fewest.rows / 2 > len(fewest.mean))


def kernel(real: Population, generated: Population, gamma: float | None = None) -> Estimate:
    """`kernel_distance` of two sets that kept their rows: KID, KVD. Unbiased: halves give the same on average."""
    return _from_halves(
        lambda groups: kernel_distance(real.rows(groups), generated.rows(groups), gamma), real, generated
    )


def inception(generated: Population) -> Estimate:
    """`inception_score` of a set that kept its rows, which are logits."""
    return _from_halves(lambda groups: inception_score(generated.rows(groups)), generated)


def _from_halves(figure: Callable[[Sequence[int]], float], *sets: Population) -> Estimate:
    """A figure of all videos, and its spread over halves of them (delete-half jackknife, Shao and Wu 1989).

    Not a bootstrap: that draws videos twice, which a distance between sets takes for lack of variety. What one half
    misses is as much as the whole misses of the world, so the standard deviation over halves is that of the whole, with
    the degrees of freedom of `GROUPS` parts (Student's t). Real and generated videos share ids, and so halves: a video
    and the clip it began from are drawn together.
    """
    videos = min(map(len, sets))
    value = figure(range(GROUPS))
    halves = [half for half in _halves() if all(each.count(half) >= 2 for each in sets)]
    if len(halves) < HALVES:
        return Estimate(value, None, None, videos)
    values = np.array([figure(half) for half in halves])
    error = float(student.ppf(_LEVEL, GROUPS - 1) * values.std(ddof=1))
    return Estimate(value, value - error, value + error, videos, float(values.mean()))


def _halves() -> list[list[int]]:
    """The same `HALVES` selections of half the groups every time, each with its complement."""
    draws, chosen = np.random.default_rng(0), list[list[int]]()
    while len(chosen) < HALVES:
        half = sorted(draws.permutation(GROUPS)[: GROUPS // 2].tolist())
        if half not in chosen:
            chosen += [half, [group for group in range(GROUPS) if group not in half]]
    return chosen
