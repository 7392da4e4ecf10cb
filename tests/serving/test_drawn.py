"""Arrows and masks over HTTP: what is wrong with them is said at once, and nothing is queued."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from serving.test_page import always, open_store, png
from tiny import tiny_longer_bundle

from cinemo.bundle import BundleCard, read_card
from cinemo.serving.http.api import build_api
from cinemo.serving.store.jobs import JobStore


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> BundleCard:
    return read_card(tiny_longer_bundle(tmp_path_factory.mktemp("longer")))


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return open_store(tmp_path)


@pytest.fixture
def client(card: BundleCard, store: JobStore) -> TestClient:
    return TestClient(build_api(store, lambda: card, always))


def test_arrows_are_kept_as_numbers(client: TestClient) -> None:
    for text in ("1,2,30,4;5,6,5,6", "[[1, 2, 30, 4], [5, 6, 5, 6]]"):
        files = {"input_reference": ("a.png", png(), "image/png"), "mask": ("m.png", png(), "image/png")}
        answer = client.post("/v1/videos", data={"prompt": "waves", "arrows": text}, files=files)
        assert answer.status_code == 202, answer.text
        assert answer.json()["arrows"] == [[1, 2, 30, 4], [5, 6, 5, 6]]


@pytest.mark.parametrize(
    ("arrows", "mask", "said"),
    [
        ("1,2,3", False, "expected four numbers x0,y0,x1,y1"),
        ("[[1,2", False, "expected a list of arrows"),
        ("1,2,3,nan", False, "arrows of four numbers x0,y0,x1,y1"),
        ("60,2,3,4", False, "arrow 1: starts at 60,2, expected a place in the picture, which is 60x40"),
        (";".join(["1,2,3,4"] * 65), False, "at most 64"),
        ("", True, "mask: says where arrows move the picture, but there are none"),
    ],
)
def test_what_is_wrong_is_said_at_once(client: TestClient, store: JobStore, arrows: str, mask: bool, said: str) -> None:
    files = {"input_reference": ("a.png", png(), "image/png")}
    files |= {"mask": ("m.png", png(), "image/png")} if mask else {}
    answer = client.post("/v1/videos", data={"prompt": "waves", "arrows": arrows}, files=files)
    assert answer.status_code == 422
    assert said in answer.json()["error"]["message"]
    assert store.page() == []
