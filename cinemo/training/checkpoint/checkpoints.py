"""Checkpoints on storage: what makes one complete, which one to take, which ones to sweep.

::

    <output>/train/checkpoint_<time>/checkpoint.json   step, world, dataset, files with sizes: written with the rest
                                     recipe.json       the recipe it was made with
                                     state/...         each rank's share (`cinemo.training.checkpoint.shares`)

All ranks write side by side, while steps go on (`UnderWay`). Each file appears whole, and none is certain to be the
last: a checkpoint is complete when every file that ``checkpoint.json`` lists is there with its size. Any number of
workers can take it up.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cinemo import storage
from cinemo.config import Recipe
from cinemo.training.checkpoint.shares import Memory
from cinemo.types import NO_ROOM, InputError, RunError, check_schema

RUN = "train"  # Ray Train's run name: its directory under the output
RECORD = "checkpoint.json"
SCHEMA_VERSION = 1
MOST = 2  # checkpoints that may be copied, but not yet written
_NAME = re.compile(r"checkpoint_[\d_.-]+")
_SNAPSHOT = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class CheckpointCard:
    """What can be said of a complete checkpoint without loading it.

    ``dataset``: digest of what it was trained on. ``sources``: by dataset its share, and from which epoch on how many
    shards were used where it grew (older checkpoints do not say: one dataset, all that ``dataset`` means).
    ``recipe``: its JSON, not yet validated.
    """

    uri: str
    step: int
    world: int
    dataset: str
    recipe: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]] = ()


def describe(
    directory: str | Path,
    recipe: Recipe,
    step: int,
    world: int,
    dataset: str,
    files: dict[str, int],
    sources: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Add ``recipe.json`` and, at last, ``checkpoint.json`` to rank 0's share; ``files`` are those of all ranks."""
    text = recipe.to_json().encode()
    storage.write_bytes(storage.join(str(directory), "recipe.json"), text)
    files = files | {"recipe.json": len(text)}
    record = {"schema": SCHEMA_VERSION, "step": step, "world": world, "dataset": dataset, "sources": list(sources)}
    record |= {"files": files}
    storage.write_json(storage.join(str(directory), RECORD), record)


@contextmanager
def saving(step: int, size: int, place: str) -> Iterator[None]:
    """Around whatever writes ``size`` bytes of a checkpoint to ``place``.

    Raises:
        RunError: the disk is full. Other faults pass: Ray Train starts the workers anew from the checkpoint before.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise RunError(
            f"{place}: no space left for the checkpoint of step {step} ({size / 2**20:.1f} MiB); free some or lower "
            "train.keep_checkpoints, then continue from the previous one with --resume auto"
        ) from error


class UnderWay:
    """The checkpoints of one rank that are copied, but not yet written: `MOST` at most.

    Args:
        pinned: see `cinemo.training.checkpoint.shares.Memory`.
    """

    def __init__(self, pinned: bool = False) -> None:
        self._news = threading.Condition()
        self._idle = [Memory(pinned) for _ in range(MOST)]
        self._fault: BaseException | None = None
        self.seconds = 0.0  # that the last one took to write

    def begin(self) -> Memory:
        """Memory for one more, which waits while `MOST` are being written.

        Raises:
            BaseException: what the writing of an earlier one raised.
        """
        with self._news:
            self._news.wait_for(lambda: self._idle or self._fault)
            if self._fault:
                raise self._fault
            return self._idle.pop()

    @contextmanager
    def writing(self, memory: Memory) -> Iterator[None]:
        """Around the writing, in another thread. Memory of what could not be written is not used again."""
        fault, begun = None, time.monotonic()
        try:
            yield
            self.seconds = time.monotonic() - begun
        except BaseException as error:
            fault = error
            raise
        finally:
            with self._news:
                self._fault = fault
                self._idle += [] if fault else [memory]
                self._news.notify_all()

    def finish(self) -> None:
        """Wait until all that has begun is written, or could not be."""
        with self._news:
            self._news.wait_for(lambda: len(self._idle) == MOST or self._fault)


def read(uri: str) -> CheckpointCard | None:
    """The card of a checkpoint directory, or None where it is incomplete or none."""
    try:
        record = storage.read_json(storage.join(uri, RECORD))
        check_schema(record.get("schema"), SCHEMA_VERSION, f"checkpoint {uri}")
        if any(storage.size(storage.join(uri, name)) != size for name, size in record["files"].items()):
            return None
        recipe = storage.read_json(storage.join(uri, "recipe.json"))
        sources = record.get("sources", ())
        return CheckpointCard(uri, record["step"], record["world"], record["dataset"], recipe, sources)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def stored(output: str) -> list[str]:
    """URIs of all checkpoint directories under a run's output, complete or not."""
    root = storage.join(output, RUN)
    return [storage.join(root, name) for name in storage.names(root) if _NAME.fullmatch(name)]


def complete(output: str) -> list[CheckpointCard]:
    """The complete checkpoints of a run, by ascending step."""
    return sorted((card for uri in stored(output) if (card := read(uri))), key=lambda card: (card.step, card.uri))


def latest(output: str) -> CheckpointCard | None:
    """The complete checkpoint with the most steps."""
    return next(reversed(complete(output)), None)


def prune(output: str, keep: int) -> None:
    """Remove what a killed job left half written, all but the last ``keep`` checkpoints, and Ray Train's snapshot.

    The snapshot lists checkpoints by name and stops the next job if one is missing or if it was itself cut short; a new
    job is told its starting point instead. Only while no training writes to ``output``.
    """
    kept = {card.uri for card in complete(output)[-keep:]}
    for uri in stored(output):
        if uri not in kept:
            storage.remove(uri)
    storage.remove(storage.join(output, RUN, _SNAPSHOT))
    storage.sweep(storage.join(output, RUN))


def find(location: str) -> CheckpointCard:
    """A checkpoint by its own URI, or the latest one of a run's output directory.

    Raises:
        InputError: there is none, or it is incomplete.
    """
    location = storage.absolute(location)
    if not storage.exists(storage.join(location, RECORD)):
        card = latest(location)
        if card is None:
            raise InputError(f"checkpoint {location}: none there; expected a run's --output or one of its checkpoint_*")
        return card
    card = read(location)
    if card is None:
        raise InputError(f"checkpoint {location}: incomplete (files missing or cut short); use an earlier one")
    return card
