"""Mean and deviation of every latent channel of a dataset, from a few hundred of its samples.

Autoencoders differ by orders of magnitude between their channels, and noise drowns the faint ones first. A recipe with
``encoders.normalize`` trains on channels of mean 0 and deviation 1; Stable Diffusion's published scaling does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import DatasetIndex, Members
from cinemo.types import InputError

SAMPLES = 256  # 16 frames each: more than enough for two digits
_READERS = 16


def latent_statistics(uri: str, samples_of_shards: Mapping[int, int]) -> dict[str, Any]:
    """``samples``, and ``mean`` and ``std`` of each channel, of stored latents: over up to `SAMPLES` samples at equal
    distances, so that the same dataset always gives the same numbers.

    Args:
        samples_of_shards: shard -> how many samples it holds.
    """
    places = [(shard, place) for shard in sorted(samples_of_shards) for place in range(samples_of_shards[shard])]
    chosen = [places[k] for k in np.linspace(0, len(places) - 1, min(SAMPLES, len(places))).round().astype(int)]
    numbers = sorted({shard for shard, _ in chosen})

    def sums(shard: int) -> np.ndarray:
        """(frames and cells, sum, sum of squares) of each channel over the chosen samples of a shard: (3, C)."""
        members = Members(**storage.read_json(shards.record_uri(uri, shard))["members"])
        mine = [place for number, place in chosen if number == shard]
        parts = []
        for place in mine:  # one at a time: a shard of large videos would take hundreds of megabytes
            values = shards.fetch_sample(uri, shard, members, place).latents_FCHW.astype(np.float64)
            count = np.full(values.shape[1], values[:, 0].size, np.float64)
            parts.append(np.stack([count, values.sum((0, 2, 3)), np.square(values).sum((0, 2, 3))]))
        return np.asarray(np.sum(parts, axis=0))

    with ThreadPoolExecutor(_READERS if storage.is_remote(uri) else 1) as pool:
        count, total, squares = np.sum(list(pool.map(sums, numbers)), axis=0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    rounded = {name: [float(f"{v:.6g}") for v in values] for name, values in (("mean", mean), ("std", deviation))}
    return {"samples": len(chosen), **rounded}


def with_statistics(recipe: Recipe, index: DatasetIndex) -> Recipe:
    """The recipe with what ``encoders.normalize`` needs of the dataset; as it is where it does not ask for it.

    Raises:
        InputError: the dataset has no statistics, as those of older versions, or they do not fit its latents.
    """
    if not recipe.encoders.normalize:
        return recipe
    measured = index.info.get("latent_statistics")
    if not measured:
        raise InputError(
            f"dataset {index.uri}: has no latent_statistics, which encoders.normalize needs; "
            "run the same precompute.py command again to add them"
        )
    channels = index.info["latent_shape"][1]
    try:
        mean, deviation = (tuple(float(value) for value in measured[name]) for name in ("mean", "std"))
        fits = len(mean) == len(deviation) == channels and min(deviation) > 0 and np.isfinite([*mean, *deviation]).all()
    except (TypeError, KeyError, ValueError):
        fits = False
    if not fits:
        raise InputError(
            f"dataset {index.uri}: latent_statistics in dataset.json is damaged, expected mean and std of {channels} "
            "channels; remove the entry and run the same precompute.py command again"
        )
    values = {"latents_mean": mean, "latents_std": deviation}
    return recipe.model_copy(update={"encoders": recipe.encoders.model_copy(update=values)})
