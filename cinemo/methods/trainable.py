"""What of a method learns: everything (Cinemo, section 3.1), its temporal layers, or LoRA."""

from __future__ import annotations

import torch

from cinemo.config import Recipe, TrainConfig
from cinemo.methods.cinemo import CinemoMethod
from cinemo.networks.lavie_unet import LavieUNet, is_temporal
from cinemo.networks.lora import add_lora


def mark_trainable(method: CinemoMethod, train: TrainConfig) -> None:
    """Leave gradients to the parameters that ``train.trainable`` names; the others keep their values for ever.

    ``lora`` also puts the new matrices into the network (global torch RNG), which then answers as before.

    Raises:
        InputError: an entry of ``train.lora_layers`` names no linear layer.
    """
    if train.trainable == "lora":
        method.requires_grad_(False)
        for name in add_lora(method.unet, train):
            method.unet.get_submodule(f"{name}.lora_A").requires_grad_(True)
            method.unet.get_submodule(f"{name}.lora_B").requires_grad_(True)
    elif train.trainable == "temporal":
        for name, parameter in method.unet.named_parameters():
            parameter.requires_grad_(is_temporal(name))


def check_trainable(recipe: Recipe) -> None:
    """Raise what `mark_trainable` will, before any weights are there."""
    if recipe.train.trainable == "lora":
        with torch.device("meta"):
            add_lora(LavieUNet(**recipe.model.model_dump()), recipe.train)
