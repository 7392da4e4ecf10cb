"""The motion-control report: is what moves what was asked for, and which value of the control gives how much?

Each picture is animated at every value of the method's control of motion with the same seeds, and the motion of what
came out is measured. The mean over pictures, made monotone, is inverted: then a strength of 0..1 is linear in motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr
from scipy.stats import t as student

from cinemo.media.motion import value_at
from cinemo.types import InputError

INTERVAL = (0.05, 0.95)
STRENGTHS = 20  # at which a strength is judged
_NOTHING = 1e-6  # of motion, 1 - SSIM
FLAT = 0.02  # of the whole range: less than that between neighbours is no change


@dataclass(frozen=True)
class Calibration:
    """Measured motion of generated videos.

    Attributes:
        control: the control of motion that was set.
        values: of it, from the least motion to the most.
        motion_PLS: (pictures, values, seeds), 1 - mean SSIM of neighbouring frames (arXiv 2407.15642, section 3.2).
        speed_PLS: the same of the mean length of optical flow, pixels a frame.
    """

    control: str
    values: tuple[float, ...]
    motion_PLS: np.ndarray
    speed_PLS: np.ndarray

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """What `to_json` made.

        Raises:
            InputError: an older calibration, without seeds; or something else.
        """
        try:
            tables = (np.array(stored[name], np.float64) for name in ("motion_of_seeds", "speed_of_seeds"))
            return cls(stored["control"], tuple(stored["values"]), *tables)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"calibration.json: {error} is missing or wrong; measure the bundle again") from None

    @property
    def motion_PL(self) -> np.ndarray:
        """Mean over seeds."""
        return np.asarray(self.motion_PLS.mean(2))

    @property
    def mean_L(self) -> np.ndarray:
        return np.asarray(self.motion_PL.mean(0))

    @property
    def curve_L(self) -> np.ndarray:
        """The mean, made monotone (isotonic regression): what a value is said to give."""
        return np.asarray(isotonic_regression(self.mean_L).x)

    @property
    def interval_L(self) -> tuple[np.ndarray, np.ndarray]:
        """Between which motions nine of ten videos of a further picture are, by value.

        Of n pictures the k-th smallest is expected to exceed k / (n + 1) of all others, not k / n: the quantiles lie as
        much further out. Fewer than 19 have no such quantiles: there it is the prediction interval of a normal
        distribution (Student's t), and of a single picture, which tells nothing of others, all that motion can be.
        """
        count = len(self.motion_PLS)
        if count < 2:
            return np.zeros(len(self.values)), np.ones(len(self.values))
        levels_ = (np.array(INTERVAL) * (count + 1) - 1) / (count - 1)
        if levels_[0] >= 0:
            low, high = np.quantile(self.motion_PLS, levels_, axis=(0, 2))
        else:
            seeds = self.motion_PLS.shape[2]
            within_L = self.motion_PLS.var(2, ddof=1).mean(0) * (1 - 1 / seeds) if seeds > 1 else 0.0
            spread_L = np.sqrt((self.motion_PL.var(0, ddof=1) + within_L) * (1 + 1 / count))
            reach_L = float(student.ppf(INTERVAL[1], count - 1)) * spread_L
            low, high = np.maximum(self.mean_L - reach_L, 0), np.minimum(self.mean_L + reach_L, 1)
        return np.minimum(low, self.curve_L), np.maximum(high, self.curve_L)

    @property
    def span(self) -> float:
        """Motion at the most minus motion at the least."""
        return float(self.curve_L[-1] - self.curve_L[0])

    def value_for(self, strength: float) -> float:
        """The control's value whose motion is closest to ``strength`` (0..1) of the way from the least to the most."""
        return value_at(strength, self.values, {"values": self.values, "curve": self.curve_L})

    @property
    def spearman_P(self) -> tuple[float | None, ...]:
        """Rank correlation of value and motion within each picture; None where nothing moved at all."""
        places = range(len(self.values))  # larger is more motion, whatever the values are
        return tuple(rank_correlation(places, row) for row in self.motion_PL.tolist())

    @property
    def spearman(self) -> float | None:
        known = [value for value in self.spearman_P if value is not None]
        return float(np.mean(known)) if known else None

    @property
    def monotone_share(self) -> float:
        """Share of pictures whose motion never falls by more than `FLAT` of their range as the value rises."""
        ranges = np.ptp(self.motion_PL, axis=1)
        falls = -np.diff(self.motion_PL, axis=1).min(1, initial=0.0)
        return float(((falls <= FLAT * ranges) & (ranges > 0)).mean())

    @property
    def dead(self) -> tuple[float, ...]:
        """Values at the lower end that give no more motion than the least."""
        return self._like(0)

    @property
    def saturated(self) -> tuple[float, ...]:
        """Values at the upper end that give no less motion than the most."""
        return self._like(-1)

    def _like(self, end: int) -> tuple[float, ...]:
        close = np.abs(self.curve_L - self.curve_L[end]) <= FLAT * self.span
        alike = tuple(value for value, is_close in zip(self.values, close, strict=True) if is_close)
        return alike if len(alike) > 1 else ()

    def obedience(self) -> dict[str, float] | None:
        """How well a strength of 0..1 says what comes out, each picture judged by the map of all the others. None of
        fewer than 4 pictures.

        Returns:
            ``r2``: of requested and achieved motion, mean over pictures, at `STRENGTHS` strengths; ``r2_of_videos``:
            of single videos, which differ by picture; ``coverage``: share of videos in the interval; ``monotone``: see
            `monotone_share`.
        """
        count = len(self.motion_PLS)
        if count < 4:
            return None
        strengths = np.linspace(0, 1, STRENGTHS)
        asked_PT, achieved_PTS, covered_PTS = [], [], []
        for picture in range(count):
            map_ = self._of(np.delete(np.arange(count), picture))
            curve, (low, high) = map_.curve_L, map_.interval_L
            places = [self.values.index(map_.value_for(float(strength))) for strength in strengths]
            videos_TS = self.motion_PLS[picture, places]
            asked_PT.append(curve[0] + strengths * (curve[-1] - curve[0]))
            achieved_PTS.append(videos_TS)
            covered_PTS.append((videos_TS >= low[places, None]) & (videos_TS <= high[places, None]))
        asked, achieved = np.array(asked_PT), np.array(achieved_PTS)
        return {
            "r2": _explained(asked.mean(0), achieved.mean((0, 2))),
            "r2_of_videos": _explained(asked[..., None], achieved),
            "coverage": float(np.mean(covered_PTS)),
            "monotone": self.monotone_share,
        }

    def _of(self, pictures: np.ndarray) -> Calibration:
        return Calibration(self.control, self.values, self.motion_PLS[pictures], self.speed_PLS[pictures])

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval_L
        strengths = [round(float(strength), 4) for strength in np.linspace(0, 1, STRENGTHS + 1)]
        return {
            "control": self.control,
            "values": list(self.values),
            "motion": self.motion_PL.tolist(),
            "mean_motion": self.mean_L.tolist(),
            "curve": self.curve_L.tolist(),
            "interval": [low.tolist(), high.tolist()],
            "mean_speed": self.speed_PLS.mean((0, 2)).tolist(),
            "spearman": self.spearman,
            "spearman_per_image": list(self.spearman_P),
            "dead": list(self.dead),
            "saturated": list(self.saturated),
            "obedience": self.obedience(),
            "strengths": [[strength, self.value_for(strength)] for strength in strengths],
            "motion_of_seeds": self.motion_PLS.tolist(),
            "speed_of_seeds": self.speed_PLS.tolist(),
        }


@dataclass(frozen=True)
class Drift:
    """A bundle's motion beside that of another one, with the same control and pictures.

    ``span_ratio``: how far the control reaches, of how far it reached, None where it never reached anywhere;
    ``motion_ratio``: mean motion over all values.
    """

    span_ratio: float | None
    motion_ratio: float
    curve_ratio: tuple[float, ...]

    @property
    def has_died(self) -> bool:
        """Whether less than half of the motion is left."""
        return self.motion_ratio < 0.5

    @property
    def has_collapsed(self) -> bool:
        """Whether less than half of the motion, or of the control's reach, is left."""
        return self.has_died or (self.span_ratio is not None and self.span_ratio < 0.5)

    def verdict(self, before: str) -> str:
        """In words, beside what is called ``before``."""
        found = "motion has died" if self.has_died else "motion is alive"
        if self.has_collapsed and not self.has_died:
            found = "the control has lost its reach"
        reach = "whose control reached nowhere" if self.span_ratio is None else f"{self.span_ratio:.0%} of the reach"
        return f"{found}: {self.motion_ratio:.0%} of the motion of {before}, {reach}"


def drift(calibration: Calibration, before: Calibration) -> Drift:
    """What has become of motion, for example by fine-tuning.

    Raises:
        InputError: they are of other controls or values.
    """
    if (calibration.control, calibration.values) != (before.control, before.values):
        raise InputError(
            f"calibrations are of {calibration.control} at {list(calibration.values)} and of {before.control} at "
            f"{list(before.values)}, expected the same"
        )
    tiny = _NOTHING
    ratios = tuple(float(a / max(b, tiny)) for a, b in zip(calibration.mean_L, before.mean_L, strict=True))
    mean = float(calibration.mean_L.mean() / max(before.mean_L.mean(), tiny))
    return Drift(calibration.span / before.span if before.span > tiny else None, mean, ratios)


def levels(values: Sequence[float], count: int) -> tuple[float, ...]:
    """``count`` of a control's values from the first to the last, all where it has fewer."""
    places = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return tuple(values[place] for place in places)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one of the two is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)


def _explained(asked: np.ndarray, achieved: np.ndarray) -> float:
    """1 - error / variance of what was achieved, with nothing fitted: an offset counts as an error."""
    if np.ptp(asked) <= _NOTHING:  # a control that changes nothing explains nothing
        return 0.0
    variance = float(np.square(achieved - achieved.mean()).sum())
    return 1 - float(np.square(achieved - asked).sum()) / variance if variance else 0.0
