"""A disk without room."""

from __future__ import annotations

import contextlib
from pathlib import Path


def fill(place: Path) -> Path:
    """Take all the room there is, with the file that is returned."""
    filler = place / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler
