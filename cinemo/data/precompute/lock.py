"""One job on one output: a lock file that says who holds it, kept warm by a thread, taken over from the dead.

Nobody's clock is compared with another's: a holder on another machine counts as dead once its heartbeat has not changed
for `STALE_SECONDS` of watching; one on this machine at once when its process is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cinemo import storage
from cinemo.types import InputError, RunError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
NAME = ".lock.json"


class Lock:
    """A held lock. `check` it between steps: whoever lost it must not go on."""

    def __init__(self, output: str, facts: dict[str, Any], version: str) -> None:
        self.output, self.uri, self.facts, self.version = output, storage.join(output, NAME), facts, version
        self.lost: str | None = None
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            RunError: another job holds the output now.
        """
        if self.lost:
            raise RunError(f"{self.output}: this job has lost its lock ({self.lost}), so it stops; nothing is damaged")

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if not self.lost:
            storage.remove_if(self.uri, self.version)

    def _beat(self) -> None:
        silent_since = time.monotonic()
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                version = storage.write_if(self.uri, _content(self.facts), self.version)
            except Exception as error:
                # Storage that fails for a moment costs nothing; in the end another job may have taken over.
                if time.monotonic() - silent_since > STALE_SECONDS:
                    self.lost = f"no heartbeat could be written for {STALE_SECONDS:g} s: {error}"
                    return
                continue
            if version is None:
                self.lost = _describe(_read(self.uri)[0]) or "somebody removed it"
                return
            self.version, silent_since = version, time.monotonic()


@contextlib.contextmanager
def hold(output: str) -> Iterator[Lock]:
    """Hold the lock of an output for the length of a ``with`` block.

    Raises:
        InputError: another job is at work on it.
    """
    lock = _acquire(output)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(output: str) -> Lock:
    uri = storage.join(output, NAME)
    facts = {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "process_started": _started(os.getpid()),
        "since": _now(),
    }
    watched, since = "", time.monotonic()
    while True:
        holder, version = _read(uri)
        if holder is None or _is_dead(holder) or (version == watched and time.monotonic() - since > STALE_SECONDS):
            taken = storage.write_if(uri, _content(facts), version)
            if taken is not None:
                return Lock(output, facts, taken)
            watched = ""
            continue
        if _is_here(holder) or (watched and version != watched):
            raise InputError(
                f"{output}: another job is working on it ({_describe(holder)}); wait for it, stop it, or choose "
                f"another --output (a dead job is noticed at once on its machine, else within {STALE_SECONDS:g} s)"
            )
        if not watched:
            watched, since = str(version), time.monotonic()
            print(
                f"{output}: locked by a job elsewhere ({_describe(holder)}); watching whether it is alive", flush=True
            )
        time.sleep(HEARTBEAT_SECONDS / 5)


def _content(facts: dict[str, Any]) -> bytes:
    return json.dumps({**facts, "heartbeat": _now()}, sort_keys=True).encode() + b"\n"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _read(uri: str) -> tuple[dict[str, Any] | None, str | None]:
    try:
        data, version = storage.read_version(uri)
    except FileNotFoundError:
        return None, None
    try:
        values = json.loads(data)
        return (values if isinstance(values, dict) else {}), version
    except ValueError:
        return {}, version


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return ""
    known = {name: holder.get(name, "unknown") for name in ("host", "pid", "since", "heartbeat")}
    return "host {host}, process {pid}, since {since}, last heartbeat {heartbeat}".format(**known)


def _is_here(holder: dict[str, Any]) -> bool:
    return bool(holder.get("machine")) and holder.get("machine") == _machine()


def _is_dead(holder: dict[str, Any]) -> bool:
    """Certainly so: a process of this machine that is no more, or another one under its number."""
    return _is_here(holder) and _started(int(holder["pid"])) != holder.get("process_started")


def _machine() -> str:
    """This boot of this machine and its process numbers: containers beside each other have their own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str | None:
    """When a process was started, in ticks since boot; None where there is none (or only its exit code)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
