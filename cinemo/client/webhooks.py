"""Webhooks that a server sends, verified: https://www.standardwebhooks.com, version 1 (HMAC-SHA256)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping

from pydantic import ValidationError

from cinemo.client.errors import WebhookInvalid
from cinemo.client.types import Answer

TOLERANCE_SECONDS = 300.0


class WebhookData(Answer):
    """``id``: of the video."""

    id: str


class WebhookEvent(Answer):
    """``type``: what happened, ``video.completed`` or ``video.failed``. ``id``: of the event, the same where it is
    delivered more than once. ``created_at``: Unix seconds."""

    id: str = ""
    object: str = "event"
    created_at: int = 0
    type: str
    data: WebhookData


def unwrap(
    body: bytes | str, headers: Mapping[str, str], secret: str, tolerance: float = TOLERANCE_SECONDS
) -> WebhookEvent:
    """The event of a webhook request whose signature is right.

    Args:
        body: as it came, not parsed and written again. ``headers``: of the request, in any case.
        secret: that the server signs with, as it gave it (``whsec_...``).
        tolerance: seconds that the clocks may be apart; what is older was recorded and sent again.

    Raises:
        WebhookInvalid: the signature is missing, wrong or too old, or the body is no event.
        ValueError: the secret is malformed.
    """
    content = body.encode() if isinstance(body, str) else body
    given = {name.lower(): value for name, value in headers.items()}
    try:
        name, sent_at, signatures = (given[f"webhook-{part}"] for part in ("id", "timestamp", "signature"))
    except KeyError as missing:
        raise WebhookInvalid(f"the header {missing.args[0]} is missing") from None
    expected = signature(content, name, sent_at, secret)
    if not any(hmac.compare_digest(each.encode(), expected.encode()) for each in signatures.split()):
        raise WebhookInvalid("no signature is right: another secret, or the body was changed")
    if not sent_at.isdecimal() or abs(time.time() - int(sent_at)) > tolerance:
        raise WebhookInvalid(f"sent at {sent_at}, more than {tolerance:g} s from now by this clock")
    try:
        return WebhookEvent.model_validate_json(content)
    except ValidationError as error:
        raise WebhookInvalid(f"the body is no event: {error.errors()[0]['msg']}") from None


def signature(body: bytes, name: str, sent_at: str, secret: str) -> str:
    """What ``webhook-signature`` must hold, for a delivery's id ``name`` and its time in Unix seconds.

    Raises:
        ValueError: the secret is not base64.
    """
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise ValueError("a webhook secret is 'whsec_' and base64; copy it whole") from None
    signed = f"{name}.{sent_at}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
