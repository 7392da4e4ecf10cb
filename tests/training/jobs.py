"""Trainings as a user starts them, to be disturbed, and the undisturbed one to compare with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.data.loading.loader import HeldOut, LatentLoader
from cinemo.methods import build_method
from cinemo.methods.cinemo import CinemoTrain
from cinemo.training.report.metrics import Report
from cinemo.training.report.validation import Validation
from cinemo.training.run.batch import FrozenStates
from cinemo.training.run.engine import Engine
from cinemo.training.run.loop import train
from cinemo.types import keyed_seed

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 240.0
STEPS = 24


def two_workers(small: Recipe) -> Recipe:
    settings = {"workers": 2, "micro_batch": 1, "max_steps": STEPS, "checkpoint_every": 4, "sample_every": 0}
    settings |= {"held_out_shards": 1, "validate_every": 8}
    return small.model_copy(update={"train": CinemoTrain(**(small.train.model_dump() | settings))})


def _descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of a process's children, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, pending = [], [pid]
    while pending:
        for child in parents.get(pending.pop(), []):
            pending.append(child)
            try:
                found.append((child, Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()))
            except OSError:
                continue
    return found


def train_workers(pid: int) -> list[int]:
    """The two workers of a training among the descendants of a process."""
    found = [child for child, command in _descendants(pid) if "RayTrainWorker" in command]
    assert len(found) == 2, _descendants(pid)
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Job:
    """``pipelines/train.py`` as a user starts it."""

    def __init__(self, recipe: Recipe, data: str, output: Path, log: Path, *flags: str, **variables: str) -> None:
        recipe_file = log.with_suffix(".json")
        recipe_file.write_text(recipe.to_json())
        command = [sys.executable, str(ROOT / "pipelines" / "train.py"), "--recipe", str(recipe_file), "--data", data]
        environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "LOCAL_RANK")}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
        self.log = log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [*command, "--output", str(output), *flags], stdout=sink, stderr=subprocess.STDOUT, env=environment
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"too slow:\n{self.log.read_text()}"
            time.sleep(0.1)

    def kill_all(self) -> None:
        """What an out-of-memory killer or a lost machine does: no process of the job is left, none had a warning."""
        everyone = [self.process.pid, *(pid for pid, _ in _descendants(self.process.pid))]
        for pid in everyone:
            _kill(pid)
        self.process.wait()

    def kill_a_worker(self) -> None:
        _kill(train_workers(self.process.pid)[-1])


def reference(recipe: Recipe, data: str) -> list[Report]:
    """The undisturbed curve, on one rank in this process: the number of workers must not matter."""
    settings = CinemoTrain(**(recipe.train.model_dump() | {"workers": 1, "micro_batch": 4, "zero_stage": 0}))
    torch.manual_seed(keyed_seed(settings.seed, "weights"))
    alone = recipe.model_copy(update={"train": settings})
    engine = Engine(build_method(alone), settings, torch.device("cpu"))
    index = DatasetIndex.load(data)
    loader = LatentLoader.of(index, settings)
    text = FrozenStates.of(recipe)
    reports: list[Report] = []
    validation = Validation(alone, engine, text, HeldOut.of(index, alone.train))
    train(alone, engine, loader.batches(), text, on_report=reports.append, validate=validation)
    return reports
