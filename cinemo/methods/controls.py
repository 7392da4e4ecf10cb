"""What a person may ask of a method, said once: flags, HTTP form, stored settings and page widgets are made from it.

A method's `Controls` is a pydantic model whose fields are made by `control`. None stands for the default of the recipe;
`Controls.settings` fills it in.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from cinemo.config import MOTION_BUCKETS, Recipe
from cinemo.media.arrows import MAX_ARROWS
from cinemo.methods.quality import QualityTable
from cinemo.types import InputError

MAX_PROMPT = 4000  # letters
MAX_STEPS = 999
MAX_SEED = 2**63 - 1
MIN_FRAMES, MAX_FRAMES = 2, 1024


def check_text(name: str, value: Any) -> None:
    """Raise `InputError` where ``value`` is no text that an encoder, a database and a video file can hold."""
    if not isinstance(value, str) or len(value) > MAX_PROMPT:
        got = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
        raise InputError(f"{name}: got {got}, expected a text of at most {MAX_PROMPT} characters")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{name}: holds a null character or half a surrogate pair, expected plain text")


def number_as_text(value: Any) -> Any:
    """A number, as JSON may have it, where a form has its text; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(value) if isinstance(value, int) else f"{value:g}"


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of ``WIDTHxHEIGHT``. Raises `InputError`: it is something else."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, re.ASCII)
    if match is None:
        raise InputError(f"size {text!r}: expected WIDTHxHEIGHT in pixels, such as 512x320")
    return int(match[2]), int(match[1])


@dataclass(frozen=True)
class Input:
    """A picture or video that a method takes beside the picture to animate.

    ``kind``: ``image`` (H, W, 3) or ``video`` (F, H, W, 3), uint8, of any size. Videos are for the command line and
    Python alone: the server's form takes pictures.
    """

    kind: Literal["image", "video"]
    description: str
    required: bool = False


def control(
    default: Any,
    description: str,
    *,
    title: str | None = None,
    place: Literal["front", "folded", "api"] = "api",
    alias: str | None = None,
    words: Mapping[int, str] | None = None,
    of: str | None = None,
    **limits: Any,
) -> Any:
    """A field of `Controls`.

    Args:
        default: None: the recipe's, from its ``sample.<name>`` unless `Controls.settings` knows better.
        title: its name for people.
        place: on the page: in sight, among more settings, or not there.
        alias: its name in HTTP, where that is another one.
        words: of a control with steps, from which value on which word holds.
        of: the input that it is about; a video is not for HTTP, and neither is what it is about.
        limits: as pydantic's `Field` takes them: ``ge``, ``le``, ``max_length``.
    """
    about: dict[str, Any] = {"place": place, "alias": alias, "words": dict(words or {}), "of": of}
    return Field(default, title=title, description=description, json_schema_extra={"about": about}, **limits)


# Names that interfaces have for other things: fields of a video and of its form, flags of ``pipelines/animate.py``.
RESERVED = frozenset(
    (
        *("id", "object", "status", "progress", "step", "created_at", "started_at", "completed_at", "expires_at"),
        *("deadline_at", "error", "deleted", "input_reference", "model", "prompt", "size", "seconds", "timeout"),
        *("image", "inputs", "bundle", "output", "save_latents", "device", "help", "recipe"),
        *("fps", "cinemo_version", "remixed_from_video_id", "prompt_tokens", "webhook_url", "estimated_seconds_left"),
        *("predicted_quality", "predicted_motion", "reuse", "reused", "previews", "lora", "lora_scale"),
    )
)


def check_names(controls: type[Controls], inputs: Collection[str]) -> None:
    """Whether interfaces can be made of a method's controls and inputs.

    Raises:
        TypeError: a name is taken, or used twice; or a control's type has no widget.
    """
    infos = controls_of(controls)
    names = [*infos, *inputs, *(info.alias for info in infos.values() if info.alias != info.name)]
    if taken := sorted({name for name in names if name in RESERVED or names.count(name) > 1}):
        raise TypeError(f"{controls.__name__}: {', '.join(taken)}: taken by an interface or used twice; rename it")


