"""``train.init``: the weights that a training begins with, LaVie's or Cinemo's, or None for nothing."""

from __future__ import annotations

import torch
from torch import nn

from cinemo import storage
from cinemo.config import Recipe
from cinemo.media.motion import MORE_MOTION
from cinemo.methods import method_class
from cinemo.types import InputError

_SCHEDULER = "scheduler/scheduler_config.json"
_MOTION = "motion.json"


def base_networks(recipe: Recipe) -> dict[str, nn.Module] | None:
    """The networks of ``train.init``; what the method adds to its base is fresh (global torch RNG)."""
    init, method = recipe.train.init, method_class(recipe)
    if init is None:
        return None
    try:
        return {part: method.load_network(recipe, part, init, torch.float32, base=True) for part in method.parts}
    except InputError as error:
        raise InputError(f"train.init: {error}; --set train.init=null trains from scratch") from None


def check_base(recipe: Recipe) -> str | None:
    """Compare what lies beside the weights, in a bundle or a published folder, with the recipe; a note worth telling.

    Raises:
        InputError: they predict something else than the recipe: another target would unlearn them.
    """
    init = recipe.train.init
    if init is None or init.startswith("package:"):
        return None
    predicts = {"epsilon": "epsilon", "v_prediction": "v"}.get(str(_beside(init, _SCHEDULER).get("prediction_type")))
    wanted = recipe.diffusion.prediction
    if predicts and predicts != wanted:
        raise InputError(
            f"train.init {init}: its network predicts {predicts}, recipe {recipe.name} trains {wanted}; "
            f"--set diffusion.prediction={predicts} keeps what it has learnt"
        )
    scale = _beside(init, _MOTION).get("scale", MORE_MOTION)
    if scale != MORE_MOTION:
        return f"train.init {init}: its motion ids are {scale!r}; training teaches it {MORE_MOTION!r} instead"
    return None


def _beside(init: str, name: str) -> dict[str, object]:
    """A JSON file of the folder that holds the weights or their ``unet/``; empty where there is none."""
    place = init.rstrip("/")
    for folder in (place, place.rpartition("/")[0]):
        try:
            found = storage.read_json(storage.join(folder, name)) if folder else None
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}
