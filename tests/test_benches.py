"""The benchmarks and the chaos run still start: their imports exist and their commands explain themselves."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = (Path(__file__).parent.parent / "benchmarks").glob("*.py")
SCRIPTS = sorted(path.stem for path in BENCHMARKS if "def main(" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_starts(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module(name)
    assert script.__doc__
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vae", "sampling", "batching", "norms", "memory", "training"])
def test_the_accelerator_s_bench_is_whole(part: str) -> None:
    """On a CPU with small networks: every part has rows, and none of them says why it could not be measured."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "benchmarks/bench_gpu.py", "--device", "cpu", "--small", "--part", part]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert rows
    assert not [row for row in rows if "Error" in row or "left out" in row]
