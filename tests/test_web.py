"""Files behind URLs: whole or not at all, within bounds, tried again where that helps, and never a job's end."""

from __future__ import annotations

import datetime
import multiprocessing
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cinemo import web
from cinemo.media.sources import fetched, refused_scheme
from cinemo.types import ClipError, RunError

CONTENT = bytes(range(256)) * 2000
Answer = tuple[int, dict[str, str], bytes] | Callable[[BaseHTTPRequestHandler], None]


class Site(ThreadingHTTPServer):
    """Answers each path as it was told: one answer after another, the last one for ever."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[str] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def url(self, path: str, *answers: Answer) -> str:
        self.answers[f"/{path}"] = list(answers)
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up."""


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        site = self.server
        with site.lock:
            site.asked.append(self.path)
            answers = site.answers[self.path]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            site.at_once += 1
            site.most_at_once = max(site.most_at_once, site.at_once)
        if callable(answer):
            answer(self)
        else:
            status, headers, body = answer
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        with site.lock:
            site.at_once -= 1

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv(web.PLAIN, "1")
    monkeypatch.setattr(web, "_PAUSE_SECONDS", 0.02)
    web._down.clear()
    made = Site()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()
    web._down.clear()


OK: Answer = (200, {}, CONTENT)
GONE: Answer = (410, {}, b"")


def content(uri: str) -> bytes:
    with fetched(uri) as path:
        return path.read_bytes()


def refusal(uri: str) -> str:
    with pytest.raises(ClipError) as refused:
        content(uri)
    assert refused.value.stage == "open"
    assert uri.partition("::")[0] in refused.value.detail
    return refused.value.reason


def test_the_content(site: Site) -> None:
    assert content(site.url("v.mp4?a=b%20c&d", OK)) == CONTENT
    with fetched(site.url("w.webm", OK)) as path:
        assert path.suffix == ".webm"


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "missing"), (410, "missing"), (403, "denied"), (401, "denied"), (418, "http_error"), (204, "http_error")],
)
def test_an_answer_that_stays_is_not_asked_for_again(site: Site, status: int, reason: str) -> None:
    assert refusal(site.url("v.mp4", (status, {}, b""))) == reason
    assert len(site.asked) == 1


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(CONTENT[:1000])


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@pytest.mark.parametrize(
    "fault",
    [cut, hang_up, (503, {}, b""), (429, {"Retry-After": "0"}, b""), (500, {}, b"")],
    ids=["cut", "hang up", "503", "429", "500"],
)
def test_what_may_pass_is_tried_again(site: Site, fault: Answer) -> None:
    assert content(site.url("v.mp4", fault, fault, OK)) == CONTENT
    assert len(site.asked) == 3


@pytest.mark.parametrize("fault", [cut, hang_up, (503, {}, b"")], ids=["cut", "hang up", "503"])
def test_a_host_that_stays_down_refuses_its_clips_and_is_not_waited_for_each_time(site: Site, fault: Answer) -> None:
    url = site.url("v.mp4", fault)
    assert refusal(url) == "unreachable"
    assert len(site.asked) == web._ATTEMPTS
    assert refusal(url) == "unreachable"
    assert len(site.asked) == web._ATTEMPTS + 1  # no pauses now
    assert content(site.url("v.mp4", OK)) == CONTENT
    assert refusal(site.url("v.mp4", fault)) == "unreachable"
    assert len(site.asked) == 2 * web._ATTEMPTS + 2


def test_nobody_there_is_unreachable(site: Site) -> None:
    site.server_close()
    assert refusal(site.url("v.mp4", OK)) == "unreachable"


def test_a_pause_that_is_longer_than_the_time_left_is_not_made(site: Site) -> None:
    assert refusal(site.url("v.mp4", (503, {"Retry-After": "7000"}, b""))) == "unreachable"
    date = "Wed, 21 Oct 2115 07:28:00 GMT"
    assert refusal(site.url("w.mp4", (503, {"Retry-After": date}, b""))) == "unreachable"
    assert len(site.asked) == 2


def test_the_time_for_one_file_is_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"x" * (1 << 18))
            time.sleep(0.05)

    monkeypatch.setenv(web.SECONDS, "0.5")
    begun = time.monotonic()
    assert refusal(site.url("v.mp4", trickle)) == "unreachable"
    assert time.monotonic() - begun < 5


