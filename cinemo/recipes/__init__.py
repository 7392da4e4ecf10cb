"""Named runs: a file per method, a function per recipe that returns a complete `Recipe`; and recipes from files.

Methods are imported late: the names of recipes, for bad flags, need no torch.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cinemo import storage
from cinemo.config import Recipe, keys
from cinemo.types import InputError

DEFAULT_RECIPE = "cinemo-tiny"
DEFAULT_METHOD = "cinemo"  # of recipe files that name none


_NAMED = {  # by the module of this package that has their functions
    "cinemo": ("cinemo-320x512", "cinemo-tiny"),
    "dynamicrafter": (
        *("dynamicrafter-256", "dynamicrafter-512", "dynamicrafter-1024", "dynamicrafter-512-interp"),
        *("dynamicrafter-256-stage1", "dynamicrafter-256-stage2", "dynamicrafter-tiny"),
    ),
    "longer": (
        *("longer-320x512", "longer-320x512-static", "longer-320x512-refiner"),
        *("longer-tiny", "longer-tiny-refiner"),
    ),
    "trip": ("trip-256", "trip-w-256", "trip-tiny"),
}


def _named(module: str, name: str) -> Recipe:
    recipe: Recipe = getattr(importlib.import_module(f"{__name__}.{module}"), name.replace("-", "_"))()
    return recipe


RECIPES: dict[str, Callable[[], Recipe]] = {
    name: functools.partial(_named, module, name) for module, names in _NAMED.items() for name in names
}


def load_recipe(name_or_file: str, assignments: Sequence[str] = ()) -> Recipe:
    """A named recipe, or one read from a JSON file (local or s3://), with ``--set`` assignments applied.

    Raises:
        InputError: an unknown name, an unreadable file, an unknown key or a value out of range.
    """
    if name_or_file in RECIPES:
        recipe = RECIPES[name_or_file]()
    elif name_or_file.endswith(".json"):
        try:
            values = json.loads(storage.read_bytes(name_or_file))
        except FileNotFoundError:
            raise InputError(f"recipe {name_or_file}: no such file") from None
        except ValueError as error:
            raise InputError(f"recipe {name_or_file}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"recipe {name_or_file}: expected a JSON object, got {type(values).__name__}")
        recipe = parse_recipe(values, f"recipe {name_or_file}")
    else:
        raise InputError(f"recipe {name_or_file!r}: unknown name; expected one of {', '.join(RECIPES)} or a .json file")
    return override(recipe, assignments)


def parse_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """A recipe of its method's own type; every fault becomes one `InputError` line that names the dotted key."""
    from cinemo.methods import method_named

    if not isinstance(values, Mapping):
        raise InputError(f"{source}: got a {type(values).__name__}, expected a JSON object")
    name = values.get("method", DEFAULT_METHOD)
    if not isinstance(name, str):
        raise InputError(f"{source}: method is {name!r}, expected the name of a method")
    try:
        kind = method_named(name).recipe_type
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    try:
        return kind.model_validate({**values, "method": name})
    except ValidationError as error:
        every, faults = set(keys(kind)), dict[tuple[str, str], list[str]]()
        for fault in error.errors():
            # Behind a key that takes one of several types pydantic names the type that it tried.
            where = [part for part in fault["loc"] if not (isinstance(part, str) and re.search(r"[^\w]|-", part))]
            key = ".".join(map(str, where)) or "recipe"
            got = "" if fault["type"] in ("missing", "value_error") else f" (got {fault['input']!r})"
            hint = _near(key, kind, name) if fault["type"] == "extra_forbidden" else ""
            leaf = key if key in every else ".".join(map(str, fault["loc"]))
            said = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "model_type" and (inside := [each for each in every if each.startswith(f"{key}.")]):
                said = f"has keys of its own; set one of them, as in {min(inside)}=..."
            faults.setdefault((leaf, got + hint), []).append(said)
        lines = [f"{key}: {' or: '.join(said)}{after}" for (key, after), said in faults.items()]
        raise InputError(f"{source}: " + "; ".join(lines)) from None


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """Apply ``dotted.key=value`` assignments; the value is JSON, or a plain string where it is not JSON."""
    values = recipe.model_dump(mode="json")
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: expected dotted.key=value, for example train.lr=1e-4")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        node = values
        *path, leaf = key.strip().split(".")
        for name in path:
            child = node.get(name)
            node = child if isinstance(child, dict) else {}
        if leaf not in node:
            raise InputError(f"--set {assignment}: unknown key {key!r}{_near(key, type(recipe), recipe.method)}")
        node[leaf] = value
    return parse_recipe(values, "--set " + " ".join(assignments) if assignments else recipe.name)


def _near(key: str, kind: type[Recipe], method: str) -> str:
    """What was perhaps meant; or which keys this part of a recipe of this method has."""
    leaf, every = key.rsplit(".", 1)[-1], keys(kind)
    close = difflib.get_close_matches(key, every, 1, 0.75) or [k for k in every if k.rsplit(".", 1)[-1] == leaf][:1]
    if close:
        return f"; did you mean {close[0]}?"
    part = key.rpartition(".")[0]
    beside = [k.rpartition(".")[2] for k in every if k.rpartition(".")[0] == part]
    return f"; {part} of method {method} has {', '.join(beside)}" if beside and part else ""
