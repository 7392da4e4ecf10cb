"""What the server answers, typed. Fields that a newer server adds are kept (``model_extra``), never refused.

More may be absent here than this server leaves out: other servers of this interface answer with less.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict

Picture = str | os.PathLike[str] | bytes | BinaryIO
"""A picture: its path, its address (``https://``, ``http://`` or ``data:``), its bytes, or an open file."""

ControlValue = str | int | float | bool | None | tuple[Any, ...] | list[Any]
"""The value of a control of the model; None: as if it were not given."""

Variant = Literal["video", "thumbnail", "spritesheet", "gif"]
Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
FINAL = ("completed", "failed", "cancelled")


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Fault(Answer):
    """``code``: a stable slug for programs. ``message``: one line for a person. ``param``: the field it is about.
    ``type``: the coarse class, in OpenAI's words."""

    code: str
    message: str
    param: str | None = None
    type: str = "invalid_request_error"


class ErrorBody(Answer):
    error: Fault


class JobError(Answer):
    """Why a video failed."""

    code: str
    message: str


class PromptTokens(Answer):
    """How much of a prompt is read: ``used`` tokens, of which the text encoder reads the first ``limit``. ``cut``: the
    rest of the prompt has no effect."""

    used: int
    limit: int
    cut: bool


class Video(Answer):
    """A video, made or in the making. Times are Unix seconds; ``size`` is WIDTHxHEIGHT; ``progress`` is a percentage;
    ``step`` of ``steps`` is the same in the sampler's steps (0 of 0: not begun); ``estimated_seconds_left``: until the
    end, where the server measured what steps take."""

    id: str
    object: str = "video"
    status: Status | str
    progress: int = 0
    step: int = 0
    steps: int = 0
    estimated_seconds_left: float | None = None
    created_at: int = 0
    started_at: int | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    deadline_at: int | None = None
    model: str = ""
    prompt: str | None = None
    size: str = ""
    seconds: str = ""
    error: JobError | None = None
    remixed_from_video_id: str | None = None
    prompt_tokens: PromptTokens | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it: it is completed, failed or cancelled."""
        return self.status in FINAL

    @property
    def controls(self) -> Mapping[str, Any]:
        """Whatever else the server says of it: the controls of the model that it was made with, by name."""
        return self.model_extra or {}


class Preview(Answer):
    """What a video looks like before it is made. ``frames``: a few, as ``data:`` addresses of pictures."""

    id: str
    object: str = "video.preview"
    step: int
    frames: list[str]


class CancelledVideo(Video):
    """The answer to the deletion of an unfinished video: it stays, cancelled, until it is deleted again or expires."""

    deleted: bool = False


class DeletedVideo(Answer):
    """The answer to the deletion of a finished video."""

    id: str
    object: str = "video.deleted"
    deleted: bool = True


class VideoList(Answer):
    """A page of videos; ``after=last_id`` gives the next one."""

    object: str = "list"
    data: list[Video]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class MotionLevel(Answer):
    """What a level of motion means to a model. ``ssim``: the range of mean SSIM between neighbouring frames that it
    stands for. ``measured``: 1 - that SSIM in videos that this model made at this level, where it was measured;
    ``interval``: what nine of ten of them were between."""

    bucket: int
    ssim: tuple[float, float]
    measured: float | None = None
    interval: tuple[float, float] | None = None


class Control(Answer):
    """A control of a model: what ``create(..., NAME=VALUE)`` takes. ``setting``: its name in the settings inside a
    video's file. ``default``: None where the server draws one. ``place``: of its widget on the page; ``words``: from
    which value on which word holds; ``levels``: of the control that says how much moves, what its values mean."""

    name: str
    setting: str
    title: str
    description: str
    kind: str
    default: Any
    minimum: float | None
    maximum: float | None
    choices: list[str]
    place: str
    words: list[tuple[int, str]]
    levels: list[MotionLevel]


class PictureInput(Answer):
    """A picture that a model takes beside the one to animate: what ``create(..., pictures={NAME: PICTURE})`` takes."""

    name: str
    description: str
    required: bool


class PictureLimits(Answer):
    """What a server takes: ``bytes`` of a whole request, ``pixels`` of each picture in it."""

    bytes: int
    pixels: int


class Model(Answer):
    """A model, with what it supports and its defaults. ``controls``: in the order in which people see them.
    ``qualities``: by name, what is predicted of a video that asks for it; empty where nobody measured.
    ``adapters``: what ``lora`` may name. ``toy``: its videos
    show the method at work, not what it can do."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = ""
    digest: str = ""
    size: str = ""
    seconds: str = ""
    frames: int = 0
    fps: float = 0.0
    motion_buckets: int = 0
    motion: list[MotionLevel] = []
    defaults: dict[str, Any] = {}
    controls: list[Control] = []
    pictures: list[PictureInput] = []
    picture_limits: PictureLimits | None = None
    toy: bool = False
    qualities: dict[str, dict[str, Any]] = {}
    adapters: list[str] = []


class ModelList(Answer):
    object: str = "list"
    data: list[Model]


@dataclass(frozen=True)
class RenderedVideo:
    """A video that was created and waited for in one request. ``id``: None where the server does not say it.
    ``content``: of the mp4 file."""

    id: str | None
    content: bytes

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the mp4."""
        Path(path).write_bytes(self.content)
        return Path(path)
