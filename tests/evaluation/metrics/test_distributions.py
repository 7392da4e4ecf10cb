"""Distances between sets of features: against torchmetrics, the goldens and the law that no cut of the work shows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from goldens import Family
from hypothesis import given, settings
from hypothesis import strategies as st

from cinemo.evaluation.metrics.distributions import (
    GROUPS,
    LIMIT,
    Moments,
    Population,
    frechet_distance,
    frechet_of,
    group_of_number,
    inception_score,
    kernel_distance,
)
from cinemo.evaluation.metrics.frames import psnr_of_frames, ssim_of_frames
from cinemo.evaluation.metrics.similarity import (
    clip_similarity,
    frame_consistency,
    perceptual_input_conformity,
    temporal_consistency,
)
from cinemo.types import InputError


def features(rows: int, width: int = 5, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    return shift + draws.standard_normal((rows, width)) @ draws.standard_normal((width, width))


def gaussian(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features_ND.mean(0), np.cov(features_ND, rowvar=False)


def test_golden_metrics(say: Callable[[str], None]) -> None:
    family = Family("metrics")
    for name, _, arrays in family:
        real, fake, frames, text = (arrays[part] for part in ("feat_real", "feat_fake", "frame_emb", "text_emb"))
        a, b = (arrays[video].transpose(0, 2, 3, 1) for video in ("video_a", "video_b"))
        computed = {
            "frechet": frechet_of(*gaussian(real), *gaussian(fake)),
            "kvd_gamma_1_over_d": kernel_distance(real, fake),
            "kvd_gamma_1": kernel_distance(real, fake, gamma=1.0),
            "F4_adjacent": frame_consistency(frames, 4),
            "Fall_adjacent": frame_consistency(frames),
            "F4_allpairs": frame_consistency(frames, 4, all_pairs=True),
            "Fall_allpairs": frame_consistency(frames, all_pairs=True),
            "temcons": temporal_consistency(frames),
            "clipsim": clip_similarity(frames, text),
            "inception_score": inception_score(arrays["logits"]),
            "psnr_per_frame": psnr_of_frames(a, b),
            "psnr_mean": psnr_of_frames(a, b).mean(),
            "ssim_per_frame": ssim_of_frames(a, b),
            "ssim_mean": ssim_of_frames(a, b).mean(),
            "pic": perceptual_input_conformity(arrays["dreamsim_distance"]),
        }
        for kind, value in computed.items():
            family.check(name, kind, value, arrays[kind], 1e-10 * max(1.0, float(np.abs(arrays[kind]).max())))
        # The sums that are streamed keep features to 2**-27.
        streamed = frechet_distance(Moments.of(real), Moments.of(fake))
        assert streamed == pytest.approx(float(arrays["frechet"]), rel=1e-6)
    family.finish(say)


class Identity(torch.nn.Module):
    """In the place of Inception: features are given as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features_ND: torch.Tensor) -> torch.Tensor:
        return features_ND


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_against_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = features(60, seed=1), features(60, seed=2, shift=0.5)
    theirs = FrechetInceptionDistance(Identity(5), normalize=True)
    theirs.set_dtype(torch.float64)
    theirs.update(torch.from_numpy(real), real=True)
    theirs.update(torch.from_numpy(fake), real=False)
    assert frechet_distance(Moments.of(real), Moments.of(fake)) == pytest.approx(float(theirs.compute()), rel=1e-5)

    kid = KernelInceptionDistance(Identity(5), subsets=1, subset_size=60)
    kid.update(torch.from_numpy(real), real=True)
    kid.update(torch.from_numpy(fake), real=False)
    assert kernel_distance(real, fake) == pytest.approx(float(kid.compute()[0]), rel=1e-6)

    score = InceptionScore(Identity(5), splits=1)
    score.update(torch.from_numpy(real))
    assert inception_score(real) == pytest.approx(float(score.compute()[0]), rel=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 40), max_size=4), st.floats(0.01, 20))
def test_moments_are_the_same_to_the_last_bit_however_rows_are_cut(seed: int, cuts: list[int], scale: float) -> None:
    rows = (scale * features(50, seed=seed % 1000)).astype(np.float32)
    whole = Moments.of(rows)
    shuffled = rows[np.random.default_rng(seed).permutation(50)]
    parts = [Moments.of(part) for part in np.split(shuffled, sorted(min(cut, 49) for cut in cuts)) if len(part)]
    joined = sum(reversed(parts), Moments())
    assert joined.rows == 50
    np.testing.assert_array_equal(joined.mean, whole.mean)
    np.testing.assert_array_equal(joined.covariance, whole.covariance)
    tolerance = 1e-6 * max(1.0, scale**2)
    np.testing.assert_allclose(
        whole.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-6, atol=tolerance
    )


