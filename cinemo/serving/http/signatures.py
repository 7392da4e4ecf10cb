"""Signatures of webhooks, as Standard Webhooks says (https://www.standardwebhooks.com): HMAC-SHA256, version 1."""

from __future__ import annotations

import base64
import hashlib
import hmac

from cinemo.types import InputError

_PREFIX = "whsec_"


def read_secret(text: str) -> bytes:
    """The key in a secret as Standard Webhooks writes it. Raises `InputError`."""
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except ValueError:
        key = b""
    if not text.startswith(_PREFIX) or not 24 <= len(key) <= 64:
        raise InputError(
            "webhook_secret: expected whsec_ and 24 to 64 random bytes in base64; make one with "
            "python -c \"import base64, os; print('whsec_' + base64.b64encode(os.urandom(32)).decode())\""
        )
    return key


def secret_of(secret: str, client: str) -> str:
    """The secret that events for one API key are signed with: its own, so that its holder can sign for nobody else.
    Without keys (an empty ``client``) it is the server's."""
    if not client:
        return secret
    own = hmac.digest(read_secret(secret), f"webhooks of {client}".encode(), "sha256")
    return _PREFIX + base64.b64encode(own).decode()


def signature(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    """The ``webhook-signature`` header."""
    signed = b"%s.%d.%s" % (event_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.new(read_secret(secret), signed, hashlib.sha256).digest()).decode()
