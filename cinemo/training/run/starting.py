"""Which checkpoint a training takes up, whether it may, and what goes on otherwise than before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.source import Source
from cinemo.recipes import parse_recipe
from cinemo.training.checkpoint import checkpoints
from cinemo.training.checkpoint.checkpoints import CheckpointCard
from cinemo.training.report.progress import read_run
from cinemo.training.run.growth import digest_of, generations_of
from cinemo.training.run.left_out import steps_of
from cinemo.types import InputError

_BATCH = ("train.global_batch", "train.lanes")  # what --change-batch lets change
_SEEN = ("train.where", "train.held_out_shards")  # which samples of a dataset are in its order
_NORMALISED = ("latents_mean", "latents_std")
# A checkpoint can be continued only with these unchanged: they decide its tensors, the order of data, or every draw.
_FIXED = (
    *(
        "method",
        "model",
        "diffusion",
        "encoders.text_encoder",
        "encoders.tokenizer",
        "encoders.image_encoder",
        "encoders.latents_mean",
        "encoders.latents_std",
        "data.frames",
        "data.size",
        "data.other_shapes",
        "data.bucket_edges",
    ),
    *("train.precision", *_BATCH, "train.seed", *_SEEN),
    *("train.trainable", "train.lora_rank", "train.lora_alpha", "train.lora_layers"),
    "train.posthoc_ema",
)


@dataclass(frozen=True)
class Start:
    """A checkpoint to take up.

    ``before``: the recipe that it was made with. ``recipe``: the one asked for, with what the checkpoint decides.
    ``other_data``: it was made with other datasets. ``changes``: lines about what goes on otherwise than before.
    """

    card: CheckpointCard
    before: Recipe
    recipe: Recipe
    other_data: bool
    changes: tuple[str, ...]


def starting_point(
    recipe: Recipe,
    sources: Sequence[Source],
    indexes: Sequence[DatasetIndex],
    output: str,
    resume: str,
    change_batch: bool,
) -> Start | None:
    """The checkpoint to take up, or None for a start from nothing. Arguments as `cinemo.training.run.worker.run` has
    them.

    Raises:
        InputError: there is none where one was named, or it does not go on with this recipe and these datasets.
    """
    holds = read_run(output) is not None or checkpoints.stored(output)
    if resume != "auto" and holds:
        raise InputError(
            f"output {output}: already holds a run; continue it with --resume auto, or choose another --output"
        )
    if resume == "never":
        return None
    card = checkpoints.latest(output) if resume == "auto" else checkpoints.find(resume)
    if card is None:
        return None
    changes, other_data = list[str](), False
    try:
        generations_of(indexes, sources, {"dataset": card.dataset, "sources": card.sources})
    except InputError as error:
        if resume == "auto":
            raise InputError(
                f"checkpoint {card.uri}: {error}; give the same --data, or go on with these from their first epoch: "
                f"--resume {card.uri} and another --output"
            ) from None
        other_data = True
        there, here = _data_of(card), name_of(sources)
        if there == here:
            there, here = f"{there} as {card.dataset}", f"as {digest_of(indexes)}"
        changes.append(f"goes on at step {card.step} with another dataset: {there} -> {here}, from its first epoch")
    # Parsed, so that keys that are younger than the checkpoint have their defaults.
    before = parse_recipe(dict(card.recipe), f"checkpoint {card.uri}")
    if recipe.encoders.normalize and before.encoders.normalize:  # the network has learnt it with these numbers
        kept = {name: getattr(before.encoders, name) for name in _NORMALISED}
        recipe = recipe.model_copy(update={"encoders": recipe.encoders.model_copy(update=kept)})
    old, new = before.model_dump(mode="json"), recipe.model_dump(mode="json")
    done = [steps for steps in recipe.train.skip_steps if steps_of(steps)[-1] <= card.step]
    done = [steps for steps in done if steps not in old["train"]["skip_steps"]]
    if done:
        raise InputError(
            f"checkpoint {card.uri}: has done {card.step} steps, so train.skip_steps {', '.join(done)} cannot be "
            "passed over any more; start from an earlier one (--resume URI and another --output)"
        )
    fixed = [key for key in _FIXED if key not in _SEEN or not other_data]
    changed = {
        key: f"{key} {_pick(old, key)} -> {_pick(new, key)}" for key in fixed if _pick(old, key) != _pick(new, key)
    }
    batch = [changed.pop(key) for key in _BATCH if change_batch and key in changed]
    if changed:
        way = f"use the recipe it was made with (--recipe {storage.join(card.uri, 'recipe.json')})"
        way += ", or --change-batch" if changed.keys() <= {*_BATCH} else ""
        raise InputError(f"checkpoint {card.uri}: cannot continue with another {'; '.join(changed.values())}; {way}")
    if batch and not other_data:
        rest = "what its epoch has not seen yet comes next, each sample once"
        changes.append(f"goes on at step {card.step} with another {'; '.join(batch)}; {rest}")
    return Start(card, before, recipe, other_data, tuple(changes))


def name_of(sources: Sequence[Source]) -> str:
    """What a training's datasets are called."""
    return sources[0].uri if len(sources) == 1 and not sources[0].still else " + ".join(map(str, sources))


def _data_of(card: CheckpointCard) -> str:
    """The name of the datasets that a checkpoint was trained on; their digest where its run does not tell."""
    output = card.uri.rsplit("/", 2)[0]  # <output>/train/checkpoint_...
    return str((read_run(output) or {}).get("dataset", card.dataset))


def _pick(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name)
    return values
