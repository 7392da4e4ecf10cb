"""What the HTTP interface takes and gives: OpenAI's video jobs, with the controls of image animation added."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from fastapi import File, UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cinemo.animate import MAX_GUIDANCE, MAX_STEPS, check_text
from cinemo.bundle import BundleCard, MotionScale
from cinemo.config import MOTION_BUCKETS
from cinemo.media.motion import strength_to_bucket
from cinemo.serving.jobs import Job, Status


def _blank_is_absent(value: Any) -> Any:
    """A form field that was sent empty counts as not sent."""
    return None if value == "" else value


_Absent = BeforeValidator(_blank_is_absent)


class VideoForm(BaseModel):
    """The multipart form of ``POST /v1/videos``."""

    model_config = ConfigDict(extra="forbid")

    input_reference: Annotated[UploadFile, File(description="the picture to animate: PNG, JPEG or WebP")]
    prompt: str = Field(description="what happens; the encoder reads the first 77 tokens")
    negative_prompt: str = Field("", description="what should not be seen")
    model: Annotated[str | None, _Absent] = Field(None, description="name from /v1/models")
    motion_bucket: Annotated[int | None, _Absent] = Field(
        None, ge=0, lt=MOTION_BUCKETS, description="larger = more motion; the model's default where absent"
    )
    motion_strength: Annotated[float | None, _Absent] = Field(
        None, ge=0, le=1, description="the same as a share 0..1; give at most one of the two"
    )
    seed: Annotated[int | None, _Absent] = Field(None, ge=0, lt=2**53, description="drawn where absent")
    num_inference_steps: Annotated[int | None, _Absent] = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: Annotated[float | None, _Absent] = Field(None, ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)
    dct_init: Annotated[bool | None, _Absent] = Field(None, description="layout of the image in the initial noise")
    size: Annotated[str | None, _Absent] = Field(None, max_length=32, description="WIDTHxHEIGHT; one size per model")
    seconds: Annotated[str | None, _Absent] = Field(None, max_length=32, description="one length per model")

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _plain(cls, value: str, info: ValidationInfo) -> str:
        check_text(str(info.field_name), value)
        return value

    @model_validator(mode="after")
    def _one_motion(self) -> VideoForm:
        if self.motion_bucket is not None and self.motion_strength is not None:
            raise ValueError("motion_bucket and motion_strength are both given; give at most one of them")
        return self

    def controls(self, card: BundleCard) -> dict[str, Any]:
        """Every control with its value, the model's defaults filled in: what a job keeps as its request."""
        sample = card.recipe.sample
        bucket = sample.motion_bucket if self.motion_bucket is None else self.motion_bucket
        if self.motion_strength is not None:
            bucket = strength_to_bucket(self.motion_strength)
        return {
            "model": card.recipe.name,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "motion_bucket": bucket,
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
            "num_inference_steps": self.num_inference_steps or sample.steps,
            "guidance_scale": self.guidance_scale or sample.guidance_scale,
            "dct_init": sample.dct_init if self.dct_init is None else self.dct_init,
            "size": video_size(card),
            "seconds": video_seconds(card),
        }


class Fault(BaseModel):
    """``code``: a stable slug for programs. ``message``: one line for a person. ``param``: the field it is about."""

    code: str
    message: str
    param: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: Fault


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A job. Times are Unix seconds; ``size`` is WIDTHxHEIGHT; ``progress`` is a percentage."""

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    model: str
    prompt: str
    negative_prompt: str
    motion_bucket: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    dct_init: bool
    size: str
    seconds: str
    error: JobError | None = None

    @classmethod
    def of(cls, job: Job) -> Video:
        error = JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None
        times = {
            name: None if (value := getattr(job, name)) is None else int(value)
            for name in ("created_at", "started_at", "completed_at", "expires_at")
        }
        return cls(id=job.id, status=job.status, progress=job.progress, error=error, **times, **job.request)


class VideoList(BaseModel):
    """A page of jobs; ``after=last_id`` gives the next one."""

    object: Literal["list"] = "list"
    data: list[Video]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedVideo(BaseModel):
    """The answer to the deletion of a finished job."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class MotionBucket(BaseModel):
    """What a motion bucket means to a model. ``ssim``: the mean SSIM of neighbouring frames that it stands for, from
    and to. ``measured``: 1 - that SSIM in videos this model made at this bucket, where somebody measured it."""

    bucket: int
    ssim: tuple[float, float]
    measured: float | None = None


class Model(BaseModel):
    """A model that can be asked for, with what it supports and its defaults."""

    id: str
    object: Literal["model"] = "model"
    owned_by: str = "cinemo"
    digest: str
    size: str
    seconds: str
    frames: int
    fps: float
    motion_buckets: int = MOTION_BUCKETS
    motion: list[MotionBucket]
    defaults: dict[str, Any]

    @classmethod
    def of(cls, card: BundleCard) -> Model:
        sample = card.recipe.sample
        return cls(
            id=card.recipe.name,
            digest=card.digest,
            size=video_size(card),
            seconds=video_seconds(card),
            frames=card.recipe.data.frames,
            fps=sample.fps,
            motion=motion_buckets(card.motion),
            defaults={
                "motion_bucket": sample.motion_bucket,
                "num_inference_steps": sample.steps,
                "guidance_scale": sample.guidance_scale,
                "dct_init": sample.dct_init,
            },
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """``queued``: jobs that wait."""

    status: Literal["ok", "starting"]
    queued: int | None = None


def motion_buckets(scale: MotionScale) -> list[MotionBucket]:
    """The motion scale of a bundle, stillest bucket first, with its calibration where the bundle holds one."""
    bounds = (0.0, *scale.edges, 1.0)
    found = scale.calibration or {}
    measured = dict(zip(found.get("buckets", ()), found.get("mean_motion", ()), strict=False))
    return [
        MotionBucket(bucket=bucket, ssim=(bounds[-2 - bucket], bounds[-1 - bucket]), measured=measured.get(bucket))
        for bucket in range(MOTION_BUCKETS)
    ]


def video_size(card: BundleCard) -> str:
    """WIDTHxHEIGHT of what a model makes."""
    height, width = card.recipe.data.size
    return f"{width}x{height}"


def video_seconds(card: BundleCard) -> str:
    """The length of what a model makes, as a short decimal text."""
    return f"{card.recipe.data.frames / card.recipe.sample.fps:g}"
