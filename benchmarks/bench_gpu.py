"""`make bench-gpu`: what an accelerator makes of the encoder, the networks' training steps and sampling. A table.

One command, under nine minutes on one H100, with nothing beside torch, diffusers, DeepSpeed and this package: weights
are random, nothing is downloaded. A part that cannot run says why in its row, and the others go on; what would begin
after ``--minutes`` is left out. With ``--device cpu --small`` the same parts run on tiny networks within a minute.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from published_unet import published_forward
from torch import Tensor, nn

from cinemo.accelerators import peak_flops
from cinemo.config import Checkpointing, Recipe
from cinemo.data.precompute.stages import Encoder
from cinemo.methods import build_method
from cinemo.networks.lavie_unet import LavieUNet
from cinemo.networks.norms import group_norm
from cinemo.networks.vae_cost import STABLE_DIFFUSION, encoding
from cinemo.recipes import RECIPES, override
from cinemo.training.plan.activations import counted
from cinemo.training.plan.cost import sample_flops
from cinemo.training.plan.footprint import Parameters, footprint
from cinemo.training.plan.search import SAID
from cinemo.training.run.batch import blank_condition, blank_example, latent_shape
from cinemo.training.run.engine import Engine, allow_tf32
from cinemo.types import LatentBatch

ROOT = Path(__file__).resolve().parent.parent
HEAD = ("part", "measured", "of its bound or of what it is compared with", "goal", "note")
Row = tuple[str, ...]
FULL = ("cinemo-320x512", "dynamicrafter-512", "trip-256", "longer-320x512")
SMALL = ("cinemo-tiny", "dynamicrafter-tiny", "trip-tiny", "longer-tiny")
TINY_VAE = STABLE_DIFFUSION | {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
ONE_WORKER = ["train.workers=1", "train.init=null", "train.zero_stage=2"]


@dataclass(frozen=True)
class Bench:
    """``turns``: how often a thing is measured, after it was done twice."""

    device: torch.device
    small: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.small else torch.bfloat16

    @property
    def recipes(self) -> tuple[str, ...]:
        return SMALL if self.small else FULL

    def recipe(self, name: str, *changes: str) -> Recipe:
        recipe = RECIPES[name]()
        batch = 1 if self.small else recipe.train.setting.micro_batch
        sizes = [f"train.global_batch={batch}", f"train.micro_batch={batch}", "train.lanes=1"]
        gpus = f"train.gpus_per_worker={int(self.device.type == 'cuda')}"
        precision = f"train.precision={'fp32' if self.small else 'bf16'}"
        return override(recipe, [*ONE_WORKER, *sizes, gpus, precision, *changes])

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], turns: int = 5) -> float:
        """Of one call, once it has been made before."""
        turns = 1 if self.small else turns
        for _ in range(1 if self.small else 2):
            work()
        self.finish()
        begun = time.perf_counter()
        for _ in range(turns):
            work()
        self.finish()
        return (time.perf_counter() - begun) / turns

    def host_share(self, work: Callable[[], object], seconds: float) -> str:
        """How much of the ``seconds`` of a call the host takes to enqueue it. A CUDA graph can only save where that is
        nearly all.
        """
        self.finish()
        begun = time.perf_counter()
        work()
        queued = time.perf_counter() - begun
        self.finish()
        return f"host {queued / seconds:.0%} of it" if self.device.type == "cuda" else ""

    def in_turns(self, ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
        return self.seconds(ours), self.seconds(theirs)


def vae(bench: Bench) -> Iterator[Row]:
    """Clips a second through the encoder that precompute uses, from bytes on the host to latents on the host."""
    import diffusers

    recipe = bench.recipe(bench.recipes[0], f"data.encode_gpus={int(bench.device.type == 'cuda')}")
    count = 2 if bench.small else 16
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        network = diffusers.AutoencoderKL.from_config(TINY_VAE if bench.small else dict(STABLE_DIFFUSION))
        network.save_pretrained(place)
        flops = encoding(place, recipe.data.size).flops * recipe.data.frames
        encoder = Encoder(recipe.data, place, "sample", str(bench.dtype).removeprefix("torch."))
        shape = (recipe.data.frames, *recipe.data.size, 3)
        clip = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        views = [(clip, f"clip{number}", 0) for number in range(count)]

    def encode() -> list[Any]:
        return list(encoder._encoded(views))

    seconds = bench.seconds(encode, 2) / count
    share = flops / seconds / peak_flops(bench.device, bench.dtype)
    yield "VAE encode", f"{1 / seconds:.2f} clips/s", f"{share:.2f} of peak FLOP/s", "0.5", f"{flops / 1e12:.2f} TFLOP"
    # What the encoder does not do, to be done where it pays.
    encoder.vae.network.to(memory_format=torch.channels_last)
    other = bench.seconds(encode, 2) / count
    yield "the same, weights channels_last", f"{1 / other:.2f} clips/s", f"{other / seconds:.2f} of its time", "", ""
    if not bench.small:
        encoder.vae.network.encoder = torch.compile(encoder.vae.network.encoder)
        other = bench.seconds(encode, 2) / count
        yield "the same, and compiled", f"{1 / other:.2f} clips/s", f"{other / seconds:.2f} of its time", "", ""


def training(bench: Bench) -> Iterator[Row]:
    """A step of forward, backward and Adam of each network, without DeepSpeed."""
    for name in bench.recipes:
        for checkpointing in get_args(Checkpointing):
            for how in ("false", "regional", "true"):
                if bench.small and how != "false":
                    continue  # CPUs compile for minutes
                changes = [f"train.gradient_checkpointing={checkpointing}"]
                recipe = bench.recipe(name, *changes)
                label = f"{name}: step, batch {recipe.train.setting.micro_batch}"
                compiled = {"false": "", "true": ", compiled whole"}.get(how, f", {how}")
                label += f", {SAID[checkpointing]}{compiled}"
                yield from guarded(
                    label, lambda recipe=recipe, how=how, label=label: one_step(bench, recipe, how, label)
                )


def one_step(bench: Bench, recipe: Recipe, how: str, label: str) -> Iterator[Row]:
    method = build_method(recipe).to(bench.device, bench.dtype)
    method.checkpoint_activations(recipe.train.setting.gradient_checkpointing)
    if how != "false":
        method.compile_networks(how == "regional")
    adam = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], fused=True)
    given = batch(bench, recipe, method)

    def step() -> None:
        method(*given).backward()
        adam.step()
        adam.zero_grad()

    begun = time.perf_counter()
    step()
    bench.finish()
    first = time.perf_counter() - begun
    seconds = bench.seconds(step, 3)
    useful = sample_flops(recipe).training * recipe.train.setting.micro_batch
    mfu = useful / seconds / peak_flops(bench.device, bench.dtype)
    note = ", ".join(filter(None, (f"first step {first:.1f} s", bench.host_share(step, seconds))))
    yield label, f"{seconds:.3f} s", f"{mfu:.0%} MFU", "50%", note


def batch(bench: Bench, recipe: Recipe, method: nn.Module) -> tuple[Any, ...]:
    frames, channels, rows, columns = latent_shape(recipe)
    size, generator = recipe.train.setting.micro_batch, torch.Generator().manual_seed(0)
    video = torch.randn(size, channels, frames, rows, columns, generator=generator).to(bench.device)
    shape = method.target_shape((channels, frames, rows, columns))
    noise = torch.randn(size, *shape, generator=generator).to(bench.device)
    t_B = torch.full((size,), recipe.diffusion.train_steps // 2, device=bench.device)
    return LatentBatch(video, blank_condition(recipe, blank_example(recipe), video, bench.dtype)), t_B, noise


def memory(bench: Bench) -> Iterator[Row]:
    """The peak of DeepSpeed's steps against what `train.py --plan` says of them."""
    recipe = bench.recipe(bench.recipes[0], "train.gradient_checkpointing=whole")
    setting = recipe.train.setting
    if not torch.distributed.is_initialized():
        place = Path(tempfile.mkdtemp()) / "rendezvous"
        backend = "nccl" if bench.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=place.as_uri(), rank=0, world_size=1)
    method = build_method(recipe)
    parameters = Parameters.of(method)
    method.checkpoint_activations("whole")
    engine = Engine(method, recipe.train, bench.device)
    given = batch(bench, recipe, method)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)

    def step() -> None:
        engine.step(engine.loss(*given).mean())

    seconds = bench.seconds(step, 3)
    activations = counted(recipe, "whole", setting.micro_batch).activations
    planned = footprint(recipe, parameters, {"whole": activations}, 0, setting).peak
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(bench.device)
        found = f"{peak / 1e9:.1f} GB", f"{peak / planned:.2f} of --plan"
    else:
        found = "-", f"--plan says {planned / 1e9:.2f} GB"
    yield "DeepSpeed ZeRO 2: peak memory, whole checkpointing", *found, "0.90-1.10", f"{seconds:.3f} s a step"


def unet(bench: Bench) -> tuple[LavieUNet, tuple[int, ...], int]:
    recipe = bench.recipe(bench.recipes[0])
    torch.manual_seed(0)
    network = build_method(recipe).networks["unet"].to(bench.device, bench.dtype)
    frames, channels, rows, columns = latent_shape(recipe)
    assert isinstance(network, LavieUNet)
    return network, (channels, frames, rows, columns), network.config["cross_attention_dim"]


def asked(bench: Bench, shape: tuple[int, ...], width: int, rows: int) -> tuple[Tensor, ...]:
    options: Any = {"device": bench.device, "dtype": bench.dtype}
    text, motion = torch.randn(rows, 77, width, **options), torch.full((rows,), 10.0, device=bench.device)
    return torch.randn(rows, *shape, **options), torch.full((), 500, device=bench.device), text, motion


@torch.no_grad()
def sampling(bench: Bench) -> Iterator[Row]:
    """50 guided steps of one video against the published order of operations on the same weights."""
    network, shape, width = unet(bench)
    given = asked(bench, shape, width, 2)
    keys_values = network.keys_values(given[2])

    def step() -> Tensor:
        return network(*given[:2], keys_values, given[3])

    ours, theirs = bench.in_turns(step, lambda: published_forward(network, *given))
    share = bench.host_share(step, ours)
    yield (
        "a video of 50 guided steps",
        f"{50 * ours:.1f} s",
        f"{ours / theirs:.2f} of the published order",
        "0.6",
        share,
    )
    if bench.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replayed = bench.seconds(graph.replay)
        yield "the same, as a CUDA graph", f"{50 * replayed:.1f} s", f"{replayed / ours:.2f} of its time", "", ""


