"""What spoils a clip for learning motion, as numbers: cuts, bars, still overlays, and hashes that find duplicates.

All are measured on a sample's frames, which are decoded anyway. So a cut is one between two of them, which may be ten
frames of the file apart, and duplicates are found where their samples look alike. Nothing is refused: filters decide.
"""

from __future__ import annotations

import functools
import itertools

import cv2
import numpy as np

SCORES_VERSION = (
    2  # raise it when the same frames no longer give the same numbers; 2: overlays need a camera that moves
)

_SIDE = 80  # pixels of the shorter side of the small pictures that cuts and overlays are looked for in
# PySceneDetect's AdaptiveDetector: a change of at least 15 levels of HSV, three times as large as those around it.
_CUT_CHANGE, _CUT_RATIO, _CUT_WINDOW = 15.0, 3.0, 2
_BLACK = 40  # levels; limited-range black with what compression leaves beside a bar's edge
_BAR_FRAMES = 4
_STILL, _EDGE, _MOVING = 3.0, 20.0, 4.0  # levels: deviation of what stands still, contrast of an outline, motion around
_AROUND = 15  # small pixels
# Where the camera stands, what stands still is the scene. It moves where most pixels of most parts of the picture
# change; parts of one colour do not tell.
_PARTS, _CHANGED, _MOST_PARTS, _CONTRAST = (6, 4), 0.7, 0.75, 3.0


def clip_scores(frames_FHWC: np.ndarray, ssim_min: float) -> dict[str, float | int]:
    """The scores of a sample (uint8 RGB), flat, as they stand in its ``KEY.json``.

    Args:
        ssim_min: the lowest SSIM of neighbouring frames; low where there is a cut, or motion.

    Returns:
        ``ssim_min``; ``cut`` 1 where two neighbouring frames are of different shots, else 0; ``cut_change`` their mean
        difference in HSV, 0 to 255; ``bar_rows``, ``bar_columns`` share of rows and of columns in black bars at the
        borders; ``overlay`` share of the picture with outlines that stand still while the camera moves (logos,
        subtitles), 0 where it does not; ``hash_first``, ``hash_middle`` 64-bit difference hashes as signed integers:
        frames that look alike differ in few bits.
    """
    small_FHWC = _small(frames_FHWC)
    changes = _changes(small_FHWC)
    rows, columns = _bars(frames_FHWC)
    return {
        "ssim_min": round(ssim_min, 6),
        "cut": int(_cut(changes)),
        "cut_change": round(float(changes.max()), 3),
        "bar_rows": round(rows, 6),
        "bar_columns": round(columns, 6),
        "overlay": round(_overlay(small_FHWC), 6),
        "hash_first": difference_hash(small_FHWC[0]),
        "hash_middle": difference_hash(small_FHWC[len(small_FHWC) // 2]),
    }


def difference_hash(frame_HWC: np.ndarray) -> int:
    """64 bits, as a signed integer: which of neighbouring cells of an 8x9 grid is the brighter one."""
    cells = cv2.resize(cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big", signed=True)


def _small(frames_FHWC: np.ndarray) -> np.ndarray:
    small_FHWC = list(frames_FHWC)
    while min(small_FHWC[0].shape[:2]) >= 2 * _SIDE:  # halving has vector code
        height, width = small_FHWC[0].shape[:2]
        small_FHWC = [
            cv2.resize(frame, (width // 2, height // 2), interpolation=cv2.INTER_AREA) for frame in small_FHWC
        ]
    return np.stack(small_FHWC)


def _changes(small_FHWC: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring frames in OpenCV's HSV, as PySceneDetect's ContentDetector has it."""
    hsv = [cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2HSV) for frame_HWC in small_FHWC]
    return np.array([np.mean(cv2.mean(cv2.absdiff(a, b))[:3]) for a, b in itertools.pairwise(hsv)])


def _cut(changes: np.ndarray) -> bool:
    for place, change in enumerate(changes):
        around = changes[max(0, place - _CUT_WINDOW) : place + _CUT_WINDOW + 1]
        others = (around.sum() - change) / max(1, len(around) - 1)
        if change >= _CUT_CHANGE and change >= _CUT_RATIO * others:
            return True
    return False


def _bars(frames_FHWC: np.ndarray) -> tuple[float, float]:
    places = np.linspace(0, len(frames_FHWC) - 1, _BAR_FRAMES).round().astype(int)
    brightest_HWC = functools.reduce(cv2.max, [frames_FHWC[place] for place in places])
    brightest_HX = brightest_HWC.reshape(len(brightest_HWC), -1)
    rows, columns = brightest_HX.max(1) > _BLACK, brightest_HX.max(0).reshape(-1, 3).max(1) > _BLACK
    return _border(rows), _border(columns)


def _border(bright: np.ndarray) -> float:
    """Share of a line's cells outside of its first and last bright one."""
    places = np.flatnonzero(bright)
    return 1 - (int(places[-1]) - int(places[0]) + 1) / len(bright) if len(places) else 1.0


def _overlay(small_FHWC: np.ndarray) -> float:
    luma_FHW = np.stack([cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY) for frame_HWC in small_FHWC]).astype(np.float32)
    mean_HW = luma_FHW.mean(0)
    deviation_HW = luma_FHW.std(0)
    if not _camera_moves(mean_HW, deviation_HW):
        return 0.0
    edge_HW = cv2.magnitude(cv2.Sobel(mean_HW, -1, 1, 0), cv2.Sobel(mean_HW, -1, 0, 1)) / 4
    still_HW = (deviation_HW <= _STILL) & (edge_HW >= _EDGE) & (cv2.blur(deviation_HW, (_AROUND, _AROUND)) >= _MOVING)
    return float(still_HW.mean())


def _camera_moves(mean_HW: np.ndarray, deviation_HW: np.ndarray) -> bool:
    def parts(values_HW: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.resize(values_HW, _PARTS, interpolation=cv2.INTER_AREA))

    tells = parts(mean_HW**2) - parts(mean_HW) ** 2 >= _CONTRAST**2
    changed = parts((deviation_HW > _STILL).astype(np.float32)) >= _CHANGED
    return bool(tells.any()) and float(changed[tells].mean()) >= _MOST_PARTS
