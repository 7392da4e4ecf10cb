"""The UNets that TRIP's residual path may be, told apart by what each needs to be loaded and trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cinemo.config import Part
from cinemo.networks import dynamicrafter_unet, dynamicrafter_weights, lavie_unet
from cinemo.networks.dynamicrafter_unet import DynamiCrafterConfig, DynamiCrafterUNet
from cinemo.networks.lavie_unet import LavieUNet, UNetConfig
from cinemo.networks.weights import load_unet


@dataclass(frozen=True)
class Backbone:
    """A UNet as TRIP asks it: ``unet(frames, t, text, deep=deep)``, nothing else told; ``unet.keys_values(text)`` may
    stand in the text's place, and it has a ``dtype``.

    ``config``: its arguments, with ``in_channels`` and ``out_channels``. ``load``: from a configuration, a location, a
    dtype, and whether what the base lacks may be fresh. ``is_temporal``, ``is_unused``: of a parameter, by its name; of
    the latter TRIP makes no use, and they never learn.
    """

    config: type[Part]
    network: Callable[..., nn.Module]
    load: Callable[[Any, str, torch.dtype | None, bool], nn.Module]
    text_width: Callable[[Any], int]
    is_temporal: Callable[[str], bool]
    is_unused: Callable[[str], bool]


BACKBONES: dict[str, Backbone] = {
    "lavie": Backbone(
        UNetConfig,
        LavieUNet,
        lambda config, location, dtype, base: load_unet(config, location, dtype, motion_optional=base, grow_input=base),
        lambda config: int(config.cross_attention_dim),
        lavie_unet.is_temporal,
        lambda name: "add_embedding." in name,  # Cinemo's motion input
    ),
    "dynamicrafter": Backbone(
        DynamiCrafterConfig,
        DynamiCrafterUNet,
        lambda config, location, dtype, base: dynamicrafter_weights.load_unet(
            config, location, dtype, "video" if base else None
        ),
        lambda config: int(config.context_dim),
        dynamicrafter_unet.is_temporal,
        dynamicrafter_unet.is_image_context,
    ),
}
