"""Still pictures: those that people bring, as 8-bit RGB; and frames as JPEG, one of them or all of a clip in one tall
picture, which people and other programs can look at.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from cinemo.types import InputError

JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}  # 0: full chroma

# Where Pillow's mode I is 16-bit grey; elsewhere its range is not known.
_SIXTEEN_BITS_AS_I = ("PNG", "PPM")
_TIFF_BITS, _TIFF_PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1


def rgb(image: Image.Image, name: str = "image") -> np.ndarray:
    """A picture of any mode as (H, W, 3) uint8, as it lies: transparency over white, 16 bit made 8.

    Args:
        name: what errors call it.

    Raises:
        InputError: its levels have no known range (32-bit integers, floats), or cannot be shown as RGB.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS_AS_I):
        (bits,) = tags.get(_TIFF_BITS, (16,))
        if tags.get(_TIFF_PHOTOMETRIC, _BLACK_IS_ZERO) != _BLACK_IS_ZERO:
            raise InputError(f"{name}: is a TIFF of {bits}-bit grey whose white is 0; save it as PNG, JPEG or WebP")
        grey_HW = (np.asarray(image, np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        return np.stack([grey_HW] * 3, axis=-1)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise InputError(
            f"{name}: its levels are {kind}, whose black and white are not known; save it with 8 or 16 bits as PNG, "
            "JPEG or WebP"
        )
    try:
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise InputError(f"{name}: cannot be shown as RGB ({error}); save it as PNG, JPEG or WebP") from None


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
