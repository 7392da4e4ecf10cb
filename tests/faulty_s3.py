"""A proxy before an S3 server that fails as networks do, the same way for the same seed.

What a request meets depends on the seed, its method and path and how often it came before, never on arrival order.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from cinemo.types import keyed_seed

FAULTS = ("500", "503", "slow", "drop", "lose_reply", "cut_reply")
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>injected</Message></Error>'
_CODES = {"500": "InternalError", "501": "NotImplemented", "503": "SlowDown", "403": "AccessDenied"}
_CONDITIONS = {"if-match", "if-none-match"}
_HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "content-length"}


def operation(method: str, path: str, query: str) -> str:
    """The name that S3 gives to a request."""
    options = set(parse_qs(query, keep_blank_values=True))
    if "/" not in path.strip("/"):
        if method == "GET":
            return "ListMultipartUploads" if "uploads" in options else "ListObjectsV2"
        return {"POST": "DeleteObjects", "HEAD": "HeadBucket", "PUT": "CreateBucket"}.get(method, method)
    if "uploadId" in options:
        return {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}[method]
    if method == "POST":
        return "CreateMultipartUpload"
    return f"{method.capitalize()}Object"


class FaultyS3(ThreadingHTTPServer):
    """Forwards to ``upstream``, without any fault until `meet` asks for some."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.lock, self.wire = threading.Lock(), threading.Lock()
        self.meet()

    def meet(
        self,
        rates: Mapping[str, float] | None = None,
        seed: int = 0,
        delay: float = 0.3,
        bytes_per_second: float = 0,
        only: str = "",
        conditions: str = "",
    ) -> None:
        """What requests meet from now on.

        Args:
            rates: share of requests that meet each of `FAULTS`, or ``403``; ``drop`` closes the connection before the
                request is forwarded, ``lose_reply`` after it was carried out, ``cut_reply`` amid the answer's body.
                ``overtaken`` is for PUTs: answered as by Swift where a newer object is there (202), nothing is stored.
            delay: seconds of a ``slow`` answer.
            bytes_per_second: speed at which request bodies are taken in, all connections together; 0 = no limit.
            only: faults meet requests whose path contains this.
            conditions: what becomes of a conditional PUT: ``ignored``, ``501``, or as the server behind does it.
        """
        assert set(rates or {}) <= {*FAULTS, *_CODES, "overtaken"}, rates
        with self.lock:
            self.seed, self.rates, self.delay, self.only = seed, dict(rates or {}), delay, only
            self.bytes_per_second, self.conditions = bytes_per_second, conditions
            self.seen: Counter[str] = Counter()
            self.injected: Counter[str] = Counter()
            self.operations: Counter[str] = Counter()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, path: str) -> str:
        """What this request meets: one of `FAULTS`, or ``""``."""
        with self.lock:
            key = f"{method} {path}"
            self.seen[key] += 1
            draw = keyed_seed(self.seed, key, self.seen[key]) / 2**63
            for name, rate in self.rates.items() if self.only in path else ():
                if draw < rate:
                    self.injected[name] += 1
                    return name
                draw -= rate
            return ""

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyS3

    def _serve(self) -> None:
        proxy = self.server
        # The upload id of a multipart upload is random: without it the path is the same in every run.
        url = urlsplit(self.path)
        parts = "&".join(part for part in url.query.split("&") if not part.startswith("uploadId"))
        with proxy.lock:
            proxy.operations[operation(self.command, url.path, url.query)] += 1
        fault = proxy.fault(self.command, f"{url.path}?{parts}")
        if fault == "drop":
            self._hang_up()
            return
        body = self._body()
        if self.command == "PUT" and proxy.conditions and _CONDITIONS & {name.lower() for name in self.headers}:
            fault = fault or ("501" if proxy.conditions == "501" else "")
            for name in _CONDITIONS:
                del self.headers[name]
        if fault in _CODES:
            self._answer(int(fault), {"Content-Type": "application/xml"}, _ERROR.format(_CODES[fault]).encode())
            return
        if fault == "overtaken" and self.command == "PUT":
            self._answer(202, {}, b"")
            return
        if fault == "slow":
            time.sleep(proxy.delay)
        assert proxy.upstream.hostname
        upstream = http.client.HTTPConnection(proxy.upstream.hostname, proxy.upstream.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in (*_HOP_HEADERS, "expect")}
        upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        if fault == "lose_reply":
            self._hang_up()
            return
        kept = {k: v for k, v in response.getheaders() if k.lower() not in _HOP_HEADERS}
        if self.command == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length") or "0"
        self._answer(response.status, kept, content, cut=fault == "cut_reply" and len(content) > 1)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        return self._take(int(self.headers.get("Content-Length") or 0))

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self._take(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _take(self, left: int) -> bytes:
        speed, pieces = self.server.bytes_per_second, []
        while left > 0:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                raise ConnectionError("the client went away")
            pieces.append(piece)
            left -= len(piece)
            if speed:
                with self.server.wire:
                    time.sleep(len(piece) / speed)
        return b"".join(pieces)

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def faulty_s3(upstream: str) -> Iterator[FaultyS3]:
    """A running `FaultyS3`."""
    proxy = FaultyS3(upstream)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
