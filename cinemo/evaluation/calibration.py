"""The motion-control report: does a larger motion bucket give more motion?

Each image is animated at each bucket with the same noise, and the motion of what came out is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle
from cinemo.evaluation.metrics.frames import motion
from cinemo.methods import at_motion

BUCKETS = (0, 5, 10, 14, 19)


@dataclass(frozen=True)
class Calibration:
    """Measured motion (1 - mean adjacent SSIM) of generated videos.

    ``motion``: one row per image, one column per bucket. ``spearman``: rank correlation of bucket and motion within an
    image, averaged over images: 1 = more bucket is always more motion; None where nothing moved at all.
    """

    buckets: tuple[int, ...]
    motion: tuple[tuple[float, ...], ...]
    mean_motion: tuple[float, ...]
    spearman: float | None
    spearman_per_image: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    bundle: ModelBundle,
    images: Sequence[tuple[np.ndarray, str]],
    buckets: Sequence[int] = BUCKETS,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Animate each (image HWC uint8, prompt) at each bucket and measure; ``progress(done, total)`` counts videos."""
    rows, total = [], len(images) * len(buckets)
    for i, (image, prompt) in enumerate(images):
        row = []
        for j, bucket in enumerate(buckets):
            request = AnimateRequest(image, prompt, steps=steps, seed=seed, **at_motion(bundle.recipe, bucket))
            row.append(motion(animate(bundle, request).frames_FHWC))
            if progress is not None:
                progress(i * len(buckets) + j + 1, total)
        rows.append(tuple(row))
    return calibration_of(buckets, rows)


def calibration_of(buckets: Sequence[int], rows: Sequence[Sequence[float]]) -> Calibration:
    """The figures of a table of measured motion: one row per image, one column per bucket."""
    per_image = tuple(rank_correlation(buckets, row) for row in rows)
    known = [value for value in per_image if value is not None]
    return Calibration(
        tuple(buckets),
        tuple(tuple(row) for row in rows),
        tuple(float(value) for value in np.mean(rows, axis=0)),
        float(np.mean(known)) if known else None,
        per_image,
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one of the two is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)
