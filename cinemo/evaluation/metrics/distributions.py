"""Distances between two sets of feature vectors: Fréchet distance, kernel distance and Inception score.

Their sums are exact: features are taken to a grid on which no addition rounds, so that a set's moments are the same to
the last bit whatever the order of videos and however they were shared among workers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from cinemo.types import InputError

# Features are split into a coarse part, multiples of 2**-9, and the rest, multiples of 2**-26: products of two are
# whole numbers of at most 37 bits on a grid of their own, and float64 adds 2**16 and more of them without rounding.
_COARSE, _FINE, LIMIT = 2.0**-9, 2.0**-26, 2.0**9
_EXACT = 2.0**53

GROUPS = 8


@dataclass
class Moments:
    """Exact sums of feature rows (N, D) and of their outer products; D is known with the first rows.

    Rows count to 2**-27, absolutely, and their magnitudes stay below `LIMIT`.
    """

    rows: int = 0
    _sums: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, features_ND: np.ndarray) -> Self:
        """Moments of one batch."""
        moments = cls()
        moments.add(features_ND)
        return moments

    def add(self, features_ND: np.ndarray) -> None:
        """Count further rows.

        Raises:
            InputError: of another width, not finite, or beyond `LIMIT`.
        """
        features = np.asarray(features_ND, np.float64)
        if features.ndim != 2:
            raise InputError(f"features: got shape {features.shape}, expected (rows, width)")
        largest = float(np.abs(features).max(initial=0.0))
        if not largest < LIMIT:  # neither is what is not a number
            raise InputError(f"features: the largest is {largest}, expected finite ones below {LIMIT:g}; scale them")
        coarse = np.rint(features / _COARSE) * _COARSE
        fine = np.rint((features - coarse) / _FINE) * _FINE
        self._merge(
            len(features),
            {
                "coarse": coarse.sum(0),
                "fine": fine.sum(0),
                "coarse_coarse": coarse.T @ coarse,
                "coarse_fine": coarse.T @ fine,
                "fine_fine": fine.T @ fine,
            },
        )

    def __add__(self, other: Moments) -> Moments:
        total = Moments()
        for part in (self, other):
            total._merge(part.rows, part._sums)
        return total

    @property
    def mean(self) -> np.ndarray:
        """(D,).

        Raises:
            InputError: of no rows.
        """
        if not self.rows:
            raise InputError("mean of no feature rows, expected at least one")
        return np.asarray((self._sums["coarse"] + self._sums["fine"]) / self.rows)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), with N - 1.

        Raises:
            InputError: of fewer than two rows.
        """
        if self.rows < 2:
            raise InputError(f"covariance of {self.rows} feature rows, expected at least 2")
        sums = self._sums
        products = sums["coarse_coarse"] + (sums["coarse_fine"] + sums["coarse_fine"].T) + sums["fine_fine"]
        return np.asarray((products - self.rows * np.outer(self.mean, self.mean)) / (self.rows - 1))

    def _merge(self, rows: int, sums: Mapping[str, np.ndarray]) -> None:
        if not rows:
            return
        if self._sums and self._sums["coarse"].shape != sums["coarse"].shape:
            raise InputError(
                f"features have width {len(sums['coarse'])}, expected {len(self._sums['coarse'])} as those before"
            )
        self.rows += rows
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in sums.items()}
        # The diagonal bounds every other entry, and only grows.
        if self._sums["coarse_coarse"].diagonal().max() >= _EXACT * _COARSE**2:
            raise InputError(f"{self.rows} feature rows are too large to add exactly; scale them down")


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians with these moments (Dowson and Landau 1982): FID, FVD.

    |m - m'|^2 + tr(S + S' - 2 (S S')^1/2), where the last is the sum of singular values of S^1/2 S'^1/2: that exists
    with fewer rows than features, too.
    """
    return frechet_of(a.mean, a.covariance, b.mean, b.covariance)


def frechet_of(mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray) -> float:
    """`frechet_distance` from means (D,) and covariances (D, D)."""
    shared = np.linalg.svd(_root(covariance_a) @ _root(covariance_b), compute_uv=False).sum()
    apart = float(np.square(mean_a - mean_b).sum())
    return apart + float(np.trace(covariance_a) + np.trace(covariance_b) - 2 * shared)


def _root(covariance_DD: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix without negative eigenvalues; those that are rounding errors are none."""
    values, vectors = np.linalg.eigh(covariance_DD)
    smallest = max(0.0, values[-1]) * len(values) * np.finfo(np.float64).eps
    return np.asarray((vectors * np.sqrt(np.where(values > smallest, values, 0))) @ vectors.T)


def kernel_distance(a_ND: np.ndarray, b_MD: np.ndarray, gamma: float | None = None) -> float:
    """Squared maximum mean discrepancy with the kernel (gamma x.y + 1)^3, unbiased (Binkowski et al. 2018): KID, KVD.

    Args:
        gamma: None is 1 / D, as the common code has it; the FVD paper (arXiv 1812.01717) writes 1.
    """
    a, b = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    if a.shape[1:] != b.shape[1:] or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(f"kernel distance of features {a.shape} and {b.shape}, expected equal widths and finite ones")
    if min(len(a), len(b)) < 2:
        raise InputError(f"kernel distance of {len(a)} and {len(b)} feature rows, expected at least 2 of each")
    scale = 1 / a.shape[1] if gamma is None else gamma

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray((scale * (x @ y.T) + 1) ** 3)

    def within(x: np.ndarray) -> float:
        products = kernel(x, x)
        return float((products.sum() - np.trace(products)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def inception_score(logits_NK: np.ndarray) -> float:
    """exp of the mean KL divergence of class probabilities from their mean (arXiv 1606.03498); 1 to K.

    Over all rows at once, not the mean over ten parts of some code, which depends on the rows' order.
    """
    logits = np.asarray(logits_NK, np.float64)
    if not len(logits) or not np.isfinite(logits).all():
        raise InputError(f"Inception score of {len(logits)} rows of logits, expected at least one, and finite ones")
    logits = logits - logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    chances = np.exp(logs)
    mean = chances.mean(0)
    seen = mean > 0  # a class whose chance is 0 in every row adds nothing
    return math.exp(float((chances[:, seen] * (logs[:, seen] - np.log(mean[seen]))).sum(1).mean()))


class Population:
    """What an extractor says of one set of videos, in `GROUPS` parts by the videos' ids; parts that workers made are
    joined with `+`.

    Args:
        keep_rows: also keep every row, for what moments do not tell: kernel distances and Inception scores.
    """

    def __init__(self, keep_rows: bool = False) -> None:
        self._moments = [Moments() for _ in range(GROUPS)]
        self._videos: dict[str, int] = {}
        self._rows: dict[str, np.ndarray] | None = {} if keep_rows else None

    def add(self, video: str, features_ND: np.ndarray, group: int | None = None) -> None:
        """A video's rows: one (of video features) or as many as it has frames.

        Args:
            group: the part that it counts to; None: as its id says, which leaves parts of few videos unequal.

        Raises:
            InputError: the id is there already, or as `Moments.add`.
        """
        self._check_new(video)
        group = group_of(video) if group is None else group
        self._moments[group].add(features_ND)
        self._videos[video] = group
        if self._rows is not None:
            self._rows[video] = np.asarray(features_ND)

    def __add__(self, other: Population) -> Population:
        joined = Population()
        for video in other._videos:
            self._check_new(video)
        joined._moments = [a + b for a, b in zip(self._moments, other._moments, strict=True)]
        joined._videos = self._videos | other._videos
        kept = [each._rows for each in (self, other) if len(each)]  # an empty one has nothing to keep
        if all(rows is not None for rows in kept):
            joined._rows = {video: row for rows in kept if rows is not None for video, row in rows.items()}
        return joined

    def __len__(self) -> int:
        return len(self._videos)

    def count(self, groups: Iterable[int]) -> int:
        """Videos in some groups."""
        chosen = set(groups)
        return sum(group in chosen for group in self._videos.values())

    def moments(self, groups: Iterable[int] = range(GROUPS)) -> Moments:
        return sum((self._moments[group] for group in groups), Moments())

    def rows(self, groups: Iterable[int] = range(GROUPS)) -> np.ndarray:
        """(N, D), in the order of the videos' ids."""
        assert self._rows is not None, "made without keep_rows"
        chosen = set(groups)
        return np.concatenate([self._rows[video] for video in sorted(self._rows) if self._videos[video] in chosen])

    def _check_new(self, video: str) -> None:
        if video in self._videos:
            raise InputError(f"video {video} is there twice; ids must differ")


def group_of(video: str) -> int:
    """Of `GROUPS`, decided by the id alone."""
    return zlib.crc32(video.encode()) % GROUPS


def group_of_number(number: int) -> int:
    """Of `GROUPS`, by a video's place among all. Of each 8 in a row every group gets one, in an order of chance: halves
    have equally many, and what comes round in the list (kinds, classes) falls into all of them."""
    block, place = divmod(number, GROUPS)
    return int(np.random.default_rng([0, block]).permutation(GROUPS)[place])
