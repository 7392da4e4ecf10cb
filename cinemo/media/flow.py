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


def resized(flow_F2HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A field for frames of another ``size`` (height, width): interpolated, and its lengths in pixels of that size.

    Args:
        flow_F2HW: pixels a frame, any number of fields.
    """
    height, width = size
    scale = np.array([width / flow_F2HW.shape[-1], height / flow_F2HW.shape[-2]], np.float32)
    plain = np.asarray(flow_F2HW, np.float32).transpose(0, 2, 3, 1)
    fields = [cv2.resize(field_HW2, (width, height)) * scale for field_HW2 in plain]
    return np.stack(fields).transpose(0, 3, 1, 2)


def speed(flow_F2HW: np.ndarray, of_components: bool = False) -> float:
    """Motion strength (arXiv 2405.17306, equation 8): the mean length over all fields and pixels, pixels a frame.

    The paper's |F| is not said; a length does not change when the picture is turned. ``of_components``: the mean of
    |dx| and |dy| instead.
    """
    flow = np.asarray(flow_F2HW, np.float64)
    return float(np.abs(flow).mean() if of_components else np.hypot(flow[:, 0], flow[:, 1]).mean())


def consistency(forward_2HW: np.ndarray, backward_2HW: np.ndarray) -> np.ndarray:
    """Where a field and the one back agree, (H, W) bool: |f(p) + b(p + f(p))|^2 < 0.01 (|f|^2 + |b|^2) + 0.5, the test
    of Sundaram et al. (ECCV 2010). What is covered in the second frame, or leaves the picture, does not.

    Args:
        forward_2HW: pixels, from one frame to the next; ``backward_2HW``: from the next one back.
    """
    forward, backward = np.asarray(forward_2HW, np.float32), np.asarray(backward_2HW, np.float32)
    height, width = forward.shape[1:]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    x, y = columns + forward[0], rows + forward[1]
    there = cv2.remap(backward.transpose(1, 2, 0), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    gap = np.square(forward + there.transpose(2, 0, 1)).sum(0)
    bound = 0.01 * (np.square(forward).sum(0) + np.square(there).sum(-1)) + 0.5
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return np.asarray((gap < bound) & inside)
