"""How far a long command is, in lines for people, and the one form that times and rates have in them.

`doing` names what goes on. Of what takes a moment nothing is said; otherwise a line comes within `FIRST_SECONDS` of the
last one and then every `LINE_SECONDS`, whether there is something to count or not. Only commands speak (`shown`); the
same code is silent in a notebook or a worker. Standard library only: a precompute run's meter must start quickly.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

FIRST_SECONDS, LINE_SECONDS, REWRITE_SECONDS = 2.5, 5.0, 1.0
_POLL_SECONDS = 0.25
T = TypeVar("T")


def clock(seconds: float) -> str:
    """``0:01:05``: hours, minutes, seconds; hours go on beyond a day."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def times(gone: float, left: float | None = None) -> str:
    """``0:00:42 gone, 0:01:05 left``, of seconds; without the second part where it is not known."""
    return f"{clock(gone)} gone" + ("" if left is None else f", {clock(left)} left")


def rate(count: float, seconds: float, unit: str) -> str:
    """``0.79 clips/s``"""
    each = count / max(seconds, 1e-9)
    return f"{each:.0f} {unit}/s" if each >= 100 else f"{each:.2f} {unit}/s"


class Work:
    """What is going on: ``total`` of a ``unit`` that can be counted, or something of unknown length (``total`` 0)."""

    def __init__(self, what: str, total: int = 0, unit: str = "", patience: float | None = None) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.begun, self.said, self.patience = time.monotonic(), False, patience

    def advance(self, count: int = 1) -> None:
        self.done += count

    def reach(self, done: int, total: int) -> None:
        """As a callback: ``done`` of ``total`` so far."""
        self.done, self.total = done, total

    def counting(self, items: Iterable[T], size: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
        """The same items; each counts for its ``size`` once the next is asked for."""
        for item in items:
            yield item
            self.advance(size(item))

    def line(self) -> str:
        gone = time.monotonic() - self.begun
        if not self.unit or not self.total:
            return f"{self.what}: {times(gone)}"
        head = f"{self.what}: {self.done}/{self.total} {self.unit}"
        if not self.done:
            return f"{head}, {times(gone)}"
        return f"{head}, {rate(self.done, gone, self.unit)}, {times(gone, gone / self.done * (self.total - self.done))}"


class _Screen:
    """What the lines of a process share: who speaks, when something was last said, and whether a line is unfinished."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.shown = self.unfinished = False
        self.spoken, self.indent = 0.0, ""
        self.works: list[Work] = []

    def write(self, text: str, rewritten: bool = False) -> None:
        """A line; one that is ``rewritten`` gives way to the next, on a terminal."""
        with self.lock:
            self.clear()
            text = self.indent + text
            if rewritten and sys.stdout.isatty():
                sys.stdout.write(text[: shutil.get_terminal_size().columns - 1])
                self.unfinished = True
            else:
                sys.stdout.write(text + "\n")
            sys.stdout.flush()
            self.spoken = time.monotonic()

    def clear(self) -> None:
        with self.lock:
            if self.unfinished:
                sys.stdout.write("\r\x1b[K")
                sys.stdout.flush()
                self.unfinished = False

    def tick(self, work: Work) -> None:
        """Say how far ``work`` is if it is the innermost, and it is time."""
        with self.lock:
            pause = work.patience or (LINE_SECONDS if work.said else FIRST_SECONDS)
            pause = REWRITE_SECONDS if self.unfinished else pause
            if self.works[-1:] == [work] and time.monotonic() - self.spoken >= pause:
                work.said = True
                self.write(work.line(), rewritten=True)


_screen = _Screen()


def say(text: str) -> None:
    """A line on standard output, at once."""
    _screen.write(text)


def heard() -> None:
    """Something else has just said how far it is."""
    _screen.spoken = time.monotonic()


@contextmanager
def shown() -> Iterator[None]:
    """Show what `doing` names, for the length of a command."""
    before, _screen.shown, _screen.spoken = _screen.shown, True, time.monotonic()
    try:
        yield
    finally:
        _screen.shown = before


@contextmanager
def indented(by: str = "   ") -> Iterator[None]:
    """What is said in the block belongs under the line before it."""
    before, _screen.indent = _screen.indent, _screen.indent + by
    try:
        yield
    finally:
        _screen.indent = before


@contextmanager
def doing(what: str, total: int = 0, unit: str = "", patience: float | None = None) -> Iterator[Work]:
    """Say now and then what is being done while the block runs, and how far it is.

    Args:
        what: "loading the model"; of nested blocks the innermost speaks.
        total, unit: how many of what there are to do, where they can be counted: call `Work.advance` for each.
        patience: seconds of silence before a line, where something else is expected to speak.
    """
    work = Work(what, total, unit, patience)
    if not _screen.shown:
        yield work
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            _screen.tick(work)

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    with _screen.lock:
        _screen.works.append(work)
    thread.start()
    try:
        yield work
    finally:
        over.set()
        thread.join()
        with _screen.lock:
            _screen.works.remove(work)
            _screen.clear()


def counted(what: str, items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """The same items, each counted once the next is asked for."""
    with doing(what, total, unit) as work:
        yield from work.counting(items)
