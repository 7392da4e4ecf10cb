"""Weights of DynamiCrafter's networks: published checkpoints, own files, and text-to-video or text-to-image ones to
begin from.

A published checkpoint (``.ckpt``) has both networks in one table, under `UNET` and `IMAGE_PROJ`, beside encoders that
are not read. Own files are in diffusers layout, one network each (`cinemo.networks.weights.save_network`), with the
same names without a prefix.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from cinemo.networks.dynamicrafter_blocks import DualAttention, zeroed
from cinemo.networks.dynamicrafter_unet import (
    ONLY,
    DynamiCrafterConfig,
    DynamiCrafterUNet,
    is_image_context,
    is_temporal,
)
from cinemo.networks.resampler import Resampler, ResamplerConfig
from cinemo.networks.weights import compare, find_weights, read_tensors, resolve, weight_files
from cinemo.types import InputError

UNET, IMAGE_PROJ = "model.diffusion_model.", "image_proj_model."

# Lightning's table, and DeepSpeed's inside Lightning.
_TABLES = ("state_dict", "module")
_DEEPSPEED = "_forward_module."
# What the 256x256 checkpoint calls the input for frames per second: there it was trained with their stride.
_FPS, _STRIDE = "fps_embedding.", "framestride_embed."

_ENTRY = "input_blocks.0.0.weight"
# Layers that end a branch and begin as zero: of the input for frames per second, of convolutions and attention in time.
_LAST = re.compile(r"^fps_embedding\.2$|\.temopral_conv\.conv4\.3$|(^init_attn\.0|\.2)\.proj_out$")

Base = Literal["video", "image"]
ImageInit = Literal["zero", "published"]
Network = TypeVar("Network", bound=nn.Module)


def published_config(values: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The entries of a published UNet's configuration (``unet_config.params``) that `DynamiCrafterConfig` has.

    Others change no result where the weights fit.

    Raises:
        InputError: an entry asks for what this network cannot do.
    """
    for key, only in ONLY.items():
        if values.get(key) not in (None, only):
            raise InputError(
                f"{location}: the UNet's configuration has {key} = {values[key]!r}, this network supports only {only!r}"
            )
    return {name: values[name] for name in DynamiCrafterConfig.model_fields if values.get(name) is not None}


def load_unet(
    config: DynamiCrafterConfig,
    location: str,
    dtype: torch.dtype | None = None,
    base: Base | None = None,
    image_init: ImageInit = "zero",
    context: str | None = None,
) -> DynamiCrafterUNet:
    """The UNet at ``location`` (a published checkpoint, a file of it alone, or diffusers layout), on the CPU.

    Args:
        dtype: cast to it; None keeps the file's.
        base: a text-to-video (or text-to-image) checkpoint will do: `grow` gives it what it lacks.
        image_init: see `grow`.
        context: a checkpoint from which the attention to an image is taken instead.

    Raises:
        InputError: the file has missing, extra or misshapen entries, or cannot be read.
    """
    state = _read(location, "unet", UNET, dtype)
    with torch.device("meta"):
        unet = DynamiCrafterUNet(**config.model_dump())
    expected = unet.state_dict()
    if context is not None:
        looking = {name: v for name, v in _read(context, "unet", UNET, dtype).items() if is_image_context(name)}
        if not looking:
            raise InputError(f"{context}: no attention to an image there, expected weights of a training with one")
        state |= looking
    if base is not None:
        state = grow(state, unet, image_init, base)
    _check_kind(state, expected, location)
    return _filled(unet, state, location, dtype)


def load_resampler(config: ResamplerConfig, location: str, dtype: torch.dtype | None = None) -> Resampler:
    """The image's query transformer at ``location``, as `load_unet` reads the UNet; a folder's is in ``image_proj/``.

    Raises:
        InputError: the file has missing, extra or misshapen entries, or cannot be read.
    """
    state = _read(location, "image_proj", IMAGE_PROJ, dtype)
    with torch.device("meta"):
        resampler = Resampler(**config.model_dump())
    return _filled(resampler, state, location, dtype)


def has_resampler(location: str) -> bool:
    """Whether weights at ``location`` have the query transformer too; a text-to-video model has none."""
    files = find_weights(location, "image_proj")
    if files is None:
        return False
    if resolve(location).is_dir():
        return files.paths[0].parent.name == "image_proj"
    names = read_tensors(files, location, None, _TABLES)
    return any(name.removeprefix(_DEEPSPEED).startswith(IMAGE_PROJ) for name in names)


