"""The motion score against skimage and kornia, and the laws of its buckets."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from cinemo.media.motion import mean_adjacent_ssim, motion_bucket, value_at
from cinemo.media.video import read_frames
from cinemo.types import InputError


@pytest.fixture(scope="module")
def frames_FHWC() -> np.ndarray:
    """A bright, a dark and a flat region, moving by one pixel a frame under a little noise."""
    generator = np.random.default_rng(0)
    scene = cv2.resize(generator.integers(0, 256, (12, 24, 3), np.uint8), (160, 80), interpolation=cv2.INTER_CUBIC)
    scene[:20], scene[60:] = 250, 3
    frames = np.stack([scene[:, k : k + 128] for k in range(6)]).astype(int)
    return (frames + generator.integers(-3, 4, frames.shape)).clip(0, 255).astype(np.uint8)


def test_luma_is_skimage_gaussian_ssim(frames_FHWC: np.ndarray) -> None:
    luma = frames_FHWC.astype(np.float64) @ [0.299, 0.587, 0.114]
    expected = [
        structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
        for a, b in pairwise(luma)
    ]
    assert mean_adjacent_ssim(frames_FHWC) == pytest.approx(np.mean(expected), abs=1e-5)


def test_luma_is_kornia_on_luma(frames_FHWC: np.ndarray) -> None:
    from kornia.metrics import ssim

    luma_F1HW = torch.from_numpy(frames_FHWC.astype(np.float64) @ [0.299, 0.587, 0.114])[:, None].float() / 255
    expected = float(ssim(luma_F1HW[:-1], luma_F1HW[1:], 11, padding="valid").double().mean())
    assert mean_adjacent_ssim(frames_FHWC) == pytest.approx(expected, abs=1e-4)


def test_real_frames_score_as_with_skimage(real_clips: Path) -> None:
    for name in ("bikes.mp4", "mma_test_mpeg4.avi"):
        frames_FHWC = read_frames(real_clips / name, range(40, 56, 4), (320, 512))
        luma = frames_FHWC.astype(np.float64) @ [0.299, 0.587, 0.114]
        expected = [
            structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
            for a, b in pairwise(luma)
        ]
        assert mean_adjacent_ssim(frames_FHWC) == pytest.approx(np.mean(expected), abs=1e-5)


def test_rgb_is_kornia(frames_FHWC: np.ndarray) -> None:
    from kornia.metrics import ssim

    frames = torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2) / 255
    expected = np.mean([float(ssim(a[None], b[None], 11).mean()) for a, b in pairwise(frames)])
    assert mean_adjacent_ssim(frames_FHWC, "rgb") == pytest.approx(expected, abs=1e-6)
    assert mean_adjacent_ssim(frames_FHWC, "rgb") == pytest.approx(mean_adjacent_ssim(frames_FHWC), abs=0.05)


def test_still_frames_score_one(frames_FHWC: np.ndarray) -> None:
    assert mean_adjacent_ssim(np.repeat(frames_FHWC[:1], 3, 0)) == pytest.approx(1, abs=1e-6)
    assert mean_adjacent_ssim(np.zeros((3, 32, 32, 3), np.uint8)) == pytest.approx(1, abs=1e-6)


def test_faster_motion_scores_lower(frames_FHWC: np.ndarray) -> None:
    assert mean_adjacent_ssim(frames_FHWC[::2]) < mean_adjacent_ssim(frames_FHWC)


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (4, 10, 32, 3), (4, 32, 32), (4, 32, 32, 1)])
def test_refuses_what_has_no_score(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected"):
        mean_adjacent_ssim(np.zeros(shape, np.uint8))


def test_refuses_floats() -> None:
    with pytest.raises(InputError, match="float32"):
        mean_adjacent_ssim(np.zeros((2, 32, 32, 3), np.float32))


def test_bucket_values() -> None:
    assert motion_bucket(1.0) == 0
    assert motion_bucket(0.951) == 0
    assert motion_bucket(0.95) == 1
    assert motion_bucket(0.5) == 10
    assert motion_bucket(0.0) == 19
    assert motion_bucket(-0.3) == 19


@given(st.floats(-1, 1), st.floats(-1, 1), st.lists(st.floats(0.01, 0.99), min_size=19, max_size=19, unique=True))
def test_more_motion_is_never_a_smaller_bucket(a: float, b: float, edges: list[float]) -> None:
    low, high = sorted((a, b))
    for cut in (None, sorted(edges)):
        assert 0 <= motion_bucket(high, cut) <= motion_bucket(low, cut) <= 19


@given(st.floats(-1, 1), st.lists(st.floats(0.01, 0.99), min_size=19, max_size=19, unique=True))
def test_bucket_counts_edges_not_exceeded(ssim: float, edges: list[float]) -> None:
    assert motion_bucket(ssim, sorted(edges)) == sum(ssim <= edge for edge in edges)


@pytest.mark.parametrize("ssim", [math.nan, math.inf, None])
def test_no_bucket_without_a_score(ssim: float) -> None:
    with pytest.raises(InputError, match="ssim is"):
        motion_bucket(ssim)


def test_a_strength_goes_evenly_along_a_control_or_along_its_measured_motion() -> None:
    assert [value_at(bucket / 19, range(20)) for bucket in range(20)] == list(range(20))
    assert [value_at(strength, (9, 6, 3)) for strength in (0, 0.5, 1)] == [9, 6, 3]
    measured = {"values": [0, 10, 19], "curve": [0.1, 0.1, 0.4]}  # nothing happens below 10
    assert [value_at(strength, range(20), measured) for strength in (0, 1 / 3, 2 / 3, 1)] == [0, 13, 16, 19]
    with pytest.raises(InputError):
        value_at(1.01, range(20))
