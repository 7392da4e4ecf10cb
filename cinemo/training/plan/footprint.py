"""Memory of one training worker, part by part, for each ZeRO stage (arXiv 1910.02054), as DeepSpeed 0.19 lays it out.

P values learn, A values are there in all, N workers share; in float32 a value takes 4 bytes, in bfloat16 2. Adam has
two float32 moments (adam8bit: of a byte each), with an average of the weights three; whatever computes in bfloat16,
and ZeRO 1 to 3 always, has float32 master weights too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from cinemo.config import Checkpointing, Offload, Recipe, Setting, Stage
from cinemo.methods import method_class
from cinemo.training.checkpoint.checkpoints import MOST
from cinemo.training.plan.activations import precision
from cinemo.training.run.batch import TEXT_CACHE, TOKENS, latent_shape
from cinemo.training.run.engine import deepspeed_config

# DeepSpeed's defaults, in values: what a CPU reduces at once, what ZeRO-3 holds gathered at most.
REDUCE_AT_ONCE = 500_000_000
GATHERED_AT_MOST = 1_000_000_000
# Of the activations' bytes: what the C library keeps beyond them on a CPU, where the worker asks it to keep freed
# memory (`networks.memory.keep_freed_memory`): holes that no later activation fitted. Measured, see BENCHMARKS.md.
KEPT_SHARE = 0.45
# What oneDNN holds on a CPU in bfloat16 once every shape has been met: compiled kernels and their workspaces, until its
# cache of kernels lets them go (float32: 6 MB). Measured for the tiny network on a processor with AMX; 16 MB of it stay
# when that cache is made to hold a single kernel.
KERNELS_BF16 = 41_000_000
ON_A_NODE = 8  # workers with accelerators that one node is taken to have at most
BLOCK = 256  # values of 8-bit moments that share a scale, see `cinemo.training.run.adam8bit`
_PREFETCHED = 4  # steps' batches in host memory: two wait, one is made, one is used


@dataclass(frozen=True)
class Parameters:
    """Values of a method: in all, those that learn, and the largest tensor of the latter."""

    total: int
    trainable: int
    largest: int

    @classmethod
    def of(cls, method: nn.Module) -> Parameters:
        learning = [parameter.numel() for parameter in method.parameters() if parameter.requires_grad]
        return cls(sum(p.numel() for p in method.parameters()), sum(learning), max(learning, default=0))


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker.

    ``buffers``: the most at one time of DeepSpeed's buckets, and gathered weights.
    ``inputs``: the frozen encoders, kept text states, a micro batch. ``kernels``: what the CPU's kernel library
    holds. ``kept``: freed memory that a process on CPUs does not give back. ``checkpoints``: host memory for those that
    are being written. ``peak``: on the device, less than the sum of the parts, which are not all there at one time: the
    larger of the backward pass and the optimizer's step; on CPUs with ``checkpoints``. ``in_use``: the same without
    ``kept`` and ``checkpoints``. ``host``: host memory of a worker on an accelerator.
    """

    zero_stage: Stage
    checkpointing: Checkpointing
    offload: Offload
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    inputs: int
    kernels: int
    kept: int
    checkpoints: int
    peak: int
    in_use: int
    host: int


def stages(recipe: Recipe) -> Iterator[tuple[Stage, Offload]]:
    """Every ZeRO stage and, on accelerators, each offload that it allows."""
    offloads: dict[Stage, tuple[Offload, ...]] = {
        0: ("none",),
        1: ("none", "optimizer"),
        2: ("none", "optimizer"),
        3: ("none", "optimizer", "all"),
    }
    for stage, allowed in offloads.items():
        for offload in allowed if recipe.train.gpus_per_worker else ("none",):
            yield stage, offload


