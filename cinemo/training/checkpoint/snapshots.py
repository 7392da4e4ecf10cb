"""Snapshots of power-function averages, from which an average of any width is made after the training.

::

    <output>/posthoc/step-00001000/rank-00000.safetensors   each rank's share (`cinemo.training.checkpoint.shares`)
                                   state.json               step, optimiser's steps, widths, files: written last

They are written before the checkpoint of the same step, in float16, so that a run that goes on from a checkpoint has
those before it and makes those behind it again. How many there are follows from the recipe: checkpoints whose step is a
multiple of `interval`, and the last one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinemo import storage
from cinemo.config import TrainConfig
from cinemo.training.checkpoint import checkpoints, shares
from cinemo.training.checkpoint.checkpoints import CheckpointCard
from cinemo.training.checkpoint.profiles import Profile, coefficients
from cinemo.training.run.averaging import power_average
from cinemo.training.run.engine import Engine
from cinemo.types import InputError

DIRECTORY = "posthoc"
DTYPE = torch.float16
_FARTHEST = 0.1  # from a wanted profile that what is made of snapshots may be
_SMALLEST = 1e-5  # coefficient that is worth reading a snapshot for


def interval(train: TrainConfig) -> int:
    """Steps between snapshots: a multiple of ``checkpoint_every``, so that there are few enough."""
    checkpoints_in_all = -(-train.max_steps // train.checkpoint_every)
    return train.checkpoint_every * -(-checkpoints_in_all // train.posthoc_snapshots)


def count(train: TrainConfig) -> int:
    """How many snapshots a whole run leaves."""
    return -(-train.max_steps // interval(train)) if train.posthoc_ema else 0


def size(train: TrainConfig, trainable: int) -> int:
    """Bytes of one, of ``trainable`` values."""
    return len(train.posthoc_ema) * trainable * DTYPE.itemsize


def is_due(train: TrainConfig, done: int) -> bool:
    return bool(train.posthoc_ema) and (done == train.max_steps or done % interval(train) == 0)


def write(output: str, done: int, engine: Engine) -> None:
    """The snapshot of step ``done``; every rank calls. Those that the recipe does not ask for any more are removed."""
    train, place = engine.train, _place(output, done)
    if engine.rank == 0:
        storage.remove(place)  # a killed run may have left one, of another number of ranks
        for other in _steps(output):
            if other < done and other % interval(train):
                storage.remove(_place(output, other))
    engine.gather(None)
    states = [power_average(width) for width in train.posthoc_ema]
    with checkpoints.saving(done, engine.share_bytes, output), _filled(place) as directory:
        steps = engine.save_averages(directory, states, DTYPE)
        own = directory / shares.file_name(engine.rank)
        size = own.stat().st_size
    files = dict(engine.gather((own.name, size)))
    if engine.rank == 0:
        record = {"step": done, "adam_steps": steps, "widths": list(train.posthoc_ema), "files": files}
        storage.write_json(storage.join(place, shares.RECORD), record)


@dataclass(frozen=True)
class Mixture:
    """An average as a sum of stored ones: by place the states to read, and how much of each. ``off``: how far its
    profile is from the wanted one, as a share (`cinemo.training.checkpoint.profiles.coefficients`).
    """

    width: float
    parts: dict[str, dict[str, float]]
    off: float

    def add_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Add it to the flat float32 tensors of trained parameters, which are zero, by the parameters' names.

        One snapshot after the other: nothing of them is in memory but one parameter.
        """
        for uri, shares_of_states in self.parts.items():
            with _local(uri) as directory, shares.Shares(directory) as stored:
                for name, out in tensors.items():
                    buffer = torch.empty_like(out)
                    for state, share in shares_of_states.items():
                        stored.read(state, name, stored.shapes.get(name, ()), buffer)
                        out.add_(buffer, alpha=share)


def mixture(card: CheckpointCard, state: Path, train: TrainConfig, width: float) -> Mixture:
    """How the average of a width follows from a checkpoint and the snapshots before it.

    Args:
        state: the local directory of the checkpoint's shares.

    Raises:
        InputError: the training kept no such averages, or those there cannot make this width.
    """
    if not train.posthoc_ema:
        raise InputError(
            f"checkpoint {card.uri}: has no averages for another width: it was trained without train.posthoc_ema "
            "(e.g. [0.05,0.1])"
        )
    with shares.Shares(state) as own:
        steps = int(own.record["adam_steps"])
    if steps < 1:
        raise InputError(f"checkpoint {card.uri}: no step has moved its weights, so that there is no average")
    stored = [(str(state), own_width, steps) for own_width in train.posthoc_ema]
    output = card.uri.rstrip("/").rsplit("/", 2)[0]
    for step in _steps(output):
        record = _complete(_place(output, step)) if step < card.step else None
        if record and tuple(record["widths"]) == train.posthoc_ema and 0 < record["adam_steps"] < steps:
            stored += [(_place(output, step), own_width, record["adam_steps"]) for own_width in record["widths"]]
    found, off = coefficients([Profile(own_width, made) for _, own_width, made in stored], Profile(width, steps))
    if off > _FARTHEST:
        low, high = train.posthoc_ema
        raise InputError(
            f"--ema-std is {width:g}: the {len(stored) // 2} snapshots of this training make it only to within "
            f"{off:.0%}; a width nearer to {low:g}..{high:g} is possible, or more snapshots (train.posthoc_snapshots)"
        )
    parts: dict[str, dict[str, float]] = {}
    for (uri, own_width, _), share in zip(stored, found, strict=True):
        if abs(share) > _SMALLEST:
            parts.setdefault(uri, {})[power_average(own_width)] = share
    return Mixture(width, parts, off)


def _place(output: str, step: int) -> str:
    return storage.join(output, DIRECTORY, f"step-{step:08d}")


def _steps(output: str) -> list[int]:
    names = storage.names(storage.join(output, DIRECTORY))
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())


def _complete(uri: str) -> dict[str, Any] | None:
    """The record of a snapshot whose files are all there."""
    try:
        record: dict[str, Any] = storage.read_json(storage.join(uri, shares.RECORD))
        whole = all(storage.size(storage.join(uri, name)) == size for name, size in record["files"].items())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return record if whole else None


@contextmanager
def _filled(uri: str) -> Iterator[Path]:
    """A local directory whose files are at ``uri`` afterwards."""
    if not storage.is_remote(uri):
        path = storage.local_path(uri)
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="cinemo-snapshot-") as scratch:
        yield Path(scratch)
        storage.upload(Path(scratch), uri)


@contextmanager
def _local(uri: str) -> Iterator[Path]:
    """The files of a snapshot on this machine, for a while."""
    if not storage.is_remote(uri):
        yield storage.local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="cinemo-snapshot-") as scratch:
        for name in storage.names(uri):
            storage.fetch(storage.join(uri, name), Path(scratch) / name)
        yield Path(scratch)
