"""Which of several shapes (frames, height, width) each clip has, before anything is decoded.

The aspect ratio comes first: the shape nearest to the clip's own, by the distance of logarithms. Of shapes with that
ratio, the one of most frames that the clip has at the recipe's smallest interval; of those, the largest that the clip
need not be enlarged for, else the smallest. A clip that is too short for all of them has the shortest, and is refused
when it is decoded, as ever. So has a clip of which nothing can be learnt, for the recipe's own shape.

What must be known of a clip is in the columns of the manifest (`STATED`), or else is measured on its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cinemo.config import DataConfig, Shape
from cinemo.data.manifest.manifest import Manifest
from cinemo.data.precompute.plan import Plan

# Columns of a manifest that tell a clip's picture and length; the first that is there counts.
STATED = {
    "width": ("width",),
    "height": ("height",),
    "fps": ("fps",),
    "frames": ("num_frames", "frames", "frame"),
    "duration": ("duration", "seconds"),
}
KEPT = ".shapes"  # directory beside an unfinished dataset, of what was measured on files
_BATCH_ROWS = 1 << 17

Measure = Callable[[Plan, np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Some rows of a plan's manifest -> the same ones in parts, each with (width, height, frames) of its clips (N, 3)."""


def kinds(plan: Plan, data: DataConfig, measure: Measure) -> np.ndarray:
    """The number of each clip's shape among ``data.shapes`` (uint8, by row)."""
    found, unknown = np.zeros(len(plan), np.uint8), []
    rows = np.arange(len(plan)) if plan.chosen is None else plan.chosen
    for start in range(0, len(plan), _BATCH_ROWS):
        part = rows[start : start + _BATCH_ROWS]
        extents = stated(plan.clips, part, data)
        found[start : start + _BATCH_ROWS] = nearest(data.shapes, data.frame_interval[0], extents)
        unknown.append(start + np.flatnonzero(np.isnan(extents).any(1)))
    places = np.concatenate(unknown)
    if len(places):
        done = 0
        for part, extents in measure(plan, rows[places]):
            found[places[done : done + len(part)]] = nearest(data.shapes, data.frame_interval[0], extents)
            done += len(part)
    return found


def nearest(shapes: Sequence[Shape], interval: int, extents: np.ndarray) -> np.ndarray:
    """The number of the shape that fits each clip best.

    Args:
        interval: the smallest between frames of a sample.
        extents: (width, height, frames) of each clip (N, 3); nan is unknown.
    """
    width, height, frames = extents.T[:, :, None]
    length, rows, columns = np.array(shapes, np.float64).T
    off = np.abs(np.log(width / height) - np.log(columns / rows))
    near = off <= off.min(1, keepdims=True) + 1e-9
    fits = near & (frames >= (length - 1) * interval + 1)
    area = np.argsort(np.argsort(rows * columns, kind="stable")) + 1.0
    by_area = np.where((columns <= width) & (rows <= height), area, -area)
    most = 4.0 * len(shapes)  # so that frames come before area
    score = np.where(fits.any(1, keepdims=True), np.where(fits, length, -np.inf), np.where(near, -length, -np.inf))
    chosen = np.argmax(score * most + by_area, 1)
    return np.where(np.isnan(off).any(1), 0, chosen).astype(np.uint8)


def stated(clips: Manifest, rows: np.ndarray, data: DataConfig) -> np.ndarray:
    """(width, height, frames) of clips (N, 3) as the manifest's columns say; nan where they do not.

    Frames are infinitely many where the number makes no difference.
    """
    names = [name for choices in STATED.values() for name in choices]
    columns = clips.numbers(rows, [*names, "start", "end"])
    absent = np.full(len(rows), np.nan)

    def told(what: str) -> np.ndarray:
        values = next((columns[name] for name in STATED[what] if name in columns), absent)
        return np.where((values > 0) & np.isfinite(values), values, np.nan)

    if len({frames for frames, *_ in data.shapes}) == 1:
        frames = np.full(len(rows), np.inf)
    else:
        start, end = columns.get("start", absent), columns.get("end", absent)
        whole = np.isnan(start) & ~np.isfinite(end)  # else a duration may be the clip's or the file's
        stop = np.where(np.isfinite(end), end, np.where(whole, told("duration"), np.nan))
        frames = np.floor(np.maximum(stop - np.nan_to_num(start), 0) * told("fps") + 1e-6)
        frames = np.where(whole & ~np.isnan(told("frames")), told("frames"), frames)
    return np.stack([told("width"), told("height"), frames], 1)
