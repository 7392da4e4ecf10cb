"""The motion-control report's figures on tables with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from cinemo.evaluation.calibration import calibration_of, rank_correlation


def test_rank_correlation() -> None:
    assert rank_correlation([0, 5, 10], [0.1, 0.2, 0.9]) == pytest.approx(1)
    assert rank_correlation([0, 5, 10], [0.9, 0.2, 0.1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [0.5, 0.5, 0.5]) is None


def test_a_table_that_rises_for_one_image_and_falls_for_another() -> None:
    made = calibration_of((0, 10, 19), [(0.1, 0.2, 0.3), (0.3, 0.2, 0.1), (0.2, 0.2, 0.2)])
    assert made.spearman_per_image == (pytest.approx(1), pytest.approx(-1), None)
    assert made.spearman == pytest.approx(0)
    np.testing.assert_allclose(made.mean_motion, [0.2, 0.2, 0.2])
    assert made.to_json()["buckets"] == (0, 10, 19)


def test_nothing_moves() -> None:
    assert calibration_of((0, 19), [(0.0, 0.0)]).spearman is None
