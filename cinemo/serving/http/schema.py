"""What the HTTP interface answers: OpenAI's video jobs, with the controls of the model's method added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from cinemo.bundle import BundleCard
from cinemo.config import MOTION_BUCKETS
from cinemo.media.motion import MotionScale
from cinemo.methods import method_class, served_controls
from cinemo.methods.quality import NAMES
from cinemo.serving.store.jobs import Job, Status

_TOY_SIDE = 128  # pixels


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


class PromptTokens(BaseModel):
    """How much of a prompt is read: ``used`` tokens, of which the text encoder reads the first ``limit``. ``cut``: the
    rest of the prompt has no effect."""

    used: int = Field(ge=0)
    limit: int = Field(ge=0)
    cut: bool


class Video(BaseModel):
    """A job. Times are Unix seconds; ``size`` is WIDTHxHEIGHT; ``progress`` is a percentage; ``step`` of ``steps`` is
    the same in the sampler's steps (0: not begun). ``estimated_seconds_left``: until the job is completed, from what
    steps take on this server and the jobs before it; null where nothing was measured yet. Beside these it has the
    controls of the model that it was made by, under their names in the form."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int = Field(ge=0, le=100)
    step: int = Field(0, ge=0)
    steps: int = Field(0, ge=0)
    estimated_seconds_left: float | None = Field(None, ge=0)
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    deadline_at: int | None = None
    model: str
    prompt: str
    size: str
    seconds: str
    error: JobError | None = None
    remixed_from_video_id: str | None = None
    prompt_tokens: PromptTokens | None = None

    @classmethod
    def of(cls, job: Job) -> Self:
        error = JobError(code=job.error_code, message=job.error_message or "") if job.error_code else None
        times = {
            name: None if (value := getattr(job, name)) is None else int(value)
            for name in ("created_at", "started_at", "completed_at", "expires_at", "deadline_at")
        }
        known = {"id": job.id, "status": job.status, "progress": job.progress, "step": job.step, "steps": job.steps}
        left = None if job.seconds_left is None else round(job.seconds_left, 1)
        return cls.model_validate(dict(job.request) | known | times | {"error": error, "estimated_seconds_left": left})


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


class Named(BaseModel):
    """The video that an event is about."""

    id: str


class WebhookEvent(BaseModel):
    """What is posted to a ``webhook_url``, signed as Standard Webhooks says. ``id`` is the same at every try."""

    id: str
    object: Literal["event"] = "event"
    created_at: int
    type: Literal["video.completed", "video.failed"]
    data: Named


class MotionLevel(BaseModel):
    """What a level of motion means to a model. ``ssim``: the range of mean SSIM between neighbouring frames that it
    stands for. ``measured``: 1 - that SSIM in videos that this model made at this level, where it was measured;
    ``interval``: what nine of ten of them were between."""

    bucket: int
    ssim: tuple[float, float]
    measured: float | None = None
    interval: tuple[float, float] | None = None


class Control(BaseModel):
    """A control of a model, as a form shows it. ``name``: of its field in the form, and of its value in a video;
    ``setting``: of its value in the settings inside a video's file.
    ``default``: null where the server draws one. ``place``: of its widget on the page; ``api``: it has none.
    ``words``: from which value on which word holds. ``levels``: of the control that says how much moves, what its
    values mean, from 0 on."""

    name: str
    setting: str
    title: str
    description: str
    kind: Literal["integer", "number", "boolean", "text", "choice", "pair", "vectors"]
    default: Any
    minimum: float | None
    maximum: float | None
    choices: list[str]
    place: Literal["front", "folded", "api"]
    words: list[tuple[int, str]]
    levels: list[MotionLevel]


class Picture(BaseModel):
    """A picture that a model takes beside the one to animate, by the name of its field in the form."""

    name: str
    description: str
    required: bool


class PictureLimits(BaseModel):
    """What a server takes: ``bytes`` of a whole request, ``pixels`` of each picture in it."""

    bytes: int
    pixels: int


