"""Controls that several methods have: how long a video is, how little work it may be, how much moves (0..1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import field_validator, model_validator

from cinemo.config import Recipe
from cinemo.media.motion import value_at
from cinemo.methods.controls import MAX_FRAMES, MAX_STEPS, MIN_FRAMES, Controls, Pair, control, number_as_text
from cinemo.methods.quality import QualityTable, decibels
from cinemo.types import InputError


class LongVideo(Controls):
    """How many frames, for methods whose sampling takes their number (`cinemo.methods.base.Method.sampling`)."""

    frames: int | None = control(
        None,
        "length; more frames than the model makes at once come in parts",
        title="Frames",
        place="front",
        ge=MIN_FRAMES,
        le=MAX_FRAMES,
    )
    long_video: Literal["phased", "windows", "chain"] | None = control(
        None,
        "how more frames than the model makes at once come about: phased: segments share their first steps; windows: "
        "they overlap; chain: each begins with the last frame of the one before",
        title="How long videos are made",
        place="folded",
    )

    @classmethod
    def defaults(cls, recipe: Recipe) -> dict[str, Any]:
        return super().defaults(recipe) | {"frames": recipe.data.frames, "long_video": recipe.sample.long.way}

    def settings(self, recipe: Recipe, inputs: Collection[str] = ()) -> dict[str, Any]:
        """``frames`` where they are not those of the recipe, and how they are made where they are more."""
        filled = super().settings(recipe, inputs)
        if filled.get("frames") == recipe.data.frames:
            del filled["frames"]
        filled.pop("long_video", None)
        if filled.get("frames", 0) > recipe.data.frames:
            filled["long_video"] = self.long_video or recipe.sample.long.way
        return filled


class FastSampling(Controls):
    """Less work for a video, for methods whose samplers can: see `cinemo.config.SampleConfig`."""

    solver: Literal["ddim", "multistep"] | None = control(
        None, "multistep: DPM-Solver++, which needs about 20 steps", title="Sampling method"
    )
    guidance_interval: Pair | None = control(
        None, "part of the noise range 0..1 in which guidance acts; a step outside costs half", title="Guidance range"
    )
    reuse_features: int | None = control(
        None, "run the inner layers only at every Nth step", title="Feature reuse", ge=1, le=MAX_STEPS
    )

    quality: str | None = control(
        None,
        "in place of steps, solver, guidance range and feature reuse: draft, standard, best, or a PSNR in dB to the "
        "model's best; the cheapest way that was measured to give it",
        title="Quality",
        max_length=32,
    )

    @model_validator(mode="after")
    def _quality_alone(self) -> Self:
        if self.quality is not None:
            for name in ("steps", "solver", "guidance_interval", "reuse_features"):
                if getattr(self, name) is not None:
                    raise ValueError(f"quality and {name} are both given; give at most one of them")
        return self

    @classmethod
    def changed(cls, kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """A quality takes the place of what it stands for."""
        stood = ("steps", "solver", "guidance_interval", "reuse_features") if "quality" in given else ()
        return super().changed({name: value for name, value in kept.items() if name not in stood}, given)

    @field_validator("quality", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return number_as_text(value)

    @field_validator("quality")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            decibels(value)
        return value

    def calibrated(
        self, recipe: Recipe, calibration: Mapping[str, Any] | None, quality: QualityTable | None = None
    ) -> Self:
        if self.quality is None:
            return self
        if quality is None:
            raise InputError(
                f"quality is {self.quality!r}, but {recipe.name} was not measured for it: run pipelines/evaluate.py "
                "--bundle DIR --quality 4 --output DIR --into-bundle, or give steps"
            )
        return self.model_copy(update={"quality": None, **quality.choose(self.quality).controls})

    def predicted(
        self, recipe: Recipe, calibration: Mapping[str, Any] | None, quality: QualityTable | None
    ) -> dict[str, Any]:
        if self.quality is None or quality is None:
            return {}
        return {"predicted_quality": quality.predicted(self.quality)}

    def settings(self, recipe: Recipe, inputs: Collection[str] = ()) -> dict[str, Any]:
        filled = super().settings(recipe, inputs)
        filled.pop("quality", None)
        return filled

    @field_validator("guidance_interval")
    @classmethod
    def _interval(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        low, high = value or (0.0, 1.0)
        if not 0 <= low <= high <= 1:
            raise ValueError("expected 0 <= low <= high <= 1, such as 0.1,0.9")
        return value


class MotionStrength(FastSampling):
    """Of a method with a control of how much moves: the same on a scale of 0..1.

    ``strength_of``: that control. Where a bundle's motion was measured, the scale is linear in it (`calibrated`); else
    in the control's values.
    """

    strength_of: ClassVar[str]
    strength: ClassVar[str | None] = "motion_strength"

    motion_strength: float | None = control(
        None,
        "how much moves on a scale of 0..1, in place of the control that says it in its own units",
        title="How much it moves, 0 to 1",
        ge=0,
        le=1,
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.motion_strength is not None and getattr(self, self.strength_of) is not None:
            raise ValueError(f"{self.strength_of} and motion_strength are both given; give at most one of them")
        return self

    @classmethod
    def changed(cls, kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """A strength takes the place of what it stands for, and the other way round."""
        other = {"motion_strength": cls.strength_of, cls.strength_of: "motion_strength"}
        return super().changed({name: value for name, value in kept.items() if other.get(name) not in given}, given)

    def calibrated(
        self, recipe: Recipe, calibration: Mapping[str, Any] | None, quality: QualityTable | None = None
    ) -> Self:
        asked, known = super().calibrated(recipe, calibration, quality), self.motion_values(recipe)
        if self.motion_strength is None or known is None or calibration is None or "curve" not in calibration:
            return asked
        low, high = min(known[1]), max(known[1])
        measured = all(low <= value <= high for value in calibration["values"])
        if calibration.get("control", known[0]) != known[0] or not measured:
            return asked  # measured before the recipe changed what can be asked
        value = value_at(self.motion_strength, known[1], calibration)
        return asked.model_copy(update={"motion_strength": None, self.strength_of: value})

    def predicted(
        self, recipe: Recipe, calibration: Mapping[str, Any] | None, quality: QualityTable | None
    ) -> dict[str, Any]:
        """Of a measured strength the motion, 1 - mean SSIM of neighbouring frames, and what nine of ten videos are
        between. Of videos sampled as those that were measured: with other steps or guidance they move otherwise."""
        said = super().predicted(recipe, calibration, quality)
        asked = self.calibrated(recipe, calibration, quality)
        value = getattr(asked, self.strength_of)
        if self.motion_strength is None or value is None or calibration is None or "interval" not in calibration:
            return said
        usual = self.defaults(recipe) | {"steps": calibration.get("steps", recipe.sample.steps)}
        free = {"seed", self.strength_of}
        given = {name: each for name, each in asked.settings(recipe).items() if name in usual.keys() - free}
        if any(each != usual[name] for name, each in given.items()):
            return said
        order = np.argsort(calibration["values"])
        places = np.array(calibration["values"])[order]
        curves = {"mean": calibration["curve"], **dict(zip(("low", "high"), calibration["interval"], strict=True))}
        motion = {name: np.interp(value, places, np.array(curve)[order]) for name, curve in curves.items()}
        return said | {"predicted_motion": {name: round(float(each), 4) for name, each in motion.items()}}

    def settings(self, recipe: Recipe, inputs: Collection[str] = ()) -> dict[str, Any]:
        filled = super().settings(recipe, inputs)
        strength = filled.pop("motion_strength", None)
        if strength is not None and (known := self.motion_values(recipe)) is not None:
            filled[self.strength_of] = value_at(strength, known[1])
        return filled