def test_the_size_of_one_file_is_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def unannounced(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(CONTENT)

    assert content(site.url("v.mp4", unannounced)) == CONTENT
    monkeypatch.setenv(web.GIGABYTES, "0.0001")
    assert refusal(site.url("v.mp4", unannounced)) == "too_large"
    assert refusal(site.url("v.mp4", OK)) == "too_large"
    assert len(site.asked) == 3


def test_redirects_are_followed_a_few_times(site: Site) -> None:
    last = site.url("there", OK)
    assert content(site.url("here", (302, {"Location": last}, b""))) == CONTENT
    assert refusal(site.url("loop", (301, {"Location": "/loop"}, b""))) == "http_error"
    assert site.asked.count("/loop") == web._REDIRECTS + 1
    for elsewhere in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://[::1"):
        assert refusal(site.url("out", (302, {"Location": elsewhere}, b""))) in ("invalid_uri", "unreachable")


def test_https_unless_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused_scheme("https") is None
    assert refused_scheme("http") is None
    monkeypatch.delenv(web.PLAIN)
    assert refused_scheme("http") == "expected https:// (CINEMO_HTTP=1 allows http)"
    assert refusal(site.url("v.mp4", OK)) == "http_error"
    assert not site.asked


@pytest.mark.parametrize("url", ["https://", "https:///v.mp4", "https://[1/v.mp4", "https://h:x/v"])
def test_what_is_no_url_is_the_clips_fault(url: str) -> None:
    assert refusal(url) == "invalid_uri"


def test_a_member_of_a_tar_is_a_range(site: Site) -> None:
    def ranged(handler: BaseHTTPRequestHandler) -> None:
        first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        handler.send_response(206)
        handler.send_header("Content-Length", str(last + 1 - first))
        handler.end_headers()
        handler.wfile.write(CONTENT[first : last + 1])

    assert content(site.url("a.tar", ranged) + "::b.mp4::1000+300") == CONTENT[1000:1300]
    assert refusal(site.url("a.tar", OK) + "::b.mp4::1000+300") == "http_error"
    assert refusal(site.url("a.tar", (416, {}, b"")) + "::b.mp4::1000+300") == "http_error"


def test_a_full_disk_is_not_the_hosts_fault(site: Site) -> None:
    for body in (CONTENT, b"few"):
        with pytest.raises(RunError, match=r"/dev/full: cannot write there .No space left.*set TMPDIR"):
            web.fetch(site.url("v.mp4", (200, {}, body)), Path("/dev/full"))
    assert len(site.asked) == 2


def fetch_some(url: str, directory: str, ready: Any) -> None:
    ready.wait()
    for number in range(4):
        web.fetch(url, Path(directory) / f"{multiprocessing.current_process().pid}-{number}")


def test_few_at_a_time_from_one_host(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        if site.at_once > 1:
            two.set()
        two.wait(60)
        time.sleep(0.03)  # for a third one to come
        handler.send_response(200)
        handler.end_headers()

    monkeypatch.setenv(web.PER_HOST, "2")
    url, spawn = site.url("v.mp4", slow), multiprocessing.get_context("spawn")
    ready = spawn.Barrier(3)
    workers = [spawn.Process(target=fetch_some, args=(url, str(tmp_path), ready)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert len(site.asked) == 12
    assert site.most_at_once == 2


@contextmanager
def secure(site: Site, directory: Path, name: str) -> Iterator[Path]:
    """The site with a certificate for ``name``; yields the file that a client must trust."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made: Any = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - day, now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = made.public_bytes(serialization.Encoding.PEM)
    (directory / "both.pem").write_bytes(private + public)
    (directory / "public.pem").write_bytes(public)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "both.pem")
    site.socket = context.wrap_socket(site.socket, server_side=True)
    yield directory / "public.pem"


def test_https_checks_the_certificate(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(web.PLAIN)
    plain = site.url("plain", OK)
    with secure(site, tmp_path, "localhost") as trusted:
        url = site.url("v.mp4", OK).replace("http://127.0.0.1", "https://localhost")
        web._client.cache_clear()
        assert refusal(url) == "unreachable"  # nobody vouches for it
        web._down.clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        web._client.cache_clear()
        assert content(url) == CONTENT
        assert refusal(url.replace("localhost", "127.0.0.1")) == "unreachable"
        down = site.url("down", (302, {"Location": plain}, b"")).replace("http://127.0.0.1", "https://localhost")
        assert refusal(down) == "http_error"  # back to http
    web._client.cache_clear()
