"""A whole recipe, and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, model_validator

from cinemo.config.data import MACHINES, DataConfig
from cinemo.config.encoders import EncodersConfig
from cinemo.config.part import Part
from cinemo.config.sampling import DiffusionConfig, SampleConfig
from cinemo.config.training import TrainConfig

# Keys that came later: a recipe's file leaves them out where nobody changed them, so that bundles keep their digests.
_LATER = {
    "sample": ("long",),
    "encoders": ("flow",),
    "train": (
        "grow",
        "where",
        "max_skipped_steps",
        "skip_steps",
        "skip_samples",
        "tf32",
        "deepspeed",
        "optimizer",
        "tensorboard",
        "posthoc_ema",
        "posthoc_snapshots",
        "text_states",
        "checkpoint_minutes",
        "stop_file",
        "resource",
    ),
    "data": (*MACHINES, "scores", "other_shapes"),
}


class Recipe(Part):
    """A complete run. Built by a function in `cinemo.recipes`, changed with ``--set dotted.key=value``.

    Each method has a type of recipe of its own (`cinemo.methods.base.Method.recipe_type`), whose ``model``, and where
    it needs them ``train`` and ``sample``, have the keys of that method.
    """

    name: str
    method: str = Field(description="a method of cinemo.methods, or package.module:Class of one elsewhere")
    compile: bool | Literal["regional"] = Field(
        False,
        description="torch.compile the network, in training and sampling; regional: each kind of block once, which "
        "takes a fraction of the time",
    )
    data: DataConfig = DataConfig()
    encoders: EncodersConfig = EncodersConfig()
    model: SerializeAsAny[Part] = Part()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: SerializeAsAny[TrainConfig] = TrainConfig()
    sample: SerializeAsAny[SampleConfig] = SampleConfig()

    @model_validator(mode="after")
    def _takes_every_shape(self) -> Self:
        for shape in self.data.other_shapes:
            try:
                type(self).model_validate(self.of_shape(shape).model_dump())
            except ValidationError as error:
                message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
                raise ValueError(f"data.other_shapes has {list(shape)}: {message}") from None
        return self

    def of_shape(self, shape: Sequence[int]) -> Self:
        """For samples of one (frames, height, width) alone."""
        return self.model_copy(update={"data": self.data.of_shape(shape)})

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        sample, steps = self.sample, self.diffusion.train_steps
        least = 2 if sample.solver == "multistep" else 1
        most = steps - (sample.spacing == "leading")
        if not least <= sample.steps <= most:
            raise ValueError(
                f"sample.steps is {sample.steps}, expected {least}..{most} with diffusion.train_steps {steps}, "
                f"solver {sample.solver} and spacing {sample.spacing}"
            )
        return self

    @property
    def toy(self) -> bool:
        """Whether its videos are too small for anything but to see the method work."""
        return min(self.data.size) < 128

    def with_lanes(self) -> Self:
        """With the number that ``train.lanes`` = null stands for, which a checkpoint keeps whatever the default is."""
        lanes = {"lanes": self.train.reading_lanes}
        return self.model_copy(update={"train": self.train.model_copy(update=lanes)})

    def to_json(self) -> str:
        exclude = {
            section: {name for name in names if getattr(part, name) == type(part).model_fields[name].default}
            for section, names in _LATER.items()
            for part in [getattr(self, section)]
        }
        content = self.with_lanes().model_dump(mode="json", exclude=exclude)
        # As the switch it was, so that a recipe that has not changed is the same file.
        checkpointing = content["train"]["gradient_checkpointing"]
        content["train"]["gradient_checkpointing"] = {"none": False, "whole": True}.get(checkpointing, checkpointing)
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a type of recipe."""
    names = []
    for name, info in model.model_fields.items():
        part = info.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            names += keys(part, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
