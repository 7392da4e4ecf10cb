"""What a training will take before it starts: parameters, FLOPs, memory of a worker, time and money.

Parameters, FLOPs and memory come from shapes alone, without a dataset and without weights. Time is FLOPs by the peak of
an accelerator and the share of it that is reached (MFU): assumed, given, or measured by real steps on this machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cinemo.accelerators import (
    DEFAULT_ACCELERATOR,
    Accelerator,
    accelerator,
    accelerators,
    peak_flops,
    this_accelerator,
)
from cinemo.config import Recipe
from cinemo.data.precompute.prices import Prices, money
from cinemo.methods import build_method, mark_trainable
from cinemo.training.checkpoint import snapshots
from cinemo.training.plan.activations import precision
from cinemo.training.plan.encoders import image_encoder_values, text_encoder_values
from cinemo.training.plan.search import ASSUMED_MFU, Workload, fastest, room, settings, settled
from cinemo.training.run.batch import blank_condition, blank_example, latent_shape
from cinemo.training.run.engine import accumulation
from cinemo.types import InputError, LatentBatch

HERE = "here"
_LONGEST_STEP = 90.0  # seconds: a longer step is not measured


@dataclass(frozen=True)
class Speed:
    """FLOP/s at most, the share of them that useful FLOPs (recomputation left out) reach, and where that is from."""

    peak: float
    mfu: float
    source: str


def plan_training(
    recipe: Recipe, name: str | None = None, mfu: float | None = None, prices: Prices | None = None
) -> dict[str, Any]:
    """The estimate of a recipe as a JSON object; sizes in bytes, times in hours of wall time.

    Args:
        name: of an accelerator; ``here`` measures this machine. None: this machine for a recipe on CPUs, else an A100.
        mfu: share of the peak that useful FLOPs reach; None: measured ``here``, else assumed.

    Raises:
        InputError: an unknown accelerator, a share out of range, a step too large to be measured here.
    """
    largest = recipe.data.largest if recipe.data.other_shapes else None
    recipe = recipe.of_shape(largest) if largest else recipe
    train = recipe.train
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"--mfu is {mfu:g}, expected a share of the peak above 0 and up to 1")
    name = name or (DEFAULT_ACCELERATOR if train.gpus_per_worker else HERE)
    if name != HERE and not train.gpus_per_worker:
        recipe = recipe.model_copy(update={"train": train.model_copy(update={"gpus_per_worker": 1.0})})
        train = recipe.train
    known = _this_machine(recipe) if name == HERE else accelerator(name)
    chosen = None
    if train.automatic:
        recipe, chosen = settled(recipe, known if train.gpus_per_worker else None)
        train = recipe.train
    most = room(recipe, known)

    work, setting = Workload.of(recipe), train.setting
    encoder, encoder_source = text_encoder_values(recipe)
    image_encoder, image_source = image_encoder_values(recipe)
    beside = [other for other in settings(recipe) if other.micro_batch == setting.micro_batch]
    rows = [asdict(work.footprint(other)) for other in beside]
    for row in rows:
        row["fits"] = row["peak"] <= most
    own = asdict(work.footprint(setting if train.gpus_per_worker else setting._replace(offload="none")))
    executed = work.executed(setting.gradient_checkpointing)
    speed = _speed(recipe, known, work, mfu, name == HERE, own["peak"])
    reached = speed.peak * speed.mfu * executed / work.flops.training
    seconds = work.seconds(setting, known, reached)
    hours = seconds * train.max_steps / 3600
    flops = asdict(work.flops) | {"executed": executed}
    figures = {"core_hours": hours * train.workers * train.cpus_per_worker}
    if train.gpus_per_worker:
        figures["accelerator_hours"] = hours * train.workers * train.gpus_per_worker
    estimate: dict[str, Any] = {
        "recipe": recipe.name,
        "largest_shape": list(largest) if largest else None,
        "parameters": asdict(work.parameters),
        "text_encoder": {"parameters": encoder, "source": encoder_source} if encoder else None,
        "image_encoder": {"parameters": image_encoder, "source": image_source} if image_encoder else None,
        "flops_per_sample": flops,
        "flops_per_step": {key: value * train.global_batch for key, value in flops.items()},
        "samples_per_step": train.global_batch,
        "chosen": chosen,
        "micro_batch": setting.micro_batch,
        "accumulation": accumulation(train),
        "workers": train.workers,
        "accelerator": {
            "name": known.name,
            "memory": known.memory,
            "reserved": known.memory - most,
            "peak_flops": known.peak(precision(recipe)),
        },
        "memory": {"rows": rows, "recipe": own, "fits": own["peak"] <= most},
        "snapshots": {
            "count": snapshots.count(train),
            "every": snapshots.interval(train),
            "bytes": snapshots.count(train) * snapshots.size(train, work.parameters.trainable),
        }
        if train.posthoc_ema
        else None,
        "speed": asdict(speed),
        "steps": train.max_steps,
        "seconds_per_step": seconds,
        "hours": hours,
        **figures,
        "fastest": _fastest(work, train.max_steps) if train.gpus_per_worker else [],
    }
    if prices:
        estimate |= {"costs": money(figures, prices), "currency": prices.currency}
    return estimate


def _fastest(work: Workload, steps: int) -> list[dict[str, Any]]:
    """The fastest setting that fits each accelerator there is a name for, as far as one does.

    ``share``: of the time that the recipe's own setting takes there; None: that does not fit.
    """
    rows = []
    for known in accelerators():
        reached = known.peak(precision(work.recipe)) * ASSUMED_MFU
        choice, own = fastest(work, known, reached), work.recipe.train.setting
        if choice is not None:
            fits = work.footprint(own).peak <= room(work.recipe, known)
            found: dict[str, Any] = {"peak": choice.peak, "hours": choice.seconds * steps / 3600}
            found["share"] = choice.seconds / work.seconds(own, known, reached) if fits else None
            rows.append({"accelerator": known.name, "memory": known.memory, **choice.setting._asdict(), **found})
    return rows


def _this_machine(recipe: Recipe) -> Accelerator:
    """A worker's accelerator, or its part of this machine, whose peak is measured."""
    if recipe.train.gpus_per_worker:
        if not torch.cuda.is_available():
            raise InputError(
                "--accelerator here: there is no accelerator on this machine, but recipe "
                f"{recipe.name} asks for {recipe.train.gpus_per_worker:g} per worker; name one, or give "
                "--set train.gpus_per_worker=0"
            )
        return replace(this_accelerator(), name=HERE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / recipe.train.workers
    with _threads(recipe):
        peak = peak_flops(torch.device("cpu"), precision(recipe))
    return Accelerator(HERE, memory, peak, peak)


@contextmanager
def _threads(recipe: Recipe) -> Iterator[None]:
    """As many threads as a worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(recipe.train.cpus_per_worker)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _speed(recipe: Recipe, known: Accelerator, work: Workload, mfu: float | None, here: bool, peak_bytes: int) -> Speed:
    peak = known.peak(precision(recipe))
    if mfu is not None:
        return Speed(peak, mfu, "given")
    executed = work.executed(recipe.train.setting.gradient_checkpointing)
    if here:
        return _measured_speed(recipe, work.flops.training, executed, peak, peak_bytes <= known.memory)
    recomputing = work.flops.training / executed
    return Speed(peak, ASSUMED_MFU * recomputing, f"assumed: {ASSUMED_MFU:g} of the peak, including recomputation")


def _measured_speed(recipe: Recipe, useful: int, executed: int, peak: float, fits: bool) -> Speed:
    """The share of the peak that forward and backward of one micro batch reach here; the better of two after one.

    Raises:
        InputError: a step would not fit, or take longer than is reasonable for a plan.
    """
    train, dtype, size = recipe.train, precision(recipe), recipe.train.setting.micro_batch
    expected = size * executed / peak
    if not fits or expected > _LONGEST_STEP:
        why = f"takes at least {expected:.0f} s" if fits else "does not fit this machine's memory"
        raise InputError(
            f"--accelerator here: a micro batch of recipe {recipe.name} {why} and is not measured; "
            "give --mfu, or name an accelerator"
        )
    device = torch.device("cuda", 0) if train.gpus_per_worker else torch.device("cpu")
    with _threads(recipe):
        method: Any = build_method(recipe)
        mark_trainable(method, recipe.train)
        method.to(device, dtype)
        method.checkpoint_activations(train.setting.gradient_checkpointing)
        frames, channels, rows, columns = latent_shape(recipe)
        video_BCFHW = torch.randn(size, channels, frames, rows, columns, device=device)
        condition = blank_condition(recipe, blank_example(recipe), video_BCFHW, dtype)
        steps_B = torch.full((size,), recipe.diffusion.train_steps // 2, device=device)
        shape = method.target_shape(tuple(video_BCFHW.shape[1:]))
        noise_BCFHW = torch.randn(size, *shape, device=device)
        spent = []
        for _ in range(3):
            begun = time.perf_counter()
            method(LatentBatch(video_BCFHW, condition), steps_B, noise_BCFHW, reduction="none").mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent.append(time.perf_counter() - begun)
    reached = size * useful / min(spent[1:]) / peak
    return Speed(
        peak, reached, "measured here: forward and backward pass of one micro batch, without data and optimizer"
    )
