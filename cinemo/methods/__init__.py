"""The methods: each paper's mathematics in one readable file, and how a recipe becomes one of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from cinemo.config import Recipe
from cinemo.methods.base import Encoders, Example, Method, run
from cinemo.methods.cinemo import CinemoMethod
from cinemo.methods.trainable import check_trainable, mark_trainable
from cinemo.types import InputError

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
    """The class of a recipe's method: one of this package, or ``package.module:Class`` of any that can be imported.

    Raises:
        InputError: there is no such method.
    """
    module, colon, name = recipe.method.partition(":")
    if not colon:
        found: Any = _METHODS.get(recipe.method)
    else:
        try:
            found = getattr(importlib.import_module(module), name, None)
        except (ImportError, ValueError, TypeError) as error:  # the last two: no name of a module at all
            raise InputError(f"method is {recipe.method!r}, which cannot be imported ({error})") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        known = ", ".join(_METHODS)
        raise InputError(f"method is {recipe.method!r}, expected one of {known}, or package.module:Class of a Method")
    return found


def build_method(recipe: Recipe, networks: Mapping[str, nn.Module] | None = None) -> Method:
    """The method of a recipe, around ``networks`` or freshly initialised ones (global torch RNG)."""
    method = method_class(recipe)
    return method.of(recipe, method.fresh_networks(recipe) if networks is None else networks)
