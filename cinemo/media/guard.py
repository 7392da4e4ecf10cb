"""Decoding in a process of its own: a file that crashes, hangs or bloats the decoder costs one clip, not the job.

A Ray worker that a decoder kills is started again with the same clips, for ever. Notes of who died on what would have
to be kept for every clip, and could not tell a crash from a machine that was taken away. A child process can: it lives
as long as its parent and decodes one clip after another into shared memory, for less than a hundredth of the decoding
time (BENCHMARKS.md). It is a fresh interpreter, never a fork: a Ray worker has threads that a fork would tear.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np

from cinemo.config import DataConfig
from cinemo.media.video import decode_windows
from cinemo.types import Clip, ClipError, Frames

Views = list[Frames] | ClipError
Decode = Callable[[Path, Sequence[Clip], DataConfig, np.ndarray], list[Views]]

_START_SECONDS = 300.0
# A child killed from outside (a machine short of memory, an operator) is no verdict on the clip, up to a point.
_ATTEMPTS = 4
_WINDOWS, _WINDOWS_BYTES = 16, 64 << 20  # clips of one file that are decoded at once, and pixels of theirs
_PR_SET_PDEATHSIG = 1


class Guard:
    """Calls ``decode`` (a function of a module) in a child process, for one clip at a time or for several of one file.

    A crash or a hang is believed only of a fresh child: one that decoded other clips before gets a second chance, so
    that no clip is refused for what an earlier one broke.
    """

    def __init__(self, data: DataConfig, decode: Decode = decode_windows) -> None:
        self.data, self.decode = data, decode
        each = [data.of_shape(shape) for shape in data.shapes]
        self._room = max(_at_once(one) * _clip_bytes(one) for one in each)
        self.lock = threading.Lock()
        self.child: _Child | None = None

    def __call__(self, path: Path, clip: Clip, data: DataConfig | None = None) -> list[Frames]:
        """The views of a clip in a local file; their pixels are overwritten by the next call.

        Args:
            data: settings for one of the shapes that the guard's own have.

        Raises:
            ClipError: what ``decode`` raised; or ``decoder_crash``, ``decoder_hang`` (``data.clip_timeout`` seconds),
                ``out_of_memory`` (``data.clip_memory`` GiB) or ``decoder_error``, each of stage ``decode``.
        """
        with self.lock:
            for attempt in range(_ATTEMPTS):
                fresh, begun = self._start(), time.monotonic()
                try:
                    [views] = self._ask(path, [clip], data)
                except _Broken as error:
                    if fresh and (error.reason or attempt == _ATTEMPTS - 1):
                        size = path.stat().st_size if path.is_file() else 0
                        detail = f"{error} after {time.monotonic() - begun:.0f} s ({size} bytes)"
                        raise ClipError("decode", error.reason or "decoder_crash", detail) from None
                else:
                    if isinstance(views, ClipError):
                        raise views
                    return views
        raise AssertionError("unreachable: every attempt but the first has a fresh child")

    def windows(self, path: Path, clips: Sequence[Clip], data: DataConfig | None = None) -> Iterator[Views]:
        """The views of clips in one local file, or why one of them is refused, exactly as one call for each would give
        them; in one pass over the file unless something goes wrong in it. Pixels are overwritten by the next step.
        """
        at_once = _at_once(data or self.data)
        for start in range(0, len(clips), at_once):
            together = clips[start : start + at_once]
            answer = self._in_one_pass(path, together, data) if len(together) > 1 else None
            if answer is not None:
                yield from answer
                continue
            for clip in together:
                try:
                    views: Views = self(path, clip, data)
                except ClipError as error:
                    views = error
                yield views

    def _in_one_pass(self, path: Path, clips: Sequence[Clip], data: DataConfig | None) -> list[Views] | None:
        """None where it failed, which is not held against any clip."""
        with self.lock:
            self._start()
            try:
                return self._ask(path, clips, data)
            except (_Broken, ClipError):
                return None

    def _start(self) -> bool:
        """Have a child; whether it is one that decoded nothing yet."""
        if self.child is None or self.child.process.poll() is not None:
            self.child = _Child(self.data, self.decode, self._room)
        fresh, self.child.used = not self.child.used, True
        return fresh

    def _ask(self, path: Path, clips: Sequence[Clip], data: DataConfig | None) -> list[Views]:
        assert self.child is not None
        try:
            return self.child.ask(path, clips, data or self.data)
        except ClipError:
            raise
        except BaseException:
            # Whatever it is, an answer that still came would be taken for that of the next clip.
            self.child.end()
            self.child = None
            raise


class _Broken(Exception):
    """A child that is of no more use; ``reason`` is empty where something else than the clip may have ended it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Child:
    def __init__(self, data: DataConfig, decode: Decode, room: int) -> None:
        self.timeout, self.used = data.clip_timeout, False
        memory = os.memfd_create("cinemo-frames")
        ours, theirs = socket.socketpair()
        try:
            os.ftruncate(memory, room)
            self.pixels = _mapped(memory, room)
            command = "import sys; from cinemo.media.guard import serve; serve(*map(int, sys.argv[1:]))"
            self.process = subprocess.Popen(
                [sys.executable, "-c", command, *map(str, (theirs.fileno(), memory, os.getpid()))],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        finally:
            theirs.close()
            os.close(memory)
        self.connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self.process, self.connection)
        self.connection.send((data.clip_memory, decode, room))
        if not self.connection.poll(_START_SECONDS) or self._receive() is not True:
            self.end()
            raise RuntimeError(f"the decoding process did not start (exit status {self.process.returncode})")

    def ask(self, path: Path, clips: Sequence[Clip], data: DataConfig) -> list[Views]:
        """The answer; raises `ClipError`, or `_Broken`."""
        try:
            self.connection.send((path, clips, data))
        except OSError:
            raise _Broken("", "ended while it waited") from None
        if not self.connection.poll(self.timeout):
            raise _Broken("decoder_hang", "no answer")
        answer = self._receive()
        if isinstance(answer, ClipError):
            if answer.reason == "out_of_memory":
                raise _Broken(answer.reason, answer.detail)
            raise answer
        if not isinstance(answer, list):
            status = self.process.wait()
            ending = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            raise _Broken("" if status == -signal.SIGKILL else "decoder_crash", ending)
        return [
            views
            if isinstance(views, ClipError)
            else [Frames(*each) for each in zip(frames_VFHWC, *views, strict=True)]
            for frames_VFHWC, views in zip(_frames(self.pixels, len(clips), data), answer, strict=True)
        ]

    def _receive(self) -> object:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()


