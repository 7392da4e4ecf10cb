"""The methods: each paper's mathematics in one readable file, and how a recipe becomes one of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from cinemo.config import MOTION_BUCKETS, Recipe
from cinemo.methods.base import Encoders, Example, Imported, Method, Published, run
from cinemo.methods.cinemo import CinemoMethod
from cinemo.methods.controls import ControlInfo, Controls, Input, controls_of
from cinemo.methods.dynamicrafter import DynamiCrafterMethod
from cinemo.methods.dynamicrafter_stills import StillsMethod
from cinemo.methods.interpolation import InterpolationMethod
from cinemo.methods.longer import LongerMethod
from cinemo.methods.trainable import check_trainable, mark_trainable
from cinemo.methods.trip import TripLinearMethod, TripMethod
from cinemo.types import InputError

__all__ = [
    "ControlInfo",
    "Controls",
    "Encoders",
    "Example",
    "Imported",
    "Input",
    "Method",
    "Published",
    "at_motion",
    "build_method",
    "check_trainable",
    "controls_of",
    "image_encoder_place",
    "mark_trainable",
    "method_class",
    "method_named",
    "published_sources",
    "run",
    "served_controls",
]

_METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(CinemoMethod, DynamiCrafterMethod, StillsMethod, InterpolationMethod),
        *(TripMethod, TripLinearMethod, LongerMethod),
    )
}


def method_named(name: str) -> type[Method]:
    """The class of a method, by its name in a recipe: one of this package, or ``package.module:Class`` of any other
    that can be imported.

    Raises:
        InputError: there is no such method.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        method: Any = _METHODS.get(name)
    else:
        try:
            method = getattr(importlib.import_module(module), attribute, None)
        except (ImportError, ValueError, TypeError) as error:  # the last two: no name of a module at all
            raise InputError(f"method is {name!r}, which cannot be imported ({error})") from None
    if not (isinstance(method, type) and issubclass(method, Method) and hasattr(method, "recipe_type")):
        known = ", ".join(_METHODS)
        raise InputError(f"method is {name!r}, expected one of {known}, or package.module:Class of a Method")
    return method


def method_class(recipe: Recipe) -> type[Method]:
    """The class of a recipe's method. Raises `InputError`: there is no such method."""
    return method_named(recipe.method)


def served_controls(recipe: Recipe) -> dict[str, ControlInfo]:
    """The controls of a recipe's method that HTTP has: all but those of videos, which it does not take."""
    method = method_class(recipe)
    videos = {name for name, about in method.inputs.items() if about.kind == "video"}
    return {name: info for name, info in controls_of(method.controls_type).items() if info.of not in videos}


def at_motion(recipe: Recipe, level: int) -> dict[str, Any]:
    """Controls for a level of motion, 0 the stillest and 19 the most, whatever the recipe's method calls it; empty
    where it has no control of how much moves."""
    if (motion := method_class(recipe).controls_type.motion_values(recipe)) is None:
        return {}
    name, values = motion
    return {name: values[round(level * (len(values) - 1) / (MOTION_BUCKETS - 1))]}


def published_sources() -> dict[str, Published]:
    """Published weights that can be imported, of all methods here, by name."""
    return {name: source for method in _METHODS.values() for name, source in method.published.items()}


def image_encoder_place(recipe: Recipe) -> str:
    """Where the image encoder of a recipe is. Raises `InputError`: it names none."""
    if recipe.encoders.image_encoder is None:
        raise InputError(
            f"recipe {recipe.name}: encoders.image_encoder is not set, expected the directory of a CLIPVisionModel"
        )
    return recipe.encoders.image_encoder


def build_method(recipe: Recipe, networks: Mapping[str, nn.Module] | None = None) -> Method:
    """The method of a recipe, around ``networks`` or freshly initialised ones (global torch RNG)."""
    method = method_class(recipe)
    return method.of(recipe, method.fresh_networks(recipe) if networks is None else networks)
