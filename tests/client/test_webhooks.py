"""Signatures of webhooks: the published example, and everything that must not pass."""

from __future__ import annotations

import base64
import json
import time

import pytest

from cinemo.client import WebhookInvalid, webhooks
from cinemo.client.webhooks import signature, unwrap
from cinemo.serving.http.signatures import signature as signed_by_the_server

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = json.dumps({"id": "evt_1", "type": "video.completed", "created_at": 1, "data": {"id": "v1"}, "more": 1}).encode()


def headers(
    body: bytes = BODY, secret: str = SECRET, sent_at: float | None = None, name: str = "msg_1"
) -> dict[str, str]:
    stamp = str(int(time.time() if sent_at is None else sent_at))
    return {"Webhook-Id": name, "Webhook-Timestamp": stamp, "Webhook-Signature": signature(body, name, stamp, secret)}


def test_the_example_of_the_standard() -> None:
    """From the test vectors of the standard's own libraries."""
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signature(b'{"test": 2432232314}', "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", SECRET) == expected


def test_the_server_signs_the_same() -> None:
    assert signed_by_the_server(SECRET, "msg_1", 1614265330, BODY) == signature(BODY, "msg_1", "1614265330", SECRET)


def test_a_signed_event_is_read() -> None:
    event = unwrap(BODY, headers(), SECRET)
    assert (event.id, event.type, event.data.id) == ("evt_1", "video.completed", "v1")
    assert unwrap(BODY.decode(), {name.lower(): value for name, value in headers().items()}, SECRET) == event


def test_any_of_several_signatures_may_be_right() -> None:
    given = headers()
    given["Webhook-Signature"] = f"v1a,x v1,{base64.b64encode(b'x' * 32).decode()} {given['Webhook-Signature']}"
    assert unwrap(BODY, given, SECRET).type == "video.completed"


@pytest.mark.parametrize("ago", [-301, 301, 1e12])
def test_old_and_future_deliveries_are_refused(ago: float) -> None:
    with pytest.raises(WebhookInvalid, match="more than 300 s"):
        unwrap(BODY, headers(sent_at=max(0, time.time() - ago)), SECRET)
    assert unwrap(BODY, headers(sent_at=time.time() - 290), SECRET)


def test_what_was_changed_or_signed_otherwise_is_refused() -> None:
    other = "whsec_" + base64.b64encode(b"other").decode()
    good = headers()
    for body, given in [
        (BODY + b" ", good),
        (BODY, headers(secret=other)),
        (BODY, good | {"Webhook-Id": "msg_2"}),
        (BODY, good | {"Webhook-Timestamp": str(int(time.time()) + 1)}),
        (BODY, good | {"Webhook-Signature": ""}),
        (BODY, good | {"Webhook-Signature": good["Webhook-Signature"].removeprefix("v1,")}),
        (BODY, good | {"Webhook-Signature": "v1,é"}),
    ]:
        with pytest.raises(WebhookInvalid, match="no signature is right"):
            unwrap(body, given, SECRET)


@pytest.mark.parametrize("name", ["Webhook-Id", "Webhook-Timestamp", "Webhook-Signature"])
def test_a_missing_header_is_named(name: str) -> None:
    given = headers()
    del given[name]
    with pytest.raises(WebhookInvalid, match=name.lower()):
        unwrap(BODY, given, SECRET)


def test_a_signed_body_that_is_no_event_and_a_secret_that_is_none() -> None:
    with pytest.raises(WebhookInvalid, match="no event"):
        unwrap(b"[]", headers(b"[]"), SECRET)
    given = headers() | {"Webhook-Timestamp": "now"}
    given["Webhook-Signature"] = signature(BODY, "msg_1", "now", SECRET)
    with pytest.raises(WebhookInvalid, match="sent at now"):
        unwrap(BODY, given, SECRET)
    with pytest.raises(ValueError, match="copy it whole"):
        webhooks.unwrap(BODY, headers(), "whsec_no!")
