"""What devices can do at most: dense peak FLOP/s and memory of accelerators by name, for plans and for the MFU."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from cinemo.types import InputError

DEFAULT_ACCELERATOR = "A100-80GB"  # what is planned for where none is named and none is here
_PROBE_SECONDS = 0.3

# Dense peak FLOP/s of tensor cores, NVIDIA's data sheets: (bfloat16, TF32, which torch's float32 convolutions use).
# The first name that is part of the device's own counts.
_PEAKS = {
    "H200 NVL": (835e12, 417e12),
    "H200": (989e12, 494e12),
    "H100 NVL": (835e12, 417e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "L40": (181e12, 90e12),
    "L4": (121e12, 60e12),
    "A10G": (70e12, 35e12),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that a device reaches at most: by its data sheet where it is known here, else measured (0.3 s)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (half, full) in _PEAKS.items():
            if known in name:
                return half if dtype == torch.bfloat16 else full
    return measured_flops(device, dtype)


@dataclass(frozen=True)
class Accelerator:
    """What a plan needs to know of a device: bytes of memory, dense peak FLOP/s in bfloat16 and in float32 (TF32).

    ``link``, ``host``: bytes a second that go one way to another of them on its node, and to the host's memory.
    """

    name: str
    memory: float
    half: float
    full: float
    link: float = math.inf
    host: float = math.inf

    def peak(self, dtype: torch.dtype) -> float:
        return self.half if dtype == torch.bfloat16 else self.full


# The same: bytes a second in one direction over NVLink, where all of a node are joined by it, else PCIe; and over PCIe.
_LINKS = {
    "H200 NVL": (64e9, 64e9),
    "H200": (450e9, 64e9),
    "H100 NVL": (64e9, 64e9),
    "H100 PCIe": (64e9, 64e9),
    "H100": (450e9, 64e9),
    "A100": (300e9, 32e9),
    "L40S": (32e9, 32e9),
    "L40": (32e9, 32e9),
    "L4": (32e9, 32e9),
    "A10G": (32e9, 32e9),
}

# Names to plan for: memory in GB (NVIDIA's data sheets, decimal), and the entry of `_PEAKS`.
_ACCELERATORS = {
    "A100-40GB": (40, "A100"),
    "A100-80GB": (80, "A100"),
    "H100-80GB": (80, "H100"),
    "H100-PCIe": (80, "H100 PCIe"),
    "H100-NVL": (94, "H100 NVL"),
    "H200-141GB": (141, "H200"),
    "H200-NVL": (141, "H200 NVL"),
    "L40S-48GB": (48, "L40S"),
    "L40-48GB": (48, "L40"),
    "L4-24GB": (24, "L4"),
    "A10G-24GB": (24, "A10G"),
}


def accelerators() -> list[Accelerator]:
    """All that can be planned for by name."""
    return [accelerator(name) for name in _ACCELERATORS]


def accelerator(name: str) -> Accelerator:
    """
    Raises:
        InputError: an unknown name.
    """
    if name not in _ACCELERATORS:
        raise InputError(f"accelerator {name!r}: unknown; expected here or one of {', '.join(_ACCELERATORS)}")
    memory, peaks = _ACCELERATORS[name]
    return Accelerator(name, memory * 1e9, *_PEAKS[peaks], *_LINKS[peaks])


def this_accelerator() -> Accelerator:
    """The first one of this process; its peaks are measured where its data sheet is not known here."""
    name, memory = torch.cuda.get_device_name(0), float(torch.cuda.get_device_properties(0).total_memory)
    for known, peaks in _PEAKS.items():
        if known in name:
            return Accelerator(name, memory, *peaks, *_LINKS[known])
    device = torch.device("cuda", 0)
    return Accelerator(name, memory, *(measured_flops(device, dtype) for dtype in (torch.bfloat16, torch.float32)))


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some large matrix products, with as many threads as torch may use."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
    out = torch.mm(a, b)  # loads kernels, which takes longer than all that follows
    best, begun = float("inf"), time.perf_counter()
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - started)
        if now - begun > _PROBE_SECONDS:
            break
    return 2 * side**3 / best
