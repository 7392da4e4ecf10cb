from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cinemo.config import DiffusionConfig
from cinemo.diffusion.schedule import noise_schedule


@given(st.sampled_from(["epsilon", "v"]), st.integers(0, 999), st.integers(0, 999), st.integers(0, 2**31))
def test_split_undoes_add_noise_when_the_network_is_perfect(
    prediction: str, first: int, second: int, seed: int
) -> None:
    schedule = noise_schedule(DiffusionConfig(prediction=prediction))
    x_0, noise = torch.randn(2, 2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for t in (first, torch.tensor([first, second])):
        x_t = schedule.add_noise(x_0, noise, t)
        got_0, got_noise = schedule.predict_x0_eps(x_t, schedule.target(x_0, noise, t), t)
        # float32 roots of an int step do not square to exactly one; far steps magnify that by 1/sqrt(a).
        torch.testing.assert_close(got_0, x_0, rtol=0, atol=2e-5)
        torch.testing.assert_close(got_noise, noise, rtol=0, atol=1e-6)


def test_each_item_gets_its_own_step() -> None:
    schedule = noise_schedule(DiffusionConfig())
    x_0, noise = torch.randn(2, 3, 4, 2, 5, 5)
    both = schedule.add_noise(x_0, noise, torch.tensor([7, 500, 999]))
    for i, t in enumerate((7, 500, 999)):
        torch.testing.assert_close(both[i], schedule.add_noise(x_0[i], noise[i], t))


def test_published_values() -> None:
    alpha_bar = noise_schedule(DiffusionConfig()).alpha_bar
    assert alpha_bar[[0, 1, 500, 975]].tolist() == pytest.approx([0.9999, 0.99978006, 0.07779665, 6.517e-5], rel=1e-4)
    scaled = noise_schedule(DiffusionConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    assert float(scaled.alpha_bar[-1]) == pytest.approx(0.00466, rel=1e-2)  # Stable Diffusion's well-known last value


@given(st.integers(0, 999), st.floats(0.1, 100))
def test_min_snr_weights_in_closed_form(t: int, gamma: float) -> None:
    """Weighted, either prediction's error is that of x_0 times min(SNR, gamma)."""
    t_B = torch.tensor([t, 500])
    for prediction in ("epsilon", "v"):
        schedule = noise_schedule(DiffusionConfig(prediction=prediction))
        weights = schedule.min_snr_weights(t_B, gamma)
        a = schedule.alpha_bar.double()[t_B]
        snr = a / (1 - a)
        closed = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
        torch.testing.assert_close(weights.double(), closed, rtol=1e-3, atol=0)

        x_0, noise, output = torch.randn(3, 2, 50, dtype=torch.float64)
        x_t = schedule.add_noise(x_0, noise, t_B)
        error = (schedule.predict_x0_eps(x_t, output, t_B)[0] - x_0).square().mean(1)
        own = (output - schedule.target(x_0, noise, t_B)).square().mean(1)
        torch.testing.assert_close(weights * own, snr.clamp(max=gamma) * error, rtol=1e-2, atol=1e-9)


def test_zero_terminal_snr_leaves_no_signal_and_the_first_level_as_it_was() -> None:
    plain, zero = (
        noise_schedule(DiffusionConfig(beta_schedule="scaled_linear", prediction="v", zero_terminal_snr=there))
        for there in (False, True)
    )
    assert float(zero.alpha_bar[-1]) == 0
    assert float(zero.alpha_bar[0]) == pytest.approx(float(plain.alpha_bar[0]), abs=1e-12)
    assert (zero.alpha_bar.diff() < 0).all()
    x_0, noise = torch.randn(2, 1, 2, 3, 4)
    torch.testing.assert_close(zero.add_noise(x_0, noise, 999), noise)
    torch.testing.assert_close(zero.predict_x0_eps(noise, zero.target(x_0, noise, 999), 999)[0], x_0)
    with pytest.raises(ValueError, match="prediction epsilon, expected v"):
        DiffusionConfig(zero_terminal_snr=True)


@given(st.integers(0, 999), st.integers(0, 999), st.floats(0.1, 1))
def test_clean_scale_is_that_of_each_step(first: int, second: int, base: float) -> None:
    schedule = noise_schedule(DiffusionConfig(prediction="v", dynamic_rescale=base))
    x_0, noise = torch.randn(2, 2, 3, 2, 4, 4, dtype=torch.float64)
    t_B = torch.tensor([first, second])
    scaled, _ = schedule.predict_x0_eps(schedule.add_noise(x_0, noise, t_B), schedule.target(x_0, noise, t_B), t_B)
    for row, t in enumerate((first, second)):
        expected = 1 - (1 - base) * min(t, 399) / 399
        torch.testing.assert_close(scaled[row], x_0[row] * expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(scaled[row] * schedule.scale_change(t, 0), x_0[row], atol=1e-5, rtol=0)
