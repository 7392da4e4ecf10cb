"""Metrics against values worked out by hand, and the laws that they obey."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from cinemo.evaluation.metrics.frames import (
    MAX_PSNR,
    colour_drift,
    first_frame_consistency,
    largest_jump,
    motion,
    psnr,
    ssim,
)
from cinemo.types import InputError


@pytest.fixture
def picture() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    return coarse.repeat(6, axis=0).repeat(6, axis=1)


def test_psnr(picture: np.ndarray) -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black + np.uint8(255)) == pytest.approx(0)
    assert psnr(black, black + np.uint8(51)) == pytest.approx(20 * np.log10(5))
    assert psnr(picture, picture) == MAX_PSNR
    noisy = picture ^ np.random.default_rng(1).integers(0, 8, picture.shape).astype(np.uint8)
    assert psnr(picture, noisy) == pytest.approx(peak_signal_noise_ratio(picture, noisy))
    with pytest.raises(InputError, match="shapes"):
        psnr(black, picture)


def test_motion_grows_with_what_moves(picture: np.ndarray) -> None:
    def shifted(step: int) -> np.ndarray:
        return np.stack([np.roll(picture, step * k, axis=1) for k in range(5)])

    scores = [motion(shifted(step)) for step in (0, 1, 2, 4)]
    assert scores[0] == pytest.approx(0, abs=1e-6)
    assert scores == sorted(scores)
    assert scores[-1] > 0.3


def test_a_jump_and_a_drift_of_colours(picture: np.ndarray) -> None:
    even = np.stack([np.full_like(picture, 10 * k) for k in range(5)])
    assert largest_jump(even) == pytest.approx(1)
    assert largest_jump(even[[0, 0, 0, 0, 4]]) == pytest.approx(4)
    assert largest_jump(even[[0, 0]]) == 1
    assert colour_drift(even) == pytest.approx(40 * np.sqrt(3))
    assert colour_drift(np.stack([picture, np.roll(picture, 5, axis=0)])) == pytest.approx(0)


def test_first_frame_consistency_sees_a_slow_drift_that_motion_does_not(picture: np.ndarray) -> None:
    swinging = np.stack([np.roll(picture, k % 2, axis=1) for k in range(8)])
    drifting = np.stack([np.roll(picture, k, axis=1) for k in range(8)])
    assert motion(swinging) == pytest.approx(motion(drifting), rel=0.05)
    assert first_frame_consistency(drifting) < first_frame_consistency(swinging) - 0.1
    assert first_frame_consistency(np.stack([picture] * 3)) == pytest.approx(1)
    assert ssim(picture, 255 - picture) < 0.2
