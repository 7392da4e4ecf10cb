"""What every image-animation method is, and the loss they share."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cinemo.diffusion.guidance import Sampling
from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.networks.lavie_unet import DeepFeatures
from cinemo.types import Condition, LatentBatch


class MotionMethod(Protocol):
    """An ``nn.Module`` that holds the trained networks of one method and the mathematics around them.

    Frozen encoders stay outside: a method sees latents and text states. ``needs`` names the encoders whose output it
    uses (``vae``, ``text_encoder``).
    """

    needs: ClassVar[tuple[str, ...]]

    @property
    def schedule(self) -> NoiseSchedule: ...

    def target(self, batch: LatentBatch) -> Tensor:
        """What is diffused, in float32: for Cinemo the residuals (B, C, F-1, h, w)."""
        ...

    def forward(
        self, batch: LatentBatch, t_B: Tensor, noise: Tensor, each: bool = False, weighted: bool = True
    ) -> Tensor:
        """The scalar training loss, with ``each`` that of every sample (B,); ``noise`` is shaped like `target`.

        ``weighted``: by timestep, where the recipe asks for it; validation measures the plain error.
        """
        ...

    def start(self, condition: Condition, noise: Tensor) -> Tensor:
        """x_T for sampling from N(0, 1) noise shaped like `target`."""
        ...

    def predict(self, x_t: Tensor, t: Tensor | int, condition: Condition, deep: DeepFeatures | None = None) -> Tensor:
        """The network's output for x_t, shaped like it; ``condition`` as it is, or as `sampling` asks with it.

        ``deep``: inner features to keep or to use again, where `sampling` says so.
        """
        ...

    def finish(self, x_0: Tensor, condition: Condition) -> Tensor:
        """Latents of the whole video (B, C, F, h, w), the given frame first."""
        ...

    def sampling(
        self,
        condition: Condition,
        negative_text_BLD: Tensor | None,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        generator: torch.Generator | None = None,
    ) -> Sampling:
        """From noise, shaped like `target`, to a video: solver and guidance, as a generator of queries."""
        ...


def diffusion_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample (B,) in float32, whatever the network's precision (Cinemo, equation 3)."""
    errors = F.mse_loss(output.float(), target.to(output.device, torch.float32), reduction="none")
    return errors.flatten(1).mean(1)
