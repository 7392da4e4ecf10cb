"""Webhooks against a real receiver on loopback: what is sent, what is refused, and that nothing owed is lost."""

from __future__ import annotations

import base64
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from ports import free_port
from small_server import complete_one, make_keys, open_store, png, small_api

from cinemo.serving.http.signatures import read_secret, secret_of
from cinemo.serving.http.webhooks import Receivers, WebhookSender
from cinemo.serving.store.database import Database
from cinemo.serving.store.jobs import JobStore
from cinemo.serving.store.media import MediaStore
from cinemo.serving.store.webhooks import WebhookQueue
from cinemo.types import InputError

SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


class Receiver:
    """Notes what it was sent; ``statuses``: of the next answers, 200 afterwards. Down until `start`."""

    def __init__(self, port: int = 0, statuses: tuple[int, ...] = ()) -> None:
        self.port = port = port or free_port()
        self.url = f"http://127.0.0.1:{port}/hook?a=1"
        self.statuses, self.received = list(statuses), list[tuple[dict[str, str], bytes]]()
        self._server: http.server.ThreadingHTTPServer | None = None

    def start(self) -> Receiver:
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return open_store(tmp_path)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def send(store: JobStore) -> Iterator[Callable[..., WebhookSender]]:
    """Starts senders, which are closed after the test."""
    made: list[WebhookSender] = []

    def started(lease_seconds: float = 60.0, **options: Any) -> WebhookSender:
        queue = WebhookQueue(store.database, lease_seconds)
        options = {"retry_seconds": (0.02, 0.02, 0.02), "poll_seconds": 0.02, "answer_seconds": 2.0} | options
        made.append(WebhookSender(queue, SECRET, Receivers(anywhere=True), **options))
        made[-1].start()
        return made[-1]

    yield started
    for each in made:
        each.close()


def submit(store: JobStore, url: str, **fields: Any) -> Any:
    client = TestClient(small_api(store, receivers=Receivers(anywhere=True)))
    files = {"input_reference": ("a.png", png())}
    answer = client.post("/v1/videos", data={"prompt": "waves", "webhook_url": url} | fields, files=files)
    assert answer.status_code == 202, answer.text
    return answer.json()


def until(done: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.01)


def waiting(store: JobStore) -> int:
    return WebhookQueue(store.database).waiting()


def test_a_finished_video_is_told_and_the_official_client_believes_it(
    store: JobStore, receiver: Receiver, send: Any
) -> None:
    receiver.start()
    video = submit(store, receiver.url)
    assert "webhook_url" not in video, "it may hold a secret of its own"
    send()
    assert waiting(store) == 0, "nothing is due before the end"
    complete_one(store)
    until(lambda: receiver.received and not waiting(store))
    ((headers, body),) = receiver.received
    with openai.OpenAI(api_key="x", webhook_secret=SECRET) as official:
        official.webhooks.verify_signature(body, headers)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            official.webhooks.verify_signature(body + b" ", headers)
    event = json.loads(body)
    assert (event["object"], event["type"], event["data"]) == ("event", "video.completed", {"id": video["id"]})
    job = store.get(video["id"])
    assert job is not None
    assert event["created_at"] == int(job.completed_at or 0)
    assert event["id"] == headers["webhook-id"]


@pytest.mark.parametrize("how", ["fail", "deadline", "cancel"])
def test_other_ends(store: JobStore, receiver: Receiver, send: Any, how: str) -> None:
    receiver.start()
    video = submit(store, receiver.url, **({"timeout": "0.01"} if how == "deadline" else {}))
    if how == "fail":
        (job,) = store.claim("worker", 1)
        store.fail(job, "internal_error", "the reason")
    elif how == "cancel":
        store.cancel(video["id"])
    else:
        time.sleep(0.02)
        store.sweep()
    marker = submit(store, receiver.url)
    complete_one(store)
    send()
    until(lambda: receiver.received and not waiting(store))
    told = {(json.loads(body)["data"]["id"], json.loads(body)["type"]) for _, body in receiver.received}
    expected = {(marker["id"], "video.completed")}
    assert told == expected | (set() if how == "cancel" else {(video["id"], "video.failed")})


def test_a_receiver_that_is_down_and_comes_up(store: JobStore, receiver: Receiver, send: Any) -> None:
    submit(store, receiver.url)
    complete_one(store)
    sender = send(retry_seconds=(0.05,) * 200)
    time.sleep(0.2)
    assert waiting(store) == 1
    sender.close()  # and the server restarts meanwhile
    receiver.start()
    send()
    until(lambda: receiver.received and not waiting(store))
    assert len(receiver.received) == 1


def test_answers_that_are_no_success_are_tried_again_under_one_id(
    store: JobStore, receiver: Receiver, send: Any
) -> None:
    receiver.statuses = [500, 302, 404]
    receiver.start()
    submit(store, receiver.url)
    complete_one(store)
    send()
    until(lambda: not waiting(store))
    assert len(receiver.received) == 4, "a redirect is not followed"
    assert len({headers["webhook-id"] for headers, _ in receiver.received}) == 1
    assert len({body for _, body in receiver.received}) == 1


@pytest.mark.parametrize(("statuses", "tries"), [((500,) * 9, 4), ((410,), 1)])
def test_tries_have_an_end(
    store: JobStore, receiver: Receiver, send: Any, statuses: tuple[int, ...], tries: int
) -> None:
    receiver.statuses = list(statuses)
    receiver.start()
    submit(store, receiver.url)
    complete_one(store)
    send()
    until(lambda: not waiting(store))
    assert len(receiver.received) == tries


