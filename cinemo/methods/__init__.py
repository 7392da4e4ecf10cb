"""The methods: each paper's mathematics in one readable file, and how a recipe becomes one of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cinemo.config import Recipe
from cinemo.methods.base import Encoders, Example, Method, run
from cinemo.methods.cinemo import CinemoMethod
from cinemo.methods.trainable import check_trainable, mark_trainable

__all__ = [
    "CinemoMethod",
    "Encoders",
    "Example",
    "Method",
    "build_method",
    "check_trainable",
    "mark_trainable",
    "method_class",
    "run",
]

_METHODS: dict[str, type[Method]] = {method.name: method for method in (CinemoMethod,)}


def method_class(recipe: Recipe) -> type[Method]:
    """The class of a recipe's method."""
    return _METHODS[recipe.method]


def build_method(recipe: Recipe, networks: Mapping[str, nn.Module] | None = None) -> Method:
    """The method of a recipe, around ``networks`` or freshly initialised ones (global torch RNG)."""
    method = method_class(recipe)
    return method.of(recipe, method.fresh_networks(recipe) if networks is None else networks)
