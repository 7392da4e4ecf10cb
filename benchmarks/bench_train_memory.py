"""Memory of a training worker as `train.py --plan` predicts it, against the true peak of real steps; on CPUs.

Each case runs in a process of its own: the real method, DeepSpeed engine, text encoder and batches, one worker. What
counts is the peak of resident memory (VmHWM) over that of the same process when libraries are loaded and a network of
a few thousand weights has been trained (so that their own memory does not count). Two peaks: with an allocator that
gives freed memory back at once, which is what tensors really take ("in use"), and as the worker runs, with freed memory
kept. With ``--write`` the table goes to BENCHMARKS.md. About ten minutes on one core, in 4 GB. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE = ["train.workers=1", "train.global_batch=4", "train.micro_batch=4", "train.init=null"]
# The same method with as little as it can have, whose training loads libraries before anything is measured.
LEAST = {
    "cinemo-tiny": ["model.block_out_channels=[32,32]"],
    "dynamicrafter-tiny": ["model.unet.model_channels=32"],
    "trip-tiny": ["model.unet.block_out_channels=[32,32]"],
}
MID = ["model.block_out_channels=[128,256]", "data.size=[128,192]"]
CASES = {  # of cinemo-tiny, unless another recipe stands first
    "tiny, ZeRO 0": ["train.zero_stage=0"],
    "tiny, ZeRO 2": ["train.zero_stage=2"],
    "tiny, ZeRO 3": ["train.zero_stage=3"],
    "tiny, ZeRO 2, gradient checkpointing": ["train.zero_stage=2", "train.gradient_checkpointing=whole"],
    "tiny, ZeRO 2, selective checkpointing": ["train.zero_stage=2", "train.gradient_checkpointing=selective"],
    "tiny, ZeRO 1, four micro batches": ["train.zero_stage=1", "train.micro_batch=1"],
    "tiny, ZeRO 2, bf16": ["train.zero_stage=2", "train.precision=bf16"],
    "dynamicrafter-tiny, ZeRO 2": ["dynamicrafter-tiny", "train.zero_stage=2"],
    "dynamicrafter-tiny, ZeRO 2, gradient checkpointing": [
        *("dynamicrafter-tiny", "train.zero_stage=2", "train.gradient_checkpointing=whole")
    ],
    "trip-tiny, ZeRO 2": ["trip-tiny", "train.zero_stage=2"],
    "trip-tiny, ZeRO 2, gradient checkpointing": [
        *("trip-tiny", "train.zero_stage=2", "train.gradient_checkpointing=whole")
    ],
    "mid-size, ZeRO 0": [*MID, "train.zero_stage=0"],
    "mid-size, ZeRO 2": [*MID, "train.zero_stage=2"],
    "mid-size, ZeRO 2, gradient checkpointing": [*MID, "train.zero_stage=2", "train.gradient_checkpointing=whole"],
    "mid-size, ZeRO 2, selective checkpointing": [
        *(*MID, "train.zero_stage=2", "train.gradient_checkpointing=selective")
    ],
    "mid-size, ZeRO 2, bf16": [*MID, "train.zero_stage=2", "train.precision=bf16"],
}
TITLE = "## Training: memory"
TEXT = """
Made with `benchmarks/bench_train_memory.py --write`: one worker on a CPU, float32 unless stated, micro batch 4 (or 1
of 4), three steps; MB over the same process with its libraries loaded and a minimal network trained. "In use": every
freed block goes back to the system at once, so that the peak is that of tensors. "As it runs": freed memory is kept
(`networks.memory.keep_freed_memory`), as a worker on CPUs does; the prediction adds {share:.0%} of the activations.
No checkpoint is written meanwhile.

"""
NOTE = """
Activations alone come out within 4% of the resident memory of the same forward and backward pass, in float32 and in
bfloat16. In bfloat16 the prediction of a CPU has {kernels:.0f} MB more for what oneDNN keeps of its kernels (seen on
the tiny network: what a first pass leaves behind). "As it runs" misses 15% where freed memory that stays is more than
that share of the activations: the share was fitted to two of these cases. Replayed in an allocator
that takes the smallest hole that fits, the activations alone leave almost none; why more stays is not known. On
accelerators none of this was measured: there torch's own allocator keeps blocks, and the plan leaves
{reserved:.0f} GB of the memory to it, to CUDA and its libraries.
"""


def resident() -> dict[str, int]:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at most since the last `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: int(value.split()[0]) * 1024 for key, value in (x.split(":") for x in lines if x.startswith("Vm"))}


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def named(case: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Recipe and assignments of a case."""
    return (case[0], case[1:]) if case[0] in LEAST else ("cinemo-tiny", case)


