"""What every part of a recipe is, and types that several have."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOTION_BUCKETS = 20
MAX_SHAPES = 64
Shape = tuple[int, int, int]
"""Of a sample in pixels: frames, height, width."""


class Part(BaseModel):
    """A group of keys: frozen, without unknown ones, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]
