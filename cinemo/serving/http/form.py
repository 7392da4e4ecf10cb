"""What ``POST /v1/videos`` and a remix take, as a form or as JSON: OpenAI's fields, and the model's own."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import fastapi
from fastapi import File, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from cinemo.bundle import BundleCard
from cinemo.config import Recipe
from cinemo.methods import Controls, method_class, served_controls
from cinemo.methods import controls as method_controls
from cinemo.methods.controls import MAX_FRAMES, MAX_PROMPT, MIN_FRAMES, check_text, number_as_text
from cinemo.methods.long import expected_calls
from cinemo.networks.adapters import parse_choice
from cinemo.serving.http.fetch import MAX_URL
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import video_seconds, video_size
from cinemo.serving.http.words import expectation, explained

MAX_TIMEOUT = 7 * 24 * 3600.0
MAX_SEED = 2**53 - 1  # of the whole numbers that JSON can hold
PICTURE = "input_reference"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_PAIR = r"^\s*\[?\s*[0-9.eE+-]{1,24}\s*,\s*[0-9.eE+-]{1,24}\s*\]?\s*$"


def _blank_is_absent(value: Any) -> Any:
    """A form field that was sent empty counts as not sent."""
    return None if value == "" else value


_Absent = BeforeValidator(_blank_is_absent)


class VideoForm(BaseModel):
    """The fields that every model takes."""

    model_config = ConfigDict(extra="forbid")

    input_reference: Annotated[
        fastapi.UploadFile | str | None,  # which knows its schema; a form's files are of the class below it
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
    seconds: Annotated[str | None, _Absent, BeforeValidator(number_as_text)] = Field(
        None, max_length=32, description="length; or give frames"
    )
    timeout: Annotated[float | None, _Absent] = Field(
        None, gt=0, le=MAX_TIMEOUT, allow_inf_nan=False, description="seconds from now after which the job fails"
    )

    lora: Annotated[str | None, _Absent] = Field(
        None, max_length=100, description="NAME or NAME:SCALE of an adapter in /v1/models; SCALE 1 is as it was trained"
    )
    previews: Annotated[bool | None, _Absent] = Field(
        None, description="true: /events also sends a few small frames of the video while it is made"
    )
    reuse: Annotated[bool | None, _Absent] = Field(
        None, description="false: make the video again, although one of the same request, seed included, is finished"
    )
    webhook_url: Annotated[str | None, _Absent] = Field(
        None, max_length=MAX_URL, description="told when the video is completed or failed, signed; where enabled"
    )

    @field_validator("prompt")
    @classmethod
    def _plain(cls, value: str) -> str:
        check_text("prompt", value)
        return value

    @field_validator("lora")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None:
            parse_choice(value)
        return value

    @model_validator(mode="after")
    def _one_picture(self) -> VideoForm:
        if self.input_reference is not None and self.image_url is not None:
            raise ValueError("input_reference is given twice, directly and as input_reference[image_url]")
        return self


@dataclass(frozen=True)
class VideoRequest:
    """A request that was read.

    ``pictures``: those sent beside the picture to animate, by the names of the method's inputs. ``inputs``: names of
    all that the job will have. ``seed_drawn``: the client gave none.
    """

    form: VideoForm
    controls: Controls
    pictures: dict[str, UploadFile | str]
    inputs: frozenset[str]
    seed_drawn: bool

    def asked(self, card: BundleCard) -> dict[str, Any]:
        """The prompt and every control with its value, the model's defaults filled in: what a job keeps."""
        settings = self.settings(card)
        values = {info.alias: settings[name] for name, info in served_controls(card.recipe).items() if name in settings}
        named = {"model": card.recipe.name, "prompt": self.form.prompt}
        seconds = video_seconds(card, settings.get("frames"))
        length = {"size": self.form.size or video_size(card), "seconds": seconds}
        previews: dict[str, Any] = {"previews": True} if self.form.previews else {}
        if self.form.lora is not None:
            named["lora"] = "{}:{:g}".format(*parse_choice(self.form.lora))
        is_measured = self.form.lora is None and self.form.size in (None, video_size(card)) and "frames" not in settings
        predicted = self.controls.predicted(card.recipe, card.motion.calibration, card.quality) if is_measured else {}
        return {**named, **values, **length, **previews, **predicted}

    def calls(self, card: BundleCard) -> int:
        """How often the network will be asked, as far as can be said."""
        return expected_calls(card.recipe, self.settings(card))

    def settings(self, card: BundleCard) -> dict[str, Any]:
        """Every control with its value. Raises `InputError`: a quality is asked for that the bundle has no table of."""
        controls = self.controls.calibrated(card.recipe, card.motion.calibration, card.quality)
        return controls.settings(card.recipe, self.inputs)


