"""Figures of sets of videos: the same however the work is cut, empty where weights are missing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cinemo.evaluation.extractors import FeatureExtractor
from cinemo.evaluation.measurements import METRICS, Measurements, Pair, Seen
from cinemo.evaluation.metrics.distributions import group_of_number
from cinemo.evaluation.metrics.frames import still_places, still_psnr
from cinemo.types import InputError


class Levels(FeatureExtractor):
    """Features of a video without any weights: its mean colours and how many frames it was given."""

    name, expects = "i3d", "nothing"

    def __init__(self) -> None:
        self.identity = {"extractor": "mean colours", "weights": ""}

    def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
        return np.append(frames_FHWC.mean((0, 1, 2)) / 255, len(frames_FHWC))[None]


def pair(number: int) -> Pair:
    draws = np.random.default_rng(number)
    coarse = draws.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    picture = coarse.repeat(6, axis=0).repeat(6, axis=1)
    real, made = (np.stack([np.roll(picture, speed * k, axis=1) for k in range(6)]) for speed in (1, 2))
    return Pair(f"clip-{number}", real, made, "a prompt")


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    return {f"clip-{n}": Seen.of(pair(n), {"i3d": Levels(), "c3d": Levels()}) for n in range(40)}


def joined(seen: dict[str, Seen], order: list[str]) -> Measurements:
    measurements = Measurements()
    for video in order:
        measurements.add(video, seen[video])
    return measurements


def test_figures_do_not_depend_on_how_the_work_was_cut(seen: dict[str, Seen]) -> None:
    """Nor on what was stored between: to the last bit."""
    videos = list(seen)
    whole = joined(seen, videos).estimates()
    assert {"fvd", "kvd", "is", "psnr", "ssim", "motion", "dynamic_degree"} <= whole.keys()
    stored = {video: Seen.from_bytes(each.to_bytes()) for video, each in seen.items()}
    draws = np.random.default_rng(0)
    for cuts in ([], [1], [7, 30], [10, 20, 39]):
        order = draws.permutation(videos).tolist()
        shares = [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(order)])]
        total: Any = sum((joined(stored, share) for share in shares), Measurements())
        assert total.estimates() == whole


def test_what_has_no_weights_stays_empty() -> None:
    measurements = Measurements()
    for number in range(3):
        measurements.add(f"{number}", Seen.of(pair(number), {}))
    found = measurements.estimates()
    assert found.keys() | {"still_psnr"} == {metric.name for metric in METRICS if metric.needs is None}


def test_figures_of_a_known_pair() -> None:
    """The generated clip moves twice as fast as the real one, from the same picture."""
    known = pair(3)
    figures = Seen.of(known, {}).figures
    assert figures["first_frame_psnr"] == 100
    assert figures["motion"] > figures["motion_of_clip"] > 0
    still = Seen.of(Pair("still", known.real_FHWC, known.real_FHWC[[0] * 6], ""), {}).figures
    assert (still["motion"], still["dynamic_degree"], still["temporal_flickering"]) == pytest.approx(
        (0, 0, 1), abs=1e-6
    )
    assert still["first_frame_consistency"] == pytest.approx(1)
    equal = Seen.of(Pair("equal", known.real_FHWC, known.real_FHWC, ""), {}).figures
    assert (equal["psnr"], equal["ssim"]) == pytest.approx((100, 1))


def test_what_stands_still_in_the_clip_should_stay_as_the_given_picture() -> None:
    """The left half of the clip moves; a video that repaints the right half by 10 levels is 28.1 dB off there."""
    real_FHWC = np.full((4, 16, 24, 3), 100, np.uint8)
    real_FHWC[1:, :, :12] = np.random.default_rng(0).integers(0, 60, (3, 16, 12, 3))
    assert still_places(real_FHWC)[:, 12:].all()
    assert not still_places(real_FHWC)[:, :12].any()
    made_FHWC = np.full_like(real_FHWC, 100)
    assert Seen.of(Pair("kept", real_FHWC, made_FHWC, ""), {}).figures["still_psnr"] == 100
    made_FHWC[1:, :, 12:] += 10
    assert still_psnr(real_FHWC, made_FHWC) == pytest.approx(20 * np.log10(25.5))
    moving_FHWC = real_FHWC.copy()
    moving_FHWC[1:] += 20
    assert "still_psnr" not in Seen.of(Pair("moving", moving_FHWC, made_FHWC, ""), {}).figures


def test_a_picture_without_a_clip_has_what_needs_none() -> None:
    clip = pair(1)
    alone = Seen.of(Pair("alone", clip.real_FHWC[:1], clip.made_FHWC, ""), {"i3d": Levels(), "c3d": Levels()})
    assert not {"psnr", "ssim", "still_psnr", "motion_of_clip"} & alone.figures.keys()
    assert alone.figures["motion"] == Seen.of(clip, {}).figures["motion"]
    kept = Seen.from_bytes(alone.to_bytes())
    measurements = Measurements()
    for number in range(6):
        assert "is" not in measurements.estimates()  # without an interval it says nothing
        measurements.add(f"{number}", kept, group_of_number(number))
    found = measurements.estimates()
    assert "is" in found
    assert not {"fvd", "kvd"} & found.keys()


def test_the_first_frame_is_left_out_of_what_networks_see() -> None:
    with_first, without = (Seen.of(pair(0), {"i3d": Levels()}, first) for first in (True, False))
    assert [rows[0, -1] for rows in with_first.features["i3d"]] == [6, 6]
    assert [rows[0, -1] for rows in without.features["i3d"]] == [5, 5]
    assert with_first.figures == without.figures


def test_a_video_counts_once(seen: dict[str, Seen]) -> None:
    name, first = next(iter(seen.items()))
    parts = Measurements(), Measurements()
    for part in parts:
        part.add(name, first)
    with pytest.raises(InputError, match=f"video {name} is there twice"):
        parts[0].add(name, first)
    with pytest.raises(InputError, match=f"video {name} is there twice"):
        _ = parts[0] + parts[1]


def test_features_that_are_no_numbers_are_named_before_they_are_kept() -> None:
    class Broken(Levels):
        def features(self, frames_FHWC: np.ndarray) -> np.ndarray:
            return np.full((1, 3), np.nan)

    with pytest.raises(InputError, match="video 7: the largest feature of i3d is nan"):
        Seen.of(replace(pair(1), video="7"), {"i3d": Broken()})
