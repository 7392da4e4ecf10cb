"""TensorBoard's files: every step once, whatever was killed and resumed, on disk and on s3://."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cinemo import storage
from cinemo.config import Recipe
from cinemo.recipes import override
from cinemo.training.report import board
from cinemo.training.report.board import Board, events, known_steps
from cinemo.training.report.metrics import Report
from cinemo.training.report.progress import Progress, Resumed, Sheet
from cinemo.types import RunError


def _report(step: int, loss: float) -> Report:
    return Report(step, loss, 1e-3, 0.5, 8.0, 0.25)


def _shown(root: str, part: str, tag: str) -> list[tuple[int, Any]]:
    """What TensorBoard keeps of a tag: a file's start forgets what is at its step or later."""
    found: list[tuple[int, Any]] = []
    directory = storage.join(root, "tensorboard", part)
    for name in storage.names(directory):
        for event in events(storage.read_bytes(storage.join(directory, name))):
            if event.HasField("session_log"):
                found = [(step, value) for step, value in found if step < event.step]
            found += [(event.step, value) for value in event.summary.value if value.tag == tag]
    return found


def _losses(root: str) -> list[tuple[int, float]]:
    return [(step, value.simple_value) for step, value in _shown(root, "curves", "loss")]


def test_a_resumed_run_shows_every_step_once(tmp_path: Path) -> None:
    output, lines = str(tmp_path), list[str]()
    first = Board(output, lines.append)
    first.resumed(0, ())
    for step in (1, 2, 3):
        first.scalars(step, _report(step, 2.0).metrics())
    second = Board(output, lines.append)  # the first was killed, nothing closed it
    second.resumed(2, (_report(1, 2.0), _report(2, 2.0)))
    second.scalars(3, {"loss": 1.5, "sample_motion_clips": 0.1})
    second.close()
    assert _losses(output) == [(1, 2.0), (2, 2.0), (3, 1.5)]
    assert [step for step, _ in _shown(output, "curves", "sample_motion_clips")] == [3]
    assert known_steps(str(tmp_path / "tensorboard")) == {1, 2, 3}
    assert not lines


def test_what_is_missing_comes_from_the_checkpoint_s_reports(tmp_path: Path) -> None:
    """Steps 2 and 3 were not written before the kill; they and what follows stand in their order."""
    output = str(tmp_path)
    first = Board(output, print)
    first.resumed(0, ())
    first.scalars(1, {"loss": 3.0})
    first.scalars(4, {"loss": 9.0})
    second = Board(output, print)
    second.resumed(4, tuple(_report(step, float(step)) for step in (1, 2, 3, 4)))
    second.close()
    assert _losses(output) == [(1, 3.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    made = Board(str(tmp_path), print)
    made.resumed(0, ())
    made.scalars(1, {"loss": 3.0})
    made.scalars(2, {"loss": 4.0})
    made.close()
    (path,) = (tmp_path / "tensorboard" / "curves").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert _losses(str(tmp_path)) == [(1, 3.0)]


def test_sheets_are_made_smaller(tmp_path: Path) -> None:
    sheet = tmp_path / "step-000007.png"
    Image.new("RGB", (2 * board.WIDTH, 300), "red").save(sheet)
    made = Board(str(tmp_path), print)
    made.resumed(0, ())
    made.sheet(7, (str(sheet), str(tmp_path / "video.mp4")))
    made.close()
    ((step, value),) = _shown(str(tmp_path), "sheets", "samples")
    picture = Image.open(io.BytesIO(value.image.encoded_image_string))
    assert (step, picture.size) == (7, (board.WIDTH, 150))


def test_a_run_on_s3_stores_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files grow in a temporary directory and lie, whole, under the output; an outage is said and passes."""
    stored: dict[str, bytes] = {}
    away, lines = [False], list[str]()

    def write(uri: str, data: bytes) -> None:
        if away[0]:
            raise RunError("no answer")
        stored[uri] = data

    monkeypatch.setattr(board.storage, "write_bytes", write)
    monkeypatch.setattr(board.storage, "names", lambda uri: [])
    made = Board("s3://bucket/run", lines.append)
    made.resumed(0, ())
    for step in (1, 2, 3):
        away[0], made._due = step < 3, 0.0  # as if half a minute had passed
        made.scalars(step, {"loss": 3.0})
    made.scalars(4, {"loss": 3.0})
    assert len(_steps(stored)) == 3
    made.close()
    assert lines == ["tensorboard: cannot be written (no answer); training goes on"]
    assert _steps(stored) == [1, 2, 3, 4]


def _steps(stored: dict[str, bytes]) -> list[int]:
    (uri,) = (uri for uri in stored if uri.startswith("s3://bucket/run/tensorboard/curves/events.out.tfevents."))
    return [event.step for event in events(stored[uri]) if event.summary.value]


def test_progress_writes_it_where_asked(tmp_path: Path, small: Recipe) -> None:
    for switched in (True, False):
        output = str(tmp_path / str(switched))
        recipe = override(small, [f"train.tensorboard={str(switched).lower()}"])
        progress = Progress(recipe, output, "/data", "digest", lambda line: None)
        progress.handle(Resumed(0, ()))
        progress.handle(_report(1, 2.0))
        progress.handle(Sheet(1, (), {"clips": 0.25}))
        progress.fail()
        assert _losses(output) == ([(1, 2.0)] if switched else [])
        assert len(_shown(output, "curves", "sample_motion_clips")) == int(switched)
