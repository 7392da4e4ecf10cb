"""The page of what moves a distance between sets of videos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import FRAMES, SIZE, tiny_bundle

from cinemo.evaluation.extractors import FeatureExtractor
from cinemo.evaluation.knobs import PACE, KnobMeter, Knobs, turned, write_knobs
from cinemo.types import InputError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Changes(FeatureExtractor):
    """How much changes from frame to frame, and how bright the video is."""

    name, expects = "changes", "nothing"

    def __init__(self) -> None:
        self.identity = {"extractor": "changes", "weights": ""}
        self.asked: list[int] = []

    def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
        self.asked.append(len(frames_FHWC))
        levels = frames_FHWC.astype(np.float64)
        return np.array([[np.abs(np.diff(levels, axis=0)).mean(), levels.mean() / 10]])


def test_each_way_differs_from_the_usual_in_one_choice() -> None:
    usual, *others = turned(64).values()
    assert usual == Knobs()
    for each in others:
        assert sum(vars(each)[name] != value for name, value in vars(usual).items()) == 1


def test_a_stride_of_real_clips_alone_can_hide_or_show_what_the_model_lacks() -> None:
    """The model is too slow: real clips at a smaller stride are slower, too, and come closer to it."""
    extractor = Changes()
    meter = KnobMeter(extractor, 24, (32, 48), 6)
    usual = meter(Knobs()).value
    asked = len(extractor.asked)
    assert meter(Knobs()).value == usual
    assert len(extractor.asked) == asked, "features are kept"
    assert meter(Knobs(real_stride=2)).value < usual < meter(Knobs(real_stride=6)).value
    assert 1 < PACE * 3 < 2, "stride 2 is nearest to the model's own pace"
    meter(Knobs(first_frame=False))
    assert set(extractor.asked) == {6, 5}


def test_the_page_and_its_figures(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    said: list[str] = []
    found = write_knobs(str(bundle), str(tmp_path / "out"), 16, device="cpu", say=said.append)
    assert json.loads((tmp_path / "out/knobs.json").read_text()) == json.loads(json.dumps(found))
    distances = found["distances"]["latents"]
    assert list(distances) == list(turned(16))
    assert len({each["value"] for each in distances.values()}) == len(distances), "every choice moves it"
    assert [each["videos"] for each in distances.values()].count(16) == len(distances) - 3
    page = (tmp_path / "out/knobs.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "latent statistics" in page
    assert "FVD" not in page
    assert len(said) == len(distances)


def test_what_it_cannot_show_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--knobs is 8"):
        KnobMeter(Changes(), 8, SIZE, FRAMES)
    with pytest.raises(InputError, match="more than a rendered clip's"):
        KnobMeter(Changes(), 16, SIZE, 40)(Knobs(stride=6))
