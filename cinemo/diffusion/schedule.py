"""The noise schedule: how much signal is left at step t, and what a network is asked to predict there.

LaVie and Cinemo (arXiv 2407.15642, section 4.1) use 1000 steps of linear betas 1e-4..0.02 and predict the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cinemo.config import DiffusionConfig
from cinemo.types import InputError


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    ``alpha_bar``: a_t for t = 0..T-1, float32, kept on the CPU so that reading one value never waits for a device.
    ``prediction``: ``epsilon`` (the noise) or ``v`` = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (arXiv 2202.00512).
    ``data_scale``: x_0 is data times this number: a method multiplies by it before, and divides by it after.

    Steps ``t`` are an int (the same for the whole batch) or an integer tensor of shape (B,). Results have the dtype and
    device of the first tensor argument.
    """

    alpha_bar: Tensor
    prediction: Literal["epsilon", "v"] = "epsilon"
    data_scale: float = 1.0

    @property
    def train_steps(self) -> int:
        return len(self.alpha_bar)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t from clean data and noise of the same shape."""
        signal, spread = self._scales(x_0, t)
        return signal * x_0 + spread * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What the network should return for ``add_noise(x_0, noise, t)``."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._scales(x_0, t)
        return signal * noise - spread * x_0

    def min_snr_weights(self, t_B: Tensor, gamma: float) -> Tensor:
        """Loss weights (B,), float32, on ``t_B``'s device, that even out the steps (min-SNR, arXiv 2303.09556).

        With SNR = a_t / (1 - a_t), min(SNR, gamma) on the error of x_0; on that of the noise it is that / SNR, and on
        that of v, / (SNR + 1).
        """
        level = self.alpha_bar.to(t_B.device)[t_B]
        snr = level / (1 - level)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def split(self, x_t: Tensor, output: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """The network's idea of (x_0, noise) from its output at x_t; undoes `add_noise` where the output is perfect."""
        signal, spread = self._scales(x_t, t)
        output = output.to(x_t.dtype)
        if self.prediction == "epsilon":
            return (x_t - spread * output) / signal, output
        return signal * x_t - spread * output, signal * output + spread * x_t

    def scales(self, t: int) -> tuple[float, float]:
        """(sqrt(a_t), sqrt(1 - a_t)): as the published sampler, each operation in float32.

        NumPy rounds these roots correctly on every machine; PyTorch's vectorised root does not.
        """
        level = np.float32(self.alpha_bar[t].item())
        return float(np.sqrt(level)), float(np.sqrt(np.float32(1) - level))

    def _scales(self, like: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor] | tuple[float, float]:
        if isinstance(t, int):
            return self.scales(t)
        wide = torch.promote_types(like.dtype, torch.float32)
        level = self.alpha_bar.to(t.device)[t].to(like.device, wide).view(-1, *[1] * (like.dim() - 1))
        return level.sqrt().to(like.dtype), (1 - level).sqrt().to(like.dtype)


def noise_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """Build the schedule of a recipe; ``scaled_linear`` is linear in sqrt(beta) (Stable Diffusion)."""
    if not 0 < config.beta_start <= config.beta_end < 1:
        raise InputError(
            f"diffusion: betas are {config.beta_start}..{config.beta_end}, expected 0 < beta_start <= beta_end < 1"
        )
    if config.beta_schedule == "linear":
        beta = torch.linspace(config.beta_start, config.beta_end, config.train_steps, dtype=torch.float32)
    else:
        root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps, dtype=torch.float32)
        beta = root**2
    return NoiseSchedule(torch.cumprod(1 - beta, 0), config.prediction, config.data_scale)
