"""The multipart form of ``POST /v1/videos``: OpenAI's fields, and the controls and pictures of the model's method."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import File, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.exceptions import HTTPException

from cinemo.bundle import BundleCard
from cinemo.config import Recipe
from cinemo.methods import Controls, method_class, served_controls
from cinemo.methods.controls import MAX_FRAMES, MAX_PROMPT, MIN_FRAMES, check_text
from cinemo.serving.http.schema import video_seconds, video_size

MAX_TIMEOUT = 7 * 24 * 3600.0
MAX_SEED = 2**53 - 1  # of the whole numbers that JSON can hold
_PAIR = r"^\s*\[?\s*[0-9.eE+-]{1,24}\s*,\s*[0-9.eE+-]{1,24}\s*\]?\s*$"


def _blank_is_absent(value: Any) -> Any:
    """A form field that was sent empty counts as not sent."""
    return None if value == "" else value


_Absent = BeforeValidator(_blank_is_absent)


class VideoForm(BaseModel):
    """The fields that every model takes."""

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
    model: Annotated[str | None, _Absent] = Field(None, max_length=256, description="name from /v1/models")
    size: Annotated[str | None, _Absent] = Field(
        None, max_length=32, description="WIDTHxHEIGHT of no more pixels than the model's own size, which it makes best"
    )
    seconds: Annotated[str | None, _Absent] = Field(None, max_length=32, description="length; or give frames")
    timeout: Annotated[float | None, _Absent] = Field(
        None, gt=0, le=MAX_TIMEOUT, allow_inf_nan=False, description="seconds from now after which the job fails"
    )

    @field_validator("prompt")
    @classmethod
    def _plain(cls, value: str) -> str:
        check_text("prompt", value)
        return value

    @model_validator(mode="after")
    def _one_picture(self) -> VideoForm:
        if self.input_reference is not None and self.image_url is not None:
            raise ValueError("input_reference is given twice, directly and as input_reference[image_url]")
        return self


@dataclass(frozen=True)
class VideoRequest:
    """A form that was read. ``pictures``: those beside the picture to animate, by the names of the method's inputs."""

    form: VideoForm
    controls: Controls
    pictures: dict[str, UploadFile | str]
    seed_drawn: bool

    def asked(self, card: BundleCard) -> dict[str, Any]:
        """The prompt and every control with its value, the model's defaults filled in: what a job keeps."""
        controls = self.controls.calibrated(card.recipe, card.motion.calibration)
        settings = controls.settings(card.recipe, self.pictures.keys())
        values = {info.alias: settings[name] for name, info in served_controls(card.recipe).items() if name in settings}
        named = {"model": card.recipe.name, "prompt": self.form.prompt}
        seconds = video_seconds(card, settings.get("frames"))
        return {**named, **values, "size": self.form.size or video_size(card), "seconds": seconds}


async def read_form(request: Request, card: BundleCard) -> VideoRequest:
    """The form in a request's body, for the model that is served.

    Raises:
        RequestValidationError: a missing, unknown or wrong field.
        HTTPException: the body is no form.
    """
    try:
        body = await request.form()
    except HTTPException:
        raise
    except Exception as error:
        raise HTTPException(400, "there was an error parsing the body") from error
    method, infos = method_class(card.recipe), served_controls(card.recipe)
    names = {info.alias: name for name, info in infos.items()}
    pictures = {name for name, about in method.inputs.items() if about.kind == "image"}
    values: dict[str, Any] = {name: value for name, value in body.items() if name not in names.keys() | pictures}
    asked: dict[str, Any] = {names[alias]: value for alias, value in body.items() if alias in names and value != ""}
    faults: list[Any] = []
    form = controls = None
    try:
        form = VideoForm.model_validate(values)
    except ValidationError as error:
        faults += error.errors()
    if form is not None and form.seconds is not None and "frames" in infos and "frames" not in asked:
        frames = frames_of(form.seconds, card.recipe)
        asked |= {"frames": frames} if MIN_FRAMES <= frames <= MAX_FRAMES else {}
    seed_drawn = "seed" not in asked
    if seed_drawn:
        asked["seed"] = secrets.randbits(32)
    try:
        controls = method.controls_type.model_validate(asked)
        if controls.seed > MAX_SEED:
            message = f"Input should be less than or equal to {MAX_SEED}"
            faults.append({"type": "less_than_equal", "loc": ("seed",), "msg": message, "input": asked["seed"]})
    except ValidationError as error:
        for fault in error.errors():  # named as in the form
            own = infos.get(str(fault["loc"][0])) if fault["loc"] else None
            faults.append({**fault, "loc": (own.alias,)} if own else fault)
    given: dict[str, Any] = {name: body[name] for name in pictures if body.get(name) not in (None, "")}
    for name, about in method.inputs.items():
        if about.kind == "image" and about.required and name not in given:
            faults.append({"type": "missing", "loc": (name,), "msg": "Field required", "input": None})
    if faults or form is None or controls is None:
        raise RequestValidationError([{**fault, "loc": ("body", *fault["loc"])} for fault in faults])
    return VideoRequest(form, controls, given, seed_drawn)


def frames_of(seconds: str, recipe: Recipe) -> int:
    """How many frames a text of seconds stands for; 0 where it is no such number."""
    try:
        return round(float(seconds) * recipe.sample.fps)
    except (ValueError, OverflowError):
        return 0


def form_schema(recipe: Recipe, reference: str = "#/components/schemas/{model}") -> dict[str, Any]:
    """JSON Schema of the form of a recipe's model."""
    schema = VideoForm.model_json_schema(ref_template=reference)
    for name, info in served_controls(recipe).items():
        field = control_schema(method_class(recipe).controls_type, name)
        if name == "seed":
            field |= {"maximum": MAX_SEED, "description": "drawn at random if absent"}
        if info.kind == "pair":
            field = {"type": "string", "pattern": _PAIR, "description": f"'low,high': {info.description}"}
        if info.kind == "vectors":
            forms = "'x0,y0,x1,y1;...' or JSON [[x0, y0, x1, y1], ...]"
            field = {"type": "string", "description": f"{forms}: {info.description}"}
        schema["properties"][info.alias] = field
    for name, about in method_class(recipe).inputs.items():
        if about.kind == "image":
            schema["properties"][name] = {"type": "string", "format": "binary", "description": about.description}
            schema["required"] += [name] if about.required else []
    return schema


def control_schema(controls: type[Controls], name: str) -> dict[str, Any]:
    """JSON Schema of one control's value."""
    schema = dict(controls.model_json_schema()["properties"][name])
    kinds = [kind for kind in schema.pop("anyOf", []) if kind.get("type") != "null"]
    schema |= kinds[0] if len(kinds) == 1 else {}
    return {key: value for key, value in schema.items() if key not in ("about", "default", "title")}
