"""A decoder that breaks in the ways real ones do, chosen by the suffix of the file; every other file it decodes."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cinemo.config import DataConfig
from cinemo.media.guard import Views
from cinemo.media.video import decode_windows
from cinemo.types import Clip

broken_heap = False


def decode(path: Path, clips: Sequence[Clip], data: DataConfig, out_NVFHWC: np.ndarray) -> list[Views]:
    global broken_heap
    if path.suffix == ".segfault" or broken_heap:
        ctypes.string_at(0)
    elif path.suffix == ".abort":
        os.abort()
    elif path.suffix == ".hang":
        ctypes.PyDLL(None).pause()  # in C, and with the interpreter's lock held
    elif path.suffix == ".bloat":
        np.ones(1 << 40)
    elif path.suffix == ".killed":
        with path.open("a") as file:
            file.write("!")
        if path.stat().st_size <= int(clips[0].caption):
            os.kill(os.getpid(), signal.SIGKILL)
    elif path.suffix == ".raises":
        raise ZeroDivisionError("0 frames a second\nand more")
    elif path.suffix == ".poison":
        broken_heap = True
    return decode_windows(path.with_name("film.mp4"), clips, data, out_NVFHWC)