def child(case: Sequence[str], kept: bool) -> None:
    """Print the peak of three real steps in bytes."""
    import numpy as np
    import torch

    from cinemo.data.loading.loader import StepBatch
    from cinemo.media.stills import jpeg
    from cinemo.methods import build_method, method_class
    from cinemo.networks.memory import keep_freed_memory
    from cinemo.recipes import load_recipe
    from cinemo.training.run.batch import TEXT_CACHE, FrozenStates, latent_shape
    from cinemo.training.run.engine import Engine, accumulation
    from cinemo.training.run.loop import _prepare, on_device, prefetch
    from cinemo.types import LatentSample

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    name, assignments = named(case)

    def train(settings: Sequence[str], steps: int) -> None:
        recipe = load_recipe(name, [*ONE, *settings])
        method = build_method(recipe)
        method.checkpoint_activations(recipe.train.setting.gradient_checkpointing)
        engine = Engine(method, recipe.train, torch.device("cpu"))
        text = FrozenStates.of(recipe, "cpu", engine.dtype)
        for start in range(0, TEXT_CACHE, 8):  # as after some steps of a large dataset
            text.texts([f"caption {number}" for number in range(start, start + 8)])

        latents = np.ones(latent_shape(recipe), np.float16)
        picture = jpeg(np.zeros((*recipe.data.size, 3), np.uint8))
        stored = dict.fromkeys(method_class(recipe).stored_fields(recipe), picture)

        def batches() -> Iterator[StepBatch]:
            for step in range(steps):
                keys = [f"{step}-{number}" for number in range(recipe.train.global_batch)]
                yield StepBatch(
                    step,
                    0,
                    [
                        LatentSample(key, key, "", f"caption {key[-1]}", latents, 0.5, 8, 3, 0, fields=stored)
                        for key in keys
                    ],
                )

        for _, micros in prefetch(_prepare(batches(), recipe, pin=False)):
            assert len(micros) == accumulation(recipe.train)
            for micro, _ in micros:
                engine.step(engine.loss(*on_device(micro, text, engine.device, engine.dtype)).mean())

    if kept:
        keep_freed_memory()
    train([*assignments, *LEAST[name], "data.size=[16,16]"], 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    forget()
    before = resident()["VmRSS"]
    train(assignments, 3)
    print(resident()["VmHWM"] - before)


def measured(case: Sequence[str], kept: bool) -> int:
    """Bytes that training takes at most; ``kept``: with freed memory kept, as in a worker."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not kept:  # every block above 64 KB is a mapping of its own
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TOP_PAD_": "0"}
    asked = json.dumps([list(case), kept])
    done = subprocess.run(
        [sys.executable, __file__, "--child", asked], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def predicted(case: Sequence[str]) -> tuple[int, int]:
    """Bytes of the plan: in use, and as the worker runs."""
    from cinemo.recipes import load_recipe
    from cinemo.training.plan.activations import counted, shapes
    from cinemo.training.plan.encoders import image_encoder_values, text_encoder_values
    from cinemo.training.plan.footprint import Parameters, footprint

    name, assignments = named(case)
    recipe = load_recipe(name, [*ONE, *assignments])
    setting = recipe.train.setting
    again = setting.gradient_checkpointing
    parameters = Parameters.of(shapes(recipe, "meta"))
    encoder = text_encoder_values(recipe)[0] + image_encoder_values(recipe)[0]
    activations = {again: counted(recipe, again, setting.micro_batch).activations}
    whole = footprint(recipe, parameters, activations, encoder, setting)
    return whole.in_use, whole.peak - whole.checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into BENCHMARKS.md")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*json.loads(arguments.child))
        return
    from bench import fill, table

    from cinemo.training.plan.footprint import KEPT_SHARE, KERNELS_BF16
    from cinemo.training.plan.search import RESERVED

    rows = []
    for name, case in CASES.items():
        if arguments.only in name:
            expected, found = predicted(case), [measured(case, kept) for kept in (False, True)]
            row = [name]
            for guess, truth in zip(expected, found, strict=True):
                row += [f"{guess / 1e6:.0f}", f"{truth / 1e6:.0f}", f"{guess / truth - 1:+.0%}"]
            rows.append(row)
            print(*row, sep="; ", flush=True)
    if arguments.write:
        head = ("case", "in use: predicted", "measured", "off", "as it runs: predicted", "measured", "off")
        text = (
            TEXT.format(share=KEPT_SHARE)
            + table(head, rows)
            + "\n"
            + NOTE.format(reserved=RESERVED / 1e9, kernels=KERNELS_BF16 / 1e6)
        )
        fill(TITLE, text)


if __name__ == "__main__":
    main()