def footprint(
    recipe: Recipe, parameters: Parameters, activations: Mapping[Checkpointing, int], encoder: int, setting: Setting
) -> Footprint:
    """The parts of one setting, whatever the recipe has.

    Args:
        activations: of its micro batch, see `cinemo.training.plan.activations.Counted`.
        encoder: values of the frozen text and image encoders.
    """
    train, (micro_batch, checkpointing, stage, offload) = recipe.train, setting
    value, workers, on_accelerator = precision(recipe).itemsize, train.workers, train.gpus_per_worker > 0
    trainable, frozen = parameters.trainable, parameters.total - parameters.trainable
    share = -(-trainable // workers)
    held = share if stage else trainable  # what this worker's optimizer works on

    weights = value * (parameters.total if stage < 3 else share + -(-frozen // workers))
    # ZeRO 1 keeps whole gradients until a step's last micro batch, ZeRO 2 and 3 add theirs up after each.
    # Those of bfloat16 weights are then float32.
    gradients = 4 * share if stage >= 2 else value * trainable
    master = 4 * held if stage or value < 4 else 0
    moments = 2 * (held + 4 * -(-held // BLOCK)) if train.optimizer == "adam8bit" else 8 * held
    states = master + moments + 4 * held * (bool(train.ema_decay) + len(train.posthoc_ema))

    settings = train.model_copy(update=setting._asdict())
    zero = deepspeed_config(settings, across_nodes=workers > ON_A_NODE)["zero_optimization"]
    at_once = zero["reduce_bucket_size"] if stage else REDUCE_AT_ONCE
    bucket = min(trainable, at_once)
    at_backward = 0
    if stage:
        # The bucket is allocated whole when a backward pass begins; a CPU gives it memory as it fills.
        # Where communication overlaps there are two: one is reduced, in float32, while the other fills.
        buffers = 2 if zero.get("overlap_comm") else 1
        at_backward = buffers * value * at_once if on_accelerator else 0
        reducing = at_backward + (4 * bucket if on_accelerator else 2 * value * bucket)
        if value < 4 and not on_accelerator:
            reducing += 4 * bucket  # travels in float32
    else:
        reducing = value * bucket  # flattened for the all-reduce
    # Gradients of the optimizer's own: a float32 copy where they lie apart, or are of another type.
    at_step = 4 * held if stage or value < 4 else 0
    if train.optimizer == "adam8bit" and not on_accelerator:
        at_step += 20 * (held if stage else parameters.largest)  # the CPU's kernel computes on whole float32 copies
    if stage == 1 and value < 4:
        at_step += value * held  # flattened in their own type first
    if stage == 3:  # weights gathered for a forward pass stay where they are soon used again
        gathered = value * min(parameters.total, GATHERED_AT_MOST)
        at_backward, reducing = at_backward + gathered, reducing + gathered
    host = 0
    if offload != "none":
        # Gradients go there as they come; one whole float32 share, and one of the weights on their way back.
        host += states + 4 * held + value * held
        states, gradients = 0, value * (trainable if stage == 1 else parameters.largest)
        at_step = 0
    if offload == "all":
        host, weights = host + weights, 0

    frames, channels, rows, columns = latent_shape(recipe)
    noise = method_class(recipe).target_shape((channels, frames, rows, columns))
    sample = 4 * (channels * frames * rows * columns + math.prod(noise))  # latents and noise, float32
    states_of_text = TOKENS * method_class(recipe).text_width(recipe) * value
    texts_stored = train.text_states == "stored"
    kept_texts = 0 if texts_stored else TEXT_CACHE
    inputs = encoder * value + kept_texts * states_of_text + micro_batch * (sample + states_of_text)
    waiting_sample = sample + (2 * states_of_text // value if texts_stored else 0)  # read in float16
    waiting = _PREFETCHED * waiting_sample * train.global_batch // workers
    active = activations[checkpointing]
    kept = 0 if on_accelerator else int(KEPT_SHARE * active)
    if on_accelerator:
        host += waiting
    else:
        inputs += waiting

    # What is trained as float32 masters, moments and averages (8-bit moments too are stored as float32).
    stored = 4 * (3 + bool(train.ema_decay) + len(train.posthoc_ema)) * trainable + value * frozen
    checkpoints = MOST * -(-stored // workers)
    if on_accelerator:
        host += checkpoints

    kernels = KERNELS_BF16 if value < 4 and not on_accelerator else 0

    resident = weights + states + inputs + kernels
    # Without accumulation gradients come as activations go; ZeRO 3 gives them their place when it is built.
    adding_up = gradients if micro_batch * workers < train.global_batch or offload != "none" or stage == 3 else 0
    backward = active + adding_up + at_backward
    in_use = resident + max(backward, gradients + reducing, gradients + at_step)
    peak = max(in_use, resident + backward + kept) + (0 if on_accelerator else checkpoints)
    buffers = max(at_backward, reducing, at_step)
    return Footprint(
        stage, checkpointing, offload,
        weights, gradients, states, active, buffers, inputs, kernels, kept, checkpoints,
        peak, in_use, host,
    )  # fmt: skip
