"""What a training will take before it starts: parameters, FLOPs, memory of a worker, time and money.

Parameters, FLOPs and memory come from shapes alone, without a dataset and without weights. Time is FLOPs by the peak of
an accelerator and the share of it that is reached (MFU): assumed, given, or measured by real steps on this machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cinemo.accelerators import DEFAULT_ACCELERATOR, Accelerator, accelerator, peak_flops
from cinemo.config import Recipe
from cinemo.data.precompute.prices import Prices, money
from cinemo.methods import build_method, mark_trainable, method_class
from cinemo.networks.weights import read_config, resolve
from cinemo.training.plan.activations import activation_bytes, precision, shapes
from cinemo.training.plan.cost import SampleFlops, sample_flops
from cinemo.training.plan.footprint import Parameters, footprint, footprints
from cinemo.training.run.batch import blank_condition, blank_example, latent_shape
from cinemo.training.run.engine import accumulation
from cinemo.types import InputError, LatentBatch

HERE = "here"
# Of the peak, without gradient checkpointing: what large diffusion networks in bfloat16 commonly reach.
ASSUMED_MFU = 0.35
# Bytes of an accelerator's memory that are not for tensors: CUDA's context, workspaces of cuBLAS and cuDNN, holes
# between the allocator's blocks. Assumed, not measured.
RESERVED = 2e9
_LONGEST_STEP = 90.0  # seconds: a longer step is not measured
_CLIP_VISION = {  # of OpenCLIP's ViT-H/14
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "image_size": 224,
    "patch_size": 14,
}
_CLIP_TEXT = {  # of Stable Diffusion 1.x: CLIP ViT-L/14, for a recipe whose own is not on this machine
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
}
_OPENCLIP_TEXT = _CLIP_TEXT | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}  # ViT-H/14


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
    room = known.memory - (RESERVED if train.gpus_per_worker else 0)

    flops = sample_flops(recipe)
    parameters = Parameters.of(shapes(recipe, "meta"))
    encoder, encoder_source = text_encoder_values(recipe)
    image_encoder, image_source = image_encoder_values(recipe)
    activations = {checkpointing: activation_bytes(recipe, checkpointing) for checkpointing in (False, True)}
    frozen = encoder + image_encoder
    rows = [asdict(row) for row in footprints(recipe, parameters, activations, frozen)]
    for row in rows:
        row["fits"] = row["peak"] <= room
    own = asdict(
        footprint(
            recipe, parameters, activations, frozen, train.zero_stage, train.gradient_checkpointing,
            train.offload if train.gpus_per_worker else "none",
        )
    )  # fmt: skip
    speed = _speed(recipe, known, flops, mfu, name == HERE, own["peak"])
    seconds = train.global_batch * flops.training / (train.workers * speed.peak * speed.mfu)
    hours = seconds * train.max_steps / 3600
    figures = {"core_hours": hours * train.workers * train.cpus_per_worker}
    if train.gpus_per_worker:
        figures["accelerator_hours"] = hours * train.workers * train.gpus_per_worker
    estimate: dict[str, Any] = {
        "recipe": recipe.name,
        "largest_shape": list(largest) if largest else None,
        "parameters": asdict(parameters),
        "text_encoder": {"parameters": encoder, "source": encoder_source},
        "image_encoder": {"parameters": image_encoder, "source": image_source} if image_encoder else None,
        "flops_per_sample": asdict(flops),
        "flops_per_step": {key: value * train.global_batch for key, value in asdict(flops).items()},
        "samples_per_step": train.global_batch,
        "micro_batch": train.micro_batch,
        "accumulation": accumulation(train),
        "workers": train.workers,
        "accelerator": {
            "name": known.name,
            "memory": known.memory,
            "reserved": known.memory - room,
            "peak_flops": known.peak(precision(recipe)),
        },
        "memory": {"rows": rows, "recipe": own, "fits": own["peak"] <= room},
        "speed": asdict(speed),
        "steps": train.max_steps,
        "seconds_per_step": seconds,
        "hours": hours,
        **figures,
    }
    if prices:
        estimate |= {"costs": money(figures, prices), "currency": prices.currency}
    return estimate


def text_encoder_values(recipe: Recipe) -> tuple[int, str]:
    """Values of the frozen CLIP text model by its ``config.json``, and where they are from."""
    location = recipe.encoders.text_encoder
    try:
        config: Mapping[str, Any] = read_config(resolve(location), location)
        source = location
    except (InputError, OSError):
        config, name = _CLIP_TEXT, "CLIP ViT-L/14"
        if method_class(recipe).text_width(recipe) == _OPENCLIP_TEXT["hidden_size"]:
            config, name = _OPENCLIP_TEXT, "OpenCLIP ViT-H/14"
        source = f"{location} is not available here: {name} is assumed"
    sizes = {**_CLIP_TEXT, **config.get("text_config", {}), **{key: config[key] for key in _CLIP_TEXT if key in config}}
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    tables = (sizes["vocab_size"] + sizes["max_position_embeddings"]) * width
    return tables + sizes["num_hidden_layers"] * layer + 2 * width, source


def image_encoder_values(recipe: Recipe) -> tuple[int, str]:
    """Values of the frozen CLIP image model by its ``config.json``, and where they are from; 0 where none is needed."""
    if "image_encoder" not in method_class(recipe).needs:
        return 0, ""
    location = recipe.encoders.image_encoder or "encoders.image_encoder"
    try:
        config: Mapping[str, Any] = read_config(resolve(location), location)
        source = location
    except (InputError, OSError):
        config, source = _CLIP_VISION, f"{location} is not available here: CLIP ViT-H/14 is assumed"
    sizes = {**_CLIP_VISION, **config.get("vision_config", {}), **{k: config[k] for k in _CLIP_VISION if k in config}}
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    patches = (sizes["image_size"] // sizes["patch_size"]) ** 2
    tables = (patches + 1) * width + width + 3 * sizes["patch_size"] ** 2 * width
    return tables + sizes["num_hidden_layers"] * layer + 4 * width, source


def _this_machine(recipe: Recipe) -> Accelerator:
    """Memory of a worker's accelerator, or its part of this machine's; its peak is measured where no sheet is known."""
    if recipe.train.gpus_per_worker:
        if not torch.cuda.is_available():
            raise InputError(
                "--accelerator here: there is no accelerator on this machine, but recipe "
                f"{recipe.name} asks for {recipe.train.gpus_per_worker:g} per worker; name one, or give "
                "--set train.gpus_per_worker=0"
            )
        device, memory = torch.device("cuda", 0), float(torch.cuda.get_device_properties(0).total_memory)
    else:
        device = torch.device("cpu")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / recipe.train.workers
    with _threads(recipe):
        peak = peak_flops(device, precision(recipe))
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


def _speed(
    recipe: Recipe, known: Accelerator, flops: SampleFlops, mfu: float | None, here: bool, peak_bytes: int
) -> Speed:
    peak = known.peak(precision(recipe))
    if mfu is not None:
        return Speed(peak, mfu, "given")
    if here:
        return _measured_speed(recipe, flops, peak, peak_bytes <= known.memory)
    recomputing = flops.training / flops.executed
    return Speed(peak, ASSUMED_MFU * recomputing, f"assumed: {ASSUMED_MFU:g} of the peak, including recomputation")


def _measured_speed(recipe: Recipe, flops: SampleFlops, peak: float, fits: bool) -> Speed:
    """The share of the peak that forward and backward of one micro batch reach here; the better of two after one.

    Raises:
        InputError: a step would not fit, or take longer than is reasonable for a plan.
    """
    train, dtype = recipe.train, precision(recipe)
    expected = train.micro_batch * flops.executed / peak
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
        method.checkpoint_activations(train.gradient_checkpointing)
        frames, channels, rows, columns = latent_shape(recipe)
        video_BCFHW = torch.randn(train.micro_batch, channels, frames, rows, columns, device=device)
        condition = blank_condition(recipe, blank_example(recipe), video_BCFHW, dtype)
        steps_B = torch.full((train.micro_batch,), recipe.diffusion.train_steps // 2, device=device)
        shape = method.target_shape(tuple(video_BCFHW.shape[1:]))
        noise_BCFHW = torch.randn(train.micro_batch, *shape, device=device)
        spent = []
        for _ in range(3):
            begun = time.perf_counter()
            method(LatentBatch(video_BCFHW, condition), steps_B, noise_BCFHW, reduction="none").mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent.append(time.perf_counter() - begun)
    reached = train.micro_batch * flops.training / min(spent[1:]) / peak
    return Speed(
        peak, reached, "measured here: forward and backward pass of one micro batch, without data and optimizer"
    )
