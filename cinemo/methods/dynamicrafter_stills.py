"""DynamiCrafter's first stage (arXiv 2310.12190, section 3.3): what a picture shows is learnt from single frames,
beside a text-to-image model that stays as it is.

The paper has no word on which queries a single frame takes. Here each frame of a clip takes those of its own place, so
that all of them have learnt when the second stage animates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cinemo.config import Recipe
from cinemo.methods.base import Encoders, Published
from cinemo.methods.dynamicrafter import DynamiCrafterMethod, DynamiCrafterRecipe, FrameRate
from cinemo.networks.dynamicrafter_weights import Base
from cinemo.types import Condition, LatentBatch


class StillsRecipe(DynamiCrafterRecipe):
    """A run of DynamiCrafter's first stage."""

    method: str = "dynamicrafter-stills"


class StillsControls(FrameRate):
    """Nothing moves."""

    @classmethod
    def motion_values(cls, recipe: Recipe) -> None:
        return None


class StillsMethod(DynamiCrafterMethod):
    """A video is one frame of a clip, and the given picture is that frame (section 3.3)."""

    name: ClassVar[str] = "dynamicrafter-stills"
    recipe_type: ClassVar[type[Recipe]] = StillsRecipe
    controls_type: ClassVar[type[FrameRate]] = StillsControls
    published: ClassVar[Mapping[str, Published]] = {}
    base: ClassVar[Base] = "image"

    @classmethod
    def target_shape(cls, latents_CFHW: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        channels, _, h, w = latents_CFHW
        return channels, 1, h, w

    @classmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Condition:
        return Condition(super().condition(video_BCFHW, fields, states), frame=fields["frame"])

    def target(self, batch: LatentBatch) -> Tensor:
        video: Tensor = batch.condition["image"].float()[:, :, None]
        return video if self.schedule.data_scale == 1 else video * self.schedule.data_scale

    def given(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        given = super().given(recipe, encoders, inputs, settings)
        return given | {"frame": torch.zeros(len(given["image"]), dtype=torch.long, device=given["image"].device)}

    def _context(self, condition: Condition) -> tuple[Tensor, Tensor]:
        text_BLD, tokens = super()._context(condition)
        if tokens.dim() == 4:
            tokens = tokens[torch.arange(len(tokens), device=tokens.device), condition["frame"]][:, None]
        return text_BLD, tokens
