"""What the job's own process does with the workers' reports: progress lines, ``loss.csv``, MLflow, ``train.json``.

Knows nothing of Ray: `Progress.handle` takes the events that rank 0 posts.
"""

from __future__ import annotations

import csv
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cinemo import storage
from cinemo.config import Recipe
from cinemo.tracking import Run, flatten
from cinemo.training.loop import Report

RUN_FILE, SUMMARY_FILE, LOSS_FILE = "run.json", "train.json", "loss.csv"
_CSV_SECONDS = 5.0


@dataclass(frozen=True)
class Resumed:
    """A worker group (re)started at ``step`` with the reports that led there."""

    step: int
    history: tuple[Report, ...]


@dataclass(frozen=True)
class Saved:
    """A checkpoint of ``step`` is stored."""

    step: int


@dataclass(frozen=True)
class Sheet:
    """A sample sheet was written."""

    step: int
    uri: str


Event = Report | Resumed | Saved | Sheet


@dataclass(frozen=True)
class TrainSummary:
    """How a training ended; ``train.json``.

    ``first_loss``, ``last_loss``: means over the first and the last tenth of all reports. ``start_step``: where this
    invocation took up. ``seconds``: of this invocation, its workers' start-up included. ``samples_per_second``: median
    of the reports. ``checkpoint``: URI of the latest one.
    """

    steps: int
    start_step: int
    first_loss: float
    last_loss: float
    seconds: float
    samples_per_second: float
    checkpoint: str
    dataset: str
    mlflow_run: str | None
    mlflow_uri: str | None


class Progress:
    """Follows one invocation of a training.

    Args:
        output: the run's output directory; its ``run.json`` remembers the MLflow run across invocations.
        say: takes the lines for a person.
    """

    def __init__(
        self, recipe: Recipe, output: str, dataset: str, fingerprint: str, say: Callable[[str], None] = print
    ) -> None:
        self._recipe, self._output, self._say = recipe, output, say
        self._dataset, self._fingerprint = dataset, fingerprint
        self._begun = time.monotonic()
        self._record = {"dataset": dataset, "fingerprint": fingerprint, "mlflow_run": None, "mlflow_uri": None}
        self._record |= read_run(output) or {}
        storage.write_json(storage.join(output, RUN_FILE), self._record)
        self._rows: list[Report] = []
        self._start: int | None = None
        self._csv_written = 0.0
        self._run: Run | None = None

    def track(self) -> None:
        """Open the MLflow run (seconds: import and database). A tracking fault never stops a training."""

        try:
            self._run = Run(
                self._output,
                f"train {self._recipe.name}",
                run_id=self._record["mlflow_run"],
                params=flatten(self._recipe),
                tags={"output": self._output, "dataset": self._dataset, "fingerprint": self._fingerprint},
            )
        except Exception as error:
            self._lost(error)
            return
        self._record |= {"mlflow_run": self._run.run_id, "mlflow_uri": self._run.uri}
        storage.write_json(storage.join(self._output, RUN_FILE), self._record)
        self._say(self._run.hint)

    def handle(self, event: Event) -> None:
        """Take up one event, in the order they were posted."""
        if isinstance(event, Report):
            self._rows.append(event)
            self._say(self._line(event))
            metrics = {k: v for k, v in asdict(event).items() if k != "step"}
            self._tracked(lambda run: run.log(event.step, metrics))
            if time.monotonic() - self._csv_written > _CSV_SECONDS:
                self._write_csv()
        elif isinstance(event, Resumed):
            if event.step:
                self._say(f"continuing at step {event.step}")
            elif self._start is not None:
                self._say("starting again at step 0")
            self._start = event.step if self._start is None else self._start
            self._rows = list(event.history)
        elif isinstance(event, Saved):
            self._write_csv()
        else:
            self._tracked(lambda run: _store(run, event.uri, "samples"))

    def finish(self, checkpoint: str) -> TrainSummary:
        """Write ``loss.csv`` and ``train.json``, end the MLflow run."""
        self._write_csv()
        tenth = max(1, len(self._rows) // 10)
        summary = TrainSummary(
            steps=self._rows[-1].step,
            start_step=self._start or 0,
            first_loss=statistics.fmean(row.loss for row in self._rows[:tenth]),
            last_loss=statistics.fmean(row.loss for row in self._rows[-tenth:]),
            seconds=round(time.monotonic() - self._begun, 1),
            samples_per_second=round(statistics.median(row.samples_per_second for row in self._rows), 3),
            checkpoint=checkpoint,
            dataset=self._dataset,
            mlflow_run=self._record["mlflow_run"],
            mlflow_uri=self._record["mlflow_uri"],
        )
        storage.write_json(storage.join(self._output, SUMMARY_FILE), asdict(summary))

        def end(run: Run) -> None:
            for name in (LOSS_FILE, SUMMARY_FILE):
                _store(run, storage.join(self._output, name))
            run.text("recipe.json", self._recipe.to_json())
            run.finish()

        self._tracked(end)
        return summary

    def fail(self, status: str = "FAILED") -> None:
        """Keep what is known of a training that did not get to its end (MLflow status ``FAILED`` or ``KILLED``)."""
        if self._rows:
            self._write_csv()
        self._tracked(lambda run: run.finish(status))

    def _line(self, report: Report) -> str:
        left = (self._recipe.train.max_steps - report.step) * self._recipe.train.global_batch
        minutes, seconds = divmod(round(left / report.samples_per_second), 60)
        return (
            f"step {report.step}/{self._recipe.train.max_steps}  loss {report.loss:.4f}  lr {report.lr:.2e}  "
            f"{report.samples_per_second:.1f} samples/s  data wait {report.data_wait:.0%}  eta {minutes}:{seconds:02d}"
        )

    def _write_csv(self) -> None:
        buffer = io.StringIO(newline="")
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(field.name for field in fields(Report))
        table.writerows([row.step, *(f"{value:.8g}" for value in list(asdict(row).values())[1:])] for row in self._rows)
        storage.write_bytes(storage.join(self._output, LOSS_FILE), buffer.getvalue().encode())
        self._csv_written = time.monotonic()

    def _tracked(self, call: Callable[[Run], None]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        """A lost tracking server costs its curves, never the training."""
        first = (str(error).splitlines() or [""])[0]
        self._say(f"mlflow: {type(error).__name__}: {first} (training goes on; {LOSS_FILE} has the curve)")
        self._run = None


def _store(run: Run, uri: str, folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
        path = Path(scratch) / uri.rsplit("/", 1)[-1]
        path.write_bytes(storage.read_bytes(uri))
        run.artifact(path, folder)


def read_run(output: str) -> dict[str, Any] | None:
    """What an output directory remembers of its run; None where it holds none."""
    try:
        return dict(storage.read_json(storage.join(output, RUN_FILE)))
    except FileNotFoundError:
        return None


def read_summary(output: str) -> TrainSummary | None:
    """The summary of a training that ended, else None."""
    try:
        return TrainSummary(**storage.read_json(storage.join(output, SUMMARY_FILE)))
    except FileNotFoundError:
        return None
