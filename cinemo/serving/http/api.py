"""The HTTP interface over the job store. It decodes pictures and previews, runs no model and knows nothing of Ray.

Every answer that is not a success has the body ``{"error": {"code", "message", "param", "type"}}``; no answer holds a
path or a stack trace, and bad input never ends in a 5xx.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import FastAPI
from fastapi.routing import APIRoute

import cinemo
from cinemo.bundle import BundleCard
from cinemo.serving.http.access import KeyCheck
from cinemo.serving.http.cors import Cors
from cinemo.serving.http.creation import add_creation
from cinemo.serving.http.description import answers, describe
from cinemo.serving.http.events import EventStreams
from cinemo.serving.http.exposition import Exposition, Observed
from cinemo.serving.http.fetch import Fetcher
from cinemo.serving.http.operation import add_models, add_operation
from cinemo.serving.http.refusals import BodyLimit, Unexpected, add_error_answers
from cinemo.serving.http.schema import PictureLimits
from cinemo.serving.http.settings import ApiSettings
from cinemo.serving.http.submission import CountTokens, Submission
from cinemo.serving.http.videos import add_events, add_jobs
from cinemo.serving.http.webhooks import Receivers, describe_webhooks
from cinemo.serving.page.routes import add_page
from cinemo.serving.store.jobs import JobStore
from cinemo.serving.store.keys import KeyStore

__all__ = ["ApiSettings", "build_api"]


def build_api(
    store: JobStore,
    card: Callable[[], BundleCard],
    ready: Callable[[], Awaitable[bool]],
    settings: ApiSettings = ApiSettings(),  # noqa: B008
    keys: KeyStore | None = None,
    fetcher: Fetcher | None = None,
    receivers: Receivers | None = None,
    tokens: CountTokens | None = None,
) -> FastAPI:
    """The application.

    Args:
        card: of the bundle that is served now.
        ready: whether a model is loaded and its runner alive.
        keys: where given, every request under ``/v1`` needs one of them, and sees that key's jobs alone.
        fetcher: where URLs are fetched, instead of one by the settings.
        receivers: which addresses webhooks may go to; None: there are none. A `WebhookSender` sends them.
        tokens: of a prompt.

    Returns:
        the application; ``state.streams`` are its `EventStreams`.
    """
    api = FastAPI(
        title="cinemo", version=cinemo.__version__, docs_url=None, redoc_url=None, responses=answers(500, 503)
    )
    streams = EventStreams(store, settings.event_seconds, settings.keep_alive_seconds, settings.event_streams)
    exposition = Exposition(store.statistics, lambda: len(streams))
    api.state.streams = streams
    # The last one added sees a request first: who asks is known before anything of the body is taken.
    api.add_middleware(BodyLimit, limit=settings.body_bytes, seconds=settings.body_seconds, rate=settings.body_rate)
    api.add_middleware(Unexpected)
    api.add_middleware(KeyCheck, keys=keys, also=("/metrics",) if settings.metrics == "key" else ())
    if settings.cors_origins:
        api.add_middleware(Cors, origins=settings.cors_origins)
    api.add_middleware(Observed, exposition=exposition, named=settings.requests_named)
    add_error_answers(api)
    if settings.fetch_urls and fetcher is None:
        fetcher = Fetcher(settings.body_bytes, settings.fetch_seconds, settings.fetch_ports)
    submission = Submission(store, settings.pixels, fetcher, receivers, tokens, settings.reuse)
    add_creation(api, store, card, submission, streams, settings.sync_seconds)
    add_jobs(api, store)
    add_events(api, store, streams)
    add_models(api, card, PictureLimits(bytes=settings.body_bytes, pixels=settings.pixels))
    add_operation(api, store, ready, exposition if settings.metrics != "off" else None)
    answer_head(api)
    add_page(api)
    describe_webhooks(api)
    api.openapi = partial(describe, api, keys is not None, card)  # type: ignore[method-assign]
    return api


def answer_head(api: FastAPI) -> None:
    """HEAD is answered wherever GET is, without the body, which the server leaves out (RFC 9110, 9.3.2): watchers of
    uptime ask so. Not where the answer has no end."""
    routes = [route for route in api.routes if isinstance(route, APIRoute)]
    own = {route.path for route in routes if "HEAD" in (route.methods or ())}
    for route in routes:
        if "GET" in (route.methods or ()) and route.path not in own and not route.path.endswith("/events"):
            api.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                include_in_schema=False,
                response_model=route.response_model,
                response_class=route.response_class,
            )
