"""Copies between host and device that nobody waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_AT_ONE_TIME = 2  # results that may be on their way


def upload(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` on ``device``, there in ``dtype``. From page-locked memory, or the host would wait until all that the
    device was given before is done."""
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True).to(dtype or x.dtype)


class Lanes:
    """The three things that an accelerator does at one time: copy to itself, compute, copy back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._down: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, x: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._up):
            there = x.pin_memory().to(self._device, non_blocking=True)
            return there, self._up.record_event()

    def compute(self, work: Callable[[Tensor], Tensor], sent: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        there, arrived = sent
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        there.record_stream(stream)  # its memory came from the other stream's share
        return work(there)

    def download(self, result: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            here = torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)
            result.record_stream(self._down)
            return here, self._down.record_event()

    def wait(self, back: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        here, arrived = back
        arrived.synchronize()
        return here


def pipelined(
    items: Iterable[Tensor], work: Callable[[Tensor], Tensor], device: torch.device, lanes: Lanes | None = None
) -> Iterator[Tensor]:
    """``work(item)`` of each, on the host, in order. On an accelerator an item is on its way there while the one before
    it is computed and the result of the one before that comes back, and the host makes the next one meanwhile.

    Args:
        items: on the host; made when they are asked for.
        work: gives the device work, and waits for nothing.
        lanes: of the device; None: its own, or on a CPU none: one item after the other.
    """
    if lanes is None and device.type != "cuda":
        for item in items:
            yield work(item.to(device)).cpu()
        return
    lanes = lanes or Lanes(device)
    coming: deque[Any] = deque()
    sent: Any = None
    for item in items:
        following = lanes.upload(item)
        if sent is not None:
            coming.append(lanes.download(lanes.compute(work, sent)))
        sent = following
        if len(coming) == _AT_ONE_TIME:
            yield lanes.wait(coming.popleft())
    if sent is not None:
        coming.append(lanes.download(lanes.compute(work, sent)))
    while coming:
        yield lanes.wait(coming.popleft())
