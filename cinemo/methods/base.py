"""What every image-animation method is, and the loss they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cinemo.config import Recipe
from cinemo.diffusion.guidance import Sampling
from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.networks.lavie_unet import DeepFeatures
from cinemo.types import Condition, InputError, LatentBatch, LatentSample

Draw = Callable[[str], torch.Generator]
"""``draw(what)``: a generator for one draw of a training sample, keyed by seed, ``what``, step and sample."""


@dataclass(frozen=True)
class Example:
    """What a method makes of one stored sample, on the host: tensors for a batch (all samples have the same names and
    shapes), and by condition slot the text that the frozen encoder is to read."""

    fields: Mapping[str, Tensor]
    texts: Mapping[str, str]


class Method(nn.Module, ABC):
    """The networks of one method, all that is trained, and the mathematics around them.

    Frozen encoders stay outside: a method sees latents and text states. Everything else (trainer, export, bundle, LoRA,
    compiler, server) iterates over `networks` and drives `sampling`, whatever the method is.

    ``name``: as a recipe has it. ``needs``: the encoders whose output it uses (``vae``, ``text_encoder``).
    ``stored_fields``: what a sample must carry beside its latents (`cinemo.data.fields`).
    ``parts``: names of its networks, which are attributes of it: parameter ``unet.x`` is ``x`` of ``networks["unet"]``.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    stored_fields: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]]
    schedule: NoiseSchedule

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {part: getattr(self, part) for part in self.parts}

    @classmethod
    @abstractmethod
    def fresh_networks(cls, recipe: Recipe) -> dict[str, nn.Module]:
        """The recipe's networks as a training from scratch begins with them (global torch RNG)."""

    @classmethod
    @abstractmethod
    def load_network(
        cls, recipe: Recipe, part: str, location: str, dtype: torch.dtype | None = None, base: bool = False
    ) -> nn.Module:
        """The network ``part`` with the weights of a folder or file.

        ``base``: they may lack what this method adds to the model that it starts from, which is then fresh.

        Raises:
            InputError: they are missing, or do not fit the recipe's network.
        """

    @classmethod
    @abstractmethod
    def of(cls, recipe: Recipe, networks: Mapping[str, nn.Module]) -> Self:
        """The method of a recipe around its networks."""

    @classmethod
    @abstractmethod
    def example(cls, recipe: Recipe, sample: LatentSample, draw: Draw) -> Example:
        """What training needs of a sample, with what is dropped in this step."""

    @classmethod
    @abstractmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], texts: Mapping[str, Tensor]) -> Condition:
        """The condition of a batch of `example`s, on the device: fields stacked, texts encoded (B, L, D)."""

    @classmethod
    def target_shape(cls, latents_CFHW: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """The shape of what is diffused for one video whose latents have this shape; its noise has the same."""
        return latents_CFHW

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """The same networks with the sampling settings of one request in the place of the recipe's, by name."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def is_temporal(name: str) -> bool:
        """Whether a parameter, by its name in its network, is what an image model lacks (``train.trainable``)."""

    @abstractmethod
    def target(self, batch: LatentBatch) -> Tensor:
        """What is diffused, in float32: for Cinemo the residuals (B, C, F-1, h, w)."""

    @abstractmethod
    def forward(
        self, batch: LatentBatch, t_B: Tensor, noise: Tensor, each: bool = False, weighted: bool = True
    ) -> Tensor:
        """The scalar training loss, with ``each`` that of every sample (B,); ``noise`` is shaped like `target`.

        ``weighted``: by timestep, where the recipe asks for it; validation measures the plain error.
        """

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor | int, condition: Condition, deep: DeepFeatures | None = None) -> Tensor:
        """The network's output for x_t, shaped like it; ``condition`` as it is, or as `sampling` asks with it.

        ``deep``: inner features to keep or to use again, where `sampling` says so.
        """

    @abstractmethod
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

    def inversion(self, video_BCFHW: Tensor, condition: Condition, steps: int) -> Sampling:
        """A video's latents -> the noise that `sampling` turns back into them, of methods that can."""
        raise InputError(f"source: method {self.name} cannot take motion from a video; leave the source out")

    def checkpoint_activations(self, on: bool) -> None:
        """Whether networks compute layers twice in a training step to hold fewer activations, those that can."""
        for network in self.networks.values():
            if hasattr(network, "gradient_checkpointing"):
                network.gradient_checkpointing = on  # type: ignore[assignment]

    def compile_networks(self) -> None:
        """Compile every network in place (`Recipe.compile`)."""
        for network in self.networks.values():
            network.compile(dynamic=False)


def chance(draw: Draw, what: str, probability: float) -> bool:
    """Whether something happens in this step and to this sample."""
    return bool(torch.rand((), generator=draw(what)) < probability)


def diffusion_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample (B,) in float32, whatever the network's precision (Cinemo, equation 3)."""
    errors = F.mse_loss(output.float(), target.to(output.device, torch.float32), reduction="none")
    return errors.flatten(1).mean(1)
