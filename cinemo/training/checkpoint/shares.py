"""The file format of a checkpoint's tensors: each rank's share, readable by any other number of ranks.

::

    state/rank-00000.safetensors   the fragments this rank holds; a fragment is a run of one parameter's values
    state/state.json               optimiser steps done, and what else the run must remember; rank 0's

A tensor ``KEY/PARAMETER`` holds the values of the fragment of ``PARAMETER``; KEY is ``weight`` (in float32, whatever
the network computes in; of a frozen parameter as the network has it) or a state of the optimiser. The files' metadata
say where in the flattened parameter a fragment begins and what the whole one's shape is. Readers ask for a range of a
parameter and do not care how it was cut, so that no conversion stands between two numbers of ranks or ZeRO stages.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cinemo.types import RunError

WEIGHT = "weight"
STATE = "state"  # the directory inside a checkpoint
RECORD = "state.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHUNK = 2**24  # values that are copied or cast at a time


@dataclass(frozen=True)
class Fragment:
    """Values ``start``, ``start + 1``, ... of a flattened parameter: one flat tensor of equal length for each key."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.values.values())).numel()

    def part(self, rank: int, world: int) -> Fragment:
        """What rank ``rank`` of ``world`` writes of a fragment that all of them hold."""
        begin, end = (len(self) * bound // world for bound in (rank, rank + 1))
        return Fragment(
            self.name, self.shape, self.start + begin, {key: value[begin:end] for key, value in self.values.items()}
        )


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write(directory: Path, rank: int, fragments: Iterable[Fragment], dtype: torch.dtype | None = None) -> None:
    """Write a rank's share straight from its tensors: nothing is there twice but a chunk at a time.

    ``dtype``: of the files' values; None: as they are.
    """
    held = [fragment for fragment in fragments if len(fragment)]
    places = {fragment.name: {"start": fragment.start, "shape": fragment.shape} for fragment in held}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "fragments": json.dumps(places)}}
    tensors, end = [], 0
    for fragment in held:
        for key, value in fragment.values.items():
            stored = dtype or value.dtype
            begin, end = end, end + value.numel() * stored.itemsize
            header[f"{key}/{fragment.name}"] = {
                "dtype": _CODES[stored],
                "shape": [value.numel()],
                "data_offsets": [begin, end],
            }
            tensors.append(value)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / file_name(rank)).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            for chunk in tensor.detach().split(_CHUNK):  # type: ignore[no-untyped-call]
                file.write(_bytes(chunk.to(dtype or chunk.dtype).cpu().contiguous()))


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write what belongs to no rank alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).write_text(json.dumps(record))


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    file: int
    offset: int
    dtype: torch.dtype


class Shares:
    """The shares of all ranks of one checkpoint, read range by range.

    Raises:
        RunError: there are none.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        paths = sorted(directory.glob("rank-*.safetensors"))
        if not paths or not (directory / RECORD).is_file():
            raise RunError(f"{directory}: does not hold a training state; use another checkpoint")
        self.record: dict[str, Any] = json.loads((directory / RECORD).read_text())
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._files: list[io.FileIO] = []
        for number, path in enumerate(paths):
            file = io.FileIO(path)
            self._files.append(file)
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            places = json.loads(header.pop("__metadata__")["fragments"])
            self.shapes |= {name: tuple(place["shape"]) for name, place in places.items()}
            for tensor, entry in header.items():
                start = places[tensor.partition("/")[2]]["start"]
                piece = _Piece(
                    start,
                    start + entry["shape"][0],
                    number,
                    8 + length + entry["data_offsets"][0],
                    _DTYPES[entry["dtype"]],
                )
                self._pieces.setdefault(tensor, []).append(piece)

    def __enter__(self) -> Shares:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def has(self, key: str, name: str) -> bool:
        return f"{key}/{name}" in self._pieces

    @torch.no_grad()
    def read(self, key: str, name: str, shape: Sequence[int], out: Tensor, start: int = 0) -> None:
        """Fill the flat tensor ``out`` with values ``start``, ``start + 1``, ... of a parameter, cast where need be.

        Args:
            shape: of the whole parameter.

        Raises:
            RunError: the checkpoint does not hold all of them, or another shape.
        """
        if self.shapes.get(name) != tuple(shape):
            there = f"of shape {self.shapes[name]}" if name in self.shapes else "missing"
            raise RunError(
                f"{self.directory}: parameter {name} is {there}, expected {tuple(shape)}; use its own recipe"
            )
        end, found = start + out.numel(), 0
        for piece in self._pieces.get(f"{key}/{name}", ()):
            begin, stop = max(start, piece.start), min(end, piece.end)
            if begin < stop:
                self._read(piece, begin, out[begin - start : stop - start])
                found += stop - begin
        if found != out.numel():
            raise RunError(
                f"{self.directory}: holds {found} of the values {start}..{end} of {key}/{name}; use another checkpoint"
            )

    def _read(self, piece: _Piece, begin: int, out: Tensor) -> None:
        file = self._files[piece.file]
        file.seek(piece.offset + (begin - piece.start) * piece.dtype.itemsize)
        for chunk in out.detach().split(_CHUNK):  # type: ignore[no-untyped-call]
            direct = chunk.device.type == "cpu" and chunk.dtype == piece.dtype and chunk.is_contiguous()
            into = chunk if direct else torch.empty(chunk.shape, dtype=piece.dtype)
            view = _bytes(into)
            while view:  # one read returns at most 2 GB, and less where it is interrupted
                count = file.readinto(view)
                if not count:
                    raise RunError(f"{self.directory}: {file.name} is cut short; use another checkpoint")
                view = view[count:]
            if not direct:
                chunk.copy_(into)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
