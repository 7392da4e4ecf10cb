"""Which motion scale does a foreign checkpoint follow? Asked of the network itself, with plain motion ids.

The paper (arXiv 2407.15642, section 3.2) says 0..19, larger = more motion; the published code at times said 100 x SSIM,
larger = stiller. A network on the first scale spends its range of motion on the ids 0 to 19, upwards; one on the second
on 0 to 99, downwards, and 0 to 19 all are much motion to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle
from cinemo.evaluation.calibration import rank_correlation
from cinemo.media.motion import MORE_MOTION, STILLER, MotionScale, mean_adjacent_ssim
from cinemo.methods import at_motion

IDS = (0.0, 5.0, 10.0, 14.0, 19.0, 35.0, 50.0, 65.0, 80.0, 90.0, 97.0)
_LOW = 19.0
_CLEAR = 0.5  # a rank correlation below is no evidence
_MARGIN = 2.0  # how many times the change of SSIM along one scale must exceed that along the other


@dataclass(frozen=True)
class MotionProbe:
    """``ssim``: mean adjacent SSIM of the videos, one row per image, one column per id.

    ``more_motion``: rank correlation of id and motion over ids 0..19; ``stiller``: of id and SSIM over all ids; both
    averaged over images, 1 = follows that scale. ``change_*``: how much the mean SSIM changes along that scale, by the
    line of least squares, in the direction it promises. ``error_*``: root mean square distance of the mean SSIM to what
    the scale promises. ``verdict``: `MORE_MOTION`, `STILLER`, or None where the samples do not tell.
    """

    ids: tuple[float, ...]
    ssim: tuple[tuple[float, ...], ...]
    more_motion: float
    stiller: float
    change_more_motion: float
    change_stiller: float
    error_more_motion: float
    error_stiller: float
    verdict: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Plain(MotionScale):
    """Hands a bucket's place in `IDS` to the network as that id."""

    def motion_id(self, bucket: int) -> float:
        return IDS[bucket]


def probe_motion_scale(
    bundle: ModelBundle,
    images: Sequence[tuple[np.ndarray, str]],
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MotionProbe:
    """Animate each (image HWC uint8, prompt) at each id of `IDS` with the same noise, and judge."""
    plain = replace(bundle, motion=_Plain(bundle.motion.edges, bundle.motion.metric))
    rows, total = [], len(images) * len(IDS)
    for i, (image, prompt) in enumerate(images):
        row = []
        for place in range(len(IDS)):
            request = AnimateRequest(image, prompt, steps=steps, seed=seed, **at_motion(bundle.recipe, place))
            row.append(mean_adjacent_ssim(animate(plain, request).frames_FHWC, bundle.motion.metric))
            if progress is not None:
                progress(i * len(IDS) + place + 1, total)
        rows.append(tuple(row))
    return judge(IDS, rows)


def judge(ids: Sequence[float], rows: Sequence[Sequence[float]]) -> MotionProbe:
    """The figures of a table of measured SSIM: one row per image, one column per id."""
    low = [place for place, number in enumerate(ids) if number <= _LOW]
    low_ids = [ids[place] for place in low]
    more = [-(rank_correlation(low_ids, [row[place] for place in low]) or 0.0) for row in rows]
    stiller = [rank_correlation(ids, row) or 0.0 for row in rows]
    mean = np.mean(rows, axis=0)
    error_more = mean[low] - (1 - (np.array(low_ids) + 0.5) / 20)
    error_stiller = mean - np.array(ids) / 100
    scores = {MORE_MOTION: float(np.mean(more)), STILLER: float(np.mean(stiller))}
    changes = {MORE_MOTION: -_change(low_ids, mean[low]), STILLER: _change(ids, mean)}
    clear = [
        scale
        for scale, other in ((MORE_MOTION, STILLER), (STILLER, MORE_MOTION))
        if scores[scale] >= _CLEAR and changes[scale] > _MARGIN * max(changes[other], 0.0)
    ]
    return MotionProbe(
        tuple(ids),
        tuple(tuple(row) for row in rows),
        scores[MORE_MOTION],
        scores[STILLER],
        changes[MORE_MOTION],
        changes[STILLER],
        float(np.sqrt(np.mean(error_more**2))),
        float(np.sqrt(np.mean(error_stiller**2))),
        clear[0] if len(clear) == 1 else None,
    )


def _change(ids: Sequence[float], values: np.ndarray) -> float:
    return float(np.polyfit(ids, values, 1)[0] * (max(ids) - min(ids)))
