"""Fetching by URL against servers on this machine, under names whose addresses the test decides."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo.serving.http.fetch import Fetcher, is_public
from cinemo.serving.http.refusals import Refused

PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 100
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG


class Server:
    """Answers every connection by ``answer(path)`` and keeps what it was asked."""

    def __init__(self, answer: Callable[[str], bytes | list[bytes]], tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.tls, self.asked = answer, tls, list[str]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        try:
            with self.tls.wrap_socket(connection, server_side=True) if self.tls else connection as stream:
                head = b""
                while b"\r\n\r\n" not in head:
                    more = stream.recv(4096)
                    if not more:
                        return
                    head += more
                self.asked.append(head.decode())
                answer = self.answer(head.split()[1].decode())
                for piece in [answer] if isinstance(answer, bytes) else answer:
                    stream.sendall(piece)
                    if not isinstance(answer, bytes):
                        time.sleep(0.05)
        except OSError:
            pass


@contextmanager
def server(answer: Callable[[str], bytes | list[bytes]], tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    made = Server(answer, tls)
    try:
        yield made
    finally:
        made.listener.close()


class Names:
    """A resolver whose answers a test writes; it counts the look-ups."""

    def __init__(self, **names: list[list[str]]) -> None:
        self.names, self.looked_up = names, list[str]()

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        self.looked_up.append(name)
        answers = self.names[name.split(".")[0]]
        return answers.pop(0) if len(answers) > 1 else answers[0]


def local_too(address: str) -> bool:
    """127.0.0.1 stands for a public server; everything else is judged as ever."""
    return address == "127.0.0.1" or is_public(address)


def fetch(url: str, names: Names, port: int = 80, **options: object) -> tuple[bytes, str]:
    options = {"max_bytes": 1000, "seconds": 5.0, "allowed": local_too, "ports": (port,)} | options
    return asyncio.run(Fetcher(resolve=names, **options).fetch(url))  # type: ignore[arg-type]


def refusal(url: str, names: Names, port: int = 80, **options: object) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        fetch(url, names, port, **options)
    assert caught.value.fault.param == "input_reference"
    for word in ("127.0.0.1", "10.0.0", "refused", "errno", "ssl"):
        assert word not in caught.value.fault.message.lower(), "tells nothing about the network"
    return caught.value.status, caught.value.fault.code


def test_a_picture_is_fetched_by_its_name() -> None:
    names = Names(pictures=[["127.0.0.1"]])
    with server(lambda path: OK) as site:
        url = f"http://pictures.example:{site.port}/a.png?x=1"
        assert fetch(url, names, site.port) == (PNG, "image/png")
    assert f"host: pictures.example:{site.port}\r\n" in site.asked[0].lower()
    assert "cookie" not in site.asked[0].lower()


FORBIDDEN = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.100.100.200", "168.63.129.16", "192.0.0.8", "198.18.0.1", "203.0.113.9", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1",
    "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", FORBIDDEN)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    names = Names(evil=[["93.184.216.34", address]])
    assert refusal("http://evil.example/", names, allowed=is_public) == (422, "url_not_allowed")


@given(st.ip_addresses(v=4))
def test_an_ipv6_form_of_an_address_is_never_more_public_than_the_address(ip: ipaddress.IPv4Address) -> None:
    for form in (f"::ffff:{ip}", f"64:ff9b::{int(ip) >> 16:x}:{int(ip) & 0xFFFF:x}"):
        assert is_public(form) <= is_public(str(ip))


def test_public_addresses() -> None:
    assert all(map(is_public, ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"]))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "0x7f000001", "127.1", "localhost"]
)
def test_numbers_as_hosts_are_resolved_and_judged_as_names_are(host: str) -> None:
    with server(lambda path: OK) as site, pytest.raises(Refused) as caught:
        asyncio.run(Fetcher(1000, ports=(site.port,)).fetch(f"http://{host}:{site.port}/"))
    assert caught.value.fault.code == "url_not_allowed"
    assert not site.asked


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """A name that answers with a public address first and a private one afterwards (DNS rebinding)."""
    names = Names(rebind=[["127.0.0.1"], ["10.0.0.1"]])
    with server(lambda path: OK) as site:
        assert fetch(f"http://rebind.example:{site.port}/", names, site.port)[0] == PNG
    assert names.looked_up == ["rebind.example"], "one look-up, whose answer is both checked and used"


def test_redirects_are_checked_again() -> None:
    names = Names(pictures=[["127.0.0.1"]], metadata=[["169.254.169.254"]])

    def answer(path: str) -> bytes:
        if path == "/end":
            return OK
        targets = {"/near": "/end", "/far": f"http://metadata.example:{site.port}/", "/file": "file:///etc/passwd"}
        target = targets.get(path, "/loop")
        return f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()

    with server(answer) as site:
        base = f"http://pictures.example:{site.port}"
        assert fetch(base + "/near", names, site.port)[0] == PNG
        assert refusal(base + "/far", names, site.port) == (422, "url_not_allowed")
        assert refusal(base + "/file", names, site.port) == (422, "invalid_url")
        assert refusal(base + "/loop", names, site.port) == (422, "url_fetch_failed")
    assert len([head for head in site.asked if head.startswith("GET /loop")]) == 4


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("ftp://a.example/", "invalid_url"),
        ("file:///etc/passwd", "invalid_url"),
        ("gopher://a.example/", "invalid_url"),
        ("//a.example/", "invalid_url"),
        ("http://", "invalid_url"),
        ("http://a.example:99999/", "invalid_url"),
        ("http://[::1/", "invalid_url"),
        ("http://a.example/\r\nX: y", "invalid_url"),
        ("http://a.example/ä", "invalid_url"),
        ("http://a.example/" + "x" * 3000, "invalid_url"),
        ("http://user:pass@a.example/", "url_not_allowed"),
        ("http://a.example:22/", "url_not_allowed"),
    ],
)
def test_urls_that_are_not_asked(url: str, code: str) -> None:
    names = Names()
    assert refusal(url, names) == (422, code)
    assert not names.looked_up


def head(*fields: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (head("Content-Type: text/html", "Content-Length: 2") + b"hi", (415, "unsupported_image")),
        (head("Content-Type: image/svg+xml", "Content-Length: 2") + b"hi", (415, "unsupported_image")),
        (head("Content-Type: image/png", "Content-Length: 5000") + b"x" * 5000, (413, "image_too_large")),
        (head("Content-Type: image/png", "Connection: close") + b"x" * 5000, (413, "image_too_large")),
        (
            head("Content-Type: image/png", "Transfer-Encoding: chunked") + b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n",
            (413, "image_too_large"),
        ),
        (head("Content-Encoding: gzip", "Content-Length: 2") + b"hi", (422, "url_fetch_failed")),
        (head("Content-Length: 0", status="404 Not Found"), (422, "url_fetch_failed")),
        (head("Content-Length: 0", status="204 No Content"), (422, "url_fetch_failed")),
        (head("Content-Type: image/png", "Content-Length: 100") + b"cut", (422, "url_fetch_failed")),
        (b"SSH-2.0-OpenSSH\r\n", (422, "url_fetch_failed")),
        (b"", (422, "url_fetch_failed")),
    ],
)
def test_answers_that_are_no_picture(answer: bytes, expected: tuple[int, str]) -> None:
    names = Names(a=[["127.0.0.1"]])
    with server(lambda path: answer) as site:
        assert refusal(f"http://a.example:{site.port}/", names, site.port) == expected


@pytest.mark.parametrize("slow", ["head", "body", "silent"])
def test_a_dripping_server_costs_no_more_than_the_time_limit(slow: str) -> None:
    pieces = {
        "head": [head("X: y")[k : k + 1] for k in range(200)] + [b""] * 200,
        "body": [head("Content-Length: 900"), *[b"x"] * 200],
        "silent": [b""] * 200,
    }[slow]
    names = Names(a=[["127.0.0.1"]])
    began = time.monotonic()
    with server(lambda path: pieces) as site:
        answer = refusal(f"http://a.example:{site.port}/", names, site.port, seconds=0.5)
    assert answer == (422, "url_fetch_failed")
    assert time.monotonic() - began < 3


def test_a_closed_port_and_an_unknown_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert refusal(f"http://a.example:{port}/", Names(a=[["127.0.0.1"]]), port) == (422, "url_fetch_failed")

    async def unknown(name: str, port: int) -> Sequence[str]:
        raise socket.gaierror("unknown")

    with pytest.raises(Refused):
        asyncio.run(Fetcher(1000, resolve=unknown).fetch("http://nowhere.example/"))


def test_https_checks_the_certificate_against_the_name(tmp_path: Path) -> None:
    serving, trusting = certificate(tmp_path, "pictures.example")
    names = Names(pictures=[["127.0.0.1"]], other=[["127.0.0.1"]])
    with server(lambda path: OK, serving) as site:
        options = {"port": site.port, "tls": trusting}
        assert fetch(f"https://pictures.example:{site.port}/", names, **options)[0] == PNG  # type: ignore[arg-type]
        assert refusal(f"https://other.example:{site.port}/", names, **options) == (422, "url_fetch_failed")  # type: ignore[arg-type]
        assert refusal(f"https://pictures.example:{site.port}/", names, site.port) == (422, "url_fetch_failed")


def certificate(directory: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context with a certificate for ``name``, and a client's that trusts it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "both.pem").write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(directory / "both.pem")
    return serving, ssl.create_default_context(cadata=made.public_bytes(serialization.Encoding.PEM).decode())
