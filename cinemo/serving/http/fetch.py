"""Fetching a picture from an address that a stranger gave, without lending them this server's place in the network.

A name is resolved once, every address it has must be a global one, and the connection goes to the address that was
checked (a second look-up could answer otherwise: DNS rebinding). TLS still checks the certificate against the name.
Redirects are followed by hand, each under the same checks; proxies of the environment are not used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

import anyio
import httpcore

from cinemo.serving.http.refusals import Refused
from cinemo.serving.http.uploads import PARAM, TYPES

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Name and port -> its addresses as text."""

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
MAX_URL = 2048
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Counted as global by some versions of Python, yet assigned to protocols; the last one is the host's own service to its
# virtual machines (Azure).
_NOT_PUBLIC = tuple(ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"))


class Forbidden(Exception):
    """The name leads to an address that is not to be reached."""


def is_public(address: str) -> bool:
    """Whether an address belongs to the global internet: not private, shared, loopback, link-local, multicast or
    reserved, nor an IPv6 form that carries such an IPv4 address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip.sixtofour is not None or ip.teredo is not None or ip.is_site_local:
            return False
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def resolve(name: str, port: int) -> list[str]:
    """The addresses of a name, by the system's resolver."""
    found = await anyio.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[4][0]) for address in found]


def check_url(url: str, ports: Collection[int] | None = None) -> bool:
    """Refuse a URL that is not to be asked at all; whether it is https.

    Args:
        ports: that may be connected to; None: any.

    Raises:
        Refused: 422.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        whole = bool(parts.hostname) and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        whole = False
    if not whole or len(url) > MAX_URL or parts.scheme not in ("http", "https"):
        raise _refused("invalid_url", f"expected an http or https URL of at most {MAX_URL} characters")
    if parts.username is not None or parts.password is not None or (ports is not None and port not in ports):
        raise _refused("url_not_allowed", "URLs with a user name or an unusual port are not asked")
    return parts.scheme == "https"


class Fetcher:
    """Fetches pictures by URL.

    Args:
        max_bytes: of the answer; it is cut off above.
        seconds: for everything together: look-up, connection, redirects and content.
        ports: that may be connected to.
        resolve, allowed: how a name becomes addresses, and which of them are let through.
        tls: for a private certificate authority.
    """

    def __init__(
        self,
        max_bytes: int,
        seconds: float = 10.0,
        ports: Iterable[int] = (80, 443),
        resolve: Resolve = resolve,
        allowed: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._max_bytes, self._seconds, self._ports = max_bytes, seconds, frozenset(ports)
        self._network, self._tls = CheckedNetwork(resolve, allowed), tls or ssl.create_default_context()

    async def fetch(self, url: str) -> tuple[bytes, str]:
        """The content behind a URL and its declared type (empty: none).

        Raises:
            Refused: 422, with no more about the other side than that it was not to be reached or gave no picture.
        """
        try:
            with anyio.fail_after(self._seconds):
                async with httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=self._network) as pool:
                    return await self._follow(pool, url)
        except Forbidden:
            raise _refused(
                "url_not_allowed", "the URL leads to an address that this server does not fetch from"
            ) from None
        except TimeoutError:
            raise _refused(
                "url_fetch_failed", f"the URL returned no picture within {self._seconds:g} seconds"
            ) from None
        except (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, UnicodeError):
            raise _refused("url_fetch_failed", "the URL could not be fetched") from None

    async def _follow(self, pool: httpcore.AsyncConnectionPool, url: str) -> tuple[bytes, str]:
        headers: dict[bytes | str, bytes | str] = {
            "Accept": "image/png, image/jpeg, image/webp",
            "Accept-Encoding": "identity",
            "User-Agent": "cinemo",
        }
        was_secure = False
        for _ in range(_MAX_REDIRECTS + 1):
            is_secure = check_url(url, self._ports)
            if was_secure and not is_secure:
                raise _refused("url_not_allowed", "the URL redirects from https to http")
            was_secure = is_secure
            async with pool.stream("GET", url, headers=headers) as answer:
                fields = {name.lower(): value.decode("latin-1") for name, value in answer.headers}
                if answer.status not in _REDIRECTS:
                    return await self._read(answer, fields)
                url = urljoin(url, fields.get(b"location", ""))
        raise _refused("url_fetch_failed", f"the URL redirects more than {_MAX_REDIRECTS} times")

    async def _read(self, answer: httpcore.Response, fields: dict[bytes, str]) -> tuple[bytes, str]:
        kind = fields.get(b"content-type", "")
        if answer.status != 200 or fields.get(b"content-encoding", "identity") != "identity":
            raise _refused("url_fetch_failed", "the URL did not return a picture")
        if kind and kind.partition(";")[0].strip().lower() not in TYPES:
            raise Refused(415, "unsupported_image", "the URL did not return a PNG, JPEG or WebP picture", PARAM)
        length = fields.get(b"content-length", "0")
        content = bytearray()
        if length.isdecimal() and len(length) < 18 and int(length) <= self._max_bytes:
            async for piece in answer.aiter_stream():
                content += piece
                if len(content) > self._max_bytes:
                    break
            else:
                return bytes(content), kind
        raise Refused(
            413,
            "image_too_large",
            f"the URL returned more than {self._max_bytes / 2**20:g} MiB; use a smaller picture",
            PARAM,
        )


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were let through, and to nothing else."""

    def __init__(self, resolve: Resolve, allowed: Callable[[str], bool]) -> None:
        self._resolve, self._allowed, self._network = resolve, allowed, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host.strip("[]"), port)
        # One forbidden address among others is a trap or a mistake; neither is served.
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise Forbidden
        for address in addresses[:-1]:
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.NetworkError:
                continue
        return await self._network.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Any = None
    ) -> httpcore.AsyncNetworkStream:
        raise Forbidden

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


def _refused(code: str, message: str) -> Refused:
    return Refused(422, code, f"input_reference: {message}", PARAM)
