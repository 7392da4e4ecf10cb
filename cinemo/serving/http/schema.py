"""What the HTTP interface takes and gives: OpenAI's video jobs, with the controls of image animation added."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal, Self

from fastapi import File, UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cinemo.animate import MAX_GUIDANCE, MAX_PROMPT, MAX_STEPS, check_text
from cinemo.bundle import BundleCard
from cinemo.config import MOTION_BUCKETS
from cinemo.media.motion import MotionScale, strength_to_bucket
from cinemo.serving.store.jobs import Job, Status

MAX_TIMEOUT = 7 * 24 * 3600.0
_INTERVAL = r"^\s*\[?\s*[0-9.eE+-]{1,24}\s*,\s*[0-9.eE+-]{1,24}\s*\]?\s*$"


def _blank_is_absent(value: Any) -> Any:
    """A form field that was sent empty counts as not sent."""
    return None if value == "" else value


_Absent = BeforeValidator(_blank_is_absent)


class VideoForm(BaseModel):
    """The multipart form of ``POST /v1/videos``."""

    model_config = ConfigDict(extra="forbid")

    input_reference: Annotated[
        UploadFile | str | None,
        _Absent,
        File(description="picture to animate: a PNG, JPEG or WebP file, or its URL (data:, or http(s): where enabled)"),
    ] = None
    image_url: Annotated[str | None, _Absent] = Field(
        None, alias="input_reference[image_url]", description="the URL, in the form of OpenAI's reference object"
    )
    prompt: str = Field(max_length=MAX_PROMPT, description="what happens; the encoder reads the first 77 tokens")
    negative_prompt: str = Field("", max_length=MAX_PROMPT, description="what should not appear")
    model: Annotated[str | None, _Absent] = Field(None, max_length=256, description="name from /v1/models")
    size: Annotated[str | None, _Absent] = Field(None, max_length=32, description="WIDTHxHEIGHT; one size per model")
    seconds: Annotated[str | None, _Absent] = Field(None, max_length=32, description="one length per model")
    motion_bucket: Annotated[int | None, _Absent] = Field(
        None, ge=0, lt=MOTION_BUCKETS, description="larger = more motion; if absent, the model's default"
    )
    motion_strength: Annotated[float | None, _Absent] = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="the same on a scale of 0..1; give at most one of the two"
    )
    seed: Annotated[int | None, _Absent] = Field(None, ge=0, lt=2**53, description="drawn at random if absent")
    num_inference_steps: Annotated[int | None, _Absent] = Field(None, ge=1, le=MAX_STEPS)
    guidance_scale: Annotated[float | None, _Absent] = Field(None, ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)
    dct_init: Annotated[bool | None, _Absent] = Field(
        None, description="start from noise that has the layout of the image"
    )
    solver: Annotated[Literal["ddim", "multistep"] | None, _Absent] = Field(
        None, description="multistep: DPM-Solver++, for about 20 steps"
    )
    guidance_interval: Annotated[str | None, _Absent] = Field(
        None, pattern=_INTERVAL, description="'low,high': the part of the noise range 0..1 that is guided"
    )
    reuse_features: Annotated[int | None, _Absent] = Field(
        None, ge=1, le=MAX_STEPS, description="run the inner layers only at every Nth step"
    )
    timeout: Annotated[float | None, _Absent] = Field(
        None, gt=0, le=MAX_TIMEOUT, allow_inf_nan=False, description="seconds from now after which the job fails"
    )

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _plain(cls, value: str, info: ValidationInfo) -> str:
        check_text(str(info.field_name), value)
        return value

    @field_validator("guidance_interval")
    @classmethod
    def _interval(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            low, high = (float(part) for part in value.strip(" []").split(","))
        except ValueError:
            raise ValueError("expected two numbers, such as 0.1,0.9") from None
        if not 0 <= low <= high <= 1:
            raise ValueError("expected 0 <= low <= high <= 1, such as 0.1,0.9")
        return json.dumps([low, high])

    @model_validator(mode="after")
    def _one_of_each(self) -> VideoForm:
        if self.motion_bucket is not None and self.motion_strength is not None:
            raise ValueError("motion_bucket and motion_strength are both given; give at most one of them")
        if self.input_reference is not None and self.image_url is not None:
            raise ValueError("input_reference is given twice, directly and as input_reference[image_url]")
        return self

    def controls(self, card: BundleCard) -> dict[str, Any]:
        """Every control with its value, the model's defaults filled in: what a job keeps as its request."""
        sample = card.recipe.sample
        bucket = sample.motion_bucket if self.motion_bucket is None else self.motion_bucket
        if self.motion_strength is not None:
            bucket = strength_to_bucket(self.motion_strength)
        interval = sample.guidance_interval if self.guidance_interval is None else json.loads(self.guidance_interval)
        return {
            "model": card.recipe.name,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "motion_bucket": bucket,
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
            "num_inference_steps": self.num_inference_steps or sample.steps,
            "guidance_scale": self.guidance_scale or sample.guidance_scale,
            "dct_init": sample.dct_init if self.dct_init is None else self.dct_init,
            "solver": self.solver or sample.solver,
            "guidance_interval": list(interval),
            "reuse_features": self.reuse_features or sample.reuse_features,
            "size": video_size(card),
            "seconds": video_seconds(card),
        }


class Fault(BaseModel):
    """``code``: a stable slug for programs. ``message``: one line for a person. ``param``: the field it is about.
    ``type``: the coarse class, in OpenAI's words."""

    code: str
    message: str
    param: str | None = None
    type: str = "invalid_request_error"


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: Fault


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A job. Times are Unix seconds; ``size`` is WIDTHxHEIGHT; ``progress`` is a percentage; ``step`` of ``steps`` is
    the same in the sampler's steps (0 of 0: not begun)."""

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int = Field(ge=0, le=100)
    step: int = Field(0, ge=0)
    steps: int = Field(0, ge=0)
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    deadline_at: int | None = None
    model: str
    prompt: str
    negative_prompt: str
    motion_bucket: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    dct_init: bool
    solver: str = "ddim"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    reuse_features: int = 1
    size: str
    seconds: str
    error: JobError | None = None

    @classmethod
    def of(cls, job: Job) -> Self:
        error = JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None
        times = {
            name: None if (value := getattr(job, name)) is None else int(value)
            for name in ("created_at", "started_at", "completed_at", "expires_at", "deadline_at")
        }
        kept = {name: value for name, value in job.request.items() if name in cls.model_fields}
        known = {"id": job.id, "status": job.status, "progress": job.progress, "step": job.step, "steps": job.steps}
        return cls.model_validate(kept | known | times | {"error": error})


class CancelledVideo(Video):
    """The answer to the deletion of an unfinished job: it stays, cancelled, until it is deleted again or expires."""

    deleted: Literal[False] = False


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
    deleted: Literal[True] = True


class MotionBucket(BaseModel):
    """What a motion bucket means to a model. ``ssim``: the range of mean SSIM between neighbouring frames that it
    stands for. ``measured``: 1 - that SSIM in videos this model made at this bucket, where it was measured."""

    bucket: int
    ssim: tuple[float, float]
    measured: float | None = None


class Model(BaseModel):
    """An available model, with what it supports and its defaults."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
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
                "solver": sample.solver,
                "guidance_interval": list(sample.guidance_interval),
                "reuse_features": sample.reuse_features,
            },
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """``queued``: jobs that are waiting."""

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
