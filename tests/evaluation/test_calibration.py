"""The motion-control report's figures on tables with known answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from cinemo.evaluation.calibration import Calibration, drift, levels, rank_correlation
from cinemo.evaluation.figures import calibration_curve, flow_curve
from cinemo.types import InputError


def table(motion_PL: np.ndarray, seeds: int = 1, spread: float = 0.0) -> Calibration:
    """A calibration at values 0, 1, ...; ``spread``: deviation of videos."""
    noise = spread * np.random.default_rng(0).standard_normal((*motion_PL.shape, seeds))
    motion_PLS = motion_PL[..., None] + noise
    return Calibration("motion_bucket", tuple(range(motion_PL.shape[1])), motion_PLS, 10 * motion_PLS)


def test_rank_correlation() -> None:
    assert rank_correlation([0, 5, 10], [0.1, 0.2, 0.9]) == pytest.approx(1)
    assert rank_correlation([0, 5, 10], [0.9, 0.2, 0.1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [0.5, 0.5, 0.5]) is None


def test_a_table_that_rises_for_one_picture_and_falls_for_another() -> None:
    made = table(np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.2, 0.2]]))
    assert made.spearman_P == (pytest.approx(1), pytest.approx(-1), None)
    assert made.spearman == pytest.approx(0)
    np.testing.assert_allclose(made.mean_L, [0.2, 0.2, 0.2])
    assert made.monotone_share == pytest.approx(1 / 3)
    assert table(np.zeros((2, 3))).spearman is None


def test_a_strength_is_linear_in_motion() -> None:
    """Of a control whose motion goes as the square of its value."""
    values = np.arange(20)
    square = table(np.tile((values / 19.0) ** 2, (4, 1)))
    assert square.value_for(0) == 0
    assert square.value_for(1) == 19
    assert square.value_for(0.25) == pytest.approx(9.5, abs=0.51)
    assert square.value_for(0.81) == 17
    wanted = np.linspace(0, 1, 20)
    achieved = [(square.value_for(float(strength)) / 19) ** 2 for strength in wanted]
    assert np.abs(achieved - wanted).max() < 0.06  # half a step at the steepest


def test_dead_and_saturated_values() -> None:
    made = table(np.tile([0.1, 0.1, 0.101, 0.3, 0.5, 0.599, 0.6, 0.6], (4, 1)))
    assert made.dead == (0, 1, 2)
    assert made.saturated == (5, 6, 7)
    rising = table(np.tile([0.1, 0.2, 0.3], (4, 1)))
    assert (rising.dead, rising.saturated) == ((), ())


def test_a_fall_of_the_mean_is_levelled_and_never_asked_for_twice() -> None:
    made = table(np.tile([0.0, 0.3, 0.2, 0.5], (4, 1)))
    np.testing.assert_allclose(made.curve_L, [0, 0.25, 0.25, 0.5])
    chosen = [made.value_for(float(strength)) for strength in np.linspace(0, 1, 30)]
    assert chosen == sorted(chosen)


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(0, 100))
def test_more_strength_is_never_a_smaller_value(motion: list[float], seed: int) -> None:
    made = table(np.tile(motion, (4, 1)), seeds=2, spread=0.05)
    draws = np.sort(np.random.default_rng(seed).random(10))
    chosen = [made.value_for(float(strength)) for strength in draws]
    assert chosen == sorted(chosen)


def test_obedience_is_judged_on_other_pictures() -> None:
    """64 pictures that move alike but for noise: the map of all but one fits that one."""
    rising = np.tile(np.linspace(0.02, 0.4, 20), (64, 1))
    obeys = table(rising, seeds=3, spread=0.01).obedience()
    assert obeys is not None
    assert obeys["r2"] > 0.995
    assert 0.87 <= obeys["coverage"] <= 0.93
    assert obeys["r2_of_videos"] < obeys["r2"]
    deaf = table(np.full((64, 20), 0.2), seeds=3, spread=0.01).obedience()
    assert deaf is not None
    assert deaf["r2"] < 0.5
    assert deaf["monotone"] == 0
    assert table(rising[:3]).obedience() is None


def test_intervals_cover_pictures_that_differ() -> None:
    """Every video of a picture moves more or less than another picture's, and there are few pictures."""
    rng, rising = np.random.default_rng(1), np.linspace(0.1, 0.4, 20)
    covered = []
    for _ in range(40):
        obeys = table(rising + 0.05 * rng.standard_normal((16, 1)), seeds=3, spread=0.001).obedience()
        assert obeys is not None
        covered.append(obeys["coverage"])
    assert 0.87 <= np.mean(covered) <= 0.93


