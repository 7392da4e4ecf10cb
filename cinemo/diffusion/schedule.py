"""The noise schedule: how much signal is left at step t, and what a network is asked to predict there.

LaVie and Cinemo (arXiv 2407.15642, section 4.1) use 1000 steps of linear betas 1e-4..0.02 and predict the noise;
DynamiCrafter (arXiv 2310.12190) takes Stable Diffusion's, above 256 pixels with zero terminal SNR and v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cinemo.config import DiffusionConfig

# Tables of schedules on other devices, by table: copied once, while a copy waits for all that a device is doing.
_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()
RESCALE_STEPS = 400  # over which `DiffusionConfig.dynamic_rescale` falls, as in the published code


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    ``alpha_bar``: a_t for t = 0..T-1, kept on the CPU so that reading one value never waits for a device; for steps
    that lie on a device a copy is kept there. float32 as Cinemo's code has it, or float64, of which the roots are then
    taken.
    ``prediction``: ``epsilon`` (the noise) or ``v`` = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (arXiv 2202.00512).
    ``data_scale``: x_0 is data times this number: a method multiplies by it before, and divides by it after.
    ``clean_scale``: (T,) or None: x_0 is further multiplied by its value at t, wherever x_0 meets noise.

    Steps ``t`` are an int (the same for the whole batch) or an integer tensor of shape (B,). Results have the dtype and
    device of the first tensor argument.
    """

    alpha_bar: Tensor
    prediction: Literal["epsilon", "v"] = "epsilon"
    data_scale: float = 1.0
    clean_scale: Tensor | None = None

    @property
    def train_steps(self) -> int:
        return len(self.alpha_bar)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t from clean data and noise of the same shape."""
        signal, spread = self._scales(x_0, t)
        return signal * self._at(x_0, t) + spread * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """What the network should return for ``add_noise(x_0, noise, t)``."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self._scales(x_0, t)
        return signal * noise - spread * self._at(x_0, t)

    def min_snr_weights(self, t_B: Tensor, gamma: float) -> Tensor:
        """Loss weights (B,), float32, on ``t_B``'s device, that even out the steps (min-SNR, arXiv 2303.09556).

        With SNR = a_t / (1 - a_t), min(SNR, gamma) on the error of x_0; on that of the noise it is that / SNR, and on
        that of v, / (SNR + 1).
        """
        level = _read(self.alpha_bar, t_B).float()
        snr = level / (1 - level)
        return snr.clamp(max=gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def predict_x0_eps(self, x_t: Tensor, output: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """The network's idea of (x_0, noise) from its output at x_t; undoes `add_noise` where the output is perfect.

        With ``clean_scale``, x_0 is as it stands at step t: times the scale there.
        """
        signal, spread = self._scales(x_t, t)
        output = output.to(x_t.dtype)
        if self.prediction == "epsilon":
            return (x_t - spread * output) / signal, output
        return signal * x_t - spread * output, signal * output + spread * x_t

    def noise_in(self, x_t: Tensor, x_0: Tensor, t: Tensor | int) -> Tensor:
        """The noise of x_t where its clean data is x_0, of a shape that can be broadcast; undoes `add_noise`."""
        signal, spread = self._scales(x_t, t)
        return (x_t - signal * self._at(x_0.to(x_t.dtype), t)) / spread

    def scale_change(self, t: int, to: int) -> float:
        """What x_0 of step ``t`` is multiplied by to be that of step ``to``: 1 without ``clean_scale``."""
        return 1.0 if self.clean_scale is None else float(self.clean_scale[to] / self.clean_scale[t])

    def scales(self, t: int) -> tuple[float, float]:
        """(sqrt(a_t), sqrt(1 - a_t)): as the published sampler, each operation in the dtype of ``alpha_bar``.

        NumPy rounds these roots correctly on every machine; PyTorch's vectorised root does not.
        """
        level = self.alpha_bar[t].numpy()
        return float(np.sqrt(level)), float(np.sqrt(level.dtype.type(1) - level))

    def _at(self, x_0: Tensor, t: Tensor | int) -> Tensor:
        if self.clean_scale is None:
            return x_0
        if isinstance(t, int):
            return x_0 * float(self.clean_scale[t])
        return x_0 * _read(self.clean_scale, t).to(x_0.device, x_0.dtype).view(-1, *[1] * (x_0.dim() - 1))

    def _scales(self, like: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor] | tuple[float, float]:
        if isinstance(t, int):
            return self.scales(t)
        wide = torch.promote_types(torch.promote_types(like.dtype, torch.float32), self.alpha_bar.dtype)
        level = _read(self.alpha_bar, t).to(like.device, wide).view(-1, *[1] * (like.dim() - 1))
        return level.sqrt().to(like.dtype), (1 - level).sqrt().to(like.dtype)


def _read(table: Tensor, t: Tensor) -> Tensor:
    """Values of a table at steps ``t``, on their device."""
    if t.device != table.device:
        if table not in _COPIES:
            _COPIES[table] = {}
        copies: dict[torch.device, Tensor] = _COPIES[table]
        if t.device not in copies:
            copies[t.device] = table.to(t.device)
        table = copies[t.device]
    return table[t]


def noise_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """Build the schedule of a recipe; ``scaled_linear`` is linear in sqrt(beta) (Stable Diffusion)."""
    if config.beta_schedule == "linear":
        beta = torch.linspace(config.beta_start, config.beta_end, config.train_steps, dtype=torch.float32)
        alpha_bar = torch.cumprod(1 - beta, 0)
    else:
        root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - root**2, 0)
    if config.zero_terminal_snr:
        alpha_bar = without_last_signal(alpha_bar.double())
    clean_scale = None
    if config.dynamic_rescale is not None:
        falling = torch.linspace(1, config.dynamic_rescale, RESCALE_STEPS, dtype=torch.float64)
        rest = torch.full((config.train_steps,), config.dynamic_rescale, dtype=torch.float64)
        clean_scale = torch.cat([falling, rest])[: config.train_steps]
    return NoiseSchedule(alpha_bar, config.prediction, config.data_scale, clean_scale)


def without_last_signal(alpha_bar: Tensor) -> Tensor:
    """a_t moved and stretched in its root so that a_0 stays and the last one is 0 (arXiv 2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
