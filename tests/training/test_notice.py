"""When a training saves before its time, and what it still does then."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import LatentLoader
from cinemo.methods import build_method
from cinemo.recipes import override
from cinemo.training.run.batch import FrozenStates
from cinemo.training.run.engine import Engine
from cinemo.training.run.loop import train
from cinemo.training.run.notice import LOOK_SECONDS, SPARE_SECONDS, Agreement, Terminated, Wish, Wishes


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def listening() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    Terminated.listen()
    yield
    signal.signal(signal.SIGTERM, before)
    Terminated.told.clear()


def test_minutes_count_from_the_last_checkpoint_on_the_clock_of_one_rank(small: Recipe, clock: Clock) -> None:
    recipe = override(small, ["train.checkpoint_minutes=10"])
    leads, other = (Wishes(recipe.train, rank, clock=clock) for rank in (True, False))
    clock.now += 599
    assert leads.own() is Wish.NOTHING
    clock.now += 1
    assert (leads.own(), other.own()) == (Wish.SAVE, Wish.NOTHING)
    clock.now += 5
    leads.saved()
    clock.now += 599
    assert leads.own() is Wish.NOTHING
    never = Wishes(override(small, ["train.checkpoint_minutes=0"]).train, True, clock=clock)
    clock.now += 1e9
    assert never.own() is Wish.NOTHING


def test_a_machine_that_goes_is_worth_two_checkpoints(small: Recipe, clock: Clock) -> None:
    """One at once, and one as late as it can still be written."""
    train_settings = override(small, ["train.checkpoint_minutes=0"]).train
    wishes = Wishes(train_settings, True, looks=True, clock=clock)
    assert wishes.own() is Wish.NOTHING
    clock.now += LOOK_SECONDS
    assert (wishes.own(), wishes.own()) == (Wish.LOOK, Wish.NOTHING)
    wishes.until(120, writing=10)
    clock.now += 120 - SPARE_SECONDS - 20 - 0.1
    assert wishes.own() is Wish.LOOK
    clock.now += 0.1
    assert (wishes.own(), wishes.own()) == (Wish.SAVE, Wish.NOTHING)
    wishes.until(60, writing=10)  # the first one is just being written
    clock.now += 60
    assert wishes.own() is Wish.LOOK


@pytest.mark.usefixtures("listening")
def test_signal_file_and_command_end_it(small: Recipe, clock: Clock, tmp_path: Path) -> None:
    recipe = override(small, [f"train.stop_file={tmp_path / 'stop'}"])
    told = False
    leads, other = (Wishes(recipe.train, rank, lambda: told, clock=clock) for rank in (True, False))
    assert (leads.own(), other.own()) == (Wish.NOTHING, Wish.NOTHING)
    os.kill(os.getpid(), signal.SIGTERM)
    assert other.own() is Wish.LEAVE
    told, clock.now = True, clock.now + 1
    assert (leads.own(), other.own()) == (Wish.STOP, Wish.LEAVE)
    told = False
    (tmp_path / "stop").touch()
    assert other.own() is Wish.STOP


@pytest.mark.usefixtures("process_group")
def test_what_is_called_when_ranks_agree(small: Recipe, dataset: str) -> None:
    recipe = override(small, ["train.max_steps=9", "train.log_every=100", "train.checkpoint_every=100"])
    recipe = override(recipe, ["train.sample_every=2"])
    made = Engine(build_method(recipe), recipe.train, torch.device("cpu"))
    loader = LatentLoader.of(DatasetIndex.load(dataset), recipe.train)

    def run(*wishes: Wish, start: int = 0) -> tuple[Wish, list[tuple[str, int]]]:
        calls: list[tuple[str, int]] = []
        each = iter(wishes)

        def wish() -> Wish:
            calls.append(("asked", 0))
            return next(each)

        ended = train(
            recipe,
            made,
            loader.batches(start),
            FrozenStates.of(recipe),
            start,
            on_checkpoint=lambda step: calls.append(("checkpoint", step)),
            on_sheet=lambda step: calls.append(("sheet", step)),
            agreement=Agreement(wish, look=lambda: Wish.SAVE),
        )
        assert calls.count(("asked", 0)) == len(wishes), "once a step"
        return ended, [call for call in calls if call[0] != "asked"]

    ended, calls = run(Wish.SAVE, Wish.NOTHING, Wish.LOOK, Wish.STOP)
    assert ended is Wish.STOP
    assert calls == [("checkpoint", 1), ("sheet", 2), ("checkpoint", 3), ("checkpoint", 4)]
    # Told after the last step: it is the end anyway.
    assert run(Wish.LEAVE, start=8) == (Wish.NOTHING, [("checkpoint", 9), ("sheet", 9)])
