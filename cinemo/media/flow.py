"""Motion fields: how far every part of a picture moves from one frame to the next."""

from __future__ import annotations

import itertools

import cv2
import numpy as np

from cinemo.types import InputError

# What decides the numbers; part of the fingerprint of stored flow.
METHOD = "DIS (Kroeger et al. 2016), OpenCV's medium preset, BT.601 luma, from each frame to the next, cell averages"
_SMALLEST = 12  # OpenCV's: below it not even one patch fits


def dense_flow(frames_FHWC: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    """Optical flow from each frame to the next.

    DIS rather than Farneback, which on the same frames took twice the time and left larger errors; both run on a CPU
    and give equal bytes for equal frames.

    Args:
        frames_FHWC: two or more RGB frames, uint8, at least 12 pixels on the longer side.
        cells: rows and columns of the result, each a divisor of the picture's (a latent's).

    Returns:
        float16 (F-1, 2, rows, columns): channel 0 to the right, 1 downwards, in pixels of the given frames (not cells)
        per stored frame, averaged over each cell. Entry ``k`` leads from frame ``k`` to frame ``k + 1``.
    """
    frames, (rows, columns) = frames_FHWC, cells
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) < 2:
        raise InputError(f"frames are {frames.shape} {frames.dtype}, expected uint8 FxHxWx3 with F >= 2")
    height, width = frames.shape[1:3]
    if max(height, width) < _SMALLEST or height % rows or width % columns:
        raise InputError(f"frames are {height}x{width}, expected a multiple of {rows}x{columns} cells and a side >= 12")
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    lumas = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flow = np.empty((len(frames) - 1, 2, rows, columns), np.float16)
    for number, (luma, after) in enumerate(itertools.pairwise(lumas)):
        field_HW2 = method.calc(luma, after, None)
        averages = field_HW2.reshape(rows, height // rows, columns, width // columns, 2).mean((1, 3))
        flow[number] = averages.transpose(2, 0, 1)
    return flow
