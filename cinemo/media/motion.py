"""How much a clip moves: mean SSIM of adjacent frames (Cinemo, arXiv 2407.15642, eq. 2) and its 20 motion buckets."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from cinemo.config import MOTION_BUCKETS
from cinemo.types import InputError

UNIFORM_EDGES = tuple(round(k / MOTION_BUCKETS, 6) for k in range(1, MOTION_BUCKETS))

# Wang et al. 2004: 11-tap Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, here for values 0..255.
_WINDOW, _SIGMA = 11, 1.5
_KERNEL = cv2.getGaussianKernel(_WINDOW, _SIGMA, cv2.CV_32F)
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_LUMA = np.array([[0.299, 0.587, 0.114]], np.float32)  # ITU-R BT.601
_MIDDLE = 128.0
_CENTRED_LUMA = np.append(_LUMA, [[-_MIDDLE]], 1).astype(np.float32)


# What a network's motion id means. The paper's scale, and the one that the published code used at times.
MORE_MOTION = "bucket 0..19, larger = more motion"
STILLER = "100 x SSIM, larger = stiller"


@dataclass(frozen=True)
class MotionScale:
    """What a motion bucket means: 19 ascending SSIM edges between 20 buckets, larger bucket = more motion.

    ``scale``: what the network calls it, `MORE_MOTION` or `STILLER`. Users always speak in buckets.
    ``calibration``: measured motion per bucket (see `cinemo.evaluation.calibration`), where somebody measured it.
    """

    edges: tuple[float, ...]
    metric: Literal["luma", "rgb"] = "luma"
    calibration: Mapping[str, Any] | None = None
    scale: str = MORE_MOTION

    def motion_id(self, bucket: int) -> float:
        """The number that the network takes for a bucket 0..19: itself, or 100 x the middle of its SSIM interval."""
        if self.scale == MORE_MOTION:
            return float(bucket)
        bounds = (0.0, *self.edges, 1.0)
        return 50 * (bounds[-2 - bucket] + bounds[-1 - bucket])


def mean_adjacent_ssim(frames_FHWC_uint8: np.ndarray, metric: Literal["luma", "rgb"] = "luma") -> float:
    """Mean SSIM over all pairs of neighbouring frames; 1 = nothing moves. Arguments are those of `adjacent_ssim`."""
    return adjacent_ssim(frames_FHWC_uint8, metric)[0]


def adjacent_ssim(frames_FHWC_uint8: np.ndarray, metric: Literal["luma", "rgb"] = "luma") -> tuple[float, float]:
    """The mean and the lowest SSIM of pairs of neighbouring frames, -1..1.

    Args:
        frames_FHWC_uint8: two or more RGB frames, at least 11 pixels a side.
        metric: ``luma`` is skimage's Gaussian SSIM of BT.601 luma (borders where the window does not fit left out);
            ``rgb`` is kornia's over the three channels, 14 times slower.
    """
    frames = frames_FHWC_uint8
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise InputError(f"frames are {frames.shape} {frames.dtype}, expected uint8 FxHxWx3")
    if len(frames) < 2 or min(frames.shape[1:3]) < _WINDOW:
        raise InputError(
            f"frames are {frames.shape}, expected at least 2 frames of at least {_WINDOW}x{_WINDOW} pixels"
        )
    return _rgb_ssim(frames) if metric == "rgb" else _luma_ssim(frames)


def ssim_parameters(metric: Literal["luma", "rgb"]) -> dict[str, Any]:
    """What decides the score of given frames, by name: part of a dataset's fingerprint."""
    shared = {"metric": metric, "window": _WINDOW, "sigma": _SIGMA, "stabilizers": [_C1, _C2]}
    if metric == "rgb":
        return {**shared, "luma": None, "border": "reflect"}
    return {**shared, "luma": [round(float(weight), 6) for weight in _LUMA[0]], "border": "left out"}


