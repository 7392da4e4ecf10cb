"""Answers that are not a success: one body for every fault, whoever found it, and the limit of a request's body."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cinemo.serving.http.schema import ErrorBody, Fault
from cinemo.serving.http.words import expectation, explained
from cinemo.types import BadPlace, InputError, NoRoom, RunError

log = logging.getLogger(__name__)

_HTTP_CODES = {
    400: "malformed_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
}


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
    async def refused(_: Request, error: Refused) -> Response:
        return _answer(error.status, error.fault, error.headers)

    @api.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> Response:
        return refusal(422, "invalid_request", str(error))

    @api.exception_handler(NoRoom)
    async def full(_: Request, error: NoRoom) -> Response:
        log.debug("%s", error)  # whoever runs the server is told once, not by every request
        return refusal(507, "insufficient_storage", "the server's disk is full", headers={"Retry-After": "30"})

    @api.exception_handler(BadPlace)
    @api.exception_handler(RunError)
    async def unavailable(request: Request, error: Exception) -> Response:
        log.error("%s %s: %s", request.method, request.url.path, error)
        return refusal(503, "unavailable", "the server cannot answer right now", headers={"Retry-After": "5"})

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        name = str(fault["loc"][-1])[:64]
        code, message = explained(fault, name, expectation(_documented(request, name)))
        return refusal(422, code, message, name)

    @api.exception_handler(HTTPException)
    async def http_fault(request: Request, error: HTTPException) -> Response:
        method, path = request.method[:16], request.url.path[:64]
        message, headers = str(error.detail), dict(error.headers or {})
        if error.status_code == 404:
            message = f"there is nothing at {path!r}; /openapi.json lists what there is"
        elif error.status_code == 405:
            allowed = _methods(request)
            headers["Allow"] = ", ".join(allowed)
            if method == "OPTIONS":
                return Response(status_code=204, headers=headers)
            message = f"{path!r} does not take {method}, expected {' or '.join(allowed[:-1])}"
        code = _HTTP_CODES.get(error.status_code, "refused")
        return refusal(error.status_code, code, message, headers=headers)


def _methods(request: Request) -> list[str]:
    """What a path takes, of all its routes; a route's own answer to another method names its own methods alone."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
    return [*sorted({method for route in routes for method in route.methods or ()} - {"OPTIONS"}), "OPTIONS"]


def _documented(request: Request, name: str) -> dict[str, Any]:
    """The schema of a parameter in the OpenAPI document."""
    operations = request.app.openapi()["paths"].get(request.scope["route"].path, {})
    parameters = operations.get(request.method.lower(), {}).get("parameters", ())
    return next((dict(each["schema"]) for each in parameters if each["name"] == name), {})


class Unexpected:
    """Answers where nothing else did: a fault of the server's own, which is logged under the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            if scope["type"] != "http" or begun:
                raise
            name = scope.get("state", {}).get("request_id", "unknown")
            log.error("%s: %s %s failed", name, scope["method"], scope["path"], exc_info=error)
            message = f"the server failed; the error was logged as {name}"
            await refusal(500, "internal_error", message)(scope, receive, send)


def refusal(
    status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The answer of a fault where nothing can be raised (middleware)."""
    return _answer(status, Fault(code=code, message=message, param=param, type=_kind(status)), headers)


def _answer(status: int, fault: Fault, headers: Any) -> Response:
    body = json.dumps(ErrorBody(error=fault).model_dump())  # ASCII: a name that was sent may hold half a surrogate pair
    return Response(body, status, headers, "application/json")


def _kind(status: int) -> str:
    """The coarse class of an error in OpenAI's words."""
    names = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}
    return names.get(status, "server_error" if status >= 500 else "invalid_request_error")


class BodyLimit:
    """Refuse a body above ``limit`` bytes with 413: by its declared length at once, else while it arrives; and one
    that, ``seconds`` after it began, falls behind ``rate`` bytes per second with 408."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float, rate: float) -> None:
        self.app, self.limit, self.seconds, self.rate = app, limit, seconds, rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message_413 = f"the request body is too large, expected at most {self.limit / 2**20:g} MiB"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or len(declared) > 18 or int(declared) > self.limit:
            await refusal(413, "body_too_large", message_413)(scope, receive, send)
            return
        arrived, whole, begun = 0, False, anyio.current_time()

        async def counted() -> Message:
            nonlocal arrived, whole
            if whole:  # what comes now is the client's leaving, however late
                return await receive()
            deadline = begun + self.seconds + arrived / self.rate
            try:
                with anyio.fail_after(deadline - anyio.current_time()):
                    message = await receive()
            except TimeoutError:
                message_408 = f"the request body arrived too slowly, expected {self.rate:g} bytes per second"
                raise HTTPException(408, message_408) from None
            arrived += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if arrived > self.limit:
                raise HTTPException(413, message_413)  # the one kind that FastAPI's form parser lets through
            return message

        await self.app(scope, counted, send)