def test_frechet_distance_of_few_rows() -> None:
    """Fewer rows than features: covariances have no full rank."""
    few = features(6, width=24)
    assert frechet_distance(Moments.of(few), Moments.of(few)) == pytest.approx(0, abs=1e-5)
    moved = few + np.eye(24)[0]
    assert frechet_distance(Moments.of(few), Moments.of(moved)) == pytest.approx(1, abs=1e-5)


def test_the_inception_score_of_known_cases() -> None:
    sure = 100 * np.eye(7)
    assert inception_score(sure) == pytest.approx(7)
    assert inception_score(np.zeros((9, 7))) == pytest.approx(1)
    assert inception_score(sure + 1e4) == pytest.approx(7)  # logits of any size


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros(3), r"shape \(3,\), expected \(rows, width\)"),
        (np.full((2, 3), LIMIT), "scale them"),
        (np.array([[np.nan, 0.0]]), "the largest is nan, expected finite"),
        (np.zeros((2, 4)), "width 4, expected 5"),
    ],
)
def test_features_that_cannot_be_counted_are_refused(rows: np.ndarray, message: str) -> None:
    moments = Moments.of(features(3))
    with pytest.raises(InputError, match=message):
        moments.add(rows)


def test_rows_beyond_exact_sums_are_refused() -> None:
    large = Moments.of(np.full((2**12, 1), 500.0))
    for _ in range(5):  # 2**17 rows, with sums of squares just below 2**53 of their steps
        large = large + large
    with pytest.raises(InputError, match="too large to add exactly"):
        large + large


def test_a_population_is_joined_of_parts() -> None:
    rows = {f"clip-{number}": features(3, seed=number) for number in range(40)}
    whole, parts = Population(keep_rows=True), [Population(keep_rows=True) for _ in range(3)]
    for number, (video, each) in enumerate(rows.items()):
        whole.add(video, each)
        parts[number * 7 % 3].add(video, each)
    joined = parts[2] + parts[0] + parts[1]
    assert len(joined) == len(whole) == 40
    for groups in (range(8), [1, 4, 6]):
        assert joined.count(groups) == whole.count(groups)
        np.testing.assert_array_equal(joined.rows(groups), whole.rows(groups))
        np.testing.assert_array_equal(joined.moments(groups).covariance, whole.moments(groups).covariance)
    with pytest.raises(InputError, match=r"video clip-\d+ is there twice"):
        joined + whole
    with pytest.raises(InputError, match="covariance of 0 feature rows"):
        _ = Population().moments().covariance


def test_parts_add_up_from_nothing() -> None:
    parts = [Population(keep_rows=True) for _ in range(3)]
    for number, part in enumerate(parts):
        part.add(f"{number}", np.full((1, 2), number))
    assert sum(parts, Population()).rows().tolist() == [[0, 0], [1, 1], [2, 2]]


def test_halves_have_equally_many_videos_of_whatever_comes_round() -> None:
    groups = np.array([group_of_number(number) for number in range(800)])
    assert (np.bincount(groups) == 100).all()
    for kind in range(4):
        assert np.bincount(groups[kind::4], minlength=GROUPS).min() >= 10  # 25 of each kind in a group, by chance


def test_a_class_that_is_never_seen_adds_nothing_to_the_inception_score() -> None:
    seen = np.array([[0.0, 0.0], [3.0, 0.0]])
    score = inception_score(np.hstack([seen, np.full((2, 1), -800.0)]))
    assert score == pytest.approx(inception_score(seen))
    for bad in (np.empty((0, 3)), np.array([[0.0, np.nan]])):
        with pytest.raises(InputError, match="Inception score of"):
            inception_score(bad)


def test_figures_of_other_shapes_are_refused() -> None:
    frames_FHWC = np.zeros((6, 16, 16, 3), np.uint8)
    with pytest.raises(InputError, match="as many frames"):
        psnr_of_frames(frames_FHWC, frames_FHWC[:1])
    with pytest.raises(InputError, match="equal widths and finite"):
        kernel_distance(np.zeros((4, 3)), np.full((4, 3), np.nan))
    with pytest.raises(InputError, match="mean of no feature rows"):
        _ = Moments().mean
