"""DynamiCrafter between two pictures (arXiv 2310.12190, section 4.5), and loops, which are that with one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from cinemo.config import Recipe
from cinemo.diffusion.guidance import Sampling
from cinemo.methods.base import Encoders
from cinemo.methods.controls import Input, control
from cinemo.methods.dynamicrafter import (
    DynamiCrafterMethod,
    DynamiCrafterRecipe,
    FrameRate,
    picture_latent,
)
from cinemo.types import Condition, InputError


class InterpolationRecipe(DynamiCrafterRecipe):
    """A run of DynamiCrafter between two pictures."""

    method: str = "dynamicrafter-interp"


class InterpolationControls(FrameRate):
    """The same between two pictures, or one: a loop, a video that can be repeated."""

    loop: bool | None = control(
        None,
        "end where the video begins, so that it can be repeated: what happens where no last picture is given",
        title="Loop",
        place="folded",
    )

    def settings(self, recipe: Recipe, inputs: Collection[str] = ()) -> dict[str, Any]:
        there = "last_image" in inputs
        if self.loop is not None and self.loop == there:
            raise InputError(
                "loop: a loop ends where it began, but there is a last_image; leave one of them out"
                if there
                else "loop: is off, but there is no last_image to end at; give one"
            )
        return super().settings(recipe, inputs) | {"loop": not there}


class InterpolationMethod(DynamiCrafterMethod):
    """What happens between two pictures (section 4.5): their latents stand beside the first and the last frame alone,
    and tokens are those of the first."""

    name: ClassVar[str] = "dynamicrafter-interp"
    recipe_type: ClassVar[type[Recipe]] = InterpolationRecipe
    controls_type: ClassVar[type[FrameRate]] = InterpolationControls
    inputs: ClassVar[Mapping[str, Input]] = {
        "last_image": Input("image", "the picture to end at; without one the video is a loop that ends where it began")
    }

    @classmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Condition:
        return Condition(super().condition(video_BCFHW, fields, states), last_image=video_BCFHW[:, :, -1])

    def given(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """A loop's picture is encoded once, so that both ends are the same."""
        image_BCHW = picture_latent(recipe, encoders, inputs, "image", settings["seed"])
        if settings["loop"]:
            return {"image": image_BCHW, "last_image": image_BCHW}
        return {
            "image": image_BCHW,
            "last_image": picture_latent(recipe, encoders, inputs, "last_image", settings["seed"]),
        }

    def prepare(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]
    ) -> tuple[Sampling, int]:
        """The last frame of a loop, which is its first one again, is left out."""
        sampling, calls = super().prepare(recipe, encoders, inputs, settings)
        if settings["loop"]:
            settings["frames"] = recipe.data.frames - 1
            sampling = _without_last(sampling)
        return sampling, calls

    @classmethod
    def condition_frame(cls, recipe: Recipe) -> str:
        return "first"


def _without_last(sampling: Sampling) -> Sampling:
    video_BCFHW = yield from sampling
    return video_BCFHW[:, :, :-1]
