"""How a request is made and its answer read, in whichever way it is sent: steps that a client carries out.

A `Flow` is a generator that yields steps and is sent their results. So retries, polling and downloads are written
once, and `Client` and `AsyncClient` differ only in how they carry out a step.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from cinemo.client.errors import APIError, ConnectionFailed, UnexpectedAnswer, api_error
from cinemo.client.types import ControlValue, Picture

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

LONGEST_PAUSE = 60.0  # what asks for more patience than this is an error for the caller
_FIRST_PAUSE, _LONGEST_BACKOFF = 0.5, 8.0
_PASSING = (408, 429, 500, 502, 503, 504, 507)
_MAGIC = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


@dataclass(frozen=True)
class Ask:
    """Send a request; the result is an `httpx.Response`, with its body unless ``stream``. ``timeout``: None: the
    client's own."""

    method: str
    path: str
    query: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    form: list[tuple[str, Any]] | None = None
    body: Any = None
    timeout: float | None = None
    stream: bool = False


@dataclass(frozen=True)
class NextPiece:
    """The next bytes of the body of the last answer that was asked for with ``stream``; None at its end."""


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class Do:
    """Call something that may wait for a disk; the result is what it returns."""

    call: Callable[[], Any]


@dataclass(frozen=True)
class Tell:
    """Call what the caller wants to be told by."""

    listener: Callable[[Any], Any]
    value: Any


Step = Ask | NextPiece | Pause | Do | Tell
Flow = Generator[Step, Any, T]


def answered(ask: Ask, max_retries: int) -> Flow[httpx.Response]:
    """A successful answer. Faults that pass are tried again after a pause that doubles, or as long as the server says.

    Raises:
        ConnectionFailed, APIError.
    """
    for retry in range(max_retries + 1):
        try:
            response: httpx.Response = yield ask
            if response.is_success:
                return response
            fault: APIError | ConnectionFailed = api_error(response)
        except httpx.RequestError as error:
            fault = connection_failed(error)
        if retry == max_retries or not is_passing(fault):
            fault.retries = retry
            raise fault
        yield Pause(pause_after(fault, retry))
    raise AssertionError("a negative number of retries")


def connection_failed(error: httpx.RequestError) -> ConnectionFailed:
    address = error.request.url.copy_with(query=None)
    failed = ConnectionFailed(f"{address}: {str(error) or type(error).__name__}")
    failed.__cause__ = error
    return failed


def is_passing(fault: APIError | ConnectionFailed) -> bool:
    """Whether the same request may be answered well in a moment."""
    if isinstance(fault, ConnectionFailed):
        return True
    return fault.status in _PASSING and not fault.video_id and (fault.retry_after or 0) <= LONGEST_PAUSE


def pause_after(fault: APIError | ConnectionFailed, retry: int) -> float:
    """Seconds to wait before the retry of this number, from 0."""
    backoff: float = min(_LONGEST_BACKOFF, _FIRST_PAUSE * 2 ** min(retry, 10)) * random.uniform(0.75, 1.0)
    wanted = fault.retry_after if isinstance(fault, APIError) else None
    return max(backoff, wanted or 0.0)


def parsed(kind: type[M], ask: Ask, max_retries: int) -> Flow[M]:
    """A successful answer as a value. Raises as `answered`, and `UnexpectedAnswer`."""
    response = yield from answered(ask, max_retries)
    return read_answer(kind, response.content, ask)


def read_answer(kind: type[M], content: bytes | str, ask: Ask) -> M:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "body"
        message = f"{ask.method} {ask.path} was not answered with a {kind.__name__}: {where}: {fault['msg']}"
        raise UnexpectedAnswer(f"{message}; is the address that of a cinemo server?") from None


def form_of(
    picture: Picture, pictures: Mapping[str, Picture], fields: Mapping[str, ControlValue]
) -> Flow[list[tuple[str, Any]]]:
    """The multipart form of a creation: files as bytes, so that it can be sent again.

    Raises:
        OSError: a file cannot be read.
    """
    form: list[tuple[str, Any]] = [(name, (None, text(value))) for name, value in fields.items() if value is not None]
    for name, each in {"input_reference": picture, **pictures}.items():
        if isinstance(each, str) and each.startswith(("https://", "http://", "data:")):
            form.append((f"{name}[image_url]" if name == "input_reference" else name, (None, each)))
        else:
            content: bytes = yield Do(partial(_read, each))
            form.append((name, (_file_name(each), content, _media_type(content))))
    return form


def text(value: ControlValue) -> str:
    """A value as the form has it."""
    if isinstance(value, str):
        return value
    return json.dumps(value)


def _read(picture: str | os.PathLike[str] | bytes | Any) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    return bytes(picture.read())


def _file_name(picture: Any) -> str:
    return Path(picture).name if isinstance(picture, str | os.PathLike) else "picture"


def _media_type(content: bytes) -> str:
    return next((kind for magic, kind in _MAGIC if content.startswith(magic)), "application/octet-stream")
