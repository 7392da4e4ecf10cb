"""From a picture of any size to the network's input: cover-resize, centre crop, values -1..1.

The geometry is the published preparation's, also where it is unusual (the target is covered with one pixel to spare,
and sampling positions use the scale factor itself), because trained weights saw it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cinemo.media.stills import rgb
from cinemo.types import InputError


class CoverCrop(NamedTuple):
    """Resize to ``resized_hw``, then cut a target-sized window at row ``top``, column ``left``."""

    scale: float
    resized_hw: tuple[int, int]
    top: int
    left: int


def cover_crop_geometry(height: int, width: int, size: tuple[int, int]) -> CoverCrop:
    """How a ``height`` x ``width`` picture comes to ``size`` = (height, width); knows no EXIF."""
    if min(height, width) < 1:
        raise InputError(f"picture is {height}x{width} pixels, expected at least 1x1")
    rows, columns = size
    scale = max((rows + 1) / height, (columns + 1) / width)
    resized = math.floor(height * scale), math.floor(width * scale)
    return CoverCrop(scale, resized, round((resized[0] - rows) / 2), round((resized[1] - columns) / 2))


def cropped_points(points_N2: np.ndarray, picture: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Where points x, y of a picture (height, width) are after `prepare_image`, pixel centres being whole numbers."""
    geometry = cover_crop_geometry(*picture, size)
    corner = np.array([geometry.left, geometry.top])
    return np.asarray((points_N2 + 0.5) * geometry.scale - 0.5 - corner)


def prepare_image(image_HWC: np.ndarray | Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as the VAE takes it.

    Args:
        image_HWC: uint8 RGB, or a PIL image of any mode (its EXIF orientation is the caller's business).
        size: target height and width.

    Returns:
        image_CHW, float32, -1..1: bilinear without antialiasing, cut out of the centre.
    """
    if isinstance(image_HWC, Image.Image):
        image_HWC = rgb(image_HWC)
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.dtype != np.uint8:
        raise InputError(f"image is {image_HWC.dtype} {image_HWC.shape}, expected uint8 (height, width, 3) RGB")
    geometry = cover_crop_geometry(image_HWC.shape[0], image_HWC.shape[1], size)
    pixels_1CHW = torch.tensor(image_HWC).permute(2, 0, 1)[None].float() / 255
    pixels_1CHW = F.interpolate(pixels_1CHW, scale_factor=geometry.scale, mode="bilinear", align_corners=False)
    rows, columns = size
    window = pixels_1CHW[0, :, geometry.top : geometry.top + rows, geometry.left : geometry.left + columns]
    return (window - 0.5) / 0.5
