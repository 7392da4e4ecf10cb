"""`make demo`, the first command of the README, with few clips and steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cinemo.recipes import RECIPES
from tests.pipelines.test_chain import ROOT


@pytest.mark.release
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.endswith("-tiny")])
def test_the_demo_ends_in_its_page(recipe: str, ray_ends: None, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    words = ["--recipe", recipe, "--output", output, "--count", 16, "--max-steps", 2]
    command = [sys.executable, str(ROOT / "pipelines/demo.py"), *map(str, words)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = (output / "report.html").read_text()
    assert "unreadable" in page  # what was broken on purpose
    assert page.count("base64,") >= 5  # figures, sheets and the served video
    again = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert again.returncode == 0
    stages = re.findall(r"^== (.+): done in", done.stdout, re.MULTILINE)
    assert re.findall(r"^== (.+): done before", again.stdout, re.MULTILINE) == stages