def motion_bucket(ssim: float, edges: Sequence[float] | None = None) -> int:
    """The bucket 0..19 of a mean SSIM, larger = more motion: the number of ``edges`` that ``ssim`` does not exceed.

    Args:
        ssim: `mean_adjacent_ssim`, -1..1.
        edges: 19 ascending SSIM values; by default 0.05, 0.10, ... 0.95 (20 uniform intervals, section 3.2).
    """
    if ssim is None or not math.isfinite(ssim):
        raise InputError(f"ssim is {ssim}, expected a number between -1 and 1")
    edges = UNIFORM_EDGES if edges is None else edges
    return len(edges) - bisect.bisect_left(edges, ssim)


def value_at(strength: float, values: Sequence[float], calibration: Mapping[str, Any] | None = None) -> float:
    """The value of a control of motion for a strength 0..1: how far from the least motion to the most.

    Args:
        values: of the control, from the least motion to the most.
        calibration: where there is one, the value whose measured motion is that far (`cinemo.evaluation.calibration`);
            else the one that is that far along ``values``.
    """
    if not 0 <= strength <= 1:
        raise InputError(f"motion strength is {strength}, expected 0 (still) to 1 (most motion)")
    if calibration is None:
        return values[round(strength * (len(values) - 1))]
    order = np.argsort(values)
    places = np.interp(calibration["values"], np.array(values)[order], order)
    curve = np.interp(np.arange(len(values)), places, calibration["curve"])
    wanted = curve[0] + strength * (curve[-1] - curve[0])
    return values[int(np.argmin(np.abs(curve - wanted)))]


class _Moments:
    """What one frame brings to both of its pairs: centred luma, its mean, the luma's mean, its square, variance."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.luma, self.mean, self.bright, self.light, self.spread = (np.empty(shape, np.float32) for _ in range(5))


def _luma_ssim(frames_FHWC: np.ndarray) -> tuple[float, float]:
    """Each frame is filtered once for its own moments, and once more with its neighbour for their covariance.

    All arithmetic goes into a few buffers, because making arrays takes as long as filling them.
    """
    shape, edge = frames_FHWC.shape[1:3], _WINDOW // 2
    now, before = _Moments(shape), _Moments(shape)
    rgb_HWC = np.empty((*shape, 3), np.float32)
    a, b = np.empty(shape, np.float32), np.empty(shape, np.float32)
    total, lowest = 0.0, 1.0
    for number, frame_HWC in enumerate(frames_FHWC):
        np.copyto(rgb_HWC, frame_HWC)
        # Centred, because float32 squares of 0..255 would lose the digits that the variances are made of.
        cv2.transform(rgb_HWC, _CENTRED_LUMA, now.luma)
        _blur(now.luma, now.mean)
        np.add(now.mean, _MIDDLE, out=now.bright)
        cv2.multiply(now.bright, now.bright, now.light)
        cv2.multiply(now.luma, now.luma, a)
        _blur(a, now.spread, _C2 / 2)
        cv2.multiply(now.mean, now.mean, a)
        cv2.subtract(now.spread, a, now.spread)  # variance + C2 / 2
        if number:
            cv2.multiply(now.luma, before.luma, a)
            _blur(a, b, _C2 / 2)
            cv2.multiply(now.mean, before.mean, a)
            cv2.subtract(b, a, b)  # covariance + C2 / 2
            cv2.multiply(now.bright, before.bright, a)
            np.add(a, _C1 / 2, out=a)
            cv2.multiply(a, b, b)  # a quarter of the numerator
            cv2.addWeighted(now.light, 1, before.light, 1, _C1, a)
            cv2.divide(b, a, b)
            cv2.add(now.spread, before.spread, a)
            cv2.divide(b, a, b)
            score = 4 * cv2.mean(b[edge:-edge, edge:-edge])[0]
            total, lowest = total + score, min(lowest, score)
        now, before = before, now
    return total / (len(frames_FHWC) - 1), lowest


def _blur(image_HW: np.ndarray, out_HW: np.ndarray, add: float = 0.0) -> None:
    cv2.sepFilter2D(image_HW, -1, _KERNEL, _KERNEL, out_HW, delta=add)


def _rgb_ssim(frames_FHWC: np.ndarray) -> tuple[float, float]:
    import torch
    from kornia.metrics import ssim

    frames_FCHW = torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2).float() / 255
    scores = ssim(frames_FCHW[:-1], frames_FCHW[1:], _WINDOW).double()
    return float(scores.mean()), float(scores.mean((1, 2, 3)).min())
