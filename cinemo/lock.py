"""One job on one output: a lock file that says who holds it, kept warm by a thread, taken over from the dead.

Nobody's clock is compared with another's: a holder on another machine counts as dead once its heartbeat has not changed
for `STALE_SECONDS` of watching; one on this machine at once when its process is gone.

A holder whose storage is away does not know whether it still is one. It goes on with what needs no storage, for up to
``CINEMO_LOCK_PATIENCE`` seconds; when the storage answers again, the lock there says whose it is.

Some S3 servers know no conditional PUTs; `compare_and_swap.has_conditions` tries that when the lock is taken. There the
lock is weaker: what was written is looked at again after `SETTLE_SECONDS`, and the last writer holds the output.
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

from cinemo import compare_and_swap, s3, storage
from cinemo.progress import say
from cinemo.types import InputError, RunError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
SETTLE_SECONDS = 3.0
PATIENCE, _AWAY_SECONDS = "CINEMO_LOCK_PATIENCE", 3600.0
NAME = ".lock.json"
_RACES = 20


class Lock:
    """A held lock. `check` it between steps: whoever lost it must not go on."""

    def __init__(self, output: str, facts: dict[str, Any], version: str, weak: bool = False) -> None:
        self.output, self.uri, self.facts, self.version = output, storage.join(output, NAME), facts, version
        self.weak = weak
        self.lost: str | None = None
        self._seen, self._news = time.monotonic(), threading.Condition()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Wait, where the storage is away for so long that the output may have been taken over, until it answers.

        Raises:
            RunError: another job holds the output now, or the storage was away for too long.
        """
        with self._news:
            self._news.wait_for(lambda: self.lost or self._silence() <= STALE_SECONDS)
        if self.lost:
            raise RunError(f"{self.output}: this job has lost its lock ({self.lost}), so it stops; nothing is damaged")

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if not self.lost:
            with storage.tidying(self.uri):
                compare_and_swap.remove_if(self.uri, self.version)

    def _silence(self) -> float:
        """Seconds since the lock was certainly ours."""
        return time.monotonic() - self._seen

    def _beat(self) -> None:
        said = False
        while not self.lost and not self._released.wait(HEARTBEAT_SECONDS):
            try:
                with s3.patience(HEARTBEAT_SECONDS):
                    version = self._renewed()
            except Exception as error:
                patience = float(os.environ.get(PATIENCE) or _AWAY_SECONDS)
                if self._silence() > patience:
                    self._tell(lost=f"no heartbeat could be written for {self._silence():.0f} s: {s3.brief(error)}")
                elif self._silence() > STALE_SECONDS and not said:
                    said = True
                    print(
                        f"{self.output}: its storage has been away for {self._silence():.0f} s ({s3.brief(error)}); "
                        f"the job goes on with what needs none, for up to {patience:g} s ({PATIENCE}), and then looks "
                        "whether the output is still its own",
                        flush=True,
                    )
            else:
                if said and not self.lost:
                    said = False
                    print(f"{self.output}: its storage is back, and the output is still held by this job", flush=True)
                if version is not None:
                    self.version = version
                    self._tell()

    def _renewed(self) -> str | None:
        """Write a heartbeat, or see that the lock is still ours: its version; None, and it is lost, where it is not."""
        try:
            version = _write(self.uri, self.facts, self.version, self.weak)
        except Exception:  # what can be read, but not written for a while, is still held
            version = None
        if version is None:  # also where an earlier heartbeat was written, and only its reply was lost
            holder, version = _read(self.uri)
            if holder is None or holder.get("token") != self.facts["token"]:
                self._tell(lost=_describe(holder) or "somebody removed it")
                return None
        return version

    def _tell(self, lost: str | None = None) -> None:
        with self._news:
            self.lost, self._seen = lost, time.monotonic()
            self._news.notify_all()


@contextlib.contextmanager
def hold(output: str, break_lock: bool = False) -> Iterator[Lock]:
    """Hold the lock of an output for the length of a ``with`` block.

    Args:
        break_lock: do not watch whether a holder on another machine is alive: replace it at once, and say whom.

    Raises:
        InputError: another job is at work on it, or nothing can be written there.
    """
    lock = _acquire(output, break_lock)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(output: str, break_lock: bool) -> Lock:
    uri = storage.join(output, NAME)
    weak = not compare_and_swap.has_conditions(output)
    if weak:
        say(
            f"{output}: the S3 server knows no conditional PUT, so its lock is a weaker one: do not start two jobs on "
            f"it within {SETTLE_SECONDS:g} s of each other"
        )
    facts = {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "process_started": _started(os.getpid()),
        "since": _now(),
    }
    watched, since, races = "", time.monotonic(), 0
    while races < _RACES:
        holder, version = _read(uri)
        broken = break_lock and holder is not None and not _is_here(holder)
        silent = version == watched and time.monotonic() - since > STALE_SECONDS
        if holder is None or _is_dead(holder) or broken or silent:
            if broken:
                say(f"{output}: --break-lock takes it from {_describe(holder)}")
                break_lock = False  # not from whoever comes first now
            taken = _write(uri, facts, version, weak, SETTLE_SECONDS)
            if taken is not None:
                return Lock(output, facts, taken, weak)
            watched, races = "", races + 1
            continue
        if _is_here(holder) or (watched and version != watched):
            raise InputError(
                f"{output}: another job is working on it ({_describe(holder)}); wait for it, stop it, or choose "
                f"another --output (a dead job is noticed at once on its machine, else within {STALE_SECONDS:g} s)"
            )
        if not watched:
            watched, since = str(version), time.monotonic()
            say(
                f"{output}: locked by a job elsewhere ({_describe(holder)}); watching for {STALE_SECONDS:g} s whether "
                "it is alive (--break-lock does not wait)"
            )
        time.sleep(HEARTBEAT_SECONDS / 5)
    raise RunError(f"{output}: its lock could not be taken in {_RACES} attempts; look at {uri}, and who writes it")


def _write(uri: str, facts: dict[str, Any], version: str | None, weak: bool, wait: float = 0) -> str | None:
    """A heartbeat; the new version, or None where somebody else wrote meanwhile. ``wait``: see `write_and_look`."""
    content = _content(facts)
    if weak:
        return compare_and_swap.write_and_look(uri, content, version, wait)
    return compare_and_swap.write_if(uri, content, version)


def _content(facts: dict[str, Any]) -> bytes:
    return json.dumps({**facts, "heartbeat": _now()}, sort_keys=True).encode() + b"\n"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _read(uri: str) -> tuple[dict[str, Any] | None, str | None]:
    try:
        data, version = compare_and_swap.read_version(uri)
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
