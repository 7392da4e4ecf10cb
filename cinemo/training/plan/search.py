"""The fastest setting that fits an accelerator, by the plan's model: micro batch, checkpointing, ZeRO stage, offload.

None of them changes what is learnt: the global batch is the same, and so are its samples, their order and their draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from pydantic import ValidationError

from cinemo.accelerators import Accelerator
from cinemo.config import AUTO, Checkpointing, Recipe, Setting, TrainConfig
from cinemo.training.plan.activations import Counted, counted, precision, shapes
from cinemo.training.plan.cost import SampleFlops, sample_flops
from cinemo.training.plan.encoders import image_encoder_values, text_encoder_values
from cinemo.training.plan.footprint import Footprint, Parameters, footprint, stages
from cinemo.types import InputError

# Of the peak, with what is computed twice: what large diffusion networks in bfloat16 commonly reach.
ASSUMED_MFU = 0.35
# Bytes of an accelerator's memory that are not for tensors: CUDA's context, workspaces of cuBLAS and cuDNN, holes
# between the allocator's blocks. Assumed, not measured.
RESERVED = 2e9
MARGIN = 0.1  # of its peak that a setting must leave free to be chosen: no plan is exact
ADAM_ON_HOST = 3.5e8  # values a second of Adam on one core, which is bound by its memory (28 bytes each). Assumed.
# What auto stands for on CPUs, where memory is shared with whatever else runs, and time hardly depends on it.
SAFE = Setting(1, "none", 2, "none")
SAID: Mapping[Checkpointing, str] = {
    "none": "no checkpointing",
    "selective": "selective checkpointing",
    "whole": "whole checkpointing",
}


@dataclass(frozen=True)
class Workload:
    """What is counted of a recipe once, whatever setting and accelerator it is planned for.

    ``encoders``: values of the frozen ones. ``counts``: of micro batches of ``counted_at`` samples, by checkpointing;
    bytes and FLOPs are proportional to their size.
    """

    recipe: Recipe
    flops: SampleFlops
    parameters: Parameters
    encoders: int
    counts: Mapping[Checkpointing, Counted]
    counted_at: int

    @classmethod
    def of(cls, recipe: Recipe) -> Workload:
        """Of one for samples of one shape. Half a minute for a full-size network."""
        size = 1 if recipe.train.micro_batch == "auto" else recipe.train.micro_batch
        return cls(
            recipe,
            sample_flops(recipe),
            Parameters.of(shapes(recipe, "meta")),
            text_encoder_values(recipe)[0] + image_encoder_values(recipe)[0],
            {checkpointing: counted(recipe, checkpointing, size) for checkpointing in get_args(Checkpointing)},
            size,
        )

    def executed(self, checkpointing: Checkpointing) -> int:
        """FLOPs of training on one sample, with what is computed again: what takes time."""
        again = self.counts[checkpointing].flops - self.counts["none"].flops
        return self.flops.training + again // self.counted_at

    def footprint(self, setting: Setting) -> Footprint:
        activations = {
            checkpointing: found.activations * setting.micro_batch // self.counted_at
            for checkpointing, found in self.counts.items()
        }
        return footprint(self.recipe, self.parameters, activations, self.encoders, setting)

    def seconds(self, setting: Setting, known: Accelerator, reached: float) -> float:
        """Of one optimizer step: what is computed, and what ZeRO 3 and offloading make it wait for.

        The gradients of the other stages travel during the backward pass and count as nothing.

        Args:
            reached: FLOP/s of a worker, counting also what is computed again.
        """
        train, stage, value = self.recipe.train, setting.zero_stage, precision(self.recipe).itemsize
        micros = train.global_batch // (train.workers * setting.micro_batch)
        seconds = train.global_batch / train.workers * self.executed(setting.gradient_checkpointing) / reached
        passes = micros * (3 if setting.gradient_checkpointing == "whole" else 2)  # that need all weights
        if stage == 3:
            seconds += passes * value * self.parameters.total * (1 - 1 / train.workers) / known.link
        share = -(-self.parameters.trainable // train.workers)
        if setting.offload != "none":
            down = (4 * micros if stage >= 2 else value) * share
            seconds += (down + value * share) / known.host + share / ADAM_ON_HOST
        if setting.offload == "all":
            seconds += passes * value * self.parameters.total / train.workers / known.host
        return seconds


@dataclass(frozen=True)
class Choice:
    """``peak``: bytes of the worker's device. ``seconds``: of an optimizer step."""

    setting: Setting
    peak: int
    seconds: float


