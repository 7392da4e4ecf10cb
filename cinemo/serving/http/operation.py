"""The routes that say what is served, and how it does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import FastAPI, Header
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from cinemo.bundle import BundleCard
from cinemo.serving.http.description import answers
from cinemo.serving.http.exposition import Exposition
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import Health, Model, ModelList, PictureLimits
from cinemo.serving.store.jobs import JobStore


def add_models(api: FastAPI, card: Callable[[], BundleCard], limits: PictureLimits) -> None:
    @api.get("/v1/models", responses=answers(401))
    def models() -> ModelList:
        """The available models: one per server."""
        return ModelList(data=[Model.of(card(), limits)])

    @api.get("/v1/models/{model}", responses=answers(401, 404))
    def model(model: str) -> Model:
        """One model, with what it supports and its defaults."""
        served = card()
        if model != served.recipe.name:
            raise no_model(model, served)
        return Model.of(served, limits)


def add_operation(
    api: FastAPI, store: JobStore, ready: Callable[[], Awaitable[bool]], exposition: Exposition | None
) -> None:
    @api.get("/healthz")
    def health() -> Health:
        """The HTTP process is alive."""
        return Health(status="ok")

    @api.get("/readyz", responses={503: {"model": Health}})
    async def readiness() -> JSONResponse:
        """The model is loaded and ready for jobs (200), or not yet (503)."""
        is_ready = await ready()
        body = Health(status="ok" if is_ready else "starting", queued=await run_in_threadpool(store.waiting))
        return JSONResponse(body.model_dump(), 200 if is_ready else 503, None if is_ready else {"Retry-After": "2"})

    if exposition is not None:

        @api.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": _TEXT}}})
        async def metrics(accept: Annotated[str, Header()] = "") -> Response:
            """For Prometheus."""
            text, kind = await run_in_threadpool(exposition.render, accept, await ready())
            return Response(text, media_type=kind)


_TEXT = {"schema": {"type": "string"}}


def no_model(name: str, card: BundleCard) -> Refused:
    message = f"model {name[:64]!r} is not served; expected {card.recipe.name!r}"
    return Refused(404, "model_not_found", message, "model")
