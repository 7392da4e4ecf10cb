"""A disk that is soon full."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[str]:
    """6 MB at an empty directory, which is made, while the block lasts; yields why none can be mounted, or nothing."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place]
    try:
        fault = subprocess.run(mount, capture_output=True, text=True).stderr.strip()
    except FileNotFoundError:
        fault = "there is no mount"
    yield fault
    if not fault:
        subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> Path:
    """Take all the room there is, with the file that is returned."""
    filler = place / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler
