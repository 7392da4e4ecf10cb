"""FLOPs from shapes are those of a real run, and peaks are those of the data sheets."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cinemo.accelerators import measured_flops, peak_flops
from cinemo.config import Recipe
from cinemo.methods import build_method
from cinemo.recipes import override
from cinemo.training.plan import cost
from cinemo.training.run.batch import FrozenStates, host_batch, on_device
from tests.training.conftest import moving_samples


class Silence:
    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 77, 32)


def test_flops_are_those_of_a_real_step(small: Recipe) -> None:
    counted = cost.sample_flops(small)
    method = build_method(small)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    batch = on_device(
        host_batch(moving_samples(1), 0, small), FrozenStates(Silence()), torch.device("cpu"), torch.float32
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as real:
        loss = method(*batch)
    assert counted.forward == pytest.approx(real.get_total_flops(), rel=0.01)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    # A little less: nobody asks for the gradient of the latents; a little more: some of the attention is done again.
    assert counted.training == pytest.approx(real.get_total_flops() + backward.get_total_flops(), rel=0.05)


def test_frozen_weights_cost_less(small: Recipe) -> None:
    """Their own gradients are not computed; those of what flows through them are."""
    counted = cost.sample_flops(small)
    for what in ("temporal", "lora"):
        part = cost.sample_flops(override(small, [f"train.trainable={what}"]))
        assert 1.5 * counted.forward < part.training < 2.7 * counted.forward, what


def test_counting_leaves_nothing_behind(small: Recipe) -> None:
    """Position tables are cached by device; shapes without values must not get among those of the real network."""
    cost.sample_flops(small)
    method = build_method(small).eval()
    batch = on_device(
        host_batch(moving_samples(1), 0, small), FrozenStates(Silence()), torch.device("cpu"), torch.float32
    )
    with torch.no_grad():
        assert torch.isfinite(method(*batch))


@pytest.mark.parametrize(
    ("name", "half", "full"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989e12, 494e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA A10G", 70e12, 35e12),
    ],
)
def test_known_peaks(name: str, half: float, full: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda", 0)
    assert (peak_flops(device, torch.bfloat16), peak_flops(device, torch.float32)) == (half, full)


def test_a_cpu_is_measured() -> None:
    begun = time.perf_counter()
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - begun < 5
    assert 1e9 < peak < 1e15
    a, b = torch.rand(2, 512, 512)
    begun = time.perf_counter()
    torch.mm(a, b)
    assert 2 * 512**3 / (time.perf_counter() - begun) < 3 * peak  # nothing is faster than the peak


def test_a_peak_is_not_that_of_a_product_that_loads_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker that starts beside others this takes longer than all the time there is for measuring."""
    multiply, calls = torch.mm, list[float]()

    def slow_at_first(*tensors: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        if not calls:
            time.sleep(0.5)
        calls.append(time.perf_counter())
        return multiply(*tensors, **options)

    monkeypatch.setattr(torch, "mm", slow_at_first)
    peak = measured_flops(torch.device("cpu"), torch.float32)
    assert len(calls) > 1
    assert peak > 2 * 1024**3 / 0.4
