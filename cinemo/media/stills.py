"""Frames as JPEG: one of them, or all of a clip in one tall picture, which people and other programs can look at."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}  # 0: full chroma


def jpeg(frame_HWC: np.ndarray) -> bytes:
    """A frame, uint8 RGB."""
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "JPEG", **JPEG)
    return buffer.getvalue()


def jpeg_strip(frames_FHWC: np.ndarray) -> bytes:
    """Frames (uint8 RGB) below each other. H is a multiple of 8, so that no block of the JPEG holds two frames."""
    return jpeg(frames_FHWC.reshape(-1, *frames_FHWC.shape[2:]))


def frame_of(content: bytes, frames: int = 1, index: int = 0) -> np.ndarray:
    """Frame ``index`` (H, W, 3) of what `jpeg_strip` made of ``frames``, or what `jpeg` made of one."""
    with Image.open(io.BytesIO(content)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    frame_HWC: np.ndarray = pixels.reshape(frames, -1, *pixels.shape[1:])[index]
    return frame_HWC
