"""What libraries write to standard error while a command runs: kept in a file, which a failure names, off the terminal.

Ray, its C++ core, torch and their like warn of what a person can do nothing about. What this package has to say goes to
standard output; its errors, and what it logs, still reach the terminal (`errors`).
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

_terminal: TextIO | None = None  # standard error as it was, while it is set aside
_kept: Path | None = None  # where it goes meanwhile
_logs: Path | None = None  # of Ray's own processes


def errors() -> TextIO:
    """Where a person reads errors."""
    return _terminal or sys.stderr


def logs_are_in(directory: str) -> None:
    """Ray's processes write their logs there."""
    global _logs
    _logs = Path(directory)


def set_aside(name: str) -> Callable[[], None]:
    """Send standard error, Python's and the system's, to a file from now on; returns what ends that.

    Nothing is changed where ``CINEMO_DEBUG`` is set, and in a job of a cluster (``RAY_ADDRESS``), whose log is the
    place for it.
    """
    global _terminal, _kept
    if _terminal is not None or os.environ.get("CINEMO_DEBUG") or os.environ.get("RAY_ADDRESS"):
        return lambda: None
    before, standard = sys.stderr, os.dup(2)
    descriptor, path = tempfile.mkstemp(prefix=f"cinemo-{Path(name).stem}-", suffix=".log")
    os.dup2(descriptor, 2)
    os.close(descriptor)
    written = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    # Python's own standard error may be elsewhere than the system's, as in a test.
    is_system = _descriptor(before) == 2
    _terminal = open(standard, "w", buffering=1, errors="backslashreplace", closefd=False) if is_system else before  # noqa: SIM115
    sys.stderr, _kept = written, Path(path)
    ours = logging.StreamHandler(_terminal)
    logging.getLogger("cinemo").addHandler(ours)
    crashes = is_system and not faulthandler.is_enabled()
    if crashes:
        faulthandler.enable(_terminal)  # a crash of the interpreter is told where it is seen

    def restore() -> None:
        global _terminal, _kept
        logging.getLogger("cinemo").removeHandler(ours)
        if crashes:
            faulthandler.disable()
        sys.stderr, _terminal = before, None
        os.dup2(standard, 2)
        os.close(standard)
        if _kept is not None:
            _kept.unlink(missing_ok=True)
        _kept = None

    return restore


def set_aside_for_good(name: str) -> None:
    """The same until the process ends, its libraries' last words included."""
    atexit.register(set_aside(name))


def where() -> str:
    """The places to look at after a failure, and keeps them; empty where there is nothing to see."""
    global _kept
    places = []
    if _kept is not None and _kept.stat().st_size:
        if _logs is not None and _logs.is_dir():
            shutil.copyfile(_kept, _logs / f"{_kept.stem}.err")  # one place to look at
        else:
            places.append(f"warnings of libraries: {_kept}")
            _kept = None
    if _logs is not None:
        places.append(f"Ray's logs: {_logs}")
    return "; ".join(places)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None
