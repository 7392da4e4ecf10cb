"""Adam whose moments take a byte a value instead of four (arXiv 2110.02861), with the kernels of bitsandbytes.

Blocks of 256 values share a float32 scale, their largest magnitude; a moment is a code of 8 bits times it. Tensors of
less than 4096 values keep float32 moments, as in the paper.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of 4-bit kernels that are not used here
import bitsandbytes  # noqa: E402

BLOCK = 256
_SMALL = 4096
_CHUNK = 2**14 * BLOCK  # values that are converted at a time
_MOMENTS = {"exp_avg": (1, "dynamic"), "exp_avg_sq": (2, "udynamic")}


class Adam8bit(bitsandbytes.optim.Adam8bit):  # type: ignore[misc]
    """The library's, with weight decay apart from the gradient (AdamW's), as it has it. Two differences:

    A step does not wait for the device. And the codes are symmetric: the library's table reaches from -0.993 to 1, so
    that of a block whose largest value is negative the scale could not be told from the values; with -1 in it,
    `packed` finds from the values of `unpacked` the very codes and scales that they had.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self.name2qmap["dynamic"][0] = -1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self.begin(parameter)
                    self.update_step(group, parameter, number, place)
        return loss

    def begin(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter; zero moments where it had none."""
        state: dict[str, Any] = self.state[parameter]
        if "step" in state:
            return state
        state["step"], small = 0, parameter.numel() < _SMALL
        for number, table in _MOMENTS.values():
            dtype = torch.float32 if small else torch.uint8
            state[f"state{number}"] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if not small:
                self.name2qmap[table] = self.name2qmap[table].to(parameter.device)
                state[f"qmap{number}"] = self.name2qmap[table]
                state[f"absmax{number}"] = torch.zeros(-(-parameter.numel() // BLOCK), device=parameter.device)
        return state

    @torch.no_grad()
    def unpacked(self, parameter: Tensor) -> dict[str, Tensor]:
        """The moments of a parameter as flat float32 tensors in host memory, named as `torch.optim.Adam` does."""
        state, found = self.begin(parameter), {}
        for name, (number, _) in _MOMENTS.items():
            codes = state[f"state{number}"].view(-1)
            if codes.dtype == torch.float32:
                found[name] = codes.to("cpu", copy=True)
                continue
            table, scales, values = state[f"qmap{number}"], state[f"absmax{number}"], torch.empty(codes.numel())
            for begin in range(0, len(codes), _CHUNK):
                part = codes[begin : begin + _CHUNK]
                scale = scales[begin // BLOCK :][: -(-len(part) // BLOCK)].repeat_interleave(BLOCK)[: len(part)]
                values[begin : begin + _CHUNK] = (table[part.int()] * scale).cpu()
            found[name] = values
        return found

    @torch.no_grad()
    def pack(self, parameter: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        """Take up moments, as `unpacked` has them, and the number of steps done."""
        state = self.begin(parameter)
        state["step"] = steps
        for name, (number, _) in _MOMENTS.items():
            codes = state[f"state{number}"].view(-1)
            if codes.dtype == torch.float32:
                codes.copy_(moments[name])
                continue
            table, scales = state[f"qmap{number}"], state[f"absmax{number}"]
            between = (table[1:] + table[:-1]) / 2
            for begin in range(0, len(codes), _CHUNK):
                part = moments[name][begin : begin + _CHUNK].to(codes.device)
                blocks = nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
                scale = blocks.abs().amax(1, keepdim=True)
                found = torch.bucketize(blocks / scale.clamp(min=torch.finfo(torch.float32).tiny), between)
                codes[begin : begin + _CHUNK] = found.view(-1)[: len(part)].to(torch.uint8)
                scales[begin // BLOCK :][: len(scale)] = scale[:, 0]
