"""Which files hold a network's weights, as diffusers and transformers save them, and whether these files are whole."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cinemo.types import InputError

DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")

_VARIANTS = (None, "fp16", "bf16")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class WeightFiles:
    """One network's weights: a file, or its shards in the order of their names.

    ``variant``: what libraries call it (``fp16``); None for the plain one, which comes first where there are several.
    """

    paths: tuple[Path, ...]
    variant: str | None = None

    @classmethod
    def find(cls, directory: Path, location: str, *names: str) -> WeightFiles | None:
        """The weights in a directory, or None.

        Args:
            location: what the user called the directory.
            names: file names to look for, the preferred one first. Of each, shards with an index and variants do too.

        Raises:
            InputError: an index cannot be read, or names a shard that is not there.
        """
        for variant in _VARIANTS:
            for name in names:
                if (path := directory / _with_variant(name, variant)).is_file():
                    return cls((path,), variant)
            for name in names:
                if (index := directory / _with_variant(f"{name}.index.json", variant)).is_file():
                    return cls(tuple(_shards(index, location)), variant)
        return None

    def check(self, location: str) -> None:
        """
        Raises:
            InputError: a file is a Git LFS pointer, or was cut short.
        """
        for path in self.paths:
            check_file(path, location)


def check_file(path: Path, location: str) -> None:
    """
    Raises:
        InputError: the file is a Git LFS pointer; or it is a weights file that was cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
        if head == _LFS_POINTER:
            raise InputError(
                f"{location}: {path.name} is a Git LFS pointer, not the file itself; run git lfs pull in its clone"
            )
        if path.suffix == ".safetensors":
            expected = _safetensors_size(file, size)
            if expected != size:
                told = f", its header asks for {expected}" if expected else " and no readable header"
                raise InputError(f"{location}: {path.name} is cut short or damaged: {size} bytes{told}; fetch it again")
    if head.startswith(b"PK\3\4") and not zipfile.is_zipfile(path):
        raise InputError(f"{location}: {path.name} is cut short: an archive without its end; fetch it again")


def _safetensors_size(file: BinaryIO, size: int) -> int | None:
    """Bytes that a safetensors file has by its own header; None where that cannot be read."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        return None
    try:
        entries = json.loads(file.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        return None
    return 8 + length + max(ends, default=0)


def _with_variant(name: str, variant: str | None) -> str:
    """diffusers and transformers both put it before the last ending: ``model.fp16.safetensors``."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


def _shards(index: Path, location: str) -> Iterator[Path]:
    check_file(index, location)
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{location}: {index.name} is no index of shards, expected JSON with weight_map") from None
    for name in names:
        path = index.parent / str(name)
        if path.parent != index.parent or not os.path.isfile(path):  # of a Path, a name too long is an OSError
            raise InputError(f"{location}: {name!s:.100} is missing there, a shard that {index.name} lists")
        yield path
