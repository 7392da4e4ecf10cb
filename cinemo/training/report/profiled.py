"""Which steps of a training are profiled (``train.py --profile``), and the event that says where the result lies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from cinemo.types import InputError

MOST = 20
_SETTLING = 3  # steps that a count leaves out: kernels are chosen, memory is allocated, the data's queue empties
_RANGE, _COUNT = re.compile(r"([1-9]\d*):([1-9]\d*)"), re.compile(r"[1-9]\d*")


@dataclass(frozen=True)
class Profiled:
    """Some steps of one rank were profiled: a line about them, and the files that were stored."""

    text: str
    uris: tuple[str, ...]


@dataclass(frozen=True)
class ProfileRequest:
    """``count`` steps from ``first`` on, which counts from 1 as reports do; None: soon after the start."""

    first: int | None
    count: int
    all_ranks: bool = False

    @classmethod
    def parse(cls, text: str, all_ranks: bool = False) -> Self:
        """``10:13`` (steps 10 to 13, both included) or a number of steps.

        Raises:
            InputError: it is neither, or asks for more than `MOST` steps.
        """
        if found := _RANGE.fullmatch(text):
            first, last = map(int, found.groups())
            made = cls(first, last - first + 1, all_ranks)
        elif _COUNT.fullmatch(text):
            made = cls(None, int(text), all_ranks)
        else:
            raise InputError(f"--profile {text}: expected FIRST:LAST, as 10:13, or a number of steps")
        if not 1 <= made.count <= MOST:
            raise InputError(
                f"--profile {text}: expected 1 to {MOST} steps, FIRST before LAST; no viewer opens a longer trace"
            )
        return made

    def steps(self, done: int, last: int) -> range:
        """The steps, counted from 1, of a run that goes on after ``done`` steps and ends with step ``last``.

        Raises:
            InputError: it does not make them.
        """
        first = self.first or max(done + 1, min(done + 1 + _SETTLING, last - self.count + 1))
        steps = range(first, first + self.count)
        if first <= done or steps[-1] > last:
            asked = f"{steps[0]}:{steps[-1]}" if self.first else str(self.count)
            raise InputError(f"--profile {asked}: this run makes steps {done + 1} to {last}; choose among them")
        return steps
