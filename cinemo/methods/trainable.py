"""What of a method learns: everything (Cinemo, section 3.1), a part of it that has a name, or LoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cinemo.config import Recipe, TrainConfig
from cinemo.methods.base import Method
from cinemo.networks.lora import add_lora


def mark_trainable(method: Method, train: TrainConfig) -> None:
    """Leave gradients to the parameters that ``train.trainable`` names; the others keep their values for ever.

    ``lora`` also puts the new matrices into the networks (global torch RNG), which then answer as before.

    Raises:
        InputError: an entry of ``train.lora_layers`` names no linear layer.
    """
    if train.trainable == "lora":
        method.requires_grad_(False)
        for network in method.networks.values():
            for name in add_lora(network, train):
                network.get_submodule(f"{name}.lora_A").requires_grad_(True)
                network.get_submodule(f"{name}.lora_B").requires_grad_(True)
    elif train.trainable != "all":
        for name, parameter in method.named_parameters():
            parameter.requires_grad_(method.learns(name, train.trainable))


def check_trainable(recipe: Recipe, method: type[Method]) -> None:
    """Raise what `mark_trainable` will, before any weights are there."""
    if recipe.train.trainable == "lora":
        with torch.device("meta"):
            networks: Mapping[str, nn.Module] = method.fresh_networks(recipe)
        for network in networks.values():
            add_lora(network, recipe.train)
