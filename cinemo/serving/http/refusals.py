"""Answers that are not a success: one body for every fault, whoever found it, and the limit of a request's body."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cinemo.serving.http.schema import ErrorBody, Fault
from cinemo.types import InputError, RunError

log = logging.getLogger(__name__)

_HTTP_CODES = {
    400: "malformed_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
}
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class Refused(Exception):
    """An answer that is not a success, from inside an endpoint.

    Args:
        status: the HTTP status.
        code: a stable slug for programs. ``message``: one line for a person. ``param``: the field it is about.
        headers: more headers of the answer, as ``Retry-After``.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.fault = Fault(code=code, message=message, param=param, type=_kind(status))

    def about(self, field: str, other: str) -> Refused:
        """The same fault of another field."""
        message = self.fault.message.replace(field, other, 1)
        return Refused(self.status, self.fault.code, message, other, self.headers)


def add_error_answers(api: FastAPI) -> None:
    """Give every fault the body of `ErrorBody`: from an endpoint, pydantic, the router, or nobody (500, logged)."""

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return _answer(error.status, error.fault, error.headers)

    @api.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> JSONResponse:
        return refusal(422, "invalid_request", str(error))

    @api.exception_handler(RunError)
    async def unavailable(request: Request, error: RunError) -> JSONResponse:
        log.error("%s %s: %s", request.method, request.url.path, error)
        return refusal(503, "unavailable", "the server cannot answer right now", headers={"Retry-After": "5"})

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind not in _FORMS:
            message = f"the body is declared as {kind[:64]!r}, expected multipart/form-data"
            return refusal(415, "unsupported_media_type", message)
        fault = error.errors()[0]
        names = [str(part) for part in fault["loc"] if part not in ("body", "query", "path", "form", "header")]
        param = names[0][:64] if names else None
        code = {"missing": "missing_field", "extra_forbidden": "unknown_field"}.get(fault["type"], "invalid_value")
        message = str(fault["msg"]).removeprefix("Value error, ")
        if param and not message.startswith(f"{param}:"):
            message = f"{param}: {message}"
        return refusal(422, code, message, param)

    @api.exception_handler(HTTPException)
    async def http_fault(_: Request, error: HTTPException) -> JSONResponse:
        code = _HTTP_CODES.get(error.status_code, "refused")
        return refusal(error.status_code, code, str(error.detail), headers=error.headers)

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        name = getattr(request.state, "request_id", "unknown")
        log.error("%s: %s %s failed", name, request.method, request.url.path, exc_info=error)
        return refusal(500, "internal_error", f"the server failed; the error was logged as {name}")


def refusal(
    status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer of a fault where nothing can be raised (middleware)."""
    return _answer(status, Fault(code=code, message=message, param=param, type=_kind(status)), headers)


def _answer(status: int, fault: Fault, headers: Any) -> JSONResponse:
    return JSONResponse(ErrorBody(error=fault).model_dump(), status, headers)


def _kind(status: int) -> str:
    """The coarse class of an error in OpenAI's words."""
    names = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}
    return names.get(status, "server_error" if status >= 500 else "invalid_request_error")


class BodyLimit:
    """Refuse a body above ``limit`` bytes with 413: by its declared length at once, else while it arrives; and one
    that is not whole after ``seconds`` with 408."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message_413 = f"the request body is too large, expected at most {self.limit / 2**20:g} MiB"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > self.limit:
            await refusal(413, "body_too_large", message_413)(scope, receive, send)
            return
        arrived, whole, deadline = 0, False, anyio.current_time() + self.seconds

        async def counted() -> Message:
            nonlocal arrived, whole
            if whole:  # what comes now is the client's leaving, however late
                return await receive()
            try:
                with anyio.fail_after(deadline - anyio.current_time()):
                    message = await receive()
            except TimeoutError:
                message_408 = f"the request body was not complete after {self.seconds:g} seconds"
                raise HTTPException(408, message_408) from None
            arrived += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if arrived > self.limit:
                raise HTTPException(413, message_413)  # the one kind that FastAPI's form parser lets through
            return message

        await self.app(scope, counted, send)