def grow(
    state: Mapping[str, Tensor], unet: DynamiCrafterUNet, image_init: ImageInit = "zero", base: Base = "video"
) -> dict[str, Tensor]:
    """A text-to-video UNet's ``state`` with what it lacks of ``unet``, such that its output stays what it is.

    The first convolution has zeros for further input channels, the last layer of the input for frames per second is
    zero, and so are the values of the attention to an image. Other new layers are drawn as torch draws them (global
    RNG).

    Args:
        unet: the network to be, on any device; its shapes count.
        image_init: ``published`` draws the values of the attention to an image too, as the published training does;
            the network then begins away from the text-to-video model's output.
        base: ``image``: ``state`` may lack all layers along time, which then change nothing.
    """
    state, expected = dict(state), unet.state_dict()
    kind = next(iter(state.values())).dtype
    narrow = state.get(_ENTRY)
    if narrow is not None and narrow.dim() == 4 and narrow.shape[1] < expected[_ENTRY].shape[1]:
        further = expected[_ENTRY].shape[1] - narrow.shape[1]
        state[_ENTRY] = torch.cat([narrow, narrow.new_zeros(len(narrow), further, *narrow.shape[2:])], dim=1)

    new_parts = [_is_rate, is_image_context] + [is_temporal] * (base == "image")
    lacks = [belongs for belongs in new_parts if not any(map(belongs, state))]
    for name, module in unet.named_modules():
        if isinstance(module, DualAttention) and module.alpha is not None and is_image_context in lacks:
            state[f"{name}.alpha"] = torch.zeros((), dtype=kind)
        elif hasattr(module, "reset_parameters") and any(belongs(f"{name}.weight") for belongs in lacks):
            layer = copy.deepcopy(module).to_empty(device="cpu").to(kind)
            cast(Any, layer).reset_parameters()
            if _LAST.search(name) or (name.endswith("to_v_ip") and image_init == "zero"):
                zeroed(layer)
            state |= {f"{name}.{part}": value for part, value in layer.state_dict().items()}
    return state


def _is_rate(name: str) -> bool:
    return name.startswith(_FPS)


def save_published(path: Path, unet: nn.Module, resampler: nn.Module | None = None, stride_names: bool = False) -> None:
    """Write a checkpoint as the published ones are, for the published code to read.

    Args:
        stride_names: with the 256x256 checkpoint's name for the input for frames per second.
    """
    state = {UNET + _renamed(name, _FPS, _STRIDE if stride_names else _FPS): v for name, v in _tensors(unet).items()}
    if resampler is not None:
        state |= {IMAGE_PROJ + name: value for name, value in _tensors(resampler).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    torch.save({"state_dict": state}, partial)
    os.replace(partial, path)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _read(location: str, folder: str, prefix: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """One network's tensors by its own names: those under ``prefix``, or all where neither network has one."""
    state = read_tensors(weight_files(location, folder), location, dtype, _TABLES)
    state = {name.removeprefix(_DEEPSPEED): value for name, value in state.items()}
    if any(name.startswith((UNET, IMAGE_PROJ)) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not state:
            raise InputError(f"{location}: nothing in this checkpoint is named {prefix}*")
    return {_renamed(name, _STRIDE, _FPS): value for name, value in state.items()}


def _check_kind(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], location: str) -> None:
    """Say in words what a list of hundreds of missing or extra entries would hide."""
    if _ENTRY not in state:
        raise InputError(
            f"{location}: weights of another network, expected a UNet as VideoCrafter's (no {_ENTRY} there)"
        )

    def has(names: Mapping[str, Tensor], part: str) -> bool:
        return any(name.endswith(part) for name in names)

    faults = []
    for part, what, setting in (
        (".alpha", "learned scales of the image (the 256x256 model's)", "image_cross_attention_scale_learnable"),
        (
            ".to_k_ip.weight",
            "attention to an image (a text-to-video model, which can only be a base, has none)",
            "image_cross_attention",
        ),
        (
            ".conv4.3.weight",
            "layers along time (a text-to-image model, which can only be the base of stills, has none)",
            "method dynamicrafter-stills",
        ),
    ):
        if has(state, part) != has(expected, part):
            there, asked = ("has", "has none") if has(state, part) else ("has no", "expects them")
            faults.append(f"it {there} {what}, and the recipe's network {asked} ({setting})")
    if faults:
        raise InputError(f"{location}: a checkpoint of another model: {faults[-1]}")


def _filled(network: Network, state: dict[str, Tensor], location: str, dtype: torch.dtype | None) -> Network:
    compare(state, network.state_dict(), location)
    if dtype is not None:
        for name in state:
            state[name] = state[name].to(dtype)
    network.load_state_dict(state, assign=True)
    return network