def _pair(value: Any) -> Any:
    """``0.1,0.9`` and ``[0.1, 0.9]``, as forms send pairs."""
    if isinstance(value, str):
        value = value.strip(" []").split(",")
        try:
            return tuple(float(part) for part in value)
        except ValueError:
            raise ValueError("expected two numbers, such as 0.1,0.9") from None
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[float, float], BeforeValidator(_pair)]
Arrow = tuple[float, float, float, float]


def _arrows(value: Any) -> Any:
    """``[[1, 2, 3, 4]]``, ``1,2,3,4`` and ``1,2,3,4;5,6,7,8``, as forms and flags send arrows."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[[") else value.strip(" ;").split(";")
        except (ValueError, RecursionError):
            raise ValueError("expected a list of arrows, such as [[10, 20, 60, 20]]") from None
    if not isinstance(value, list | tuple):
        return value
    arrows = [arrow.split(",") if isinstance(arrow, str) else arrow for arrow in value]
    try:
        made = tuple(tuple(float(number) for number in arrow) for arrow in arrows)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("expected four numbers x0,y0,x1,y1 for each arrow, such as 10,20,60,20") from None
    if any(len(arrow) != 4 for arrow in made):
        raise ValueError("expected four numbers x0,y0,x1,y1 for each arrow, such as 10,20,60,20")
    return made


Arrows = Annotated[tuple[Arrow, ...], BeforeValidator(_arrows), Field(max_length=MAX_ARROWS)]


class Controls(BaseModel):
    """What every method can be asked, and how much of the answer can be seen in its settings.

    ``motion``: the name of the control that says how much moves, a bucket 0..19, where a method has one; ``strength``:
    of the one that says it on a scale of 0..1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    motion: ClassVar[str | None] = None
    strength: ClassVar[str | None] = None

    negative_prompt: str = control(
        "", "what should not appear", title="What should not appear", place="folded", max_length=MAX_PROMPT
    )
    seed: int = control(0, "determines every random draw", title="Seed", place="front", ge=0, le=MAX_SEED)
    steps: int | None = control(
        None,
        "more are finer and slower",
        title="Steps",
        place="folded",
        alias="num_inference_steps",
        ge=1,
        le=MAX_STEPS,
    )
    guidance_scale: float | None = control(
        None, "how closely to follow the text, 1 = off", title="Follow the words", place="folded", ge=1, le=50
    )

    @classmethod
    def motion_values(cls, recipe: Recipe) -> tuple[str, Sequence[float]] | None:
        """The control that says how much moves, and its values from the least to the most; None where there is none."""
        return None if cls.motion is None else (cls.motion, range(MOTION_BUCKETS))

    @classmethod
    def defaults(cls, recipe: Recipe) -> dict[str, Any]:
        """What each control is where it is not given, by name."""
        return cls().settings(recipe)

    def calibrated(
        self, recipe: Recipe, calibration: Mapping[str, Any] | None, quality: QualityTable | None = None
    ) -> Self:
        """With what a bundle's measured motion (`MotionScale.calibration`) makes of a strength, and its measured ways
        to sample of a quality; here there is neither.

        Raises:
            InputError: a quality is asked for, and the bundle has no table.
        """
        return self

    def predicted(
        self, recipe: Recipe, calibration: Mapping[str, Any] | None, quality: QualityTable | None
    ) -> dict[str, Any]:
        """What to say beside the settings: ``predicted_quality`` where a quality is asked for, ``predicted_motion``
        where a strength of motion is, each only where the bundle was measured. Arguments as of `calibrated`."""
        return {}

    def check_picture(self, size: tuple[int, int]) -> None:
        """Whether they fit a picture to animate of this (height, width).

        Raises:
            InputError: they do not.
        """

    @field_validator("*")
    @classmethod
    def _plain_text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            check_text(str(info.field_name), value)
        return value

    @classmethod
    def of(cls, values: Mapping[str, Any], whose: str) -> Self:
        """Controls from Python values or those of a stored job; None counts as not given.

        Raises:
            InputError: an unknown name, a value of another type or out of range; ``whose`` controls is in the message.
        """
        plain = {name: _plain(value) for name, value in values.items() if value is not None}
        for name in plain:
            if name not in cls.model_fields:
                raise InputError(f"{name}: {whose} has no such control; it has {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(plain, strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
            name, message = ".".join(map(str, fault["loc"][:1])), str(fault["msg"]).removeprefix("Value error, ")
            if not name:
                raise InputError(message) from None
            if fault["type"] == "value_error":
                named = message.startswith((f"{name}: ", f"{name} is "))
                raise InputError(message if named else f"{name} is {_shown(plain[name])}; {message}") from None
            raise InputError(f"{name} is {_shown(plain[name])}, expected {expectation(cls, name)}") from None

    @classmethod
    def changed(cls, kept: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Controls of a video as they were ``kept``, changed by those ``given``; both by name."""
        return {**kept, **given}

    def settings(self, recipe: Recipe, inputs: Collection[str] = ()) -> dict[str, Any]:
        """Every control with its value, the recipe's defaults filled in: JSON values, kept with a video.

        ``inputs``: names of the pictures and videos that are given.
        """
        filled: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            value = getattr(recipe.sample, name, None) if value is None else value
            if value is not None:  # None: another way to say something, such as a share of a scale
                filled[name] = _listed(value)
        filled["guidance_scale"] = float(filled["guidance_scale"])
        return filled


@dataclass(frozen=True)
class ControlInfo:
    """A control as interfaces show it. ``kind``: what its value is; limits and choices where it has them."""

    name: str
    alias: str
    kind: Literal["integer", "number", "boolean", "text", "choice", "pair", "vectors"]
    default: Any
    title: str
    description: str
    place: Literal["front", "folded", "api"]
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    words: Mapping[int, str]
    of: str | None


def controls_of(controls: type[Controls]) -> dict[str, ControlInfo]:
    """Every control by name, in the order of the model's fields."""
    return {name: _info(name, field) for name, field in controls.model_fields.items()}


def expectation(controls: type[Controls], name: str) -> str:
    """What a control takes, in words: ``a whole number 0..19``."""
    info = controls_of(controls)[name]
    if info.choices:
        return " or ".join(info.choices)
    what = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "pair": "two numbers"}
    if info.kind == "vectors":
        return f"at most {MAX_ARROWS} arrows of four numbers x0,y0,x1,y1"
    if info.kind == "text":
        return f"a text of at most {info.maximum:g} characters" if info.maximum else "a text"
    limits = "" if info.minimum is None or info.maximum is None else f" {info.minimum:g}..{info.maximum:g}"
    if info.maximum == MAX_SEED:
        limits = " 0..2^63 - 1"
    return what[info.kind] + limits


def _info(name: str, field: FieldInfo) -> ControlInfo:
    options = [each for each in _union(field.annotation) if each is not type(None)]
    if len(options) != 1:
        raise TypeError(f"control {name}: {field.annotation} is more than one type; expected one, or one and None")
    annotation = options[0]
    choices: tuple[str, ...] = ()
    if typing.get_origin(annotation) is Literal:
        choices, kind = typing.get_args(annotation), "choice"
    else:
        kinds = {int: "integer", float: "number", bool: "boolean", str: "text"}
        kind = kinds.get(annotation, "vectors" if annotation == Arrows else "pair")
    limit = {
        key: getattr(part, key) for part in field.metadata for key in ("ge", "le", "max_length") if hasattr(part, key)
    }
    extra = field.json_schema_extra
    about: Any = extra.get("about", {}) if isinstance(extra, dict) else {}
    return ControlInfo(
        name=name,
        alias=about.get("alias") or name,
        kind=kind,  # type: ignore[arg-type]
        default=field.default,
        title=field.title or name.replace("_", " ").capitalize(),
        description=field.description or "",
        place=about.get("place", "api"),
        minimum=limit.get("ge"),
        maximum=limit.get("le", limit.get("max_length")),
        choices=choices,
        words=about.get("words", {}),
        of=about.get("of"),
    )


def _union(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's, lists as the tuples that they stand for."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return tuple(value) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    """Tuples as the lists that JSON has in their place."""
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 100 else f"{repr(value)[:80]}..."
