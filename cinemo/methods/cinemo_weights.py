"""The weights that Cinemo's authors published, and LaVie's that they began with, as this house reads them."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError

from cinemo.config import Recipe
from cinemo.methods.base import Imported, Published
from cinemo.networks.lavie_unet import UNetConfig
from cinemo.networks.weights import load_unet, published_config, read_config, resolve, weights_digest
from cinemo.types import InputError, keyed_seed

_ENCODERS = {
    "vae": "vae",
    "vae_decoder": "vae_temporal_decoder",
    "text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
}
_SCHEDULER = "scheduler_config.json"


def _cinemo(folder: str, recipe: Recipe) -> Imported:
    """A folder with unet, vae, [vae_temporal_decoder], text_encoder, tokenizer and [scheduler], in diffusers layout.

    The recipe says what the folder does not: size, frames, noise levels (the published pipeline sets its own as well),
    sampling defaults. The network is what ``unet/config.json`` says, where that is there.

    Raises:
        InputError: a part is missing, or the weights do not fit the network.
    """
    root = resolve(folder)
    missing = [name for name in ("unet", *_ENCODERS.values()) if not (root / name).is_dir()]
    if lacking := sorted(set(missing) - {"vae_temporal_decoder"}):
        raise InputError(
            f"{folder}: {', '.join(lacking)} missing; expected a folder with unet, vae, "
            "vae_temporal_decoder, text_encoder and tokenizer"
        )
    places = {field: None if name in missing else str(root / name) for field, name in _ENCODERS.items()}
    model: dict[str, Any] = recipe.model.model_dump()
    if (root / "unet" / "config.json").is_file():
        model |= published_config(read_config(root / "unet", f"{folder}/unet"), f"{folder}/unet")
    prediction = recipe.diffusion.prediction
    if (root / "scheduler" / _SCHEDULER).is_file():
        stored = read_config(root / "scheduler", f"{folder}/scheduler", _SCHEDULER)
        prediction = "v" if stored.get("prediction_type") == "v_prediction" else "epsilon"
    config = _config(model, f"{folder}/unet")
    recipe = recipe.model_copy(
        update={
            "encoders": recipe.encoders.model_copy(update=places),
            "model": config,
            "diffusion": recipe.diffusion.model_copy(update={"prediction": prediction}),
        }
    )
    unet = load_unet(config, str(root / "unet"), torch.float32)
    digest = weights_digest(str(root / "unet"))
    return Imported(recipe, {"unet": unet}, {"source": "published Cinemo weights", "unet": digest})


def _lavie(file: str, recipe: Recipe) -> Imported:
    """LaVie's base weights; the motion network that they lack starts at zero.

    Raises:
        InputError: not a LaVie checkpoint of the recipe's network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(0, "weights"))
        config = _config(recipe.model.model_dump(), file)
        unet = load_unet(config, file, torch.float32, motion_optional=True)
    return Imported(recipe, {"unet": unet}, {"source": "published LaVie weights"})


def _config(values: dict[str, Any], where: str) -> UNetConfig:
    try:
        return UNetConfig.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise InputError(f"{where}: model.{key}: {fault['msg']} (got {fault['input']!r})") from None


import_cinemo = Published("DIR", "folder of published Cinemo weights, made into a bundle", True, _cinemo)
import_lavie = Published("FILE", "published LaVie weights, made into a train.init folder", False, _lavie)
