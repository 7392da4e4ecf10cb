"""A training's curves and sample sheets for TensorBoard (``train.tensorboard``), beside MLflow.

::

    <output>/tensorboard/curves/events.out.tfevents.*   every report
    <output>/tensorboard/sheets/events.out.tfevents.*   every sample sheet, at most `WIDTH` pixels wide

Whatever steps a resumed run makes again, TensorBoard forgets of the run before: each start writes a new file that says
so. What is missing before them, because a job was killed or ran without this switch, is added from the checkpoint's
reports. For an s3:// output files grow in a temporary directory and are stored again now and then.
"""

from __future__ import annotations

import io
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cinemo import s3, storage
from cinemo.training.report.metrics import Report
from cinemo.types import RunError

DIRECTORY, CURVES, SHEETS = "tensorboard", "curves", "sheets"
WIDTH = 1280
_SECONDS, _PATIENCE = 30.0, 5.0


class Board:
    """Writes events of one invocation. A fault of the storage never stops a training.

    Args:
        output: of the run, local or s3://.
        say: takes a line for a person.
    """

    def __init__(self, output: str, say: Callable[[str], None]) -> None:
        self._root, self._say = storage.join(output, DIRECTORY), say
        remote = storage.is_remote(output)
        self._scratch = tempfile.TemporaryDirectory(prefix="cinemo-tensorboard-") if remote else None
        self._local = Path(self._scratch.name) if self._scratch else storage.local_path(self._root)
        self._writers: dict[str, Any] = {}
        self._stored: dict[Path, int] = {}  # the size that a file had when it was stored
        self._due = 0.0
        self._lost = False

    def resumed(self, step: int, history: Sequence[Report]) -> None:
        """The run goes on after ``step``; ``history``: the reports that led there."""

        def write() -> None:
            known = known_steps(self._root)
            first = next((row.step for row in history if row.step not in known), step + 1)
            self._open(CURVES, first)
            self._open(SHEETS, step + 1)
            for row in history:
                if row.step >= first:
                    self._add(CURVES, row.step, _scalars(row.metrics()))
            self._flush()

        self._guarded(write)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Values of a step."""

        def write() -> None:
            self._add(CURVES, step, _scalars(metrics))
            if time.monotonic() > self._due:
                self._flush()

        self._guarded(write)

    def sheet(self, step: int, uris: Sequence[str]) -> None:
        """The sheets among the files of a step's samples."""

        def write() -> None:
            pictures = {}
            for uri in uris:
                if uri.endswith(".png"):
                    name = uri.rpartition("/")[2].removesuffix(".png").replace(f"step-{step:06d}", "samples")
                    pictures[name] = storage.read_bytes(uri)
            self._add(SHEETS, step, _images(pictures))
            self._flush()

        self._guarded(write)

    def close(self) -> None:
        """Store what is left."""

        def write() -> None:
            self._flush()
            for writer in self._writers.values():
                writer.close()

        self._guarded(write)
        self._writers = {}
        if self._scratch:
            self._scratch.cleanup()

    def _open(self, part: str, first: int) -> None:
        """A new file, with which what other files have of step ``first`` and later ones is forgotten."""
        from tensorboardX.event_file_writer import EventsWriter  # seconds, and for whom the switch is on
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if part in self._writers:
            self._writers.pop(part).close()
        directory = self._local / part
        directory.mkdir(parents=True, exist_ok=True)
        number = len(list(directory.iterdir()))  # two files of one second would have the same name
        writer = EventsWriter(str(directory / "events"), f".{number:04d}")
        writer.write_event(Event(step=first, session_log=SessionLog(status=SessionLog.START), wall_time=time.time()))
        self._writers[part] = writer

    def _add(self, part: str, step: int, values: Sequence[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if part in self._writers:
            self._writers[part].write_event(Event(step=step, summary=Summary(value=values), wall_time=time.time()))

    def _flush(self) -> None:
        begun = time.monotonic()
        for writer in self._writers.values():
            writer.flush()
        if self._scratch:
            for path in sorted(self._local.glob("*/events*")):
                size = path.stat().st_size
                if size != self._stored.get(path):
                    uri = storage.join(self._root, path.parent.name, path.name)
                    with s3.patience(_PATIENCE):  # it is stored again soon
                        storage.write_bytes(uri, path.read_bytes())
                    self._stored[path] = size
            now = time.monotonic()
            # Whole files each time: what takes longer is done less often.
            self._due = now + max(_SECONDS, 20 * (now - begun))

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except (RunError, OSError) as error:
            if not self._lost:
                self._say(f"{DIRECTORY}: cannot be written ({error}); training goes on")
            self._lost = True
        else:
            self._lost = False


def _scalars(metrics: Mapping[str, float]) -> list[Any]:
    from tensorboardX.proto.summary_pb2 import Summary

    return [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]


def _images(pictures: Mapping[str, bytes]) -> list[Any]:
    """By name the bytes of PNGs, made smaller."""
    from tensorboardX.proto.summary_pb2 import Summary

    found = []
    for name, png in pictures.items():
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        picture.thumbnail((WIDTH, picture.height))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=buffer.getvalue()
        )
        found.append(Summary.Value(tag=name, image=image))
    return found


def known_steps(root: str) -> set[int]:
    """The steps of which the event files of a run have curves that TensorBoard would show."""
    steps = set[int]()
    directory = storage.join(root, CURVES)
    for name in sorted(storage.names(directory)):
        for event in events(storage.read_bytes(storage.join(directory, name))):
            if event.HasField("session_log"):
                steps = {step for step in steps if step < event.step}
            elif any(value.tag == "loss" for value in event.summary.value):
                steps.add(event.step)
    return steps


def events(data: bytes) -> Iterator[Any]:
    """The events of a file: each a length of 8 bytes, its checksum, a message, its checksum. A last half one is left
    out.
    """
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        message = data[at + 12 : at + 12 + length]
        if len(message) == length:
            yield Event.FromString(message)
        at += 16 + length
