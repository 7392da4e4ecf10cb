"""Copies between host and device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` on ``device``, there in ``dtype``. From page-locked memory, or the host would wait until all that the
    device was given before is done."""
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True).to(dtype or x.dtype)
