"""Slow clients, to see that a server answers others meanwhile: connections that trickle headers or a body for ever.

As a program it holds them until its standard input ends: ``python slow_clients.py PORT KIND COUNT [ADDRESS]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import httpx

Kind = Literal["headers", "body", "late-body", "idle"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: a\r\n"
_BODY = b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 4000000\r\n\r\n"
_OPENING = 256  # at a time: the backlog of a listener is finite


def _begin(kind: Kind) -> bytes:
    if kind == "idle":
        return b""
    if kind == "headers":
        return _HEAD
    return _HEAD + _BODY + (b"-" * 40_000 if kind == "late-body" else b"")


async def _hold(port: int, kind: Kind, address: str, opening: asyncio.Semaphore) -> None:
    """One connection, opened again whenever the server closes it."""
    while True:
        writer = None
        try:
            async with opening:
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
            writer.write(_begin(kind))
            while not reader.at_eof() and not writer.is_closing():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(65536), 1.0)
                if kind != "idle":
                    writer.write(b"x: y\r\n" if kind == "headers" else b"-")
                    await writer.drain()
        except OSError:
            await asyncio.sleep(0.2)
        finally:
            if writer is not None:
                writer.close()


async def _attack(port: int, kind: Kind, count: int, address: str) -> None:
    opening = asyncio.Semaphore(_OPENING)
    held = [asyncio.create_task(_hold(port, kind, address, opening)) for _ in range(count)]
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in held:
        task.cancel()


@contextlib.contextmanager
def slow_clients(port: int, kind: Kind, count: int, address: str = "127.0.0.1") -> Iterator[None]:
    """``count`` of them in a process of their own, from ``address``, while the block lasts."""
    command = [sys.executable, Path(__file__), str(port), kind, str(count), address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _allow_files() -> None:
    """As many connections as the system lets a process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def slowest_answer(url: str, seconds: float, timeout: float = 10.0) -> tuple[float, int, int]:
    """(the longest wait in seconds, answers, failures) of one GET after another, each on a connection of its own."""
    until, slowest, answers, failures = time.monotonic() + seconds, 0.0, 0, 0
    while (begun := time.monotonic()) < until:
        try:
            answer = httpx.get(url, timeout=timeout)
            failures += answer.status_code != 200
            answers += answer.status_code == 200
        except httpx.TransportError:
            failures += 1
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.1)
    return slowest, answers, failures


if __name__ == "__main__":
    _allow_files()
    asyncio.run(_attack(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]))  # type: ignore[arg-type]
