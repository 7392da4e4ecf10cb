"""What a long command says: one form for times, a line when it is due, from the innermost of what is going on."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo import progress
from cinemo.progress import Work, clock, counted, doing, indented, rate, say, shown, times

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0:00:00"), (42.4, "0:00:42"), (59.6, "0:01:00"), (3661, "1:01:01"), (90000, "25:00:00")]
)
def test_times_have_one_form(seconds: float, said: str) -> None:
    assert clock(seconds) == said
    assert times(seconds) == f"{said} gone"
    assert times(42, seconds) == f"0:00:42 gone, {said} left"


@given(st.integers(0, 10**6))
def test_a_clock_says_all_of_the_seconds(seconds: int) -> None:
    hours, minutes, rest = clock(seconds).split(":")
    assert int(hours) * 3600 + int(minutes) * 60 + int(rest) == seconds
    assert re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", clock(seconds))


def test_rates() -> None:
    assert rate(15, 20, "clips") == "0.75 clips/s"
    assert rate(4000, 2, "MB") == "2000 MB/s"
    assert rate(0, 0, "clips") == "0.00 clips/s"


def test_work_says_what_can_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    unknown, counting = Work("starting Ray"), Work("rendering", 96, "clips")
    assert counting.line() == "rendering: 0/96 clips, 0:00:00 gone"
    now += 12
    counting.advance(24)
    assert unknown.line() == "starting Ray: 0:00:12 gone"
    assert counting.line() == "rendering: 24/96 clips, 2.00 clips/s, 0:00:12 gone, 0:00:36 left"
    counting.reach(96, 96)
    assert counting.line().endswith("0:00:12 gone, 0:00:00 left")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_SECONDS", "LINE_SECONDS", "REWRITE_SECONDS", "_POLL_SECONDS"):
        monkeypatch.setattr(progress, name, 0.01)


def until(said: object, text: str) -> str:
    """What was said once ``text`` is among it."""
    seen, deadline = "", time.monotonic() + 20
    while text not in seen:
        assert time.monotonic() < deadline, seen
        out = said() if callable(said) else ""
        seen += out
        time.sleep(0.01)
    return seen


@pytest.mark.usefixtures("hasty")
def test_the_innermost_speaks_and_nobody_outside_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> str:
        return capsys.readouterr().out

    with doing("in a notebook"):
        time.sleep(0.05)
    assert read() == ""
    with shown(), indented(), doing("outer"):
        until(read, "   outer: ")
        with doing("inner"):
            until(read, "   inner: ")
            read()
            time.sleep(0.05)
            assert "outer" not in read()
        until(read, "   outer: ")
        assert list(counted("counting", iter("abc"), 3, "letters")) == ["a", "b", "c"]
    read()
    time.sleep(0.05)
    assert read() == ""


def test_what_takes_a_moment_is_not_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    with shown():
        for _ in range(20):
            with doing("a moment"):
                pass
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("hasty")
def test_a_terminal_has_one_line_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with shown(), doing("loading"):
        deadline = time.monotonic() + 20
        while terminal.getvalue().count("loading") < 3:
            assert time.monotonic() < deadline
        say("a result")
    assert "\r\x1b[Ka result\n" in terminal.getvalue(), "an unfinished line gives way to it"
    assert terminal.getvalue().count("\n") == 1
    assert not terminal.getvalue().rpartition("\r\x1b[K")[2].startswith("loading"), "nothing is left of it"


def test_a_command_is_heard_before_its_libraries_are_loaded(tmp_path: Path) -> None:
    """Into a pipe as well, where Python would keep lines until the end."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\nfrom cinemo import cli\nfrom cinemo.progress import FIRST_SECONDS\n"
        "def main(argv):\n    with cli.libraries():\n        time.sleep(FIRST_SECONDS + 1)\n"
        "    print('a result')\n    time.sleep(60)\n"
        "cli.run(main)\n"
    )
    process = subprocess.Popen([sys.executable, script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("loading libraries: ")
        while (line := process.stdout.readline()) != "a result\n":
            assert line.startswith("loading libraries: ")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
