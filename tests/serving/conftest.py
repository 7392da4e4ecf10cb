"""Databases for the serving tests: SQLite, and a real PostgreSQL where it is installed; and a small disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres_server import PostgresServer
from serving import disk

from cinemo.serving.store.database import Database


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state.sqlite"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture
def open_database() -> Iterator[Callable[..., Database]]:
    """Makes databases that are closed after the test."""
    made: list[Database] = []

    def opened(url: str, patience: float = 30.0) -> Database:
        made.append(Database(url, patience))
        return made[-1]

    yield opened
    for database in made:
        database.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB."""
    with disk.small_disk(tmp_path / "disk") as fault:
        if fault:
            pytest.skip(f"no small disk can be mounted here: {fault}")
        yield tmp_path / "disk"
