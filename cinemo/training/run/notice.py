"""When a training saves before its time: told to end, about to lose a machine, or after some minutes.

Any rank may learn of it, at any moment; all of them save at the end of the same step. The ranks exchange what they wish
between hosts, in a group of their own: no device is waited for, and no host either. An exchange begins before the last
micro batch of a step, whose gradients take every rank anyway, and is looked at after that step.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from cinemo.config import TrainConfig

ASK_SECONDS = 1.0  # between two looks at whether the command was told to end
LOOK_SECONDS = 5.0  # between two looks at whether a machine is about to be taken away
SPARE_SECONDS = 15.0  # before a machine goes, beside what writing a checkpoint takes


class Wish(IntEnum):
    """What is to happen at the end of a step; of several, the greatest does."""

    NOTHING = 0
    LOOK = 1  # ask, all ranks together, whether a machine is about to be taken away
    SAVE = 2  # and go on
    LEAVE = 3  # save, and begin anew with other workers: one of these must end
    STOP = 4  # save, and end the training


class Terminated:
    """Whether this process was sent SIGTERM; it ends by itself once all ranks have saved."""

    told = threading.Event()

    @classmethod
    def listen(cls) -> None:
        """From now on; only the main thread of a process can call this."""
        signal.signal(signal.SIGTERM, lambda *_: cls.told.set())


class Wishes:
    """What one rank wishes for.

    Args:
        leads: whether it is the one whose clock counts, and which asks others.
        stopping: whether the command was told to end.
        looks: whether machines may be taken away with a notice.
        clock: seconds.
    """

    def __init__(
        self,
        train: TrainConfig,
        leads: bool,
        stopping: Callable[[], bool] = lambda: False,
        looks: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._train, self._leads, self._stopping, self._looks, self._clock = train, leads, stopping, looks, clock
        self._saved = clock()
        self._last_chance: float | None = None
        self._ask, self._look = _Every(ASK_SECONDS, clock), _Every(LOOK_SECONDS, clock)

    def own(self) -> Wish:
        """The wish of this rank, now."""
        if self._train.stop_file and Path(self._train.stop_file).exists():
            return Wish.STOP
        if self._leads and self._ask.due() and self._stopping():
            return Wish.STOP
        if Terminated.told.is_set():
            return Wish.LEAVE
        if not self._leads:
            return Wish.NOTHING
        if self._last_chance is not None and self._clock() >= self._last_chance:
            self._last_chance = None
            return Wish.SAVE
        minutes = self._train.checkpoint_minutes
        if minutes and self._clock() - self._saved >= 60 * minutes:
            return Wish.SAVE
        return Wish.LOOK if self._looks and self._look.due() else Wish.NOTHING

    def saved(self) -> None:
        """A checkpoint was just begun, for whatever reason."""
        self._saved = self._clock()

    def until(self, seconds: float, writing: float) -> None:
        """A machine goes in ``seconds``, and a checkpoint takes ``writing`` of them: save once more shortly before."""
        spare = SPARE_SECONDS + 2 * writing
        self._last_chance = self._clock() + seconds - spare if seconds > 2 * spare else None


class _Every:
    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock, self._last = seconds, clock, clock()

    def due(self) -> bool:
        now = self._clock()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class Agreement:
    """What all ranks make of their wishes. Every rank makes every call, from its first construction on.

    Args:
        own: this rank's wish.
        look: answers `Wish.LOOK`, the same on every rank, all of which call it.
    """

    def __init__(self, own: Callable[[], Wish], look: Callable[[], Wish] = lambda: Wish.NOTHING) -> None:
        self._own, self._look = own, look
        alone = torch.distributed.get_world_size() == 1
        self._group = None if alone else torch.distributed.new_group(backend="gloo")
        self._exchange: tuple[torch.Tensor, Any] | None = None

    def begin(self) -> None:
        """Tell the others what this rank wishes, without waiting for them."""
        wish, work = torch.tensor([int(self._own())], dtype=torch.int32), None
        if self._group is not None:
            work = torch.distributed.all_reduce(wish, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = wish, work

    def end(self) -> Wish:
        """What was agreed upon since `begin`, which is called here where it was not yet in this step."""
        if self._exchange is None:
            self.begin()
        assert self._exchange is not None
        (wish, work), self._exchange = self._exchange, None
        if work is not None:
            work.wait()
        agreed = Wish(int(wish))
        return self._look() if agreed is Wish.LOOK else agreed
