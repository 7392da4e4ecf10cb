"""What the demo makes of a recipe before anything runs, of every method that has a tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cinemo.evaluation.demo import _SHOWN, _levels, _Picture, _video_name
from cinemo.recipes import RECIPES, load_recipe


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-tiny")])
def test_every_level_of_motion_has_a_video_of_its_own(name: str) -> None:
    """Whatever its values are: motion buckets are whole numbers, frame rates are not."""
    levels = _levels(load_recipe(name), _SHOWN)
    names = [_video_name(_Picture("boat", "a boat", Path("boat.png")), level) for level in levels]
    assert len({*names}) == len(levels) == (3 if levels[0] else 1)
    assert all(video.startswith("boat") and video.endswith(".mp4") for video in names)
