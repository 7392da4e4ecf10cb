"""`make bench-network`: the full-size networks against the published order of operations; their part of BENCHMARKS.md.

Both forwards run on the same weights in one process, in turns, on all cores, at 16 frames. About an hour on two cores,
in 24 GB. With ``--network`` one of them is measured, and its rows are printed alone.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import NETWORK_TITLE, fill, table
from published_dynamicrafter import published_forward as published_dynamicrafter
from published_unet import published_forward as published_lavie
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cinemo.networks.attention import _kept_positions
from cinemo.networks.dynamicrafter_unet import DynamiCrafterUNet
from cinemo.networks.lavie_unet import LavieUNet
from cinemo.networks.memory import checkpoint_activations, keep_freed_memory
from cinemo.training.plan.activations import PeakMemory

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("convolution", "conv3d", "addmm", "aten::mm", "bmm", "_scaled_dot_product", "gemm", "sdpa", "flash")
SAMPLING, TRAINING, CHECKPOINTING = "sampling step", "forward + backward", "the same, gradient checkpointing"
FULL = (40, 64)  # latent cells of 320x512 pixels


@dataclass(frozen=True)
class Subject:
    """A network and what it is compared with.

    ``inputs``: shapes that follow the frames' size, for one item. ``training``, ``checkpointing``: the largest size
    at which the published order of operations fits into 24 GB with weights and gradients, where there is no GPU.
    """

    network: Callable[..., nn.Module]
    published: Callable[..., Tensor]
    inputs: Callable[..., tuple[Tensor, ...]]
    training: tuple[int, int]
    checkpointing: tuple[int, int]

    @property
    def forwards(self) -> dict[str, Callable[..., Tensor]]:
        return {"published": self.published, "ours": lambda unet, *given: unet(*given)}


def lavie_inputs(dtype: torch.dtype, size: tuple[int, int]) -> tuple[Tensor, ...]:
    sample, text = torch.randn(1, 4, 16, *size, dtype=dtype), torch.randn(1, 77, 768, dtype=dtype)
    return sample, torch.full((1,), 500), text, torch.full((1,), 5.0)


def dynamicrafter_inputs(dtype: torch.dtype, size: tuple[int, int]) -> tuple[Tensor, ...]:
    sample, text = torch.randn(1, 8, 16, *size, dtype=dtype), torch.randn(1, 77, 1024, dtype=dtype)
    return sample, torch.full((1,), 500), text, torch.randn(1, 16, 16, 1024, dtype=dtype), torch.full((1,), 3)


SUBJECTS = {
    "LaVie": Subject(LavieUNet, published_lavie, lavie_inputs, (20, 32), FULL),
    "DynamiCrafter": Subject(DynamiCrafterUNet, published_dynamicrafter, dynamicrafter_inputs, (16, 24), (20, 32)),
}


def network(subject: Subject, dtype: torch.dtype, mode: str, device: str = "cpu") -> nn.Module:
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet = subject.network()
    finally:
        torch.set_default_dtype(torch.float32)
    checkpoint_activations(unet, "whole" if mode == CHECKPOINTING else "none")
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter) if mode != SAMPLING else None
    return unet


def inputs(subject: Subject, dtype: torch.dtype, size: tuple[int, int], device: str) -> tuple[Tensor, ...]:
    with torch.device(device):
        return subject.inputs(dtype, size)


def step(forward: Callable[..., Tensor], unet: nn.Module, mode: str, given: tuple[Tensor, ...]) -> None:
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


def measure(
    name: str, dtype: torch.dtype, mode: str, size: tuple[int, int], turns: int, device: str
) -> tuple[str, ...]:
    """A row of the table. The best of ``turns`` runs counts, by time."""
    subject = SUBJECTS[name]
    unet, given = network(subject, dtype, mode, device), inputs(subject, dtype, size, device)
    runs: dict[str, list[tuple[float, float]]] = {order: [] for order in subject.forwards}
    for _ in range(turns):
        for order, forward in subject.forwards.items():
            unet.zero_grad()  # a step begins without gradients, and nothing is added to them
            runs[order].append(profiled(functools.partial(step, forward, unet, mode, given), device != "cpu"))
    print(name, dtype, mode, size, runs, flush=True)
    (seconds, share), (their_seconds, their_share) = min(runs["ours"]), min(runs["published"])
    memory, their_memory = (counted_memory(subject, order, dtype, mode, size) for order in ("ours", "published"))
    flops = counted_flops(subject, mode, size)
    return (
        f"{name}: {mode}, {str(dtype).removeprefix('torch.')}, {8 * size[0]}x{8 * size[1]}",
        f"{seconds / their_seconds:.2f} ({seconds:.1f} s)",
        f"{memory / their_memory:.2f} ({memory / 1e9:.1f} GB)",
        f"{share:.3f}",
        f"{their_share:.3f}",
        f"{flops / 1e12:.1f}",
        f"{flops / seconds / peak_speed(dtype, device):.2f}",
    )


def counted_memory(subject: Subject, order: str, dtype: torch.dtype, mode: str, size: tuple[int, int]) -> int:
    """Peak bytes of activations, without computing."""
    _kept_positions.cache_clear()
    with FakeTensorMode():
        unet, given = network(subject, dtype, mode), inputs(subject, dtype, size, "cpu")
        with PeakMemory() as memory:
            step(subject.forwards[order], unet, mode, given)
    _kept_positions.cache_clear()
    return memory.peak


def counted_flops(subject: Subject, mode: str, size: tuple[int, int]) -> int:
    """Of one step; the backward pass takes twice the forward pass, and what is recomputed is not useful."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FakeTensorMode():
        unet, given = network(subject, torch.float32, SAMPLING), inputs(subject, torch.float32, size, "cpu")
        with FlopCounterMode(display=False, custom_mapping={attention: sdpa_flops}) as counter:
            step(subject.published, unet, SAMPLING, given)
    return counter.get_total_flops() * (1 if mode == SAMPLING else 3)