@pytest.mark.parametrize("count", [4, 8])
def test_intervals_of_few_pictures_cover_others(count: int) -> None:
    draws, covered = np.random.default_rng(3), []
    for _ in range(400):
        motion_PL = draws.normal(0.1, 0.02, (count + 1, 2))
        low, high = table(motion_PL[1:]).interval_L
        covered.append((low <= motion_PL[0]) & (motion_PL[0] <= high))
    assert 0.87 <= np.mean(covered) <= 0.95  # from the least to the most of 4 there are 60%


def test_one_picture_tells_nothing_of_others() -> None:
    low, high = table(np.array([[0.1, 0.2]])).interval_L
    assert (low.tolist(), high.tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_a_value_is_said_to_give_lies_in_its_interval(seeds: int) -> None:
    draws = np.random.default_rng(0)
    for count in (2, 4, 30):
        noisy = table(draws.normal(0.1, 0.02, (count, 8)).clip(0), seeds, 0.001)
        low, high = noisy.interval_L
        assert (low <= noisy.curve_L).all()
        assert (noisy.curve_L <= high).all()


def test_a_control_that_changes_nothing_obeys_nothing() -> None:
    flat = table(np.tile(np.linspace(0.1, 0.2, 6)[:, None], (1, 5)) + 1e-12 * np.arange(5))
    obeys = flat.obedience()
    assert obeys is not None
    assert obeys["r2"] == 0
    assert not drift(flat, flat).has_collapsed
    assert drift(flat, flat).span_ratio is None
    assert "100% of the motion of itself, whose control reached nowhere" in drift(flat, flat).verdict("itself")


def test_motion_that_died_is_noticed() -> None:
    before = table(np.tile(np.linspace(0.02, 0.4, 5), (4, 1)))
    tuned = table(np.tile(np.linspace(0.02, 0.38, 5), (4, 1)))
    still = table(np.tile(np.linspace(0.02, 0.05, 5), (4, 1)))
    deaf = table(np.full((4, 5), 0.21))  # as much motion, whatever is asked
    assert not drift(tuned, before).has_collapsed
    assert drift(still, before).has_collapsed
    assert drift(still, before).curve_ratio == pytest.approx((1, 0.239, 0.167, 0.139, 0.125), abs=1e-3)
    assert drift(deaf, before).has_collapsed
    assert drift(tuned, before).verdict("base") == "motion is alive: 95% of the motion of base, 95% of the reach"
    assert drift(still, before).verdict("base").startswith("motion has died: ")
    assert drift(deaf, before).verdict("base").startswith("the control has lost its reach: 100%")
    with pytest.raises(InputError, match="expected the same"):
        drift(before, table(np.zeros((4, 3))))


def test_a_calibration_is_stored_whole() -> None:
    made = table(np.tile(np.linspace(0.02, 0.4, 5), (4, 1)), seeds=2, spread=0.01)
    stored = made.to_json()
    again = Calibration.from_json(stored)
    np.testing.assert_array_equal(again.motion_PLS, made.motion_PLS)
    assert again.to_json() == stored
    assert stored["strengths"][0] == [0.0, 0]
    assert stored["strengths"][-1] == [1.0, 4]
    with pytest.raises(InputError, match="measure the bundle again"):
        Calibration.from_json({"buckets": [0, 19], "motion": [[0.1, 0.2]]})


def test_levels_of_a_control() -> None:
    assert levels(range(20), 5) == (0, 5, 10, 14, 19)
    assert levels((9, 6, 3), 5) == (9, 6, 3)


@pytest.mark.parametrize("figure_of", [calibration_curve, flow_curve])
@pytest.mark.parametrize("values", [range(20), np.linspace(3, 10, 20).round(2), np.linspace(0, 1200, 20).round()])
def test_labels_of_values_do_not_overlap(figure_of: Callable[[Calibration], Figure], values: Sequence[float]) -> None:
    motion_PLS = np.linspace(0, 1, 20)[None, :, None]
    figure = figure_of(Calibration("frame_rate", tuple(values), motion_PLS, motion_PLS))
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) >= 5
    assert all(box.x1 < after.x0 for box, after in itertools.pairwise(boxes))
