"""Full and read-only disks, and databases that go away: what is refused, what still works, and what is told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from postgres_server import PostgresServer
from serving.disk import fill
from serving.process import png
from tiny import tiny_bundle

from cinemo.bundle import BundleCard, read_card
from cinemo.serving.http.api import build_api
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import JobStore
from cinemo.serving.store.media import MediaStore
from cinemo.serving.store.storage_health import fault_of_storage
from cinemo.types import NoRoom


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> BundleCard:
    return read_card(str(tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")))


def open_at(place: Path) -> JobStore:
    return JobStore(Database(f"sqlite:///{place}/serving.sqlite", patience=0.2), MediaStore(str(place / "media")))


def asking(store: JobStore, card: BundleCard) -> TestClient:
    async def ready() -> bool:
        return fault_of_storage(store) is None

    return TestClient(build_api(store, lambda: card, ready), raise_server_exceptions=False)


def submit(client: TestClient) -> tuple[int, dict[str, object]]:
    answer = client.post("/v1/videos", data={"prompt": "waves"}, files={"input_reference": ("a.png", png())})
    return answer.status_code, answer.json()


def test_a_full_disk_refuses_new_jobs_and_still_ends_and_deletes_the_old_ones(
    small_disk: Path, card: BundleCard
) -> None:
    store = open_at(small_disk)
    client = asking(store, card)
    made = [str(submit(client)[1]["id"]) for _ in range(24)]
    assert client.get("/readyz").status_code == 200
    filler = fill(small_disk)
    status, body = submit(client)
    assert (status, body["error"]["code"]) == (507, "insufficient_storage")  # type: ignore[index]
    assert client.get("/readyz").status_code == 503
    assert "free some space" in str(fault_of_storage(store))
    assert {path.name for path in (small_disk / "media").iterdir()} == set(made), "a refused job left something"
    assert client.get(f"/v1/videos/{made[0]}").json()["status"] == "queued"
    for job_id in made[:-1]:
        assert client.delete(f"/v1/videos/{job_id}").status_code == 200  # cancelled
        assert client.delete(f"/v1/videos/{job_id}").json()["deleted"]
        fill(small_disk)  # somebody else takes what comes free
    assert client.post(f"/v1/videos/{made[-1]}/cancel").status_code == 200
    filler.unlink()
    assert fault_of_storage(store) is None
    assert submit(client)[0] == 202


def test_the_reserve_alone_lets_an_end_be_written(small_disk: Path) -> None:
    store = open_at(small_disk)
    job = store.submit({"prompt": "waves"}, png())
    fill(small_disk)
    grow = "x" * 40_000
    with pytest.raises(NoRoom):
        store.database.transact(lambda t: t.connection.exec_driver_sql("UPDATE jobs SET request = ?", (grow,)))
    assert store.cancel(job.id)
    assert store.delete(job.id)


def test_a_picture_that_does_not_fit_leaves_no_folder(small_disk: Path) -> None:
    store = open_at(small_disk)
    with pytest.raises(NoRoom):
        store.submit({"prompt": "waves"}, bytes(20 << 20))
    assert list((small_disk / "media").iterdir()) == []


def test_a_disk_that_became_read_only_is_told_and_refuses_with_503(small_disk: Path, card: BundleCard) -> None:
    made = open_at(small_disk)
    job = made.submit({"prompt": "waves"}, png())
    made.database.close()
    store = open_at(small_disk)
    store.database.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    client = asking(store, card)
    status, body = submit(client)
    assert (status, body["error"]["code"]) == (503, "unavailable")  # type: ignore[index]
    assert str(small_disk) not in str(body)
    assert client.get("/readyz").status_code == 503
    assert "make it writable" in str(fault_of_storage(store))
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert fault_of_storage(store) is None
    assert store.get(job.id) is not None


@pytest.mark.parametrize("fault", ["gone", "no database"])
def test_a_database_file_that_cannot_be_used_is_told(tmp_path: Path, card: BundleCard, fault: str) -> None:
    store = open_at(tmp_path)
    store.database.close()
    path = tmp_path / "serving.sqlite"
    path.unlink()
    if fault == "no database":
        path.write_bytes(os.urandom(8192))
    client = asking(store, card)
    assert str(path) in str(fault_of_storage(store))
    assert submit(client)[0] == 503
    assert client.get("/readyz").status_code == 503
    assert list((tmp_path / "media").iterdir()) == []


@pytest.mark.postgres
def test_a_postgresql_that_is_away_is_told_until_it_is_back(
    postgres: PostgresServer, tmp_path: Path, card: BundleCard
) -> None:
    store = JobStore(Database(postgres.new_database(), patience=0.5), MediaStore(str(tmp_path / "media")))
    client = asking(store, card)
    assert submit(client)[0] == 202
    postgres.stop()
    try:
        assert fault_of_storage(store) is not None
        status, body = submit(client)
        assert (status, body["error"]["code"]) == (503, "unavailable")  # type: ignore[index]
        assert client.get("/readyz").status_code == 503
    finally:
        postgres.start()
    fault_of_storage(store)  # finds its connections broken
    assert fault_of_storage(store) is None
    assert submit(client)[0] == 202
