"""Files behind https:// URLs: fetched whole, within bounds of size and time, and gently.

Whoever wrote the manifest chose the hosts, so that any address is connected to; proxies and certificate authorities
come from the environment (``HTTPS_PROXY``, ``SSL_CERT_FILE``). A host that fails is nobody's bad clip, but neither may
it end a job: its clips are refused as ``unreachable``, for a later try.
"""

from __future__ import annotations

import email.utils
import fcntl
import functools
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cinemo.types import SET_TMPDIR, ClipError, local_faults

SECONDS = "CINEMO_HTTPS_SECONDS"  # a file may take, tries and pauses included
GIGABYTES = "CINEMO_HTTPS_GB"  # it may have
PER_HOST = "CINEMO_HTTPS_PER_HOST"  # files at a time from one host, on one machine
PLAIN = "CINEMO_HTTP"  # 1: http:// is a source too, and may be redirected to
SETTINGS = (SECONDS, GIGABYTES, PER_HOST, PLAIN)

_DEFAULTS = {SECONDS: 600.0, GIGABYTES: 4.0, PER_HOST: 4.0, PLAIN: 0.0}
_ATTEMPTS = 5
_REDIRECTS = 5
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 30.0
_PAUSE_SECONDS = 15.0
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REASONS = {401: "denied", 403: "denied", 404: "missing", 407: "denied", 410: "missing", 451: "denied"}
# After all attempts failed, a host has so many seconds in which a single attempt decides.
_DOWN_SECONDS = 60.0
_SLOTS = 1 << 10  # places in the lock file for each host

_down: dict[str, float] = {}


def setting(name: str) -> float:
    return float(os.environ.get(name) or _DEFAULTS[name])


class _Insecure(Exception):
    """What would be asked next is http."""


class _Failed(Exception):
    """An attempt that may go well the next time; after ``wait`` seconds, if the host said so."""

    def __init__(self, detail: str, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.wait = wait


def fetch(url: str, path: Path, span: tuple[int, int] | None = None) -> None:
    """Write what is behind a URL to a local file, or ``span``, (offset, length), of it.

    Raises:
        ClipError: of stage ``open``: ``missing`` (404, 410), ``denied`` (401, 403), ``too_large``, ``invalid_uri``,
            ``http_error`` (another answer that will stay); ``unreachable``: no whole answer within the time there is.
    """
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    if not host:
        raise ClipError("open", "invalid_uri", f"{url}: expected https://host/path")
    with _slot(host):
        deadline = time.monotonic() + setting(SECONDS)
        attempts = 1 if time.monotonic() - _down.get(host, -_DOWN_SECONDS) < _DOWN_SECONDS else _ATTEMPTS
        for attempt in range(1, attempts + 1):
            try:
                _attempt(url, path, span, deadline)
            except _Failed as fault:
                pause = max(fault.wait, random.uniform(0.5, 1) * min(2.0 ** (attempt - 1), _PAUSE_SECONDS))
                if attempt == attempts or time.monotonic() + pause > deadline:
                    _down[host] = time.monotonic()
                    raise ClipError("open", "unreachable", f"{url}: {fault}") from None
                time.sleep(pause)
            else:
                _down.pop(host, None)
                return


def _attempt(url: str, path: Path, span: tuple[int, int] | None, deadline: float) -> None:
    import httpx

    headers = {"Range": f"bytes={span[0]}-{span[0] + span[1] - 1}"} if span else {}
    limit = int(setting(GIGABYTES) * 1e9)
    try:
        with _client().stream("GET", url, headers=headers) as answer:
            _check(url, answer, span, limit)
            size = 0
            with local_faults(path, SET_TMPDIR), path.open("wb") as file:
                for piece in answer.iter_bytes(1 << 18):
                    size += len(piece)
                    if size > limit:
                        raise _too_large(url, limit)
                    if time.monotonic() > deadline:
                        raise _Failed(f"{size} bytes came within {setting(SECONDS):g} s ({SECONDS})")
                    file.write(piece)
            if span and size != span[1]:
                raise ClipError("open", "http_error", f"{url}: {size} bytes for a range of {span[1]}")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
        raise ClipError("open", "invalid_uri", f"{url}: {error}") from None
    except _Insecure as error:
        raise ClipError(
            "open", "http_error", f"{url}: leads to {error}, expected https ({PLAIN}=1 allows http)"
        ) from None
    except httpx.TooManyRedirects:
        raise ClipError("open", "http_error", f"{url}: redirects more than {_REDIRECTS} times") from None
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise _Failed(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None


def _check(url: str, answer: Any, span: tuple[int, int] | None, limit: int) -> None:
    """Raise unless the answer's content is what was asked for."""
    status = answer.status_code
    if status in _PASSING:
        raise _Failed(f"HTTP {status}", _retry_after(answer.headers.get("Retry-After", "")))
    if status == 200 and span:
        raise ClipError("open", "http_error", f"{url}: the server does not know ranges of bytes")
    if status != (206 if span else 200):
        raise ClipError("open", _REASONS.get(status, "http_error"), f"{url}: HTTP {status}")
    length = answer.headers.get("Content-Length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(url, limit)


def _too_large(url: str, limit: int) -> ClipError:
    return ClipError("open", "too_large", f"{url}: more than {limit / 1e9:g} GB ({GIGABYTES})")


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header, which may be a date."""
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


@functools.cache
def _client() -> Any:
    import httpx

    def check(request: httpx.Request) -> None:
        if request.url.scheme == "http" and not setting(PLAIN):
            raise _Insecure(str(request.url))

    return httpx.Client(
        follow_redirects=True,
        max_redirects=_REDIRECTS,
        timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
        headers={"User-Agent": "cinemo", "Accept": "*/*", "Accept-Encoding": "identity"},
        event_hooks={"request": [check]},
    )


@contextmanager
def _slot(host: str) -> Iterator[None]:
    """Hold one of a host's places on this machine. A lock goes with its process, however that ends."""
    most = min(_SLOTS, max(1, int(setting(PER_HOST))))
    first = int.from_bytes(hashlib.sha256(host.encode()).digest()[:6], "big") * _SLOTS
    descriptor = _lock_file()
    while True:
        for place in range(first, first + most):
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except (BlockingIOError, PermissionError):
                continue
            try:
                yield
            finally:
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)
            return
        time.sleep(random.uniform(0.02, 0.2))


@functools.cache
def _lock_file() -> int:
    """Locks of bytes far behind its end: it stays empty however many hosts there are."""
    path = Path(tempfile.gettempdir()) / f"cinemo-https-{os.getuid()}.lock"
    with local_faults(path, SET_TMPDIR):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
