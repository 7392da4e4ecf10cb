"""How large the frozen encoders of a recipe are, by their configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cinemo.config import Recipe
from cinemo.methods import method_class
from cinemo.networks.weights import read_config, resolve
from cinemo.training.run.batch import IMAGE_TOKENS, TEXT_STATES, stored_fields
from cinemo.types import InputError

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


def text_encoder_values(recipe: Recipe) -> tuple[int, str]:
    """Values of the frozen CLIP text model by its ``config.json``, and where they are from; 0 where states are read."""
    if TEXT_STATES in stored_fields(recipe):
        return 0, ""
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
    if "image_encoder" not in method_class(recipe).needs or not IMAGE_TOKENS.isdisjoint(stored_fields(recipe)):
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
