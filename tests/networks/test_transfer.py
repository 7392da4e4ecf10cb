"""Copies and computation overlap, on a device whose copies and kernels take stated times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cinemo.networks.transfer import pipelined


@dataclass
class StatedTimes:
    """Lanes of a device with a clock of its own: seconds that the host needs to make an item, and that a copy up, the
    work and a copy back take. Each lane does one thing at a time, in the order given."""

    host: float
    up: float
    work: float
    down: float
    now: float = 0.0
    most_ahead: int = 0
    free: dict[str, float] = field(default_factory=dict)
    _ahead: int = 0

    def _do(self, lane: str, seconds: float, after: float) -> float:
        self.free[lane] = max(self.now, after, self.free.get(lane, 0.0)) + seconds
        return self.free[lane]

    def made(self, count: int) -> Iterator[Tensor]:
        for number in range(count):
            self.now += self.host
            self._ahead += 1
            self.most_ahead = max(self.most_ahead, self._ahead)
            yield torch.tensor([number])

    def upload(self, x: Tensor) -> tuple[Tensor, float]:
        return x, self._do("up", self.up, 0.0)

    def compute(self, work, sent):  # type: ignore[no-untyped-def]
        there, arrived = sent
        return work(there), self._do("work", self.work, arrived)

    def download(self, result):  # type: ignore[no-untyped-def]
        value, done = result
        return value, self._do("down", self.down, done)

    def wait(self, back):  # type: ignore[no-untyped-def]
        value, arrived = back
        self.now = max(self.now, arrived)
        self._ahead -= 1
        return value


@pytest.mark.parametrize(
    ("host", "up", "work", "down"), [(5, 3, 90, 1), (60, 3, 90, 1), (80, 10, 90, 10), (120, 3, 90, 1), (1, 100, 90, 1)]
)
def test_the_slowest_part_alone_counts(host: float, up: float, work: float, down: float) -> None:
    count, lanes = 40, StatedTimes(host, up, work, down)
    results = list(pipelined(lanes.made(count), lambda x: 2 * x, torch.device("cuda"), lanes))
    assert [int(value) for value in results] == [2 * number for number in range(count)]
    filling = host + up + work + down
    assert lanes.now <= count * max(host, up, work, down) + filling
    assert lanes.now < 0.95 * count * (host + up + work + down)
    assert lanes.most_ahead <= 4, "what is under way stays bounded"


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few(count: int) -> None:
    lanes = StatedTimes(1, 1, 1, 1)
    assert len(list(pipelined(lanes.made(count), lambda x: x, torch.device("cuda"), lanes))) == count
    plain = list(pipelined(lanes.made(count), lambda x: x + 1, torch.device("cpu")))
    assert [int(value) for value in plain] == list(range(1, count + 1))