def room(recipe: Recipe, known: Accelerator) -> float:
    """Bytes that tensors may take."""
    return known.memory - (RESERVED if recipe.train.gpus_per_worker else 0)


def settings(recipe: Recipe, auto: bool = False) -> Iterator[Setting]:
    """All that the recipe could be computed with; ``auto``: of those, the ones that differ in what is auto alone."""
    train = recipe.train
    each = train.global_batch // train.workers
    for micro_batch in (size for size in range(1, each + 1) if each % size == 0):
        for checkpointing in get_args(Checkpointing):
            for stage, offload in stages(recipe):
                setting = Setting(micro_batch, checkpointing, stage, offload)
                given = (getattr(train, key) in (AUTO, value) for key, value in setting._asdict().items())
                if auto and not all(given):
                    continue
                try:
                    type(train).model_validate(train.model_dump() | setting._asdict())
                except ValidationError:
                    continue  # a method that does not know this stage
                yield setting


def fastest(work: Workload, known: Accelerator, reached: float, auto: bool = False) -> Choice | None:
    """The setting of the shortest step of those that fit with a margin, None: none does.

    Of equally fast ones that of the largest micro batch, which launches least, and of those that of the least memory.

    Args:
        reached: see `Workload.seconds`. auto: see `settings`.
    """
    choices = (
        Choice(setting, work.footprint(setting).peak, work.seconds(setting, known, reached))
        for setting in settings(work.recipe, auto)
    )
    fitting = [choice for choice in choices if choice.peak * (1 + MARGIN) <= room(work.recipe, known)]
    return min(fitting, key=lambda choice: (choice.seconds, -choice.setting.micro_batch, choice.peak), default=None)


def settled(recipe: Recipe, known: Accelerator | None) -> tuple[Recipe, str]:
    """A recipe with what ``auto`` stands for in its place, and the line that says so.

    Args:
        known: the accelerator of each worker, None: CPUs.

    Raises:
        InputError: nothing fits.
    """
    if known is None:
        safe = {key: getattr(SAFE, key) for key in recipe.train.automatic}
        chosen = recipe.model_copy(update={"train": recipe.train.model_copy(update=safe)})
        return chosen, f"{said(chosen.train.setting)}: what auto is on CPUs"
    work = Workload.of(recipe.of_shape(recipe.data.largest))
    choice = fastest(work, known, known.peak(precision(recipe)) * ASSUMED_MFU, auto=True)
    if choice is None:
        least = min(work.footprint(setting).peak for setting in settings(work.recipe, auto=True))
        raise InputError(
            f"train.{', train.'.join(recipe.train.automatic)}: auto, but nothing fits {known.name}: the least takes "
            f"{least / 1e9:.1f} GB, and {room(recipe, known) / (1 + MARGIN) / 1e9:.1f} of {known.memory / 1e9:.1f} are "
            "planned with; set train.offload=optimizer, a smaller data.size, or more train.workers"
        )
    line = f"{said(choice.setting)}: {choice.peak / 1e9:.0f} of {known.memory / 1e9:.0f} GB by the plan"
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=choice.setting._asdict())}), line


def too_large(train: TrainConfig) -> str:
    """What to say, and to set, where a step did not fit."""
    setting = train.setting
    advice = []
    smaller = [size for size in range(1, setting.micro_batch) if setting.micro_batch % size == 0]
    if smaller:
        advice.append(f"train.micro_batch={smaller[-1]}")
    if setting.gradient_checkpointing != "whole":
        further = {"none": "selective", "selective": "whole"}[setting.gradient_checkpointing]
        advice.append(f"train.gradient_checkpointing={further}")
    if not advice:
        advice.append("train.offload=optimizer, or more train.workers")
    return (
        f"the accelerator's memory is full with {said(setting)}; continue with --set {' or '.join(advice)}, which "
        "changes no result"
    )


def said(setting: Setting) -> str:
    offload = {"none": "", "optimizer": ", the optimizer in host memory", "all": ", all in host memory"}
    return (
        f"micro batch {setting.micro_batch}, {SAID[setting.gradient_checkpointing]}, "
        f"ZeRO {setting.zero_stage}{offload[setting.offload]}"
    )
