"""SIGTERM and Ctrl-C while a training runs: the first lets it save and end, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cinemo.lock import Lock
from cinemo.progress import say

PATIENCE_SECONDS = 300.0  # from the signal to the last step; workers that wait for a machine never get there
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Ending:
    """What the command was told, of one training.

    Args:
        lock: once it is lost, nothing may be written any more, so every signal ends the training at once.
        stop: tells the workers to save and end.
    """

    def __init__(self, lock: Lock, stop: Callable[[], Any]) -> None:
        self._lock, self._stop = lock, stop
        self.asked: signal.Signals | None = None
        self.step: int | None = None  # after which the workers have ended
        self._begun, self._since = False, 0.0
        self._at_once: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals while the block runs, where this is the main thread; others cannot."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_over(self) -> None:
        """Somebody has just set a handler of SIGINT: it is for ending at once."""
        self._at_once = signal.signal(signal.SIGINT, self._handle)

    def begin(self) -> None:
        """From here on there is something to save."""
        self._begun = True

    def follow(self) -> None:
        """Called every now and then, by any thread: ends at once what does not end by itself."""
        if self.asked and self.step is None and time.monotonic() - self._since > PATIENCE_SECONDS:
            self._since = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)

    def leave(self) -> NoReturn:
        """End the command as the signal asks: 130 for Ctrl-C, else 143."""
        if self.asked is signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _handle(self, number: int, frame: Any) -> None:
        first, self.asked = self.asked is None, self.asked or signal.Signals(number)
        if first and self._begun and not self._lock.lost:
            self._since = time.monotonic()
            self._stop()
            say(f"told to end ({self.asked.name}): saving first; told once more, it ends at once")
            return
        if self._at_once is not None:
            self._at_once(signal.SIGINT, frame)
        self.leave()
