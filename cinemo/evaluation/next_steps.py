"""The demo's last lines: what it leaves, and commands to go on with, which work as they are printed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cinemo import tracking

_LEFT = {
    "report.html": "what was done, with videos and measurements: open it first",
    "dataset": "latents of the clips, with a report.html of their own",
    "run": "the training: checkpoints, loss.csv and what MLflow shows",
    "bundle": "the model, for the commands below",
    "videos": "what it makes of the pictures in images",
    "base-videos": "what the weights make of them that the training began with",
    "served": "the video that came over HTTP",
    "logs": "what each command said",
}


def closing_lines(output: Path, scripts: Path, image: Path, prompt: str, controls: Mapping[str, Any]) -> list[str]:
    """Lines for a person, of a demo in ``output``; the commands are indented, each with what it is for before it.

    Args:
        scripts: directory of the entry scripts.
        image, prompt, controls: what is animated in the example.
    """
    bundle, python = near(output / "bundle"), near(Path(sys.executable))
    asked = [word for name, value in controls.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def command(script: str, *words: str) -> str:
        return f"  {shlex.join([python, near(scripts / script), *words])}"

    width = max(len(near(output / name)) for name in _LEFT)
    lines = ["it leaves:", *(f"  {near(output / name):{width}}  {what}" for name, what in _LEFT.items())]
    lines += ["try next: serve the model, with a page for people at http://127.0.0.1:8000/"]
    lines += [command("serve.py", "--bundle", bundle)]
    lines += ["animate a picture of yours, with a prompt of yours in place of these"]
    mine = near(output / "mine.mp4")
    lines += [
        command("animate.py", "--bundle", bundle, "--image", near(image), "--prompt", prompt, *asked, "--output", mine)
    ]
    lines += ["measure what the model does, in a few minutes"]
    measured = near(output / "evaluation")
    lines += [command("evaluate.py", "--bundle", bundle, "--data", near(output / "dataset"), "--output", measured)]
    hint = tracking.locate(str(output / "run"))[2]
    if hint.startswith("mlflow ui "):
        lines += ["look at the training's curves", f"  {shlex.quote(python)} -m {hint}"]
    return lines


def near(path: Path) -> str:
    """A path as one types it here: without the current directory where it lies below that."""
    absolute = Path(os.path.abspath(path))  # links are kept: a virtual environment's Python is one
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)
