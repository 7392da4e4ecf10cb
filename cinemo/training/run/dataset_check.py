"""Before step 0: is this the dataset that the recipe means, and is it still what it says it is?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from cinemo.config import Recipe
from cinemo.data.dataset.identity import differences, fingerprint
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.dataset.verify import canary
from cinemo.training.run.batch import dimensions, latent_shape
from cinemo.types import InputError, RunError

_SHOWN = 3
# What decides which samples there are and how exactly they were computed, not what a sample is: any will do.
_ANY = frozenset({"views", "seed", "decoder", "dtype", "scores"})


def check_dataset(index: DatasetIndex, recipe: Recipe) -> None:
    """Refuse a dataset whose samples are not what the recipe says. How many views there are is the dataset's affair.

    Raises:
        InputError: the geometry of its latents differs, or another part of its fingerprint; each is named.
    """
    several = recipe.data.other_shapes
    expected = [latent_shape(recipe.of_shape(shape)) for shape in recipe.data.shapes]
    shapes = index.latent_shapes if several else [tuple(index.info["latent_shape"])]
    if foreign := [shape for shape in shapes if shape not in expected]:
        raise InputError(
            f"dataset {index.uri}: latents {dimensions(foreign[0])}, recipe {recipe.name} expects "
            f"{' or '.join(map(dimensions, expected))} "
            "(frames x channels x rows x columns); precompute it with this recipe, or train with the recipe it was "
            "made with"
        )
    there, here = index.info.get("computed_from", {}), fingerprint(recipe)[1]
    found = differences(*({name: value[name] for name in value.keys() - _ANY} for value in (there, here)))
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise InputError(
            f"dataset {index.uri}: was not made by recipe {recipe.name}: {'; '.join(found[:_SHOWN])}{more}; "
            "precompute it again, or give the same --recipe and --set as for precompute"
        )


def check_canary(index: DatasetIndex, recipe: Recipe) -> str:
    """Make ``train.canary`` samples again from their videos and compare; returns a line about it.

    Raises:
        RunError: one differs by more than another kind of machine explains.
    """
    made_with = index.info.get("computed_from", {})
    as_made = {name: made_with[name] for name in ("seed", "decoder") if name in made_with}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=as_made)})
    result = canary(index, recipe, recipe.train.canary, recipe.train.seed)
    left_out = result.unreadable if recipe.train.on_damaged == "skip" else []
    faults = [*result.faults, *([] if left_out else result.unreadable)]
    if faults:
        raise RunError(
            f"dataset {index.uri}: {'; '.join(faults[:_SHOWN])}; "
            "its samples do not match its videos: check it with precompute.py --verify"
        )
    made = result.samples - result.skipped - len(left_out)
    gone = f", {result.skipped} skipped because their videos are gone" if result.skipped else ""
    return f"canary: {made} of {result.samples} samples made again and compared, {result.equal} equal bit for bit{gone}"


def dataset_digest(index: DatasetIndex) -> str:
    """Identifies the content of a dataset: its fingerprint and every shard's checksum."""
    *_, digest = _digests(index)
    return digest


def shards_of(index: DatasetIndex, digest: str) -> int | None:
    """How many shards a dataset had when it was ``digest``; None where it never was. It may have grown since."""
    return next((shards for shards, found in enumerate(_digests(index)) if found == digest), None)


def _digests(index: DatasetIndex) -> Iterator[str]:
    """Of a dataset's first 0, 1, ... shards."""
    total = hashlib.sha256(index.info["fingerprint"].encode())
    yield total.hexdigest()[:16]
    for checksum in index.table["checksum"].to_pylist():
        total.update(b"\n" + checksum.encode())
        yield total.hexdigest()[:16]