class Model(BaseModel):
    """An available model, with what it supports and its defaults. ``controls``: in the order in which people see them.
    ``motion``: as the ``levels`` of its motion control; empty where it has none. ``pictures``: that it takes beside
    ``input_reference``, with what they are. ``qualities``: by name, what is predicted of a video that asks for it;
    empty where nobody measured. ``adapters``: names of LoRA adapters, for the field ``lora``. ``picture_limits``: how
    large each picture may be. ``toy``: its videos have a side of less than 128 pixels: they show the method at work,
    not what it can do."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "cinemo"
    digest: str
    size: str
    seconds: str
    frames: int
    fps: float
    motion_buckets: int
    motion: list[MotionLevel]
    defaults: dict[str, Any]
    controls: list[Control]
    pictures: list[Picture]
    qualities: dict[str, dict[str, Any]]
    adapters: list[str]
    picture_limits: PictureLimits
    toy: bool

    @classmethod
    def of(cls, card: BundleCard, limits: PictureLimits) -> Model:
        method = method_class(card.recipe)
        infos = served_controls(card.recipe)
        settings, usual = method.controls_type().settings(card.recipe), method.controls_type.defaults(card.recipe)
        motion = infos.get(method.controls_type.motion or "")
        levels = motion_levels(card.motion)[: int(motion.maximum or 0) + 1] if motion else []
        measured = "" if levels else _measured(card)
        places = {name: info.place for name, info in infos.items()}
        strength = method.controls_type.strength or ""
        if measured:
            places[strength] = "front"
        controls = [
            Control(
                name=info.alias,
                setting=name,
                title=info.title,
                description=f"{info.description}; {measured}" if measured and name == strength else info.description,
                kind=info.kind,
                default=None if name == "seed" else usual.get(name),
                minimum=info.minimum,
                maximum=None if info.maximum is None else min(info.maximum, 2**53 - 1),  # what JavaScript holds
                choices=list(info.choices),
                place=places[name],
                words=sorted(info.words.items()),
                levels=levels if name == method.controls_type.motion else [],
            )
            for name, info in sorted(
                infos.items(), key=lambda item: _rank(item[0], places, method.controls_type.motion)
            )
        ]
        own = [name for name in infos if name in settings and name not in ("negative_prompt", "seed")]
        return cls(
            id=card.recipe.name,
            digest=card.digest,
            size=video_size(card),
            seconds=video_seconds(card),
            frames=card.recipe.data.frames,
            fps=card.recipe.sample.fps,
            motion_buckets=len(levels),
            motion=levels,
            defaults={infos[name].alias: settings[name] for name in own if settings[name] is not None},
            controls=controls,
            pictures=[
                Picture(name=name, description=about.description, required=about.required)
                for name, about in method.inputs.items()
                if about.kind == "image"
            ],
            qualities={name: card.quality.predicted(name) for name in NAMES} if card.quality else {},
            adapters=sorted(card.adapters),
            picture_limits=limits,
            toy=min(card.recipe.data.size) < _TOY_SIDE,
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """``queued``: jobs that are waiting."""

    status: Literal["ok", "starting"]
    queued: int | None = None


def _rank(name: str, places: Mapping[str, str], motion: str | None) -> tuple[int, bool, bool]:
    """In which order people see controls: by place, how much moves first, what is drawn at random last."""
    return ("front", "folded", "api").index(places[name]), name != motion, name == "seed"


def _measured(card: BundleCard) -> str:
    """What a strength of 0..1 gives, of a bundle whose control was measured; else empty."""
    kind = method_class(card.recipe).controls_type
    if kind.strength is None:
        return ""
    ends = [
        kind.model_validate({kind.strength: end}).predicted(card.recipe, card.motion.calibration, card.quality)
        for end in (0.0, 1.0)
    ]
    if not all("predicted_motion" in each for each in ends):
        return ""
    told = ("{mean:.2g} ({low:.2g} to {high:.2g})".format_map(each["predicted_motion"]) for each in ends)
    return "measured, 1 - SSIM of neighbouring frames and what nine of ten videos are between: {} to {}".format(*told)


def motion_levels(scale: MotionScale) -> list[MotionLevel]:
    """The motion scale of a bundle, stillest bucket first, with its calibration where the bundle holds one."""
    bounds = (0.0, *scale.edges, 1.0)
    found = scale.calibration or {}
    values = found.get("values", found.get("buckets", ()))  # older calibrations knew of buckets alone
    measured = dict(zip(values, found.get("mean_motion", ()), strict=False))
    intervals = dict(zip(values, zip(*found.get("interval", ((), ())), strict=True), strict=False))
    return [
        MotionLevel(
            bucket=bucket,
            ssim=(bounds[-2 - bucket], bounds[-1 - bucket]),
            measured=measured.get(bucket),
            interval=intervals.get(bucket),
        )
        for bucket in range(MOTION_BUCKETS)
    ]


def video_size(card: BundleCard) -> str:
    """WIDTHxHEIGHT of what a model makes."""
    height, width = card.recipe.data.size
    return f"{width}x{height}"


def video_seconds(card: BundleCard, frames: int | None = None) -> str:
    """The length of so many frames as a short decimal text; None: as many as the model makes at once."""
    return f"{(frames or card.recipe.data.frames) / card.recipe.sample.fps:g}"
