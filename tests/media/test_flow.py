"""Dense flow: the right direction and size, in pixels per stored frame, and equal bytes for equal frames."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from goldens import Family

from cinemo.media.flow import consistency, dense_flow, resized, speed
from cinemo.types import InputError


def shifting(dx: int, dy: int, frames: int = 4, height: int = 64, width: int = 96) -> np.ndarray:
    """A smooth picture that moves ``dx`` to the right and ``dy`` down with every frame."""
    generator = np.random.default_rng(0)
    wide = cv2.resize(generator.integers(0, 256, (24, 32, 3), np.uint8), (2 * width, 2 * height))
    rows, columns = height // 2, width // 2
    return np.stack(
        [wide[rows - k * dy :, columns - k * dx :][:height, :width] for k in range(frames)]
    )  # the window goes the other way


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, 2), (-2, 1), (0, 0)])
def test_flow_of_a_known_shift(dx: int, dy: int) -> None:
    flow = dense_flow(shifting(dx, dy), (8, 12))
    assert (flow.shape, flow.dtype) == ((3, 2, 8, 12), np.float16)
    inner = flow[:, :, 2:-2, 2:-2].astype(np.float32)
    np.testing.assert_allclose(np.median(inner, (0, 2, 3)), (dx, dy), atol=0.1)
    assert np.abs(inner - np.array([dx, dy])[:, None, None]).mean() < 0.25


def test_values_are_pixels_whatever_the_cells() -> None:
    frames = shifting(3, 1)
    fine, coarse = dense_flow(frames, (16, 24)).astype(np.float32), dense_flow(frames, (8, 12)).astype(np.float32)
    averages = fine.reshape(3, 2, 8, 2, 12, 2).mean((3, 5))
    np.testing.assert_allclose(coarse, averages, atol=5e-3)


def test_equal_frames_give_equal_bytes() -> None:
    frames = shifting(2, 1, frames=5)
    assert dense_flow(frames, (8, 12)).tobytes() == dense_flow(frames.copy(), (8, 12)).tobytes()
    assert dense_flow(frames[2:4], (8, 12)).tobytes() == dense_flow(frames, (8, 12))[2:3].tobytes()


@pytest.mark.parametrize(
    ("frames", "cells"),
    [
        (np.zeros((2, 64, 96, 3), np.float32), (8, 12)),
        (np.zeros((1, 64, 96, 3), np.uint8), (8, 12)),
        (np.zeros((2, 64, 96, 3), np.uint8), (7, 12)),
        (np.zeros((2, 8, 8, 3), np.uint8), (1, 1)),
    ],
)
def test_what_cannot_be_measured_is_refused(frames: np.ndarray, cells: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        dense_flow(frames, cells)


@pytest.mark.golden
def test_golden_strength(say: Callable[[str], None]) -> None:
    family = Family("longer_strength")
    for where, _, arrays in family:
        family.check(where, "Ms_l2", speed(arrays["flow"]), arrays["Ms_l2"], 1e-10)
        family.check(where, "Ms_abs", speed(arrays["flow"], of_components=True), arrays["Ms_abs"], 1e-10)
        of_each = [speed(field[None]) for field in arrays["flow"]]
        family.check(where, "per_frame_l2", of_each, arrays["per_frame_l2"], 1e-10)
    family.finish(say)


def test_lengths_follow_the_size() -> None:
    flow = np.broadcast_to(np.array([3.0, -1.0])[:, None, None], (2, 2, 8, 12))
    wide = resized(flow, (16, 36))
    assert wide.shape == (2, 2, 16, 36)
    np.testing.assert_allclose(wide[:, 0], 9)
    np.testing.assert_allclose(wide[:, 1], -2)


def test_a_field_and_its_way_back_agree_but_where_something_leaves_or_is_covered() -> None:
    forward = np.zeros((2, 64, 96))
    forward[0] = 5
    agree = consistency(forward, -forward)
    assert agree[:, :91].all()
    assert not agree[:, 91:].any()  # it leaves the picture
    wrong = -forward
    wrong[0, 20:30, 40:60] = 0  # something else is there
    assert not consistency(forward, wrong)[22:28, 37:53].any()


def test_measured_flow_agrees_with_itself_backwards() -> None:
    frames = shifting(3, 1)
    there = dense_flow(frames[:2], (64, 96))[0]
    back = dense_flow(frames[1::-1], (64, 96))[0]
    assert consistency(there, back)[8:-8, 8:-8].mean() > 0.98
