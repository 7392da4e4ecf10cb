from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cinemo.config import DiffusionConfig
from cinemo.diffusion.ddim import ddim_sample
from cinemo.diffusion.multistep import multistep_sample
from cinemo.diffusion.schedule import noise_schedule
from cinemo.types import InputError


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_few_steps_reach_what_ddim_needs_many_for(prediction: str) -> None:
    """Data N(0, 0.5^2), whose exact denoiser is known: the flow multiplies x by 0.5."""
    schedule = noise_schedule(DiffusionConfig(prediction=prediction))  # type: ignore[arg-type]
    x_T = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoise(x: Tensor, t: int) -> Tensor:
        a = float(schedule.alpha_bar[t])
        x_0 = a**0.5 * 0.25 * x / (a * 0.25 + 1 - a)
        return schedule.target(x_0, (x - a**0.5 * x_0) / (1 - a) ** 0.5, t)

    def error(x_0: Tensor) -> float:
        return float((x_0 / x_T - 0.5).abs().max())

    assert error(multistep_sample(denoise, x_T, schedule, 20)) < 0.5 * error(ddim_sample(denoise, x_T, schedule, 50))
    assert error(multistep_sample(denoise, x_T, schedule, 80)) < error(multistep_sample(denoise, x_T, schedule, 10))


def test_callback_and_refusal() -> None:
    schedule = noise_schedule(DiffusionConfig())
    seen: list[tuple[int, int]] = []
    multistep_sample(lambda x, t: x, torch.ones(2), schedule, 4, callback=lambda i, n, x: seen.append((i, n)))
    assert seen == [(i, 4) for i in range(4)]
    with pytest.raises(InputError, match="steps is 1"):
        multistep_sample(lambda x, t: x, torch.ones(2), schedule, 1)


def test_zero_terminal_snr_begins_just_above_pure_noise_and_dynamic_rescale_is_refused() -> None:
    schedule = noise_schedule(DiffusionConfig(prediction="v", zero_terminal_snr=True))
    x_0, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    got = multistep_sample(lambda x, t: schedule.target(x_0, noise, t), noise, schedule, 20)
    torch.testing.assert_close(got, schedule.add_noise(x_0, noise, 0), rtol=0, atol=1e-2)
    rescaled = noise_schedule(DiffusionConfig(dynamic_rescale=0.7))
    with pytest.raises(InputError, match="use solver ddim"):
        multistep_sample(lambda x, t: x, noise, rescaled, 20)
