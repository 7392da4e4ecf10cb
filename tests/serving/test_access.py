"""API keys at every endpoint: nobody without one, nobody sees another's jobs, quotas, and nothing of the machine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_server import complete_one, make_keys, open_store, png, small_api

from cinemo.serving.http.api import ApiSettings
from cinemo.serving.store.jobs import JobStore

OPEN = {"/healthz", "/readyz", "/metrics"}


class Guarded:
    """A server with two keys, and what it answered so far."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.store = directory, open_store(directory)
        self.keys, self.tokens = make_keys(self.store, "one", "two")
        self.api = small_api(self.store, ApiSettings(body_bytes=100_000), keys=self.keys)
        self.client = TestClient(self.api, raise_server_exceptions=False)
        self.bodies: list[str] = []

    def ask(self, method: str, path: str, token: str | None, **options: Any) -> Any:
        headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {token}"} if token is not None else {})
        answer = self.client.request(method, path, headers=headers, **options)
        self.bodies.append(str(answer.headers) + answer.content.decode("latin-1"))
        return answer

    def create(self, token: str | None, **headers: str) -> Any:
        return self.ask(
            "POST", "/v1/videos", token, data={"prompt": "waves"}, files={"input_reference": ("a", png())},
            headers=headers,
        )  # fmt: skip


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(tmp_path)
    yield made
    told = "".join(made.bodies)
    for secret in (str(made.directory), "/tmp/", "Traceback", "site-packages", ".sqlite", "cin_"):
        assert secret not in told.replace("Bearer cin_...", ""), f"an answer tells {secret}"


def operations(api: Any) -> list[tuple[str, str]]:
    document = api.openapi()
    return [(method.upper(), path) for path, found in document["paths"].items() for method in found]


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Basic Y2luOng=", "Bearer cin_x_y", "Bearer cin_" + "0" * 12 + "_" + "0" * 64,
     "bearer \xff", "Bearer " + "x" * 5000],
)  # fmt: skip
def test_every_endpoint_but_health_and_metrics_needs_a_key(guarded: Guarded, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    for method, path in [*operations(guarded.api), ("GET", "/v1/unknown"), ("PATCH", "/v1/videos")]:
        answer = guarded.client.request(method, path.replace("{video_id}", "video_0"), headers=headers)
        if path in OPEN:
            assert answer.status_code == 200, path
        else:
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="cinemo"'), path
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_body_without_a_key_is_not_read(guarded: Guarded) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/videos",
        "raw_path": b"/v1/videos", "query_string": b"", "root_path": "", "scheme": "http", "server": ("a", 80),
        "client": ("b", 1), "headers": [(b"content-type", b"multipart/form-data; boundary=x")],
    }  # fmt: skip
    asyncio.run(guarded.api(scope, receive, send))
    assert sent[0]["status"] == 401


def test_a_revoked_key_opens_nothing_more(guarded: Guarded) -> None:
    token = guarded.tokens[0]
    assert guarded.ask("GET", "/v1/videos", token).status_code == 200
    guarded.keys.revoke(token.split("_")[1])
    assert guarded.ask("GET", "/v1/videos", token).status_code == 401


def test_no_endpoint_shows_or_changes_another_keys_job(guarded: Guarded) -> None:
    mine, theirs = guarded.tokens
    job_id = guarded.create(mine).json()["id"]
    complete_one(guarded.store)
    unknown = guarded.ask("GET", "/v1/videos/video_" + "0" * 24, theirs).json()
    tried = 0
    for method, path in operations(guarded.api):
        if "{video_id}" not in path:
            continue
        tried += 1
        answer = guarded.ask(method, path.replace("{video_id}", job_id), theirs)
        assert answer.status_code == 404, (method, path)
        assert answer.json() == json.loads(json.dumps(unknown).replace("video_" + "0" * 24, job_id)), "as if unknown"
    assert tried >= 4
    assert guarded.ask("GET", "/v1/videos", theirs).json()["data"] == []
    assert guarded.ask("GET", "/v1/videos", theirs, params={"after": job_id}).json()["data"] == []
    assert guarded.ask("GET", f"/v1/videos/{job_id}", mine).json()["status"] == "completed"
    assert guarded.ask("GET", f"/v1/videos/{job_id}/content", mine).status_code == 200


def test_idempotency_keys_are_each_clients_own(guarded: Guarded) -> None:
    one, two = (guarded.create(token, **{"Idempotency-Key": "a"}).json()["id"] for token in guarded.tokens)
    assert one != two
    assert guarded.create(guarded.tokens[0], **{"Idempotency-Key": "a"}).json()["id"] == one


def test_a_quota_is_of_one_key_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys, (small,) = make_keys(store, "small", max_active=1)
    client = TestClient(small_api(store, keys=keys))
    large = keys.create("large")[1]

    def create(token: str) -> Any:
        return client.post(
            "/v1/videos", data={"prompt": "waves"}, files={"input_reference": ("a", png())},
            headers={"Authorization": f"Bearer {token}"},
        )  # fmt: skip

    assert create(small).status_code == 202
    answer = create(small)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "quota_exceeded")
    assert int(answer.headers["retry-after"]) >= 1
    assert [create(large).status_code for _ in range(2)] == [202, 202]


def test_metrics_may_need_a_key(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys, (token,) = make_keys(store, "prometheus")
    client = TestClient(small_api(store, ApiSettings(metrics="key"), keys=keys))
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_the_document_tells_of_keys_where_they_are_needed(guarded: Guarded, tmp_path: Path) -> None:
    document = guarded.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, found in document["paths"].items():
        for operation in found.values():
            assert ("security" in operation, "401" in operation["responses"]) == (path not in OPEN, path not in OPEN)
    bare = TestClient(small_api(open_store(tmp_path / "bare"))).get("/openapi.json").json()
    assert "securitySchemes" not in bare["components"]
    assert "401" not in json.dumps(bare["paths"])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["create", "finish", "delete", "list"])), max_size=12))
def test_whatever_two_clients_do_each_sees_its_own_jobs(guarded: Guarded, steps: list[tuple[int, str]]) -> None:
    for token in guarded.tokens:
        for video in guarded.ask("GET", "/v1/videos", token).json()["data"]:
            while guarded.ask("DELETE", f"/v1/videos/{video['id']}", token).json().get("deleted") is False:
                pass
    own: list[set[str]] = [set(), set()]
    for who, what in steps:
        token = guarded.tokens[who]
        if what == "create":
            own[who].add(guarded.create(token).json()["id"])
        elif what == "finish":
            for job in guarded.store.claim("worker", 1):
                guarded.store.fail(job, "internal_error", "a test")
        elif what == "delete":
            for job_id in own[0] | own[1]:
                answer = guarded.ask("DELETE", f"/v1/videos/{job_id}", token)
                assert answer.status_code == (200 if job_id in own[who] else 404)
                if answer.json().get("deleted"):
                    own[who].discard(job_id)
        for client in (0, 1):
            listed = guarded.ask("GET", "/v1/videos", guarded.tokens[client], params={"limit": 100}).json()["data"]
            assert {video["id"] for video in listed} == own[client]


def test_without_keys_everybody_is_one_client(tmp_path: Path) -> None:
    store: JobStore = open_store(tmp_path)
    _, (token,) = make_keys(store, "one")
    client = TestClient(small_api(store))
    made = client.post("/v1/videos", data={"prompt": "w"}, files={"input_reference": ("a", png())}).json()["id"]
    assert client.get(f"/v1/videos/{made}", headers={"Authorization": f"Bearer {token}"}).status_code == 200
