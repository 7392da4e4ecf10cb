"""What it takes to encode a picture, from an autoencoder's configuration alone: no weights, nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cinemo.networks.weights import read_config, resolve
from cinemo.types import InputError

STABLE_DIFFUSION = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Encoding:
    """Of one frame: ``flops`` (a multiplication and an addition are two) and the shape of its latents.

    ``assumed``: the autoencoder is not here, so it was taken to be Stable Diffusion's.
    """

    flops: int
    latents_CHW: tuple[int, int, int]
    assumed: bool = False


def encoding(location: str, size: tuple[int, int]) -> Encoding:
    """
    Args:
        location: of an autoencoder, see `cinemo.networks.frozen.Vae`.
        size: height and width of a frame.

    Raises:
        InputError: there is something else than an autoencoder.
    """
    try:
        directory = resolve(location)
    except InputError:
        return _counted(STABLE_DIFFUSION, size, assumed=True)
    config = read_config(directory, location)
    if config.get("_class_name") not in ("AutoencoderKL", "AutoencoderKLTemporalDecoder"):
        raise InputError(f"{location}: config.json is for {config.get('_class_name')}, expected AutoencoderKL")
    return _counted(config, size)


def _counted(config: Mapping[str, Any], size: tuple[int, int], assumed: bool = False) -> Encoding:
    import diffusers

    kind = getattr(diffusers, config["_class_name"])
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents_1CHW = kind.from_config(dict(config)).encode(torch.empty(1, 3, *size)).latent_dist.mean
    _, channels, rows, columns = latents_1CHW.shape
    return Encoding(int(counter.get_total_flops()), (channels, rows, columns), assumed)
