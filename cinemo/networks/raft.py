"""RAFT (arXiv 2003.12039), torchvision's, from local weights: motion fields as the papers measured them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cinemo.networks.weights import compare, read_tensors, weight_files
from cinemo.types import InputError

METHOD = "RAFT, torchvision's, 12 refinements, from each frame to the next, cell averages"
SMALLEST = 128  # pixels: its correlation pyramid halves an eighth of a side three times
_WIDTHS = {64: "raft_large", 32: "raft_small"}  # by the channels of the first layer
_PAIRS = 4  # of frames in one call


def check_raft(location: str, size: tuple[int, int]) -> None:
    """Raise `InputError` unless fields can be measured on frames of this (height, width)."""
    if min(size) < SMALLEST:
        raise InputError(
            f"data.size is {size[1]}x{size[0]}, expected sides of at least {SMALLEST} for RAFT; leave out encoders.flow"
        )
    _models()
    weight_files(location).check(location)


class Raft:
    """The network with the weights at ``location``, on ``device``, in float32.

    Raises:
        InputError: torchvision or the weights are missing, or they are of another network.
    """

    def __init__(self, location: str, device: torch.device | str = "cpu") -> None:
        state = read_tensors(weight_files(location), location, torch.float32)
        first = state.get("feature_encoder.convnormrelu.0.weight", torch.empty(0))
        if len(first) not in _WIDTHS:
            raise InputError(f"{location}: is no RAFT of torchvision, expected raft_large's or raft_small's weights")
        self.network = getattr(_models(), _WIDTHS[len(first)])()
        compare(state, self.network.state_dict(), location)
        self.network.load_state_dict(state)
        self.network.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)

    @torch.inference_mode()
    def dense_flow(self, frames_FHWC: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
        """As `cinemo.media.flow.dense_flow`; every pair of frames on its own, whatever its neighbours."""
        rows, columns = cells
        frames_FCHW = torch.from_numpy(np.ascontiguousarray(frames_FHWC)).to(self.device).permute(0, 3, 1, 2)
        fields = []
        for start in range(0, len(frames_FCHW) - 1, _PAIRS):
            pair = frames_FCHW[start : start + _PAIRS + 1].float() / 127.5 - 1
            flow_N2HW: Tensor = self.network(pair[:-1], pair[1:])[-1]
            n, _, height, width = flow_N2HW.shape
            fields.append(flow_N2HW.view(n, 2, rows, height // rows, columns, width // columns).mean((3, 5)))
        return torch.cat(fields).to(torch.float16).cpu().numpy()


def _models() -> Any:
    try:
        from torchvision.models import optical_flow
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise InputError(
            f"encoders.flow: RAFT is torchvision's, which cannot be used here ({error}); install the torchvision that "
            "belongs to this torch, or leave encoders.flow out for OpenCV's DIS"
        ) from None
    return optical_flow
