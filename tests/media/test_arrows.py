"""Arrows to fields: the published equations, the presets' own laws, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from goldens import Family
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemo.media.arrows import PAPER, PRODUCT, Spread, check_arrows, dense_field, sparse_field
from cinemo.types import InputError

SIZE = (48, 64)


@pytest.mark.golden
def test_golden_arrows(say: Callable[[str], None]) -> None:
    family = Family("longer_arrows")
    for where, meta, arrays in family:
        arrows, strength, size = arrays["arrows_xyxy"], arrays["strength"], (meta["H"], meta["W"])

        def check(kind: str, got: np.ndarray, where: str = where, arrays: Any = arrays) -> None:
            family.check(where, kind, got, arrays[kind], 1e-10 * max(1.0, np.abs(arrays[kind]).max()))

        check("sparse", sparse_field(arrows, strength, size))
        for kind, spread in {
            "dense_sum": Spread(average=False, keep="length", threshold=-1.0),
            "dense": PAPER,
            "dense_weight_threshold": Spread(average=False, keep="weight"),
        }.items():
            check(kind, dense_field(arrows, strength, size, spread, meta["sigma"]))
        check("dense_normalized", dense_field(arrows, strength, size, PRODUCT, meta["sigma"]))
        if size[0] != size[1]:  # drawn at 170 pixels for 512
            check("dense_sum", dense_field(arrows, strength, size, Spread(False, "length", -1.0)))
    family.finish(say)


def test_two_parallel_arrows_are_no_faster_than_one() -> None:
    one = np.array([[10.0, 24, 18, 24]])
    two = np.array([[10.0, 24, 18, 24], [30.0, 24, 38, 24]])
    middle = dense_field(two, 1.0, SIZE)[:, 24, 20]
    np.testing.assert_allclose(middle, dense_field(one, 1.0, SIZE)[:, 24, 10])
    assert dense_field(two, 1.0, SIZE, PAPER)[0, 24, 20] > 1.2 * dense_field(one, 1.0, SIZE, PAPER)[0, 24, 20]


def test_an_arrow_of_no_length_pins() -> None:
    moving = np.array([[10.0, 24, 20, 24]])
    pinned = np.array([[10.0, 24, 20, 24], [30.0, 24, 30, 24]])
    at_pin = (slice(None), 24, 30)
    assert dense_field(pinned, 1.0, SIZE, sigma=8)[at_pin][0] < 0.02 * dense_field(moving, 1.0, SIZE)[at_pin][0]
    free, held = (dense_field(arrows, 1.0, SIZE, PAPER, sigma=8)[at_pin] for arrows in (moving, pinned))
    np.testing.assert_array_equal(free, held)  # in a sum it says nothing


def test_nothing_moves_without_arrows_and_where_the_mask_says_so() -> None:
    none = check_arrows([], SIZE)
    assert not dense_field(none, 1.0, SIZE).any()
    mask = np.zeros(SIZE)
    mask[:, :32] = 1
    field = dense_field(np.array([[30.0, 24, 40, 20]]), 1.0, SIZE, mask_HW=mask)
    assert field[:, :, :32].any()
    assert not field[:, :, 32:].any()
    with pytest.raises(InputError, match="mask is 5x4, expected 64x48"):
        dense_field(none, 1.0, SIZE, mask_HW=np.zeros((4, 5)))


ARROWS = st.lists(
    st.tuples(st.integers(0, 63), st.integers(0, 47), st.integers(-80, 140), st.integers(-80, 140)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40)
@given(ARROWS, st.floats(0.1, 3))
def test_lengths_are_bounded_by_the_arrows_and_grow_with_strength(arrows: list[Any], strength: float) -> None:
    drawn = check_arrows(arrows, SIZE)
    starts = {tuple(start) for start in drawn[:, :2].tolist()}
    field = dense_field(drawn, strength, SIZE)
    if len(starts) == len(drawn):
        assert np.hypot(*field).max() <= strength * np.hypot(*(drawn[:, 2:] - drawn[:, :2]).T).max() + 1e-9
    np.testing.assert_allclose(field, strength * dense_field(drawn, 1.0, SIZE), atol=1e-9)
    np.testing.assert_allclose(dense_field(drawn[::-1], strength, SIZE), field, atol=1e-9)


@pytest.mark.parametrize(
    ("arrows", "message"),
    [
        ([[1, 2, 3]], r"arrow 1: got \[1, 2, 3\], expected four numbers"),
        ([[0, 0, 1, 1], [1, 2, float("nan"), 3]], "arrow 2: got .* expected four numbers"),
        ([[64, 2, 3, 4]], "arrow 1: starts at 64,2, expected a place in the picture, which is 64x48"),
        ([[1, 2, 3, 4]] * 65, "arrows: got 65, expected at most 64"),
    ],
)
def test_arrows_that_cannot_be(arrows: list[list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_arrows(arrows, SIZE)
