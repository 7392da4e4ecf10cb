"""The table of qualities: measured, kept in the bundle, found by a request; and what it says of the shipped weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle, keep_quality, load_bundle, read_card, save_bundle
from cinemo.evaluation import quality
from cinemo.evaluation.metrics.frames import psnr
from cinemo.evaluation.quality import measure_quality, write_quality
from cinemo.methods import method_class
from cinemo.recipes import load_recipe
from cinemo.types import InputError
from pipelines import animate as command

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
USUAL = {"solver": "ddim", "guidance_interval": (0.0, 1.0), "reuse_features": 1}


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


def test_ways_are_measured_kept_and_chosen(location: Path, tmp_path: Path) -> None:
    bundle = load_bundle(location, "cpu")
    ways = [USUAL | {"steps": 10}, USUAL | {"steps": 6}, USUAL | {"steps": 8, "reuse_features": 2}]
    said: list[str] = []
    table = measure_quality(bundle, [(PICTURE, "waves"), (PICTURE[::-1].copy(), "snow")], ways=ways, say=said.append)
    assert len(said) == 3
    passes = {row.steps: row.passes for row in table.rows}
    assert passes[10] == 20, "two branches at each step"
    assert passes.get(6, 12) == 12
    assert passes.get(8, 10.4) == pytest.approx(8 + 8 * 0.3), "half of the calls run the outer layers alone"
    assert (table.rows[-1].steps, table.rows[-1].psnr_low, table.rows[-1].motion) == (10, 100, 0)
    again = measure_quality(bundle, [(PICTURE, "waves"), (PICTURE[::-1].copy(), "snow")], ways=ways, say=said.append)
    assert again == table

    here = tmp_path / "bundle"
    shutil.copytree(location, here)
    digest = read_card(here).digest
    keep_quality(here, table)
    card = read_card(here)
    assert (card.digest, card.quality) == (digest, table), "measuring makes no other bundle"
    cheap = table.rows[0]
    loaded = load_bundle(here, "cpu")
    by_name = animate(loaded, AnimateRequest(PICTURE, "waves", quality=f"{cheap.psnr_low - 0.01:.2f}"))
    by_steps = animate(loaded, AnimateRequest(PICTURE, "waves", **cheap.controls))
    assert np.array_equal(by_name.frames_FHWC, by_steps.frames_FHWC)
    assert by_name.settings["predicted_quality"]["passes"] == round(cheap.passes, 1)
    reference = animate(loaded, AnimateRequest(PICTURE, "waves", quality="best"))
    assert reference.settings["steps"] == 10
    assert psnr(reference.frames_FHWC, by_name.frames_FHWC) < 100

    with pytest.raises(InputError, match="the table is of eeeeee"):
        keep_quality(here, type(table)("e" * 64, 1, table.rows))
    (here / "quality.json").write_text(json.dumps(table.to_json() | {"bundle": "e" * 64}))
    assert read_card(here).quality is None, "of other weights"
    (here / "quality.json").write_text('{"rows": [{}]}')
    assert read_card(here).quality is None


def test_commands_refuse_in_one_line(location: Path, tmp_path: Path) -> None:
    picture, target = str(tmp_path / "a.png"), str(tmp_path / "o.mp4")
    Image.fromarray(PICTURE).save(picture)
    words = ["--bundle", str(location), "--image", picture, "--prompt", "waves", "--output", target]
    with pytest.raises(InputError, match="random-32x48 was not measured for it"):
        command.main([*words, "--quality", "standard"])
    with pytest.raises(InputError, match="quality and steps are both given"):
        command.main([*words, "--quality", "standard", "--steps", "3"])
    with pytest.raises(InputError, match="--quality is 0"):
        write_quality(str(location), str(tmp_path), 0)


@pytest.mark.slow
@pytest.mark.release
def test_the_shipped_weights_give_42_db_in_14_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = quality.candidates

    def some(bundle: ModelBundle) -> list[dict[str, Any]]:
        """The reference and what is cheap: all of them take minutes."""
        ways = [way for way in every(bundle) if way["steps"] in (6, 9, 10, 50) and way["solver"] == "ddim"]
        assert 4 <= len(ways) < 8
        return ways

    monkeypatch.setattr(quality, "candidates", some)
    recipe = load_recipe("cinemo-tiny")
    method = method_class(recipe)
    networks = {part: method.load_network(recipe, part, str(recipe.train.init), torch.float32) for part in method.parts}
    save_bundle(tmp_path / "bundle", recipe, networks, {})
    table = write_quality(str(tmp_path / "bundle"), str(tmp_path / "q"), 2, into_bundle=True)
    standard, draft = table.choose("standard"), table.choose("draft")
    assert standard.passes <= 14
    assert standard.psnr_low >= 42
    assert standard.motion <= 0.02
    assert draft.passes < standard.passes
    assert read_card(tmp_path / "bundle").quality == table
