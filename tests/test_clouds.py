"""gs:// and az://: whatever filesystem is registered for them is read, and its faults mean what those of S3 do."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.registry import _registry

from cinemo import s3
from cinemo.media.sources import fetched, refused_scheme
from cinemo.types import ClipError, InputError, RunError


class HttpError(Exception):
    """Of the kind that libraries of clouds raise: no OSError, with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status_code = status


HttpError.__module__ = "google.cloud.exceptions"


class Cloud(fsspec.AbstractFileSystem):  # type: ignore[misc]
    protocol = ("gs", "az")
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[list[Exception]] = []
    calls = 0

    def _content(self, path: str) -> bytes:
        Cloud.calls += 1
        if Cloud.faults:
            raise Cloud.faults.pop(0)
        try:
            return Cloud.files[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self._content(path)), "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        return self._content(path)[start or 0 : end]

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        Path(lpath).write_bytes(self._content(rpath))


@pytest.fixture(params=["gs", "az"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(_registry, request.param, Cloud)
    monkeypatch.setenv(s3.PATIENCE, "60")
    Cloud.files, Cloud.faults, Cloud.calls = {"bucket/ü #1.mp4": b"0123456789", "bucket/a.tar": b"0123456789"}, [], 0
    return str(request.param)


def content(uri: str) -> bytes:
    with fetched(uri) as path:
        return path.read_bytes()


def refusal(uri: str, fault: Exception | None = None) -> str:
    Cloud.faults = [fault] if fault else []
    with pytest.raises(ClipError) as refused:
        content(uri)
    assert refused.value.stage == "open"
    assert uri in refused.value.detail
    return refused.value.reason


def test_objects_and_members_are_read(scheme: str) -> None:
    assert content(f"{scheme}://bucket/ü #1.mp4") == b"0123456789"
    assert content(f"{scheme}://bucket/a.tar::x.mp4::2+3") == b"234"
    assert refusal(f"{scheme}://bucket/nowhere.mp4") == "missing"
    assert refusal(f"{scheme}://bucket/a.tar::x.mp4::8+3") == "truncated"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (HttpError(404), "missing"),
        (HttpError(403), "denied"),
        (OSError("Forbidden: bucket/x"), "denied"),
        (PermissionError("no"), "denied"),
        (HttpError(416), "truncated"),
    ],
    ids=str,
)
def test_what_one_object_refuses_is_its_clips_fault(scheme: str, fault: Exception, reason: str) -> None:
    assert refusal(f"{scheme}://bucket/ü #1.mp4", fault) == reason
    assert Cloud.calls == 1


def test_an_outage_is_met_with_patience_and_is_no_clips_fault(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{scheme}://bucket/ü #1.mp4"
    Cloud.faults = [HttpError(503), ConnectionError("dropped"), HttpError(429)]
    assert content(uri) == b"0123456789"
    monkeypatch.setenv(s3.PATIENCE, "0.1")
    Cloud.faults = [HttpError(503) for _ in range(1000)]
    with pytest.raises(RunError, match=r"storage has been failing for \d+ s \(HttpError: HTTP 503\)"):
        content(uri)


def test_what_no_patience_mends_ends_the_run_at_once(scheme: str) -> None:
    for fault, kind, line in (
        (HttpError(401), InputError, "check the credentials in the environment"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            RunError,
            "cannot write there .No space left on device.; free some space there",
        ),
    ):
        Cloud.faults, Cloud.calls = [fault], 0
        with pytest.raises(kind, match=line):
            content(f"{scheme}://bucket/ü #1.mp4")
        assert Cloud.calls == 1


def test_a_package_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    if refused_scheme("gs") is None:
        pytest.skip("gcsfs is installed")
    with pytest.raises(InputError, match=r"gs:// needs `pip install gcsfs`"):
        content("gs://bucket/x.mp4")
