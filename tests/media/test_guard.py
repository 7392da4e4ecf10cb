"""A decoder may crash, hang or eat memory: one clip is refused, the next one is decoded, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data.small_data import film
from media import broken_decoders

from cinemo.config import DataConfig
from cinemo.media.guard import Guard
from cinemo.media.mp4 import write_video
from cinemo.media.video import decode_views
from cinemo.types import Clip, ClipError

DATA = DataConfig(size=(32, 48), frames=6, frame_interval=(1, 3), views=2, clip_timeout=4, clip_memory=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clips")
    write_video(directory / "film.mp4", film("a", 30), 25)
    for kind in ("segfault", "abort", "hang", "bloat", "raises", "poison"):
        (directory / f"clip.{kind}").write_bytes(b"0123456789")
    return directory


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard(DATA, broken_decoders.decode)


def clip(name: str, caption: str = "") -> Clip:
    return Clip(name, name, caption)


def assert_decodes(guard: Guard, folder: Path) -> None:
    expected = decode_views(folder / "film.mp4", clip("film.mp4"), DATA)
    found = guard(folder / "film.mp4", clip("film.mp4"))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.frames_FHWC, theirs.frames_FHWC)
        assert (ours.fps, ours.frame_interval, ours.start_frame) == (25, theirs.frame_interval, theirs.start_frame)


def test_frames_are_those_of_the_decoder(guard: Guard, folder: Path) -> None:
    assert_decodes(guard, folder)
    process = guard.child and guard.child.process
    with pytest.raises(
        ClipError, match=r"decode: decoder_error: ZeroDivisionError: 0 frames a second \(\w+/\w+\.py:\d+\)$"
    ):
        guard(folder / "clip.raises", clip("a"))
    with pytest.raises(ClipError, match="open: missing"):
        Guard(DATA)(folder / "nowhere.mp4", clip("nowhere"))
    assert_decodes(guard, folder)
    assert guard.child is not None
    assert guard.child.process is process  # faults that a decoder names cost no new process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason", "detail"),
    [
        ("segfault", "decoder_crash", r"SIGSEGV after \d s \(10 bytes\)"),
        ("abort", "decoder_crash", r"SIGABRT after \d s \(10 bytes\)"),
        ("hang", "decoder_hang", r"no answer after 4 s \(10 bytes\)"),
        ("bloat", "out_of_memory", r"needs more than 2 GiB: .*"),
    ],
)
def test_a_broken_decoder_costs_one_clip(guard: Guard, folder: Path, kind: str, reason: str, detail: str) -> None:
    begun = time.monotonic()
    with pytest.raises(ClipError, match=f"^decode: {reason}: {detail}$"):
        guard(folder / f"clip.{kind}", clip("a"))
    assert time.monotonic() - begun < 2 * DATA.clip_timeout + 20
    assert_decodes(guard, folder)


def test_what_one_clip_broke_is_not_held_against_the_next(guard: Guard, folder: Path) -> None:
    guard(folder / "clip.poison", clip("a"))
    assert_decodes(guard, folder)


def test_a_kill_from_outside_is_no_verdict(guard: Guard, folder: Path, tmp_path: Path) -> None:
    assert_decodes(guard, folder)
    assert guard.child is not None
    guard.child.process.kill()
    assert_decodes(guard, folder)

    write_video(tmp_path / "film.mp4", film("a", 30), 25)
    (tmp_path / "once.killed").touch()
    assert len(guard(tmp_path / "once.killed", clip("a", "1"))) == 2
    (tmp_path / "always.killed").touch()
    with pytest.raises(ClipError, match="decode: decoder_crash: SIGKILL after"):
        guard(tmp_path / "always.killed", clip("a", "99"))
    assert (tmp_path / "always.killed").stat().st_size == 4


@pytest.mark.parametrize("kind", ["mp4", "hang"])
def test_the_child_dies_with_its_parent(folder: Path, kind: str) -> None:
    """Also a parent that has no time to say good-bye, and a child that hangs."""
    script = f"""
import threading, time
from pathlib import Path
from cinemo.media.guard import Guard
from media import broken_decoders, test_guard
guard = Guard(test_guard.DATA.model_copy(update={{"clip_timeout": 600}}), broken_decoders.decode)
folder = Path({str(folder)!r})
guard(folder / "film.mp4", test_guard.clip("a"))
print(guard.child.process.pid, flush=True)
guard(folder / "film.{kind}", test_guard.clip("a"))
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and alive(child):
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Running, and not just unburied by a container's first process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
