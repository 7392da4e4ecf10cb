"""A command as a person hears it: every line with the second at which it came, and what none may look like."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# Of Ray, its C++ core, Python's warnings, other libraries' loggers and progress bars; and what only a program reads.
STRAY = re.compile(
    r"pid=\d+"
    r"|\.(cc|py):\d+"
    r"|^\[?\d{4}-\d\d-\d\d[ T]\d\d:"
    r"|\w+Warning\b"
    r"|^(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b"
    r"|Started a local Ray instance|metrics agent|urllib3|NNPACK|huggingface"
    r"|it/s\]|\d%\|"
    r"|Traceback \(most recent"
    r"|\{'\w+': |\{\"\w+\": |\b(True|None)\b"
)


@dataclass(frozen=True)
class Heard:
    """``lines``: of both outputs, each with its seconds since the start; ``seconds``: until the end."""

    code: int
    lines: Sequence[tuple[float, str]]
    seconds: float

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def longest_silence(self) -> tuple[float, str]:
        """Its seconds, and the line before it."""
        marks = [(0.0, "(start)"), *self.lines, (self.seconds, "(end)")]
        return max((there - here, line) for (here, line), (there, _) in pairwise(marks))

    def stray(self) -> list[str]:
        return [line for _, line in self.lines if STRAY.search(line)]


def listen(command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str], seconds: float) -> Heard:
    """Run a command, killed after ``seconds``, and note when it says what."""
    begun, lines = time.monotonic(), list[tuple[float, str]]()
    process = subprocess.Popen(
        list(map(str, command)), cwd=cwd, env=dict(environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - begun, line.rstrip()))
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    return Heard(code, lines, time.monotonic() - begun)
