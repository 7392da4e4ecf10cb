"""Starts HAProxy for Ray Serve, with what a server needs that strangers reach, and Serve cannot be told.

Serve writes HAProxy's configuration from a template of its own, again at every change of its replicas, and starts the
binary that it was given. It is given this file (`command`), which completes the configuration and becomes HAProxy. It
runs without the packages of the environment: nothing but the standard library is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_IDLE_SECONDS = 60  # of a client that neither sends nor takes anything; event streams say something every 15
_UPLOADS_OF_ONE = 4  # one address may take a fourth of all uploads
# IPv6 hands out whole networks: somebody has 2^64 addresses of his own.
_WHO = "src,ipmask(32,64)"


@dataclass(frozen=True)
class ProxyLimits:
    """What of a server a client may take.

    Args:
        connections: open at once; more wait to be accepted. ``per_address``: from one that is not ``trusted``
            (networks, separated by commas); more are reset. 0: as many as there are.
        request_seconds: until headers, and until the body or its first 16 KB, must have arrived (else 408).
        requests: that the HTTP replicas answer at once. Of these an eighth are for uploads, an eighth for videos that
            are downloaded and a half for event streams (else 503): a fourth is always left for short requests.
    """

    connections: int = 16384
    per_address: int = 512
    trusted: str = "127.0.0.0/8,::1"
    request_seconds: int = 10
    requests: int = 512


def command(directory: Path, binary: str, limits: ProxyLimits, standby: Path) -> Path:
    """Write a program that stands for HAProxy's binary to a directory; Serve takes no arguments beside its path.

    Args:
        standby: socket of the server that answers while no HTTP replica does; it may come later.
    """
    program = directory / "haproxy"
    words = [sys.executable, "-IS", __file__, json.dumps(asdict(limits)), str(standby), binary]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    program.chmod(0o755)
    return program


def completed(config: str, limits: ProxyLimits, standby: Path) -> str:
    """Serve's configuration with deadlines, places for each kind of request, and no listener but the server's own.

    What no HTTP replica answers, ``standby`` does (a socket); what nobody answers is an error of the documented shape.

    Raises:
        ValueError: Serve writes another kind of configuration than the one this was made for.
    """
    sections = re.split(r"^(?=\S)", config, flags=re.MULTILINE)
    names = [section.partition("\n")[0].strip() for section in sections]
    if "defaults" not in names or "frontend http_frontend" not in names:
        raise ValueError("Ray Serve wrote a configuration without defaults or frontend http_frontend")
    kept = []
    for name, section in zip(names, sections, strict=True):
        if name in ("frontend prometheus", "listen stats"):
            continue  # they listen on every interface, and nothing asks them
        if name == "defaults":
            section = re.sub(r"^ +errorfile .*\n", "", section, flags=re.MULTILINE) + _defaults(limits)
        elif name == "frontend http_frontend":
            section = re.sub(
                r"^( +bind .*\n)", lambda bind: bind[1] + _rules(limits), section, count=1, flags=re.MULTILINE
            )
            section = re.sub(
                r'(return status 503) content-type text/plain string "[^"]*"', rf"\1 {_UNAVAILABLE}", section
            )
        elif name == "backend default_backend":
            section = f"{name}\n    server standby unix@{standby}\n"
        elif re.search(r"^ +server ", section, re.MULTILINE):
            # Serve's own proxy as the last resort: it denies what it does not know, and waits without end for the rest.
            section = re.sub(r"^ +server .* backup\n", "", section, flags=re.MULTILINE) + _answers(standby)
            section = re.sub(r"error-limit \d+", "error-limit 1", section)
        kept.append(section)
    return "".join(kept) + _TABLES


def _defaults(limits: ProxyLimits) -> str:
    late = f"the request was not complete after {limits.request_seconds} seconds"
    faults = [f"408 {_answer('request_timeout', late, 'invalid_request_error')}"]
    faults += [f"{status} {_answer(*fault, 'invalid_request_error')}" for status, fault in _REFUSALS.items()]
    faults += [f"{status} {_UNAVAILABLE}" for status in (500, 502, 503, 504)]  # clients ask again
    return f"""\
    timeout http-request {limits.request_seconds}s
    timeout client {_IDLE_SECONDS}s
