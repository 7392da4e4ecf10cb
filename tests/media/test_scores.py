"""What spoils motion is found where it is, and not where it is not."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo.media.motion import adjacent_ssim, mean_adjacent_ssim
from cinemo.media.scores import clip_scores, difference_hash
from cinemo.media.synthetic import render_scene

HEIGHT, WIDTH, FRAMES = 160, 256, 16


def pan(seed: int, frames: int = FRAMES, step: int = 4) -> np.ndarray:
    """A camera that pans over a textured scene."""
    generator = np.random.default_rng(seed)
    light, tint = (
        generator.integers(70, 240, (12, 24, 1)),
        generator.integers(-25, 25, 3),
    )  # of one colour, as scenes are
    coarse = (light + tint).clip(60, 255).astype(np.uint8)
    wide = cv2.resize(coarse, (WIDTH + frames * step, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.stack([wide[:, k * step : k * step + WIDTH] for k in range(frames)])


def scores(frames_FHWC: np.ndarray) -> dict[str, float | int]:
    return clip_scores(frames_FHWC, adjacent_ssim(frames_FHWC)[1])


def test_nothing_is_found_in_a_pan() -> None:
    found = scores(pan(0))
    assert (found["cut"], found["bar_rows"], found["bar_columns"]) == (0, 0, 0)
    assert found["overlay"] < 0.002
    assert found["ssim_min"] > 0.3


@pytest.mark.parametrize("place", [1, 2, 8, 14, 15])
def test_a_cut_is_found_wherever_it_is(place: int) -> None:
    frames_FHWC = np.concatenate([pan(1)[:place], pan(2)[place:]])
    found, whole = scores(frames_FHWC), scores(pan(1))
    assert found["cut"] == 1
    assert found["cut_change"] > 3 * whole["cut_change"]
    mean, lowest = adjacent_ssim(frames_FHWC)
    assert found["ssim_min"] == pytest.approx(lowest, abs=1e-6)
    assert lowest < mean - 0.2


@pytest.mark.parametrize("step", [0, 1, 16])
def test_still_and_fast_clips_have_no_cut(step: int) -> None:
    assert scores(pan(3, step=step))["cut"] == 0


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60), st.integers(0, 60))
def test_bars_are_measured_in_rows_and_columns(top: int, bottom: int, left: int, right: int) -> None:
    frames_FHWC = np.full((4, HEIGHT, WIDTH, 3), 16, np.uint8)
    frames_FHWC[:, top : HEIGHT - bottom, left : WIDTH - right] = 128
    found = scores(frames_FHWC)
    assert found["bar_rows"] == pytest.approx((top + bottom) / HEIGHT, abs=1e-6)
    assert found["bar_columns"] == pytest.approx((left + right) / WIDTH, abs=1e-6)


def test_a_logo_that_stands_still_is_found_over_what_moves() -> None:
    plain, still = pan(4), np.repeat(pan(4)[:1], FRAMES, axis=0)
    marked = [frames.copy() for frames in (plain, still)]
    for frame in (*marked[0], *marked[1]):
        cv2.putText(frame, "LOGO", (150, 150), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (0, 0, 0), 3)
    over_motion, over_nothing = (scores(frames)["overlay"] for frames in marked)
    assert over_motion > 0.01
    assert over_motion > 5 * scores(plain)["overlay"]
    assert over_nothing == 0  # a still camera has no overlay that could be told from the scene


@pytest.mark.parametrize("kind", ["flow", "object", "still", "zoom", "pan"])
def test_rendered_scenes_have_no_overlays(kind: str) -> None:
    for number in range(6):
        scene = render_scene(7, number, (96, 144), kind=kind)
        assert scores(scene.frames(range(0, FRAMES * 8, 8)))["overlay"] < 0.002


def test_what_moves_before_a_standing_camera_makes_no_overlay_of_the_scene() -> None:
    standing, moving = pan(4, step=0), pan(5, step=8)
    window = np.zeros((HEIGHT, WIDTH, 1), bool)
    window[:, WIDTH // 3 :] = True  # two thirds of the picture, as a crowd or water
    frames_FHWC = np.where(window, moving, standing)
    for frame in frames_FHWC:
        cv2.putText(frame, "SIGN", (4, 80), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (0, 0, 0), 3)
    assert scores(frames_FHWC)["overlay"] == 0


def test_hashes_tell_pictures_apart_and_copies_together() -> None:
    def far(a: np.ndarray, b: np.ndarray) -> int:
        return ((difference_hash(a) ^ difference_hash(b)) & (2**64 - 1)).bit_count()

    pictures = [pan(seed)[0] for seed in range(8)]
    for number, picture in enumerate(pictures):
        smaller = cv2.resize(picture, (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
        darker = (picture * 0.8).astype(np.uint8)
        _, packed = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 40])
        for copy in (smaller, darker, cv2.imdecode(packed, cv2.IMREAD_COLOR)):
            assert far(picture, copy) <= 3
        assert all(far(picture, other) > 10 for other in pictures[:number])
        assert -(2**63) <= difference_hash(picture) < 2**63


def test_the_mean_is_what_it_was() -> None:
    frames_FHWC = pan(5)
    for metric in ("luma", "rgb"):
        mean, lowest = adjacent_ssim(frames_FHWC, metric)
        pairs = [mean_adjacent_ssim(frames_FHWC[k : k + 2], metric) for k in range(FRAMES - 1)]
        assert mean == mean_adjacent_ssim(frames_FHWC, metric)
        assert mean == pytest.approx(np.mean(pairs), abs=1e-6)
        assert lowest == pytest.approx(min(pairs), abs=1e-6)


def test_scores_take_a_fraction_of_the_time_of_ssim() -> None:
    frames_FHWC = np.repeat(np.repeat(pan(6), 2, 1), 2, 2)
    best = [float("inf")] * 2
    for _ in range(6):
        for number, work in enumerate((adjacent_ssim, lambda frames: clip_scores(frames, 0.5))):
            begun = time.process_time()
            work(frames_FHWC)
            best[number] = min(best[number], time.process_time() - begun)
    assert best[1] < 0.5 * best[0]
