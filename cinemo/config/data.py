"""Clips, what is taken of them, and how they are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cinemo.config.part import MAX_SHAPES, MOTION_BUCKETS, Part, Shape

# Keys of `DataConfig` about the machines of a run, which leave no trace in what it makes.
MACHINES = ("decode_tasks", "encode_resource", "wait_for_nodes")


class DataConfig(Part):
    """How clips become latents (Cinemo section 4.1) and how latents become shards."""

    frames: int = Field(16, ge=2, description="frames per sample, including the first (given) one")
    size: tuple[int, int] = Field((320, 512), description="height and width in pixels")
    other_shapes: tuple[Shape, ...] = Field(
        (),
        description="further [frames, height, width] that samples may have beside frames and size: each clip has that "
        "of the nearest aspect ratio, of those the longest that it has frames for",
    )
    frame_interval: tuple[int, int] = Field((3, 10), description="smallest and largest frame interval, drawn uniformly")
    views: int = Field(1, ge=1, description="independently drawn samples per clip")
    clips_per_shard: int = Field(256, ge=1)
    seed: int = Field(0, description="seed of every random draw in precompute, keyed by clip id and view")
    decoder: Literal["pyav", "decord"] = "pyav"
    clip_timeout: float = Field(120.0, gt=0, description="seconds a clip may take to decode before it is refused")
    clip_memory: float = Field(4.0, gt=0, description="GiB of address space for the decoding process")
    ssim: Literal["luma", "rgb"] = Field("luma", description="metric of the motion score; rgb = kornia reference")
    scores: bool = Field(
        False, description="also store what spoils motion: cuts, bars, still overlays, hashes that find duplicates"
    )
    fields: tuple[Literal["text_states", "first_frame", "frames", "image_tokens", "frame_tokens", "flow"], ...] = Field(
        (), description="what else is stored with the latents, in separate tars; may be added to a finished dataset"
    )
    bucket_edges: tuple[Annotated[float, Field(ge=-1, le=1)], ...] = Field(
        tuple(round(k / MOTION_BUCKETS, 6) for k in range(1, MOTION_BUCKETS)),
        description="19 ascending SSIM values between buckets; the default is uniform (Cinemo section 3.2)",
    )
    max_quarantine_share: float = Field(1.0, ge=0, le=1, description="stop when a larger share of clips is refused")
    encode_batch: int = Field(1, ge=1, description="clips handed to an encoder at a time; each is encoded on its own")
    decode_cpus: float = Field(1.0, ge=1e-4, description="cores that one decoding process reserves")
    decode_resource: str | None = Field(
        None, description="Ray resource of the nodes that decode (one unit per core); null: wherever a core is free"
    )
    decode_tasks: int = Field(
        0, ge=0, description="decoding processes at most; 0: as many as the cluster has cores for, which may change"
    )
    encode_actors: int = Field(
        0, ge=0, description="encoder processes at most; 0: as many as the cluster has accelerators, or cores, for"
    )
    encode_gpus: float = Field(0.0, ge=0, le=1, description="share of an accelerator for each encoder process")
    encode_resource: str | None = Field(
        None, description="Ray resource of the nodes that encode (one unit per encoder); null: wherever there is room"
    )
    wait_for_nodes: float = Field(
        900.0,
        ge=0,
        description="seconds that a cluster has to add the accelerators or cores that are missing, for training too",
    )

    @property
    def together(self) -> bool:
        """Whether one process decodes, scores and encodes a clip: all of it is work for the same cores."""
        return not (self.encode_gpus or self.encode_actors or self.decode_resource or self.encode_resource)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """All that samples may have; the recipe's own first."""
        return ((self.frames, *self.size), *self.other_shapes)

    @property
    def largest(self) -> Shape:
        """The shape of most pixels."""
        return max(self.shapes, key=math.prod)

    def of_shape(self, shape: Sequence[int]) -> DataConfig:
        """For samples of one (frames, height, width) alone."""
        frames, height, width = shape
        return self.model_copy(update={"frames": frames, "size": (height, width), "other_shapes": ()})

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        low, high = self.frame_interval
        if not 1 <= low <= high:
            raise ValueError(f"frame_interval is {self.frame_interval}, expected 1 <= low <= high")
        if min(self.size) < 8 or any(side % 8 for side in self.size):
            raise ValueError(f"size is {self.size}, expected multiples of 8 (the VAE halves it three times)")
        for frames, *size in self.other_shapes:
            if frames < 2 or min(size) < 8 or any(side % 8 for side in size):
                raise ValueError(
                    f"other_shapes has {[frames, *size]}, expected [frames, height, width]: at least 2, multiples of 8"
                )
        if len(set(self.shapes)) != len(self.shapes) or len(self.shapes) > MAX_SHAPES:
            raise ValueError(
                f"other_shapes is {self.other_shapes}, expected at most {MAX_SHAPES - 1} that differ from each other "
                f"and from frames and size, {self.shapes[0]}"
            )
        if len(self.bucket_edges) != MOTION_BUCKETS - 1 or sorted(set(self.bucket_edges)) != list(self.bucket_edges):
            raise ValueError(f"bucket_edges has {len(self.bucket_edges)} values, expected 19 strictly ascending ones")
        if len(set(self.fields)) != len(self.fields):
            raise ValueError(f"fields is {self.fields}, expected each at most once")
        return self