""" + "".join(f"    http-error status {fault}\n" for fault in faults)


def _answers(standby: Path) -> str:
    """For the HTTP replicas: who steps in for them, and what becomes of Ray Serve's own answers in plain text."""
    text = "!{ res.hdr(content-type) -m beg application/json }"
    return f"""\
    server standby unix@{standby} backup no-check
    retry-on conn-failure empty-response
    http-request disable-l7-retry if !METH_GET
    http-response return status 503 {_UNAVAILABLE} if {{ status 404 }} {text} or {{ status ge 500 }} {text}
    http-response return status 400 {_answer(*_REFUSALS[400], "invalid_request_error")} if {{ status 400:499 }} {text}
"""


def _rules(limits: ProxyLimits) -> str:
    trusted = limits.trusted.replace(",", " ").strip()
    acl = f"    acl cinemo_trusted src {trusted}\n" if trusted else "    acl cinemo_trusted always_false\n"
    uploads, events = max(1, limits.requests // 8), max(1, limits.requests // 2)
    of_one = max(1, uploads // _UPLOADS_OF_ONE)
    busy, mine = "server_error", "rate_limit_error"
    lines = [
        "acl cinemo_upload method POST PUT PATCH",
        "acl cinemo_events path_end /events",
        "acl cinemo_video path_end /content",
    ]
    if limits.per_address:
        lines += [
            f"tcp-request connection track-sc0 {_WHO} table cinemo_addresses if !cinemo_trusted",
            f"tcp-request connection reject if {{ sc0_conn_cur gt {limits.per_address} }}",
        ]
    lines += [
        # Whoever is slow waits here, where a connection costs a few kilobytes, and takes no place of a replica.
        f"http-request wait-for-body time {limits.request_seconds}s if cinemo_upload",
        "http-request track-sc1 str(uploads) table cinemo_places if cinemo_upload",
        "http-request track-sc1 str(events) table cinemo_places if cinemo_events !cinemo_upload",
        "http-request track-sc1 str(videos) table cinemo_places if cinemo_video !cinemo_upload",
        f"http-request track-sc2 {_WHO} table cinemo_uploaders if cinemo_upload !cinemo_trusted",
        f"http-request return status 429 {_answer('too_many_uploads', 'too many uploads from your address', mine)}"
        f" hdr Retry-After 2 if cinemo_upload {{ sc2_conn_cur gt {of_one} }}",
    ]
    for kind, what, places in (
        ("upload", "uploads", uploads),
        ("video", "downloads", uploads),
        ("events", "event streams", events),
    ):
        answer = _answer("busy", f"too many {what} at once; try again in a moment", busy)
        lines.append(
            f"http-request return status 503 {answer} hdr Retry-After 2 if cinemo_{kind} {{ sc1_conn_cur gt {places} }}"
        )
    return acl + "".join(f"    {line}\n" for line in lines)


def _answer(code: str, message: str, kind: str) -> str:
    """The documented body of an error, as arguments of HAProxy's ``return`` and ``http-error``."""
    body = {"error": {"code": code, "message": message, "param": None, "type": kind}}
    return f"content-type application/json string '{json.dumps(body)}'"


# What HAProxy may say by itself to a request that it has read: code and message.
_REFUSALS = {
    400: ("malformed_request", "the request is not valid HTTP, or its headers are too large"),
    403: ("refused", "the request is refused"),
    413: ("body_too_large", "the request is too large"),
    425: ("too_early", "the request came too early; send it again"),
}
_UNAVAILABLE = (
    _answer("unavailable", "the server cannot answer right now; try again in a moment", "server_error")
    + " hdr Retry-After 1"
)
_TABLES = """\
backend cinemo_addresses
    stick-table type ipv6 size 100k expire 10m store conn_cur
backend cinemo_uploaders
    stick-table type ipv6 size 100k expire 10m store conn_cur
backend cinemo_places
    stick-table type string len 16 size 16 expire 10m store conn_cur
"""


def main(arguments: Sequence[str]) -> None:
    """``LIMITS STANDBY BINARY`` and HAProxy's arguments, ``-f FILE`` among them: completes the file, and becomes it."""
    limits, standby, binary, *options = arguments
    if "-f" in options:
        path = Path(options[options.index("-f") + 1])
        path.write_text(completed(path.read_text(), ProxyLimits(**json.loads(limits)), Path(standby)))
    # HAProxy would live on when the process that started it is killed, and keep the port.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(binary, [binary, *options])


if __name__ == "__main__":
    main(sys.argv[1:])
