"""Setting up: what is said, what is run with pip and with uv, and how a failure ends it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup

ROOT = Path(__file__).resolve().parents[2]
FAKE = """#!/bin/sh
echo "$@" >> '{log}'
echo "Downloading something"
[ "$2 $FAIL" = "install 1" ] && {{ echo "no such package"; exit 3; }}
exit 0
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of a uv that notes how it is called; alone on the path."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "uv"
    program.write_text(FAKE.format(log=tmp_path / "log"))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tmp_path / "log"


def set_up(log: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{log.parent / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(  # -S: with the standard library alone, as where nothing is installed yet
        [sys.executable, "-S", "-m", "tools.setup", str(log.parent / "venv")], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "PIP_INDEX_URL": "file:///packages", **environment},
    )  # fmt: skip


def test_phases_are_told_and_uv_installs_what_pip_would(log: Path) -> None:
    done = set_up(log)
    assert done.returncode == 0, done.stderr
    lines, venv = done.stdout.splitlines(), log.parent / "venv"
    assert lines[0] == f"setting up {venv} with uv; it takes minutes, once"
    assert [line.split()[0] for line in lines[1:-1]] == ["[1/3]", "[1/3]", "[2/3]", "[2/3]", "[3/3]", "[3/3]"]
    assert all(line.split(" done in ")[1].startswith("0:00:") for line in lines[2:-1:2])
    assert lines[-1].startswith(f"{venv} is ready after 0:00:")
    made, *installed = log.read_text().splitlines()
    assert made.startswith("venv ")
    assert "--seed" in made, "an environment without pip would be another one"
    assert all("--constraint constraints.txt" in line and "--index-url file:///packages" in line for line in installed)
    assert [line.split()[-1] for line in installed] == ["torch", ".[dev]"]


def test_a_failure_shows_what_was_said_and_ends_it(log: Path) -> None:
    done = set_up(log, FAIL="1")
    assert done.returncode == 3
    assert "no such package\n[2/3] failed with exit code 3: " in done.stderr
    assert len(log.read_text().splitlines()) == 2, "nothing more is tried"


def test_pip_is_the_way_without_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup, "run", lambda name, command: commands.append(command))
    setup.main("some/venv")
    assert commands[0] == [sys.executable, "-m", "venv", "some/venv"]
    pip = [
        "some/venv/bin/python",
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--constraint",
        "constraints.txt",
    ]
    assert commands[1:] == [[*pip, "torch"], [*pip, "--editable", ".[dev]"]]
