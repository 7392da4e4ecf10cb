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

from cinemo import storage
from cinemo.types import RunError

WEIGHT = "weight"
STATE = "state"  # the directory inside a checkpoint
RECORD = "state.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHUNK = 2**24  # values that are read or cast at a time
BLOCK = 2**26  # bytes of host memory that a snapshot takes at a time; a power of two is pinned without waste


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


def _header(fragments: Iterable[Fragment], dtype: torch.dtype | None = None) -> tuple[bytes, list[Tensor], int]:
    """How a share's file begins, what it holds behind that, in order, and how many bytes this takes."""
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
    return struct.pack("<Q", len(text)) + text, tensors, end


def write(directory: Path, rank: int, fragments: Iterable[Fragment], dtype: torch.dtype | None = None) -> None:
    """Write a rank's share straight from its tensors: nothing is there twice but a chunk at a time.

    ``dtype``: of the files' values; None: as they are.
    """
    header, tensors, _ = _header(fragments, dtype)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / file_name(rank)).open("wb") as file:
        file.write(header)
        for tensor in tensors:
            for chunk in tensor.detach().split(_CHUNK):  # type: ignore[no-untyped-call]
                file.write(_bytes(chunk.to(dtype or chunk.dtype).cpu().contiguous()))


class Memory:
    """Host memory for one snapshot, used again for the next one.

    Args:
        pinned: page-locked, so that an accelerator copies into it without waiting.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._blocks: list[Tensor] = []

    def blocks(self, size: int) -> list[Tensor]:
        """Blocks of `BLOCK` bytes each, of at least ``size`` bytes together, with whatever they held before."""
        while len(self._blocks) * BLOCK < size:
            self._blocks.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self.pinned))
        return self._blocks


class Snapshot:
    """A rank's share as it is now, copied to host memory as the bytes of its file; written later, by any thread.

    On an accelerator nothing waits for the copy but `write`: it stands before whatever its stream does next.

    Args:
        fragments: of which this rank writes the values.
        record: JSON of what belongs to no rank alone; of rank 0.
        memory: what to copy into; until this snapshot is written, nothing else may use it.
    """

    def __init__(
        self,
        rank: int,
        fragments: Iterable[Fragment],
        record: Mapping[str, Any] | None = None,
        memory: Memory | None = None,
    ) -> None:
        memory = memory or Memory()
        self._header, tensors, self._size = _header(fragments)
        self._blocks, self._copied = memory.blocks(self._size), None
        self._copy(tensors)
        if memory.pinned:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        self._name = f"{STATE}/{file_name(rank)}"
        self._record = None if record is None else json.dumps(record).encode()

    @property
    def sizes(self) -> dict[str, int]:
        """Name inside the checkpoint -> bytes of every file that `write` makes."""
        found = {self._name: len(self._header) + self._size}
        return found if self._record is None else found | {f"{STATE}/{RECORD}": len(self._record)}

    def write(self, checkpoint: str | Path) -> None:
        """Write the files under a checkpoint's directory, local or s3://, each whole or not at all."""
        if self._copied is not None:
            self._copied.synchronize()
        full, rest = divmod(self._size, BLOCK)
        blocks = [_bytes(block) for block in self._blocks[:full]]
        blocks += [_bytes(self._blocks[full][:rest])] if rest else []
        storage.write_bytes(storage.join(str(checkpoint), self._name), [self._header, *blocks])
        if self._record is not None:
            storage.write_bytes(storage.join(str(checkpoint), STATE, RECORD), self._record)

    def _copy(self, tensors: Iterable[Tensor]) -> None:
        offset = 0
        for tensor in tensors:
            left = tensor.detach().contiguous().view(torch.uint8)
            while len(left):
                number, place = divmod(offset, BLOCK)
                count = min(len(left), BLOCK - place)
                self._blocks[number][place : place + count].copy_(left[:count], non_blocking=True)
                left, offset = left[count:], offset + count


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
