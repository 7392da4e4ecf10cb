"""Whether what is durable can be written: room on the disks, a reserve for the ends of jobs, a database that answers.

A full disk must not keep anybody from deleting: ending a job takes a few pages in the log of an SQLite database. A
file beside it holds room for them, and is given up when they find none (`Reserve.give_up`).
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cinemo import storage
from cinemo.types import InputError, NoRoom, RunError, local_fault

if TYPE_CHECKING:
    from cinemo.serving.store.jobs import JobStore

_RESERVE_BYTES, _PIECE_BYTES = 1 << 20, 1 << 16
_LOOK_SECONDS = 2.0
_LEAST_FREE = 2 << 20  # bytes: a picture, its video, and what the database writes about them


class Reserve:
    """Room on the disk of an SQLite database that only the ends of jobs may use. Safe for threads and processes.

    Args:
        database: its file; None: no local one, and nothing to reserve.
    """

    def __init__(self, database: Path | None) -> None:
        self._path = None if database is None else database.with_suffix(".reserve")

    def hold(self) -> None:
        """Have the room, again where it was given up. Raises `NoRoom` or `BadPlace`."""
        if self._path is None:
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(bytes(max(0, _RESERVE_BYTES - file.tell())))
        except OSError as error:
            raise local_fault(error, str(self._path)) or error from None

    def give_up(self) -> bool:
        """Leave a piece of the room to whatever is written next; False where none is left."""
        try:
            if self._path is None or not (size := self._path.stat().st_size):
                return False
            os.truncate(self._path, max(0, size - _PIECE_BYTES))
        except OSError:
            return False
        return True


class StorageWatch:
    """Looks at the disks and the database every two seconds, in a thread, for as long as the process lives.

    Args:
        say: told in one line when jobs cannot be taken, and once more when they can; not by every request.
    """

    def __init__(self, store: JobStore, say: Callable[[str], object]) -> None:
        self._store, self._say = store, say
        self.fault: str | None = None
        threading.Thread(target=self._look, name="cinemo-storage", daemon=True).start()

    def _look(self) -> None:
        while True:
            before, self.fault = self.fault, fault_of_storage(self._store)
            if self.fault and not before:
                self._say(f"no new jobs are taken: {self.fault}")
            elif before and not self.fault:
                self._say("disks and database can be used again; new jobs are taken")
            time.sleep(_LOOK_SECONDS)


def check_room(store: JobStore) -> None:
    """Raise `NoRoom` where the disk of the pictures and videos, or that of the database, has none for another job."""
    store.reserve.hold()
    database = store.database.path
    for place in [database.parent] if database else []:
        _check_free(place)
    if not store.media.is_remote:
        _check_free(storage.local_path(store.media.uri))


def fault_of_storage(store: JobStore) -> str | None:
    """What an operator has to mend before jobs can be taken, in one line; None where all is well.

    It writes nothing that grows. s3:// is not asked: its faults pass, and jobs wait for them.
    """
    try:
        database = store.database.path
        if database is not None and not database.exists():
            return f"{database}: the database is gone; put it back and start again"
        places = [database, database.parent] if database else []
        if not store.media.is_remote:
            places.append(storage.local_path(store.media.uri))
        for place in places:
            if not os.access(place, os.W_OK):
                return f"{place}: cannot write there; make it writable"
        check_room(store)
        store.database.check_writable()
    except (RunError, InputError, OSError) as error:
        return str(error).partition("\n")[0]
    return None


def _check_free(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _LEAST_FREE:
        raise NoRoom(
            f"{directory}: {free >> 10} kB are free, expected at least {_LEAST_FREE >> 10}; free some space there"
        )
