"""Whether what is drawn happens: answers that are known stand in for the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_bundle, tiny_longer_bundle

from cinemo.animate import AnimateRequest
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.evaluation import drawn
from cinemo.evaluation.drawn import measure_drawn
from cinemo.types import Animation


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(tiny_longer_bundle(tmp_path_factory.mktemp("longer")), "cpu")


def obeying(turned: float = 0.0, faster: float = 1.0, blind: bool = False) -> Any:
    """A pretended model: a smooth picture that goes the arrow's way, in proportion to the speed."""
    wide = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8).astype(np.float32)

    def answer(bundle: ModelBundle, request: AnimateRequest) -> Animation:
        import cv2

        (x0, y0, x1, y1), speed = request.controls["arrows"][0], request.controls["motion_speed"]
        angle = np.arctan2(y1 - y0, x1 - x0) + turned
        step = 1.2 * faster if blind else 0.2 + faster * speed / 1000
        way = step * np.array([np.cos(angle), np.sin(angle)])
        canvas = cv2.resize(wide, (6 * SIZE[1], 6 * SIZE[0]), interpolation=cv2.INTER_CUBIC)
        rows, columns = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float32)
        frames = [
            cv2.remap(
                canvas,
                (columns + 100 - np.float32(k * way[0])).astype(np.float32),
                (rows + 80 - np.float32(k * way[1])).astype(np.float32),
                cv2.INTER_LINEAR,
            )
            for k in range(6)
        ]
        return Animation(torch.zeros(0), 8, {}, np.stack(frames).clip(0, 255).astype(np.uint8))

    return answer


def test_a_model_that_obeys_and_ones_that_do_not(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(**how: Any) -> dict[str, Any]:
        monkeypatch.setattr(drawn, "animate", obeying(**how))
        return measure_drawn(bundle, 3, 2, 0)

    obeys = figures()
    assert obeys["drawn_cosine"] > 0.97
    assert obeys["drawn_speed_rank"] > 0.97
    assert figures(turned=np.pi)["drawn_cosine"] < -0.97
    assert abs(figures(turned=np.pi / 2)["drawn_cosine"]) < 0.2
    assert abs(figures(blind=True)["drawn_speed_rank"]) < 0.5


def test_a_method_without_arrows_has_no_figures(tmp_path: Path) -> None:
    assert measure_drawn(load_bundle(tiny_bundle(tmp_path), "cpu"), 2, 2, 0) == {}
