"""A decoder that breaks in the ways real ones do, chosen by the suffix of the file; every other file it decodes."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import numpy as np

from cinemo.config import DataConfig
from cinemo.media.video import decode_views
from cinemo.types import Clip, Frames

broken_heap = False


def decode(path: Path, clip: Clip, data: DataConfig, out_VFHWC: np.ndarray) -> list[Frames]:
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
        if path.stat().st_size <= int(clip.caption):
            os.kill(os.getpid(), signal.SIGKILL)
    elif path.suffix == ".raises":
        raise ZeroDivisionError("0 frames a second\nand more")
    elif path.suffix == ".poison":
        broken_heap = True
    return decode_views(path.with_name("film.mp4"), clip, data, out_VFHWC)
