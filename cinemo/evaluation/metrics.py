"""What can be measured on frames alone: PSNR, SSIM, motion, and how far a video stays with its first frame."""

from __future__ import annotations

import math

import numpy as np

from cinemo.media.motion import mean_adjacent_ssim
from cinemo.types import InputError

MAX_PSNR = 100.0


def psnr(a_uint8: np.ndarray, b_uint8: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of equal shape; `MAX_PSNR` where they are equal."""
    if a_uint8.shape != b_uint8.shape:
        raise InputError(f"psnr: got shapes {a_uint8.shape} and {b_uint8.shape}, expected equal ones")
    error = float(np.mean((a_uint8.astype(np.float64) - b_uint8.astype(np.float64)) ** 2))
    return MAX_PSNR if error == 0 else min(MAX_PSNR, 10 * math.log10(255**2 / error))


def ssim(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    """SSIM of two uint8 RGB pictures by luma, 11-tap Gaussian window; 1 = equal."""
    return mean_adjacent_ssim(np.stack([a_HWC, b_HWC]))


def motion(frames_FHWC: np.ndarray) -> float:
    """The motion score: 1 - mean SSIM of adjacent frames (arXiv 2407.15642, section 3.2); 0 = nothing moves."""
    return 1 - mean_adjacent_ssim(frames_FHWC)


def first_frame_consistency(frames_FHWC: np.ndarray) -> float:
    """Mean SSIM of every later frame with the first one; 1 = the picture never leaves its first frame.

    Falls with motion as well as with lost content, so compare it at equal motion.
    """
    return float(np.mean([ssim(frames_FHWC[0], frame_HWC) for frame_HWC in frames_FHWC[1:]]))