def test_a_sender_that_dies_between_claim_and_delivery_loses_nothing(
    store: JobStore, receiver: Receiver, send: Any
) -> None:
    receiver.start()
    submit(store, receiver.url)
    complete_one(store)
    now = time.time()
    (taken,) = WebhookQueue(store.database, 60.0, lambda: now).claim(10)
    assert WebhookQueue(store.database, 60.0, lambda: now + 59).claim(10) == [], "leased"
    (again,) = WebhookQueue(store.database, 0.0, lambda: now + 61).claim(10)
    assert (again.event_id, again.attempt) == (taken.event_id, 2)
    WebhookQueue(store.database).again(taken, 3600)  # the first one wakes up: no longer its own
    WebhookQueue(store.database).again(again, 0)
    send()
    until(lambda: receiver.received and not waiting(store))
    assert receiver.received[0][0]["webhook-id"] == taken.event_id


def test_a_slow_receiver_keeps_no_other_waiting(store: JobStore, receiver: Receiver, send: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        submit(store, f"http://127.0.0.1:{silent.getsockname()[1]}/")
        submit(store, receiver.start().url)
        complete_one(store)
        complete_one(store)
        send(answer_seconds=30.0)
        until(lambda: receiver.received, seconds=5)


def test_each_key_has_a_secret_of_its_own(store: JobStore, receiver: Receiver, send: Any) -> None:
    receiver.start()
    keys, (token,) = make_keys(store, "someone")
    client = TestClient(small_api(store, keys=keys, receivers=Receivers(anywhere=True)))
    files, data = {"input_reference": ("a.png", png())}, {"prompt": "waves", "webhook_url": receiver.url}
    posted = client.post("/v1/videos", data=data, files=files, headers={"Authorization": f"Bearer {token}"})
    assert posted.status_code == 202
    complete_one(store)
    send()
    until(lambda: receiver.received)
    ((headers, body),) = receiver.received
    own = secret_of(SECRET, token.split("_")[1])
    assert own not in (SECRET, secret_of(SECRET, "another"))
    with openai.OpenAI(api_key="x") as official:
        official.webhooks.verify_signature(body, headers, secret=own)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            official.webhooks.verify_signature(body, headers, secret=SECRET)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1/", "url_not_allowed"),
        ("http://169.254.169.254/latest", "url_not_allowed"),
        ("http://[::1]/", "url_not_allowed"),
        ("https://inside.example/", "url_not_allowed"),
        ("https://outside.example:8443/", "url_not_allowed"),
        ("https://me:secret@outside.example/", "url_not_allowed"),
        ("https://nowhere.example/", "invalid_url"),
        ("ftp://outside.example/", "invalid_url"),
        ("outside.example", "invalid_url"),
        ("https://outside.example/" + "x" * 2048, "invalid_value"),
    ],
)
def test_addresses_that_are_refused(store: JobStore, url: str, code: str) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        known = {"inside.example": ["93.184.215.14", "10.0.0.7"], "outside.example": ["93.184.215.14"]}
        return known.get(name, [] if name.endswith(".example") else [name])

    client = TestClient(small_api(store, receivers=Receivers(resolve=resolve)))
    files = {"input_reference": ("a.png", png())}
    answer = client.post("/v1/videos", data={"prompt": "waves", "webhook_url": url}, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, "webhook_url"), error
    assert "input_reference" not in error["message"]
    assert store.page() == []
    fine = {"prompt": "waves", "webhook_url": "https://outside.example/hook"}
    assert client.post("/v1/videos", data=fine, files=files).status_code == 202
    without = TestClient(small_api(store)).post("/v1/videos", data=fine, files=files)
    assert (without.status_code, without.json()["error"]["code"]) == (400, "webhooks_not_supported")


def test_an_address_is_looked_at_again_when_it_is_asked(store: JobStore, receiver: Receiver) -> None:
    receiver.start()
    submit(store, receiver.url)
    complete_one(store)
    sender = WebhookSender(WebhookQueue(store.database), SECRET, Receivers(), poll_seconds=0.02)
    sender.start()
    until(lambda: not waiting(store))
    sender.close()
    assert receiver.received == [], "given up: the name may have been bound anew"


def test_an_idempotency_key_knows_the_webhook(store: JobStore, receiver: Receiver) -> None:
    client = TestClient(small_api(store, receivers=Receivers(anywhere=True)))

    def ask(**fields: str) -> Any:
        files = {"input_reference": ("a.png", png())}
        return client.post(
            "/v1/videos", data={"prompt": "waves"} | fields, files=files, headers={"Idempotency-Key": "a"}
        )

    first = ask(webhook_url=receiver.url)
    assert ask(webhook_url=receiver.url).json()["id"] == first.json()["id"]
    assert ask().json()["error"]["code"] == "idempotency_key_reused"


@pytest.mark.parametrize("text", ["", "secret", "whsec_", "whsec_!!", "whsec_" + base64.b64encode(b"k" * 23).decode()])
def test_secrets_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="webhook_secret"):
        read_secret(text)


def test_one_clients_many_receivers_delay_nobody_else(
    database_url: str, tmp_path: Path, open_database: Callable[..., Database]
) -> None:
    store = JobStore(open_database(database_url), MediaStore(str(tmp_path / "media")))
    for client in ("many", "many", "many", "one", "other"):
        store.submit({"prompt": "waves"}, b"", client, webhook_url=f"https://{client}.example/")
    for _ in range(5):
        complete_one(store)
    queue = WebhookQueue(store.database)
    assert sorted(delivery.client for delivery in queue.claim(3)) == ["many", "one", "other"]
    assert [delivery.client for delivery in queue.claim(9)] == ["many", "many"]
    assert queue.claim(9) == []
