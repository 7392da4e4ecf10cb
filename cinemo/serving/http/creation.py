"""The routes that make jobs."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated

import anyio
from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from cinemo.bundle import BundleCard
from cinemo.methods import method_class
from cinemo.methods.controls import MAX_FRAMES, MIN_FRAMES, size_of
from cinemo.serving.http.access import Asking
from cinemo.serving.http.description import answers
from cinemo.serving.http.fetch import Fetcher
from cinemo.serving.http.form import VideoForm, VideoRequest, frames_of, read_form
from cinemo.serving.http.operation import no_model
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import Video, video_seconds, video_size
from cinemo.serving.http.settings import ApiSettings
from cinemo.serving.http.uploads import PARAM, cleaned, data_url, read_header
from cinemo.serving.store.jobs import JobStore, KeyReused, QueueFull, QuotaExceeded
from cinemo.types import InputError

_PICTURES_AT_ONCE = 2  # a picture of 40 megapixels takes some 300 MB and a second or two to make anew


def add_creation(
    api: FastAPI, store: JobStore, card: Callable[[], BundleCard], settings: ApiSettings, fetcher: Fetcher | None
) -> None:
    places = anyio.CapacityLimiter(_PICTURES_AT_ONCE)

    async def asked_form(request: Request) -> AsyncIterator[tuple[BundleCard, VideoRequest]]:
        """The model that is served now, and the form read for it; its files are closed after the answer."""
        model = card()
        try:
            yield model, await read_form(request, model)
        finally:
            await request.close()

    @api.post("/v1/videos", status_code=202, responses=answers(400, 401, 404, 408, 413, 415, 422, 429))
    async def create(
        client: Asking,
        response: Response,
        form: tuple[BundleCard, VideoRequest] = Depends(asked_form),
        idempotency_key: Annotated[
            str | None,
            Header(
                alias="Idempotency-Key",
                min_length=1,
                max_length=255,
                description="sending the same request again with the same key returns the same job",
            ),
        ] = None,
    ) -> Video:
        """Queue the animation of a picture."""
        model, asked = form
        _check_supported(asked, model)
        content, declared = await _reference(asked.form, fetcher)
        image = await anyio.to_thread.run_sync(cleaned, content, declared, settings.pixels, limiter=places)
        header = read_header(image)
        asked.controls.check_picture((header.height, header.width))
        others = {}
        for name, given in asked.pictures.items():
            try:
                content, declared = await _picture(given, fetcher)
                others[name] = await anyio.to_thread.run_sync(
                    cleaned, content, declared, settings.pixels, limiter=places
                )
            except Refused as fault:
                raise fault.about(PARAM, name) from None
        submit = partial(
            store.submit,
            asked.asked(model),
            image,
            client=client.id,
            idempotency_key=idempotency_key,
            timeout=asked.form.timeout,
            quota=client.quota,
            drawn=("seed",) if asked.seed_drawn else (),
            others=others,
        )
        try:
            job = await run_in_threadpool(submit)
        except QueueFull as full:
            message = f"{full.waiting} jobs are waiting; try again in {full.retry_after} seconds"
            raise Refused(429, "queue_full", message, headers={"Retry-After": str(full.retry_after)}) from None
        except QuotaExceeded as quota:
            headers = {"Retry-After": str(quota.retry_after)}
            raise Refused(429, "quota_exceeded", quota.message, headers=headers) from None
        except KeyReused:
            message = "this Idempotency-Key was used before with another request; use a new one"
            raise Refused(422, "idempotency_key_reused", message, "Idempotency-Key") from None
        response.headers["Location"] = f"/v1/videos/{job.id}"
        return Video.of(job)


async def _reference(form: VideoForm, fetcher: Fetcher | None) -> tuple[bytes, str | None]:
    """The picture to animate as it was sent, or fetched, and its declared type."""
    given = form.input_reference if form.image_url is None else form.image_url
    if given is None:
        message = "input_reference: Field required; this server animates a picture: send one as a file"
        raise Refused(422, "missing_field", message, PARAM)
    return await _picture(given, fetcher)


async def _picture(given: UploadFile | str, fetcher: Fetcher | None) -> tuple[bytes, str | None]:
    if isinstance(given, UploadFile):
        return await given.read(), given.content_type
    if given.startswith("data:"):
        return data_url(given)
    if fetcher is None:
        message = "input_reference: send the picture itself, as a file or a data URL; this server does not fetch URLs"
        raise Refused(400, "url_not_supported", message, PARAM)
    return await fetcher.fetch(given)


def _check_supported(asked: VideoRequest, card: BundleCard) -> None:
    form, wanted = asked.form, getattr(asked.controls, "frames", None)
    frames = wanted or card.recipe.data.frames
    if form.model not in (None, card.recipe.name):
        raise no_model(str(form.model), card)
    if form.size is not None:
        _check_size(form.size, card)
    if form.seconds is not None and frames_of(form.seconds, card.recipe) != frames:
        expected = f"{video_seconds(card, frames)!r}"
        if "frames" in method_class(card.recipe).controls_type.model_fields and wanted is None:
            expected = f"{video_seconds(card, MIN_FRAMES)} to {video_seconds(card, MAX_FRAMES)}"
        message = f"seconds {form.seconds!r} is not supported; expected {expected}"
        raise Refused(400, "unsupported_seconds", message, "seconds")


def _check_size(text: str, card: BundleCard) -> None:
    recipe = card.recipe
    try:
        size = size_of(text)
        method_class(recipe).sized(recipe, size)
    except InputError as error:
        raise Refused(
            400, "unsupported_size", f"{error}; the model's own size is {video_size(card)!r}", "size"
        ) from None
    if math.prod(size) > math.prod(recipe.data.size):
        message = f"size {text!r} is not supported; expected at most as many pixels as {video_size(card)!r} has"
        raise Refused(400, "unsupported_size", message, "size")
