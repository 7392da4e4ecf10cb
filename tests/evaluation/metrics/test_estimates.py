"""Intervals cover what they say, and the value at half the videos shows the bias that distances between sets have."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cinemo.evaluation.metrics.distributions import Population, group_of_number
from cinemo.evaluation.metrics.estimates import frechet, inception, kernel, mean_of
from cinemo.types import InputError

WIDTH = 6


def population(count: int, seed: int, shift: float = 0.0) -> Population:
    draws, made = np.random.default_rng(seed), Population(keep_rows=True)
    for number in range(count):
        made.add(f"{number}", draws.standard_normal((1, WIDTH)) + shift, group_of_number(number))
    return made


def test_the_bootstrap_interval_of_a_mean_covers_it() -> None:
    draws, covered = np.random.default_rng(0), 0
    for trial in range(100):
        estimate = mean_of({f"{n}": float(x) for n, x in enumerate(draws.exponential(size=60))}, seed=trial)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 1 <= estimate.high
    assert 85 <= covered <= 99


def test_the_interval_of_a_mean_of_few_covers_it_too() -> None:
    draws, covered = np.random.default_rng(1), 0
    for trial in range(300):
        estimate = mean_of({f"{n}": float(x) for n, x in enumerate(draws.normal(size=8))}, seed=trial)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0 <= estimate.high
    assert 0.91 <= covered / 300 <= 0.99  # without Student's t: 0.87


def test_a_mean_does_not_depend_on_the_order_of_videos() -> None:
    values = {f"{n}": math.sin(n) for n in range(50)}
    assert mean_of(values) == mean_of(dict(reversed(values.items())))
    assert mean_of({"a": 2.0}).low is None
    with pytest.raises(InputError, match="mean of no videos"):
        mean_of({})


def test_the_frechet_distance_falls_with_the_number_of_videos_and_is_extrapolated() -> None:
    """Between sets of one distribution it is 0, and what is found is bias."""
    estimates = [frechet(population(120, 2 * seed), population(120, 2 * seed + 1)) for seed in range(12)]
    value, half = (np.mean([getattr(each, name) for each in estimates]) for name in ("value", "at_half"))
    assert half / value == pytest.approx(2, rel=0.15)  # bias goes as 1 / N
    extrapolated = np.mean([each.extrapolated for each in estimates])
    assert abs(extrapolated) < 0.25 * value


def test_intervals_of_distances_cover_what_infinitely_many_videos_give() -> None:
    """A shift of 1 in each of 6 features: Fréchet distance 6, beside a bias that the interval does not hide."""
    covered = []
    for seed in range(60):
        estimate = frechet(population(200, 2 * seed), population(200, 2 * seed + 1, 1.0))
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.extrapolated is not None
        shift = estimate.extrapolated - estimate.value
        covered.append(estimate.low + shift <= WIDTH <= estimate.high + shift)
    assert 0.88 <= np.mean(covered) <= 1


def test_fewer_rows_than_features_are_not_extrapolated() -> None:
    """The bias does not go as 1 / N there, and twice the value less that of a half is far from what it goes to."""
    assert frechet(population(16, 0), population(16, 1)).extrapolated is not None
    few = frechet(population(10, 0), population(10, 1))
    assert few.at_half is not None
    assert few.extrapolated is None


def test_kernel_distances_are_unbiased_and_scores_have_intervals() -> None:
    estimates = [kernel(population(80, 2 * seed), population(80, 2 * seed + 1, 0.5)) for seed in range(20)]
    half = np.mean([each.at_half for each in estimates])
    assert half == pytest.approx(np.mean([each.value for each in estimates]), rel=0.1)
    score = inception(population(300, 5))
    assert score.low is not None
    assert score.low < score.value < (score.high or 0)
    few = frechet(population(5, 0), population(5, 1))
    assert (few.low, few.at_half, few.extrapolated) == (None, None, None)
