"""What libraries write to standard error does not reach the terminal, and is found where a command fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cinemo import diagnostics

ROOT = Path(__file__).resolve().parents[1]
NOISE = "[2026-11-30 E 1 1] core_worker.cc:2465: of no use to a person"
SCRIPT = f"""
import atexit, logging, os, sys, warnings
from cinemo import cli, diagnostics
from cinemo.types import InputError, RunError
atexit.register(lambda: os.write(2, b"late {NOISE}\\n"))
def main(argv):
    atexit.register(lambda: os.write(2, b"last {NOISE}\\n"))
    os.write(2, b"{NOISE}\\n")
    warnings.warn("deprecated")
    logging.getLogger("ray").error("{NOISE}")
    logging.getLogger("cinemo.s3").warning("s3://bucket: no answer, trying again")
    if len(sys.argv) > 2:
        diagnostics.logs_are_in(sys.argv[2])
    print("a result")
    if sys.argv[1] != "well":
        raise {{"run": RunError, "input": InputError, "bug": KeyError}}[sys.argv[1]]("what went wrong")
cli.run(main)
"""


def ended(tmp_path: Path, how: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "command.py").write_text(SCRIPT)
    known = {key: value for key, value in os.environ.items() if key not in ("CINEMO_DEBUG", "RAY_ADDRESS")}
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(tmp_path / "command.py"), how, *more],
        env=known | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "scratch")} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def left(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "scratch").glob("*"))


def test_a_command_that_ends_well_shows_its_own_lines_alone(tmp_path: Path) -> None:
    done = ended(tmp_path, "well")
    assert (done.returncode, done.stdout) == (0, "a result\n")
    # What was registered before the command began is the program's own.
    assert done.stderr == f"s3://bucket: no answer, trying again\nlate {NOISE}\n"
    assert not left(tmp_path)


@pytest.mark.parametrize(("how", "code", "begins"), [("run", 1, ""), ("bug", 1, "KeyError: ")])
def test_a_failure_says_where_the_rest_is(tmp_path: Path, how: str, code: int, begins: str) -> None:
    done = ended(tmp_path, how)
    assert done.returncode == code
    line = done.stderr.splitlines()[1]
    assert line.startswith(f"command.py: {begins}")
    assert "what went wrong" in line
    found = re.search(r"warnings of libraries: ([^);]+)\)", line)
    assert found, line
    text = Path(found[1]).read_text()
    assert text.count(NOISE) == 3, "what was written while it ended too"
    assert "deprecated" in text


def test_rays_logs_are_one_place_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    done = ended(tmp_path, "run", str(tmp_path / "logs"))
    assert f"command.py: what went wrong (Ray's logs: {tmp_path}/logs)" in done.stderr.splitlines()
    (kept,) = (tmp_path / "logs").glob("*.err")
    assert NOISE in kept.read_text()
    assert not left(tmp_path)


def test_bad_input_is_a_persons_own_matter(tmp_path: Path) -> None:
    done = ended(tmp_path, "input", str(tmp_path))
    assert done.returncode == 2
    assert "command.py: what went wrong" in done.stderr.splitlines()
    assert not left(tmp_path)


@pytest.mark.parametrize("variable", ["CINEMO_DEBUG", "RAY_ADDRESS"])
def test_everything_is_shown_to_who_asks_for_it(tmp_path: Path, variable: str) -> None:
    done = ended(tmp_path, "well", **{variable: "1"})
    assert done.stderr.count(NOISE) == 4
    assert "deprecated" in done.stderr


def test_standard_error_is_as_it_was_after_a_call(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr
    restore = diagnostics.set_aside("test")
    again = diagnostics.set_aside("test")
    try:
        os.write(2, b"noise\n")
        print("noise", file=sys.stderr)
        print("an error", file=diagnostics.errors())
        again()
        os.write(2, b"noise\n")
    finally:
        restore()
    os.write(2, b"heard\n")
    assert sys.stderr is before
    assert capfd.readouterr().err == "an error\nheard\n"
