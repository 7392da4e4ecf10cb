"""What can be measured on frames alone: PSNR, SSIM, motion, and how far a video stays with its first frame."""

from __future__ import annotations

from typing import Any

import numpy as np

from cinemo.media.flow import dense_flow
from cinemo.media.motion import mean_adjacent_ssim
from cinemo.types import InputError

MAX_PSNR = 100.0
STILL = 8  # levels of 255: above what coding and an autoencoder change, below what one sees move
LEAST_STILL = 0.01


def psnr(a_uint8: np.ndarray, b_uint8: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of equal shape; `MAX_PSNR` where they are equal."""
    if a_uint8.shape != b_uint8.shape:
        raise InputError(f"psnr: got shapes {a_uint8.shape} and {b_uint8.shape}, expected equal ones")
    return float(psnr_of_frames(a_uint8[None], b_uint8[None])[0])


def psnr_of_frames(real_FHWC: np.ndarray, made_FHWC: np.ndarray) -> np.ndarray:
    """(F,) PSNR in dB of each frame against its counterpart; a video's figure is their mean (arXiv 2405.17306).

    Raises:
        InputError: of other shapes, or no frames.
    """
    if real_FHWC.shape != made_FHWC.shape or not len(real_FHWC):
        raise InputError(
            f"PSNR of {real_FHWC.shape} and {made_FHWC.shape}, expected as many frames of one size, and some"
        )
    errors = np.square(_levels(real_FHWC) - _levels(made_FHWC)).reshape(len(real_FHWC), -1).mean(1)
    return np.asarray(np.minimum(MAX_PSNR, -10 * np.log10(np.maximum(errors, 1e-30))))


def still_places(frames_FHWC: np.ndarray) -> np.ndarray:
    """(H, W) bool: where no frame of a clip differs from its first by more than `STILL` levels, in any colour."""
    changes = np.abs(frames_FHWC.astype(np.int16) - frames_FHWC[:1].astype(np.int16))
    return np.asarray((changes <= STILL).all((0, 3)))


def still_psnr(real_FHWC: np.ndarray, made_FHWC: np.ndarray) -> float | None:
    """PSNR in dB of later frames against the given picture, only where the real clip stands still (`still_places`).

    What does not move in the clip should not be repainted in the video. None where less than `LEAST_STILL` of the
    picture stands still.
    """
    still_HW = still_places(real_FHWC)
    if still_HW.mean() < LEAST_STILL:
        return None
    given_FNC = np.broadcast_to(real_FHWC[0][still_HW], (len(made_FHWC) - 1, int(still_HW.sum()), 3))
    return float(psnr_of_frames(given_FNC, made_FHWC[1:][:, still_HW]).mean())


def ssim_of_frames(real_FHWC: np.ndarray, made_FHWC: np.ndarray) -> np.ndarray:
    """(F,) SSIM of each frame against its counterpart: 11-tap Gaussian window, borders left out, mean over channels.

    scikit-image's; torchmetrics' counts pixels that it reflected at the borders, too.
    """
    from skimage.metrics import structural_similarity

    pairs = zip(_levels(real_FHWC), _levels(made_FHWC), strict=True)
    given: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return np.array([structural_similarity(a, b, channel_axis=-1, **given) for a, b in pairs])


def _levels(frames_FHWC: np.ndarray) -> np.ndarray:
    """0..1 in float64, of uint8 or of such."""
    return frames_FHWC / 255.0 if frames_FHWC.dtype == np.uint8 else frames_FHWC.astype(np.float64)


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


def flicker_free(frames_FHWC: np.ndarray) -> float:
    """Temporal flickering of VBench (arXiv 2311.17982): 1 - mean absolute difference of neighbouring frames, 0 to 1."""
    levels = frames_FHWC.astype(np.float64)
    return 1 - float(np.abs(np.diff(levels, axis=0)).mean()) / 255


def dynamic_degree(frames_FHWC: np.ndarray) -> float:
    """How fast the fastest twentieth of pixels goes, over all frames, in VBench's threshold of motion.

    VBench (arXiv 2311.17982) says of each pair of frames whether that speed exceeds 6 pixels at a side of 256, and of
    a video whether a quarter of its pairs do. One boolean cannot tell much motion from little, so this is the ratio
    itself; and flow is DIS's, of OpenCV, where VBench has RAFT's.
    """
    height, width = frames_FHWC.shape[1:3]
    flow_FCHW = dense_flow(frames_FHWC, (height, width))
    speeds = np.sort(np.linalg.norm(flow_FCHW.astype(np.float64), axis=1).reshape(len(flow_FCHW), -1), axis=1)
    fastest = speeds[:, -max(1, speeds.shape[1] // 20) :].mean()
    return float(fastest / (6 * min(height, width) / 256))


def flow_speed(frames_FHWC: np.ndarray) -> float:
    """Mean length of optical flow from each frame to the next, over all pixels, in pixels a frame."""
    flow_FCHW = dense_flow(frames_FHWC, (frames_FHWC.shape[1], frames_FHWC.shape[2]))
    return float(np.linalg.norm(flow_FCHW.astype(np.float64), axis=1).mean())


def largest_jump(frames_FHWC: np.ndarray) -> float:
    """The largest mean absolute change between neighbouring frames, over the mean of all; 1 = even, F - 1 = one jump.

    A video that stands still has no changes to compare: 1.
    """
    changes = np.abs(np.diff(frames_FHWC.astype(np.float64), axis=0)).mean((1, 2, 3))
    return float(changes.max() / changes.mean()) if changes.any() else 1.0


def colour_drift(frames_FHWC: np.ndarray) -> float:
    """Distance of the last frame's mean colour from the first one's, in levels of 255."""
    first, last = (frames_FHWC[place].astype(np.float64).mean((0, 1)) for place in (0, -1))
    return float(np.linalg.norm(last - first))