def sdpa_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])


def rows_of(name: str, device: str, dtypes: list[torch.dtype]) -> list[tuple[str, ...]]:
    subject, rows = SUBJECTS[name], []
    # On a GPU the published activations of a training step take more than half of 80 GB at full size, but they fit.
    training, checkpointing = (subject.training, subject.checkpointing) if device == "cpu" else (FULL, FULL)
    for dtype in dtypes:
        unet, given = network(subject, dtype, TRAINING, device), inputs(subject, dtype, subject.training, device)
        for forward in subject.forwards.values():  # the first run of all pays for kernels' set-up and for fresh memory
            unet.zero_grad()
            step(forward, unet, TRAINING, given)
        del unet, given
        for mode, size, turns in ((SAMPLING, FULL, 2), (TRAINING, training, 2), (CHECKPOINTING, checkpointing, 1)):
            rows.append(measure(name, dtype, mode, size, turns, device))
            gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--network", choices=SUBJECTS, help="this one alone; BENCHMARKS.md stays as it is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="with --network: this one alone")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    torch.manual_seed(0)
    dtypes = [getattr(torch, arguments.dtype)] if arguments.dtype else [torch.float32, torch.bfloat16]
    names = [arguments.network] if arguments.network else list(SUBJECTS)
    rows = [row for name in names for row in rows_of(name, arguments.device, dtypes)]
    if arguments.network or arguments.dtype:
        print(table(HEAD, rows))
        return
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else f"{platform.machine()} CPU"
    text = NETWORK.format(device=f"{device}, threads: {torch.get_num_threads()}") + table(HEAD, rows) + "\n"
    fill(NETWORK_TITLE, text)


HEAD = ("case", "time", "activations", "kernels' share", "of published", "TFLOP", "MFU")
NETWORK = """
Made with `make bench-network` on: {device}. Batch 1, 16 frames, against the published code's order of operations
(`tests/published_unet.py`, `tests/published_dynamicrafter.py`) on the same weights, in turns: time and activation
memory (peak without weights and their gradients, counted from shapes) as a ratio to it; the share of the time inside
convolution, matrix and attention kernels; FLOPs of one step, and FLOP/s as a share of what the best large matrix
product or convolution reaches here.

"""


if __name__ == "__main__":
    main()
