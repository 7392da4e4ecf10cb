"""From a request that was read to a job in the store: what is supported, its pictures, and who is told of its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from cinemo.bundle import BundleCard
from cinemo.methods import method_class
from cinemo.methods.controls import MAX_FRAMES, MIN_FRAMES, size_of
from cinemo.networks.adapters import parse_choice, unknown
from cinemo.serving.http.access import Client
from cinemo.serving.http.fetch import Fetcher
from cinemo.serving.http.form import VideoForm, VideoRequest, frames_of
from cinemo.serving.http.operation import no_model
from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.schema import video_seconds, video_size
from cinemo.serving.http.uploads import PARAM, cleaned, data_url, read_header
from cinemo.serving.http.webhooks import FIELD, Receivers
from cinemo.serving.store.jobs import Job, JobStore, KeyReused, QueueFull, QuotaExceeded
from cinemo.serving.store.results import Reuse, weights_digest
from cinemo.types import InputError

CountTokens = Callable[[str], tuple[int, int] | None]
"""Prompt -> how many tokens it has, and how many of them are read; None: not known."""

_PICTURES_AT_ONCE = 2  # a picture of 40 megapixels takes some 300 MB and a second or two to make anew


class Submission:
    """Makes jobs of requests.

    Args:
        pixels: of a picture, at most.
        fetcher: of pictures that are given by their URL; None: they are refused.
        receivers: of webhooks; None: they are refused.
        reuse: whose finished videos answer a request for the same, where it does not say otherwise.
    """

    def __init__(
        self,
        store: JobStore,
        pixels: int,
        fetcher: Fetcher | None = None,
        receivers: Receivers | None = None,
        tokens: CountTokens | None = None,
        reuse: Reuse = "own",
    ) -> None:
        self._reuse: Reuse = reuse
        self._store, self._pixels, self._fetcher, self._receivers = store, pixels, fetcher, receivers
        self._tokens = tokens or (lambda _: None)
        self._places = anyio.CapacityLimiter(_PICTURES_AT_ONCE)

    async def submit(
        self,
        asked: VideoRequest,
        card: BundleCard,
        client: Client,
        idempotency_key: str | None,
        source: Job | None = None,
    ) -> Job:
        """Queue a job.

        Args:
            source: the job whose pictures it has; None: they come with the request.

        Raises:
            Refused: something is not supported, a picture cannot be used, or no more jobs are taken.
            InputError: the controls do not fit the picture.
        """
        _check_supported(asked, card)
        if (webhook_url := asked.form.webhook_url) is not None:
            if self._receivers is None:
                message = f"{FIELD}: this server sends no webhooks; poll the video, or follow its events"
                raise Refused(400, "webhooks_not_supported", message, FIELD)
            await self._receivers.check(webhook_url)
        files = await self._sent(asked) if source is None else await self._kept(source)
        header = read_header(files["image"])
        asked.controls.check_picture((header.height, header.width))
        request = asked.asked(card)
        if source is not None:
            request["remixed_from_video_id"] = source.id
        if (tokens := await run_in_threadpool(self._tokens, asked.form.prompt)) is not None:
            used, limit = tokens
            request["prompt_tokens"] = {"used": used, "limit": limit, "cut": used > limit}
        submit = partial(
            self._store.submit,
            request,
            files.pop("image"),
            client=client.id,
            idempotency_key=idempotency_key,
            timeout=asked.form.timeout,
            quota=client.quota,
            drawn=("prompt_tokens", "predicted_quality", "predicted_motion", *(("seed",) if asked.seed_drawn else ())),
            others=files,
            steps=asked.calls(card),
            digest=weights_digest(card.digest, _adapter(asked.form.lora, card)),
            reuse="off" if asked.form.reuse is False else self._reuse,
            webhook_url=webhook_url,
        )
        try:
            return await run_in_threadpool(submit)
        except QueueFull as full:
            message = f"{full.waiting} jobs are waiting; try again in {full.retry_after} seconds"
            raise Refused(429, "queue_full", message, headers={"Retry-After": str(full.retry_after)}) from None
        except QuotaExceeded as quota:
            headers = {"Retry-After": str(quota.retry_after)}
            raise Refused(429, "quota_exceeded", quota.message, headers=headers) from None
        except KeyReused:
            message = "this Idempotency-Key was used before with another request; use a new one"
            raise Refused(422, "idempotency_key_reused", message, "Idempotency-Key") from None

    async def _sent(self, asked: VideoRequest) -> dict[str, bytes]:
        """The pictures of a request by name, as a job keeps them; ``image`` is the one to animate."""
        files = {"image": await self._cleaned(_reference(asked.form))}
        for name, given in asked.pictures.items():
            try:
                files[name] = await self._cleaned(given)
            except Refused as fault:
                raise fault.about(PARAM, name) from None
        return files

    async def _kept(self, source: Job) -> dict[str, bytes]:
        def read() -> dict[str, bytes]:
            return {name: self._store.media.read(place) for name, place in source.files.items()}

        try:
            return await run_in_threadpool(read)
        except FileNotFoundError:
            message = f"the pictures of {source.id} are gone; create a video with the picture itself"
            raise Refused(409, "picture_gone", message) from None

    async def _cleaned(self, given: UploadFile | str) -> bytes:
        content, declared = await self._content(given)
        return await anyio.to_thread.run_sync(cleaned, content, declared, self._pixels, limiter=self._places)

    async def _content(self, given: UploadFile | str) -> tuple[bytes, str | None]:
        """A picture as it was sent, or fetched, and its declared type."""
        if isinstance(given, UploadFile):
            return await given.read(), given.content_type
        if given.startswith("data:"):
            return data_url(given)
        if self._fetcher is None:
            message = f"{PARAM}: send the picture itself, as a file or a data URL; this server does not fetch URLs"
            raise Refused(400, "url_not_supported", message, PARAM)
        return await self._fetcher.fetch(given)


def _reference(form: VideoForm) -> UploadFile | str:
    given: Any = form.input_reference if form.image_url is None else form.image_url
    if given is None:
        message = f"{PARAM}: missing, expected the picture to animate, as a file or a data URL"
        raise Refused(422, "missing_field", message, PARAM)
    picture: UploadFile | str = given
    return picture


def _check_supported(asked: VideoRequest, card: BundleCard) -> None:
    form, wanted = asked.form, getattr(asked.controls, "frames", None)
    frames = wanted or card.recipe.data.frames
    if form.model not in (None, card.recipe.name):
        raise no_model(str(form.model), card)
    _adapter(form.lora, card)
    if getattr(asked.controls, "quality", None) is not None and card.quality is None:
        try:
            asked.settings(card)
        except InputError as error:
            raise Refused(400, "unsupported_quality", str(error), "quality") from None
    if form.size is not None:
        _check_size(form.size, card)
    if form.seconds is not None and frames_of(form.seconds, card.recipe) != frames:
        expected = video_seconds(card, frames)
        if "frames" in method_class(card.recipe).controls_type.model_fields and wanted is None:
            expected = f"a number from {video_seconds(card, MIN_FRAMES)} to {video_seconds(card, MAX_FRAMES)}"
        message = f"seconds: got {form.seconds!r}, expected {expected}"
        raise Refused(400, "unsupported_seconds", message, "seconds")


def _adapter(asked: str | None, card: BundleCard) -> str | None:
    """The sha256 of the adapter that is asked for."""
    if asked is None:
        return None
    name, _ = parse_choice(asked)
    if name not in card.adapters:
        raise Refused(404, "lora_not_found", str(unknown(name, card.adapters)), "lora")
    return card.adapters[name]


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
        message = f"size: got {text!r}, expected at most as many pixels as {video_size(card)!r} has"
        raise Refused(400, "unsupported_size", message, "size")