def _mapped(memory: int, room: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(memory, room), np.uint8)


def _clip_bytes(data: DataConfig) -> int:
    """What the pixels of a clip's views take."""
    return data.views * math.prod(data.shapes[0]) * 3


def _at_once(data: DataConfig) -> int:
    return max(1, min(_WINDOWS, _WINDOWS_BYTES // _clip_bytes(data)))


def _frames(pixels: np.ndarray, clips: int, data: DataConfig) -> np.ndarray:
    """The pixels (N, V, F, H, W, 3) of some clips."""
    shape = clips, data.views, *data.shapes[0], 3
    return pixels[: math.prod(shape)].reshape(shape)


def serve(channel: int, memory: int, parent: int) -> None:
    """The child's life: clips in, frames into shared memory and what they are out, until the parent is gone."""
    # The kernel ends it with the parent's thread that started it, also in the middle of a hang. Should that thread end
    # before the process does, the next clip finds the child dead and starts another.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cv2.setNumThreads(1)
    connection = Connection(channel)
    gigabytes, decode, room = connection.recv()
    limit = int(gigabytes * (1 << 30))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pixels = _mapped(memory, room)
    answer: object = True
    while True:
        connection.send(answer)
        try:
            path, clips, data = connection.recv()
        except EOFError:
            return
        try:
            answer = [
                views
                if isinstance(views, ClipError)
                else [[getattr(view, name) for view in views] for name in ("fps", "frame_interval", "start_frame")]
                for views in decode(path, clips, data, _frames(pixels, len(clips), data))
            ]
        except ClipError as error:
            answer = error
        except MemoryError as error:
            answer = ClipError("decode", "out_of_memory", f"needs more than {data.clip_memory:g} GiB: {error}")
        except Exception as error:
            # A library in front of damaged bytes raises what it likes, and so does a line of ours that did not expect
            # them (IndexError, TypeError). Nothing tells these from a bug that any clip would meet, and a bad clip must
            # not end the job: the ledger says which line it was.
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = ClipError("decode", "decoder_error", f"{text} ({_place(error)})")


def _place(error: BaseException) -> str:
    """Where an exception was raised, as ``package/file.py:line``."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
