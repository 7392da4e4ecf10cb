"""A training that is told to end saves first, at the same step on every rank, and a resume goes on from there as if
nothing had been; so does one whose worker is told to.
"""

from __future__ import annotations

import csv
import os
import re
import signal
from pathlib import Path

import pytest

from cinemo.config import Recipe
from cinemo.recipes import override
from cinemo.training.checkpoint import checkpoints
from cinemo.training.report import sample_log
from tests.training.jobs import PATIENCE, Job, reference, train_workers, two_workers

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def steps_of(output: Path) -> list[int]:
    return [card.step for card in checkpoints.complete(str(output))]


def ended_by_sigterm(job: Job, output: Path) -> int:
    """The step after which a training ends when its command is told to, which must be saved."""
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(PATIENCE) == 143, job.log.read_text()
    log, step = job.log.read_text(), steps_of(output)[-1]
    words = f"{output}: ended at step {step}, which is saved (SIGTERM); the same command with --resume auto continues"
    assert log.splitlines()[-1].startswith(words)
    assert f"step {step}: the last one, as told" in log
    assert "Traceback" not in log
    return step


@pytest.mark.usefixtures("process_group")
def test_sigterm_costs_no_step(
    small: Recipe, dataset: str, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the command, and of a worker; the second training saves by the clock as well."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    endless = override(two_workers(small), ["train.checkpoint_every=1000000", "train.max_steps=1000000"])
    endless, output = override(endless, ["train.validate_every=0", "train.lr=5e-4"]), tmp_path / "run"
    jobs.append(Job(endless, dataset, output, tmp_path / "first.log"))
    jobs[0].wait_for(lambda: "step 1/" in jobs[0].log.read_text())
    first = ended_by_sigterm(jobs[0], output)
    assert steps_of(output) == [first]
    assert list(sample_log.read(str(output))) == list(range(first))

    timed = override(endless, ["train.checkpoint_minutes=0.01"])
    jobs.append(Job(timed, dataset, output, tmp_path / "second.log"))
    jobs[1].wait_for(lambda: steps_of(output)[-1] > first)
    os.kill(train_workers(jobs[1].process.pid)[-1], signal.SIGTERM)
    told = "a worker was told to end (SIGTERM)"
    jobs[1].wait_for(lambda: "continuing at step" in jobs[1].log.read_text().partition(told)[2])
    last = ended_by_sigterm(jobs[1], output)
    log = jobs[1].log.read_text()
    second = int(log.split(f": {told}")[0].rpartition("step ")[2])
    assert re.findall(r"continuing at step (\d+)", log) == [str(first), str(second)]
    assert first < second < last

    with (output / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, last + 1))
    assert list(sample_log.read(str(output))) == list(range(last))
    alone = reference(override(endless, [f"train.max_steps={last}"]), dataset)
    assert [float(row["loss"]) for row in rows] == pytest.approx([report.loss for report in alone], rel=1e-3)
