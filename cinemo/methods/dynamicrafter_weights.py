"""The checkpoints that DynamiCrafter's authors published, as this house reads them."""

from __future__ import annotations

from typing import Any

import torch

from cinemo.config import Recipe
from cinemo.methods.base import Imported, Published
from cinemo.networks.dynamicrafter_weights import load_resampler, load_unet
from cinemo.networks.weights import weights_digest


def _dynamicrafter(file: str, recipe: Recipe) -> Imported:
    """A published ``.ckpt`` and a recipe that names the frozen encoders, which bundles hold as folders.

    Raises:
        InputError: not a checkpoint of the recipe's networks.
    """
    model: Any = recipe.model
    networks = {
        "unet": load_unet(model.unet, file, torch.float32),
        "image_proj": load_resampler(model.resampler, file, torch.float32),
    }
    return Imported(recipe, networks, {"source": "published DynamiCrafter weights", "file": weights_digest(file)})


import_dynamicrafter = Published(
    "FILE", "a published DynamiCrafter checkpoint (.ckpt), made into a bundle", True, _dynamicrafter
)
