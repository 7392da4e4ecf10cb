"""No model ships that does not move as it is asked: the shipped weights, measured on scenes they have never seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cinemo.bundle import load_bundle, save_bundle
from cinemo.evaluation.rendered import BARS, measure_motion
from cinemo.methods import method_class
from cinemo.networks.weights import resolve
from cinemo.recipes import load_recipe

pytestmark = pytest.mark.slow

MARGIN = 0.08  # another processor rounds differently, and a set of clips is small
RANK_MARGIN, DECIBELS = 0.25, 2.0  # of few clips one swap is much


@pytest.mark.parametrize(
    "name", ["cinemo-tiny", "dynamicrafter-tiny", "trip-tiny", pytest.param("longer-tiny", marks=pytest.mark.release)]
)
def test_the_shipped_base_moves_as_its_card_says(name: str, tmp_path: Path, say: Callable[[str], None]) -> None:
    """No figure is worse than it was when the card was written."""
    recipe = load_recipe(name)
    method, init = method_class(recipe), recipe.train.init
    assert init is not None
    networks = {part: method.load_network(recipe, part, init, torch.float32) for part in method.parts}
    save_bundle(tmp_path / "base", recipe, networks, {"made": "by a test"})
    root = resolve(init)
    made = json.loads(((root / "unet" if (root / "unet").is_dir() else root) / "made.json").read_text())
    known = made["motion_of_few"]  # as the card's figures, of fewer clips
    figures = measure_motion(load_bundle(tmp_path / "base"), known["clips_of_each_kind"])
    say(f"shipped base of {name}: " + ", ".join(f"{each} {figures[each]:.3f}" for each in BARS if each in figures))
    for each in BARS.keys() & known.keys():
        sign, _ = BARS[each]
        worse = known[each] - figures[each] if sign == ">=" else figures[each] - known[each]
        margin = RANK_MARGIN if each.endswith("_rank") else DECIBELS if "psnr" in each else MARGIN
        assert worse < margin, (each, known[each], figures[each])
