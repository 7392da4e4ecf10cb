"""What is wrong with a value, in words: its name, what was got, what was expected; made of the documented schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile

Schema = Mapping[str, Any]

_CODES = {"missing": "missing_field", "extra_forbidden": "unknown_field"}


def explained(fault: Mapping[str, Any], name: str, expected: str) -> tuple[str, str]:
    """The code and the line for one of pydantic's faults.

    Args:
        fault: as ``ValidationError.errors()`` gives it.
        name: of the field that it is about; empty where it is about several.
        expected: what the field takes (`expectation`).
    """
    code, name = _CODES.get(fault["type"], "invalid_value"), name or "the body"
    if code == "missing_field":
        return code, f"{name}: missing, expected {expected}"
    if code == "unknown_field":
        return code, f"{name}: there is no such field, expected {expected}"
    message = str(fault["msg"])
    if fault["type"] == "value_error":  # a validator of ours, which has its own words
        message = message.removeprefix("Value error, ")
        if name == "the body" or message.startswith((f"{name}:", f"{name} is ")):
            return code, message
        return code, f"{name}: got {shown(fault['input'])}, {message}"
    return code, f"{name}: got {shown(fault['input'])}, expected {expected}"


def expectation(schema: Schema) -> str:
    """What a JSON Schema takes: ``a whole number from 0 to 19``."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if kinds:
        return " or ".join(expectation(kind) for kind in kinds)
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _limits(schema)
    if kind == "boolean":
        return "true or false"
    if schema.get("format") == "binary" or "contentMediaType" in schema:
        return "a picture"
    low, high = schema.get("minLength"), schema.get("maxLength")
    if high is None:
        return "a text"
    return f"a text of {low} to {high} characters" if low else f"a text of at most {high} characters"


def shown(value: Any) -> str:
    """A value that was sent, short enough for a line."""
    if isinstance(value, UploadFile):
        return "a file"
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:60]}... ({len(text)} characters)"


def _limits(schema: Schema) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high = schema.get("maximum")
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    ends = [f" {word} {_number(end)}" for word, end in (("of at least", low), ("above", above)) if end is not None]
    ends += [] if high is None else [f" {'and ' if ends else 'of '}at most {_number(high)}"]
    return "".join(ends)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)
