"""A PostgreSQL server of its own for tests: made in a temporary directory, reached by a socket in it, and restarted."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def find_programs() -> Path | None:
    """The directory of ``initdb`` and ``pg_ctl``; None where PostgreSQL is not installed."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    for directory in [*([Path(on_path).resolve().parent] if on_path else []), *versions]:
        if (directory / "initdb").exists() and (directory / "pg_ctl").exists():
            return directory
    return None


class PostgresServer:
    """Runs from its making to `close`. PostgreSQL refuses to be root: there it runs as ``postgres`` or ``nobody``."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._directory = Path(tempfile.mkdtemp(prefix="cinemo-pg-"))  # a socket's path must be short
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            entry = names.get("postgres") or names["nobody"]
            self._user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(self._directory, entry.pw_uid, entry.pw_gid)
        self._data = self._directory / "data"
        self._run("initdb", "-D", str(self._data), "-U", "tester", "-A", "trust", "--no-sync", "-E", "UTF8")
        self._numbers = itertools.count()
        self.start()

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._directory}' -c fsync=off"
        log = str(self._directory / "log")
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", log, "-o", options)

    def stop(self, how: str = "immediate") -> None:
        """``immediate``: as after a crash; ``fast``: connections are told to go."""
        self._run("pg_ctl", "stop", "-w", "-D", str(self._data), "-m", how)

    def url(self, database: str = "postgres", host: str | None = None) -> str:
        return f"postgresql://tester@/{database}?host={host or self._directory}"

    @property
    def socket(self) -> Path:
        return self._directory / ".s.PGSQL.5432"

    def new_database(self) -> str:
        """The URL of a fresh, empty database."""
        import psycopg

        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def close(self) -> None:
        subprocess.run(
            [self._programs / "pg_ctl", "stop", "-D", self._data, "-m", "immediate"], cwd="/", check=False,
            capture_output=True, **self._user,
        )  # fmt: skip
        shutil.rmtree(self._directory, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        # The server keeps its parent's pipes open: output goes to files, which end with their writer.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [self._programs / program, *arguments], cwd="/", stdout=output, stderr=output, check=False, **self._user
            )
            output.seek(0)
            assert done.returncode == 0, output.read()
