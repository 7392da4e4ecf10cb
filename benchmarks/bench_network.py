"""`make bench-network`: the full-size network against the published order of operations; its part of BENCHMARKS.md.

Both forwards run on the same weights in one process, in turns, on all cores, at 16 frames. About half an hour on two
cores, in 24 GB.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import NETWORK_TITLE, fill, table
from published_unet import published_forward
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cinemo.networks.attention import _kept_positions
from cinemo.networks.lavie_unet import LavieUNet
from cinemo.networks.memory import keep_freed_memory
from cinemo.training.plan.activations import PeakMemory

ROOT = Path(__file__).resolve().parent.parent
FORWARDS: dict[str, Callable[..., Tensor]] = {"published": published_forward, "ours": LavieUNet.forward}
KERNELS = ("convolution", "addmm", "aten::mm", "bmm", "_scaled_dot_product", "gemm", "sdpa", "flash")
SAMPLING, TRAINING, CHECKPOINTING = "sampling step", "forward + backward", "the same, gradient checkpointing"


def network(dtype: torch.dtype, mode: str, device: str = "cpu") -> LavieUNet:
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet = LavieUNet(gradient_checkpointing=mode == CHECKPOINTING)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter) if mode != SAMPLING else None
    return unet


def inputs(dtype: torch.dtype, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.device(device):
        sample, text = torch.randn(1, 4, 16, *size, dtype=dtype), torch.randn(1, 77, 768, dtype=dtype)
        return sample, torch.full((1,), 500), text, torch.full((1,), 5.0)


def step(forward: Callable[..., Tensor], unet: LavieUNet, mode: str, given: tuple[Tensor, ...]) -> None:
    """One step; gradients that are there are added to, as in accumulation."""
    with torch.set_grad_enabled(mode != SAMPLING):
        out = forward(unet, *given)
        if mode != SAMPLING:
            out.float().square().mean().backward()
    if given[0].is_cuda:
        torch.cuda.synchronize()


def profiled(work: Callable[[], None], on_gpu: bool) -> tuple[float, float]:
    """Seconds, and the part of the kernel or operator time inside convolution, matrix and attention kernels."""
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    begun = time.perf_counter()
    with profile(activities=[activity]) as found:
        work()
        seconds = time.perf_counter() - begun
    spent = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in found.key_averages()
    }
    kernels = sum(value for key, value in spent.items() if any(name in key for name in KERNELS))
    return seconds, kernels / sum(spent.values())


def peak_speed(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best of a large matrix product and a convolution: what this machine reaches at all."""
    best = 0.0
    with torch.device(device), torch.no_grad():
        a, b, out = (torch.randn(2048, 2048, dtype=dtype) for _ in range(3))
        image = torch.randn(8, 320, 40, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(320, 320, 3, 3, dtype=dtype)
    works: list[tuple[Callable[[], object], float]] = [
        (lambda: torch.mm(a, b, out=out), 2 * 2048.0**3),
        (lambda: torch.nn.functional.conv2d(image, weight, padding=1), 2 * 8 * 2560 * 320 * 320 * 9.0),
    ]
    for work, flops in works:
        for _ in range(5):
            begun = time.perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            best = max(best, flops / (time.perf_counter() - begun))
    return best


def measure(dtype: torch.dtype, mode: str, size: tuple[int, int], turns: int, device: str) -> tuple[str, ...]:
    """A row of the table. The best of ``turns`` runs counts, by time."""
    unet, given = network(dtype, mode, device), inputs(dtype, size, device)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in FORWARDS}
    for _ in range(turns):
        for name, forward in FORWARDS.items():
            unet.zero_grad()  # a step begins without gradients, and nothing is added to them
            runs[name].append(profiled(functools.partial(step, forward, unet, mode, given), device != "cpu"))
    print(dtype, mode, size, runs, flush=True)
    (seconds, share), (their_seconds, their_share) = min(runs["ours"]), min(runs["published"])
    memory, their_memory = (counted_memory(FORWARDS[name], dtype, mode, size) for name in ("ours", "published"))
    flops = counted_flops(mode, size)
    return (
        f"{mode}, {str(dtype).removeprefix('torch.')}, {8 * size[0]}x{8 * size[1]}",
        f"{seconds / their_seconds:.2f} ({seconds:.1f} s)",
        f"{memory / their_memory:.2f} ({memory / 1e9:.1f} GB)",
        f"{share:.3f}",
        f"{their_share:.3f}",
        f"{flops / 1e12:.1f}",
        f"{flops / seconds / peak_speed(dtype, device):.2f}",
    )


def counted_memory(forward: Callable[..., Tensor], dtype: torch.dtype, mode: str, size: tuple[int, int]) -> int:
    """Peak bytes of activations, without computing."""
    _kept_positions.cache_clear()
    with FakeTensorMode():
        unet, given = network(dtype, mode), inputs(dtype, size, "cpu")
        with PeakMemory() as memory:
            step(forward, unet, mode, given)
    _kept_positions.cache_clear()
    return memory.peak


def counted_flops(mode: str, size: tuple[int, int]) -> int:
    """Of one step; the backward pass takes twice the forward pass, and what is recomputed is not useful."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FakeTensorMode():
        unet, given = network(torch.float32, SAMPLING), inputs(torch.float32, size, "cpu")
        with FlopCounterMode(display=False, custom_mapping={attention: sdpa_flops}) as counter:
            step(published_forward, unet, SAMPLING, given)
    return counter.get_total_flops() * (1 if mode == SAMPLING else 3)


def sdpa_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    torch.manual_seed(0)
    full, half = (40, 64), (20, 32)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        unet, given = network(dtype, TRAINING, arguments.device), inputs(dtype, half, arguments.device)
        for forward in FORWARDS.values():  # the first run of all pays for kernels' set-up and for fresh memory
            unet.zero_grad()
            step(forward, unet, TRAINING, given)
        del unet, given
        large = half if arguments.device == "cpu" else full  # the published activations take 22 GB at full size
        for mode, size, turns in ((SAMPLING, full, 2), (TRAINING, large, 2), (CHECKPOINTING, full, 1)):
            rows.append(measure(dtype, mode, size, turns, arguments.device))
            gc.collect()
    name = torch.cuda.get_device_name() if arguments.device != "cpu" else f"{platform.machine()} CPU"
    text = NETWORK.format(device=f"{name}, threads: {torch.get_num_threads()}") + table(HEAD, rows) + "\n"
    fill(NETWORK_TITLE, text)


HEAD = ("case", "time", "activations", "kernels' share", "of published", "TFLOP", "MFU")
NETWORK = """
Made with `make bench-network` on: {device}. Batch 1, 16 frames, against the published code's order of operations
(`tests/published_unet.py`) on the same weights, in turns: time and activation memory (peak without weights and their
gradients, counted from shapes) as a ratio to it; the share of the time inside convolution, matrix and attention
kernels; FLOPs of one step, and FLOP/s as a share of what the best large matrix product or convolution reaches
here.

"""


if __name__ == "__main__":
    main()
