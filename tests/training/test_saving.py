"""A checkpoint is copied at once and written in the background: two at most, and what is cut off counts for nothing."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cinemo.config import Recipe
from cinemo.training.checkpoint import checkpoints
from cinemo.training.checkpoint.checkpoints import MOST, UnderWay
from cinemo.training.checkpoint.shares import WEIGHT, Fragment, Memory, Snapshot
from cinemo.types import RunError


def test_a_third_waits_for_the_first() -> None:
    under_way = UnderWay()
    started: list[Memory] = []

    def begin() -> None:
        started.append(under_way.begin())

    assert MOST == 2
    begin()
    begin()
    assert started[0] is not started[1]
    waiting = threading.Thread(target=begin)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    with under_way.writing(started[0]):
        assert waiting.is_alive()
    waiting.join(5)
    assert started[2] is started[0]
    finishing = threading.Thread(target=under_way.finish)
    finishing.start()
    for memory in started[1:]:
        finishing.join(0.1)
        assert finishing.is_alive()
        with under_way.writing(memory):
            pass
    finishing.join(5)
    assert not finishing.is_alive()


def test_what_could_not_be_written_is_raised_by_the_next() -> None:
    under_way = UnderWay()
    with (
        pytest.raises(RunError, match="no space left for the checkpoint of step 3"),
        under_way.writing(under_way.begin()),
        checkpoints.saving(3, 2**20, "/there"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    under_way.finish()
    with pytest.raises(RunError, match="no space left"):
        under_way.begin()


def _dies_after(calls: int) -> None:
    """Let this process be killed instead of its next call to the disk, after so many."""
    left = [calls]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any) -> Any:
            if not left[0]:
                if call is os.writev:  # half a file
                    call(arguments[0], [memoryview(b"".join(arguments[1]))[:7]])
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*arguments)

        return instead

    for name in ("writev", "fsync", "replace"):
        setattr(os, name, counted(getattr(os, name)))


def _save(output: Path, step: int, recipe: Recipe, ranks: tuple[int, ...]) -> None:
    """What the ranks write of a checkpoint, in their order, in the background of other work."""
    values = torch.full((100,), float(step))
    parts = [Fragment("a", (100,), 0, {WEIGHT: values}).part(rank, 2) for rank in (0, 1)]
    taken = [Snapshot(rank, [parts[rank]], None if rank else {"client": {}}) for rank in (0, 1)]
    files = taken[0].sizes | taken[1].sizes
    place = output / checkpoints.RUN / f"checkpoint_2030-01-01_00-00-00.{step:06d}"

    def write() -> None:
        for rank in ranks:
            taken[rank].write(place)
            if rank == 0:
                checkpoints.describe(place, recipe, step, 2, "digest", files)

    background = threading.Thread(target=write)
    background.start()
    values.zero_()
    background.join()


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_a_kill_at_any_point_of_the_writing_leaves_the_checkpoint_before(
    ranks: tuple[int, ...], small: Recipe, tmp_path: Path
) -> None:
    _save(tmp_path, 4, small, ranks)
    kills = 0
    while True:
        child = os.fork()
        if not child:
            try:
                _dies_after(kills)
                _save(tmp_path, 8, small, ranks)
            finally:
                os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        latest = checkpoints.latest(str(tmp_path))
        assert latest is not None
        assert latest.step == 4, f"after {kills} kills"
        checkpoints.prune(str(tmp_path), keep=3)
        assert len(checkpoints.stored(str(tmp_path))) == 1
    assert kills == 5 * 3, "two shares, the record, the recipe, the card: written, flushed, renamed"
    assert [card.step for card in checkpoints.complete(str(tmp_path))] == [4, 8]
