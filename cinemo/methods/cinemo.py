"""Cinemo (arXiv 2407.15642): diffuse motion residuals, with the image itself as the first frame inside the network.

`CinemoMethod.forward` reads beside the paper's Algorithm 1; the numbers in its comments are that algorithm's lines.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from cinemo.config import SampleConfig
from cinemo.diffusion.dct import dct_init
from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.methods.base import diffusion_loss
from cinemo.networks.attention import TextKeysValues
from cinemo.networks.lavie_unet import DeepFeatures, LavieUNet
from cinemo.types import Condition, InputError, LatentBatch


class CinemoMethod(nn.Module):
    """Motion residuals with DCTInit; see `cinemo.methods.base.MotionMethod` for the contract.

    Args:
        unet: its parameters are all that is trained.
        schedule: noise schedule of training and sampling.
        sample: of it, the DCTInit settings are used here.
        min_snr_gamma: weighs the losses, see `NoiseSchedule.min_snr_weights`; None is the paper's equation 3.
    """

    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")

    def __init__(
        self, unet: LavieUNet, schedule: NoiseSchedule, sample: SampleConfig, min_snr_gamma: float | None = None
    ) -> None:
        super().__init__()
        if not 0 <= sample.dct_tau < schedule.train_steps:
            raise InputError(f"sample.dct_tau is {sample.dct_tau}, expected 0..{schedule.train_steps - 1}")
        self.unet = unet
        self.schedule = schedule
        self.sample = sample
        self.min_snr_gamma = min_snr_gamma

    def target(self, batch: LatentBatch) -> Tensor:
        """M = (z_2 - z_1, ..., z_N - z_1) times the schedule's ``data_scale``: (B, C, F-1, h, w), float32."""
        video = batch.video_BCFHW.float()
        motion = video[:, :, 1:] - video[:, :, :1]
        return motion if self.schedule.data_scale == 1 else motion * self.schedule.data_scale

    def forward(
        self, batch: LatentBatch, t_B: Tensor, noise_BCFHW: Tensor, each: bool = False, weighted: bool = True
    ) -> Tensor:
        """The loss of one batch (scalar, float32), with ``each`` that of every sample (B,).

        It is what is optimised: with ``min_snr_gamma``, the weighted error. Without ``weighted``, the plain one.

        Args:
            batch: latents of N frames and their condition (lines 2-4).
            t_B: (B,) steps 0..T-1 (line 6).
            noise_BCFHW: (B, C, N-1, h, w), N(0, 1) (line 7).
        """
        motion = self.target(batch)  # line 5
        noise = noise_BCFHW.float()
        motion_t = self.schedule.add_noise(motion, noise, t_B)  # line 8
        output = self.predict(motion_t, t_B, batch.condition)  # line 9
        losses_B = diffusion_loss(output, self.schedule.target(motion, noise, t_B))  # line 10
        if weighted and self.min_snr_gamma is not None:
            losses_B = losses_B * self.schedule.min_snr_weights(t_B, self.min_snr_gamma).to(losses_B.device)
        return losses_B if each else losses_B.mean()

    def start(self, condition: Condition, noise: Tensor) -> Tensor:
        """x_T: the noise, its low frequencies replaced by the image's layout where DCTInit is on (section 3.3)."""
        if not self.sample.dct_init:
            return noise
        alpha_bar_tau = float(self.schedule.alpha_bar[self.sample.dct_tau])
        z_1 = condition.image_BCHW[:, :, None].to(noise.device, noise.dtype)
        return dct_init(z_1, noise, alpha_bar_tau, self.sample.dct_keep, self.sample.dct_mode)

    def text(self, condition: Condition) -> TextKeysValues:
        """What `predict` needs of the text, made once for all its steps."""
        return self.unet.keys_values(condition.text_BLD.to(next(self.unet.parameters()).device, self.unet.dtype))

    def predict(
        self,
        x_t: Tensor,
        t: Tensor | int,
        condition: Condition,
        text: TextKeysValues | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """The network sees X_t = cat([z_1, z_1 + M_t]) along frames; its answer for z_1 itself is dropped (line 9).

        ``text``: from `text`, where there are many steps. ``deep``: inner features of a nearby step, see
        `cinemo.networks.lavie_unet.DeepFeatures`.
        """
        condition = condition.to(x_t.device)
        dtype = self.unet.dtype
        if not isinstance(t, Tensor):  # a compiler would build a number in
            t = torch.full((), t, device=x_t.device)
        z_1 = condition.image_BCHW[:, :, None].to(x_t.dtype)
        frames = torch.cat([z_1, z_1 + x_t], dim=2).to(dtype)
        output: Tensor = self.unet(frames, t, text or condition.text_BLD.to(dtype), condition.motion_bucket_B, deep)
        return output[:, :, 1:]

    def finish(self, x_0: Tensor, condition: Condition) -> Tensor:
        """(B, C, F, h, w): z_1, then z_1 + M."""
        z_1 = condition.image_BCHW[:, :, None].to(x_0.device, x_0.dtype)
        if self.schedule.data_scale != 1:
            x_0 = x_0 / self.schedule.data_scale
        return torch.cat([z_1, z_1 + x_0], dim=2)
