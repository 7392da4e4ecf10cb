"""Whether a training reads what frozen encoders made of its samples from the datasets, instead of running them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cinemo.config import Recipe
from cinemo.data.dataset import sidecars
from cinemo.data.dataset.fields import identity
from cinemo.data.dataset.identity import differences
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.methods import method_class
from cinemo.training.run.batch import IMAGE_TOKENS, TEXT_STATES
from cinemo.types import InputError

# Of what a field was computed from: what decides its values beyond rounding.
_ENCODER = ("version", "text_encoder", "tokenizer", "layers", "image_encoder", "preprocessing")


def with_stored_states(recipe: Recipe, indexes: Sequence[DatasetIndex]) -> tuple[Recipe, list[str]]:
    """The recipe with ``train.text_states`` decided, and what there is to say about it.

    Raises:
        InputError: it reads states that a dataset does not have, or that another encoder made.
    """
    for field in sorted(IMAGE_TOKENS.intersection(method_class(recipe).stored_fields(recipe))):
        for index in indexes:
            info = sidecars.stored_info(index.uri, field)  # where it is missing, the loader says so
            if info and (fault := _other_encoder(index, info, field, recipe)):
                raise InputError(f"{fault}; make the field again, or --set train.image_tokens=encoded")
    wanted = recipe.train.text_states
    if wanted == "encoded":
        return recipe, []
    faults = [fault for index in indexes if (fault := _fault(index, recipe))]
    if not faults:
        stored = recipe.train.model_copy(update={"text_states": "stored"})
        line = "text states are read from the dataset: no text encoder is loaded"
        return recipe.model_copy(update={"train": stored}), [line]
    if wanted == "stored":
        raise InputError(f"{faults[0]}; --set train.text_states=encoded makes them in training")
    is_anywhere = any(sidecars.stored_info(index.uri, TEXT_STATES) for index in indexes)
    return recipe, [f"{faults[0]}; text states are made in training"] if is_anywhere else []


def _fault(index: DatasetIndex, recipe: Recipe) -> str | None:
    """Why a dataset's text states cannot be used, in words."""
    info = sidecars.stored_info(index.uri, TEXT_STATES)
    if info is None:
        return f"{index.uri}: has no field {TEXT_STATES}"
    if not info["complete"] or info["shards"] < len(index.shards):
        return f"{index.uri}: field {TEXT_STATES} covers {info['shards']} of {len(index.shards)} shards"
    if lacking := sum(info["missing"].values()):
        return f"{index.uri}: field {TEXT_STATES} lacks {lacking} of {lacking + info['samples']} samples"
    return _other_encoder(index, info, TEXT_STATES, recipe)


def _other_encoder(index: DatasetIndex, info: Mapping[str, Any], field: str, recipe: Recipe) -> str | None:
    _, covers = identity(field, recipe)
    both = ({name: value[name] for name in _ENCODER if name in value} for value in (info["computed_from"], covers))
    different = differences(*both)
    return f"{index.uri}: field {field} was made by another encoder: {'; '.join(different)}" if different else None