@torch.no_grad()
def step_batching(bench: Bench) -> Iterator[Row]:
    """What a row of the network costs where the server denoises several videos in one batch."""
    network, shape, width = unet(bench)
    alone = 0.0
    for rows in (1, 2) if bench.small else (1, 2, 4, 8):
        given = asked(bench, shape, width, rows)
        seconds = bench.seconds(lambda given=given: network(*given), 3) / rows
        alone = alone or seconds
        yield f"step of {rows} rows", f"{seconds * 1000:.1f} ms a row", f"{seconds / alone:.2f} of a row alone", "", ""


def norms(bench: Bench) -> Iterator[Row]:
    """Group norm of activations with channels innermost, forward and backward, against PyTorch's own."""
    shape = (2, 64, 32, 12) if bench.small else (10, 320, 16 * 40, 64)
    x = torch.randn(shape, device=bench.device, dtype=bench.dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(shape[1], device=bench.device, dtype=bench.dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    x.requires_grad_()

    def run(norm: Callable[[], Tensor]) -> None:
        # In the layout that the next convolution takes.
        norm().contiguous(memory_format=torch.channels_last).backward(gradient)

    ours, theirs = bench.in_turns(
        lambda: run(lambda: group_norm(x, weight, weight, 32, 1e-5)),
        lambda: run(lambda: nn.functional.group_norm(x, 32, weight, weight, 1e-5)),
    )
    yield "group norm, channels innermost", f"{ours * 1000:.2f} ms", f"{ours / theirs:.2f} of PyTorch's", "< 1", ""


def gpu_tests(bench: Bench) -> Iterator[Row]:
    """The tests marked ``gpu``, in a process of their own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/test_gpu.py"),
    ]
    if bench.small:
        command += ["-k", "draws or group_norm"]
    environment = {**os.environ, "CINEMO_TEST_DEVICE": bench.device.type}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"])[-1]
    yield "tests marked gpu", "passed" if done.returncode == 0 else "FAILED", last.strip("= "), "passed", ""


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "vae": vae,
    "sampling": sampling,
    "batching": step_batching,
    "norms": norms,
    "memory": memory,
    "tests": gpu_tests,
    "training": training,
}


def guarded(label: str, part: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Its rows, or one that says why there are none."""
    if time.perf_counter() > DEADLINE[0]:
        yield label, "-", "-", "", "left out: no time was left"
        return
    try:
        yield from part()
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        yield label, "-", "-", "", f"{type(error).__name__}: {reason[:160]}"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.compiler.reset()


DEADLINE = [float("inf")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="tiny networks: whether it runs, not how fast")
    parser.add_argument("--part", choices=PARTS, action="append", help="this one alone; may be given again")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later")
    parser.add_argument("--output", help="write the table there as well")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: no accelerator is here; --device cpu --small runs without one")
    begun = time.perf_counter()
    DEADLINE[0] = begun + 60 * arguments.minutes
    bench = Bench(
        torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu"), arguments.small
    )
    allow_tf32()
    name = torch.cuda.get_device_name(bench.device) if arguments.device == "cuda" else f"{platform.machine()} CPU"
    lines = [f"{name}, torch {torch.__version__}{', small networks' * arguments.small}", ""]
    lines += [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    print("\n".join(lines), flush=True)
    for part in arguments.part or PARTS:
        for row in guarded(part, lambda part=part: PARTS[part](bench)):
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
            print(lines[-1], flush=True)
    lines += ["", f"{time.perf_counter() - begun:.0f} s in all."]
    print("\n".join(lines[-2:]))
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
