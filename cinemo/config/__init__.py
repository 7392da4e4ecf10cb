"""The recipe: everything that decides what a run computes, as frozen pydantic models. An unknown key is an error.

A machine's properties (how many nodes, which accelerator) are not here but in ``cluster/``.
"""

from __future__ import annotations

from cinemo.config.data import MACHINES, DataConfig
from cinemo.config.encoders import EncodersConfig
from cinemo.config.part import MAX_SHAPES, MOTION_BUCKETS, Count, Part, Shape
from cinemo.config.recipe import Recipe, keys
from cinemo.config.sampling import DiffusionConfig, LongConfig, SampleConfig
from cinemo.config.training import (
    AUTO,
    MOST_LANES,
    Checkpointing,
    DeepspeedConfig,
    Offload,
    Setting,
    Stage,
    TrainConfig,
)

__all__ = [
    "AUTO",
    "MACHINES",
    "MAX_SHAPES",
    "MOST_LANES",
    "MOTION_BUCKETS",
    "Checkpointing",
    "Count",
    "DataConfig",
    "DeepspeedConfig",
    "DiffusionConfig",
    "EncodersConfig",
    "LongConfig",
    "Offload",
    "Part",
    "Recipe",
    "SampleConfig",
    "Setting",
    "Shape",
    "Stage",
    "TrainConfig",
    "keys",
]