async def read_body(request: Request) -> dict[str, Any]:
    """The fields of a request's body, by name: of a form, or of a JSON object, where null is absent.

    Raises:
        Refused: 415 it is declared as something else, 400 it is not what it is declared as.
        HTTPException: the form cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            value = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise Refused(400, "malformed_request", "the body is declared as JSON, but is none") from None
        if not isinstance(value, dict):
            raise Refused(400, "malformed_request", "the body is not a JSON object")
        if not all(map(str.isprintable, value)):  # half a surrogate pair, which JSON can hold
            raise Refused(400, "malformed_request", "a field's name has characters that cannot be shown")
        fields = {name: each for name, each in value.items() if each is not None}
        reference = fields.get("input_reference")
        if isinstance(reference, dict):  # OpenAI's reference object
            del fields["input_reference"]
            fields |= {f"input_reference[{name}]": each for name, each in reference.items() if each is not None}
        return fields
    if kind not in _FORMS:
        message = f"the body is declared as {kind[:64]!r}, expected multipart/form-data or application/json"
        raise Refused(415, "unsupported_media_type", message)
    try:
        return dict(await request.form())
    except HTTPException:
        raise
    except Exception as error:
        raise HTTPException(400, "there was an error parsing the body") from error


def parse(body: Mapping[str, Any], card: BundleCard, kept: Mapping[str, Any] | None = None) -> VideoRequest:
    """What was asked, for the model that is served.

    Args:
        body: fields by name.
        kept: the request of the job that is to be made again (`Job.request`): its settings hold where none are given,
            its pictures anyway.

    Raises:
        Refused: 422 a missing, unknown or wrong field.
    """
    method, infos = method_class(card.recipe), served_controls(card.recipe)
    names = {info.alias: name for name, info in infos.items()}
    pictures = {name for name, about in method.inputs.items() if about.kind == "image"}
    values: dict[str, Any] = {name: value for name, value in body.items() if name not in names.keys() | pictures}
    asked: dict[str, Any] = {names[alias]: value for alias, value in body.items() if alias in names and value != ""}
    given: dict[str, Any] = {name: body[name] for name in pictures if body.get(name) not in (None, "")}
    if kept is not None:
        if sent := sorted({*given, *(body.keys() & {PICTURE, f"{PICTURE}[image_url]"})}):
            message = f"{sent[0]}: a remix keeps the pictures of its source; create a video for another picture"
            raise Refused(422, "unknown_field", message, sent[0])
        values = {name: kept[name] for name in ("model", "size", "lora") if name in kept} | values
        before = {name: kept[alias] for alias, name in names.items() if alias in kept}
        if "seconds" in values:
            before.pop("frames", None)
        asked = method.controls_type.changed(before, asked)
    faults: list[Any] = []
    if not isinstance(values.get(PICTURE, ""), UploadFile | str):
        faults.append({"type": "picture", "loc": (PICTURE,), "msg": "", "input": values.pop(PICTURE)})
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
            faults.append({"type": "less_than_equal", "loc": ("seed",), "msg": "", "input": asked["seed"]})
    except ValidationError as error:
        for fault in error.errors():  # named as in the form
            own = infos.get(str(fault["loc"][0])) if fault["loc"] else None
            faults.append({**fault, "loc": (own.alias,)} if own else fault)
    inputs = frozenset(given if kept is None else kept.get("inputs", ()))
    for name, about in method.inputs.items():
        if about.kind == "image" and about.required and name not in inputs:
            faults.append({"type": "missing", "loc": (name,), "msg": "", "input": None})
        elif name in given and not isinstance(given[name], UploadFile | str):
            faults.append({"type": "picture", "loc": (name,), "msg": "", "input": given[name]})
    if faults or form is None or controls is None:
        raise _refused(faults[0], card.recipe)
    return VideoRequest(form, controls, given, inputs, seed_drawn)


def _refused(fault: Mapping[str, Any], recipe: Recipe) -> Refused:
    param = str(fault["loc"][0])[:64] if fault["loc"] else None
    fields = form_schema(recipe)["properties"]
    controls = {info.alias: info for info in served_controls(recipe).values()}
    if fault["type"] == "extra_forbidden":
        expected = ", ".join(fields)
    elif param in controls and controls[param].kind in ("pair", "vectors"):
        expected = method_controls.expectation(method_class(recipe).controls_type, controls[param].name)
    else:
        expected = expectation(fields.get(param, {}))
    code, message = explained(fault, param or "", expected)
    return Refused(422, code, message, param)


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
