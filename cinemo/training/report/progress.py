"""What the job's own process does with the workers' reports: progress lines, ``loss.csv``, MLflow, ``train.json``.

Knows nothing of Ray: `Progress.handle` takes the events that rank 0 posts.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cinemo import s3, storage
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.progress import say, times
from cinemo.recipes import parse_recipe
from cinemo.tracking import Run, changes, flatten, run_name
from cinemo.training.report.board import Board
from cinemo.training.report.exported import Exported
from cinemo.training.report.metrics import COLUMNS, Report, names_of
from cinemo.training.report.profiled import Profiled
from cinemo.types import InputError, RunError

RUN_FILE, SUMMARY_FILE, LOSS_FILE, MOTION_FILE = "run.json", "train.json", "loss.csv", "motion.json"
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
    """Samples of ``step`` were written: a contact sheet and videos.

    ``motion``: 1 - mean SSIM of neighbouring frames, mean over the samples: of their ``clips`` and of what the network
    makes of them with each of the method's variants; of one's own ``prompts``.
    """

    step: int
    uris: tuple[str, ...]
    motion: Mapping[str, float]

    @classmethod
    def of(cls, sheets: Sequence[Sheet]) -> Sheet:
        """One of several of a step."""
        uris = tuple(uri for sheet in sheets for uri in sheet.uris)
        return cls(sheets[0].step, uris, {name: value for sheet in sheets for name, value in sheet.motion.items()})


@dataclass(frozen=True)
class Grown:
    """The dataset has become longer: a line about it; its digest and profile where it is used from now on."""

    text: str
    fingerprint: str | None = None
    profile: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Notice:
    """Why a checkpoint of ``step`` is written before its time. ``ends``: the training ends with it."""

    step: int
    text: str
    ends: bool = False


Event = Report | Resumed | Saved | Sheet | Grown | Profiled | Notice


@dataclass(frozen=True)
class TrainSummary:
    """How a training ended; ``train.json``.

    ``first_loss``, ``last_loss``: means over the first and the last tenth of all reports. ``start_step``: where this
    invocation took up. ``seconds``: of this invocation, its workers' start-up included. ``samples_per_second``
    and ``mfu``: medians of the reports. ``memory_gb``: the most any rank held. ``val_loss``, ``val_loss_t0`` ..: the
    last ones that were measured. ``checkpoint``: URI of the latest one. ``skipped_steps``: those of the whole training
    that moved no weights, see `Report`. None stands for what is not known.
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
    val_loss: float | None = None
    val_loss_t0: float | None = None
    val_loss_t1: float | None = None
    val_loss_t2: float | None = None
    val_loss_t3: float | None = None
    mfu: float | None = None
    memory_gb: float | None = None
    skipped_steps: int | None = None


class Progress:
    """Follows one invocation of a training.

    Args:
        output: the run's output directory; its ``run.json`` remembers the MLflow run across invocations.
        dataset: its URI. ``fingerprint``: of its content, see `cinemo.training.run.dataset_check.dataset_digest`.
        say: takes the lines for a person.
        profile: what else there is to know of the dataset, for MLflow (`dataset_profile`).
        previous: the recipe of the checkpoint that it goes on from. Where ``run.json`` has that of the invocation
            before (a job may be killed before its first checkpoint), that one counts.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: str,
        dataset: str,
        fingerprint: str,
        say: Callable[[str], None] = say,
        profile: Mapping[str, Any] | None = None,
        previous: Recipe | None = None,
    ) -> None:
        self._recipe, self._output, self._say = recipe, output, say
        self._dataset, self._fingerprint, self._profile = dataset, fingerprint, profile or {}
        self._begun = time.monotonic()
        self._record: dict[str, Any] = {
            "dataset": dataset,
            "fingerprint": fingerprint,
            "mlflow_run": None,
            "mlflow_uri": None,
        }
        self._record |= read_run(output) or {}
        previous = _recipe_of(self._record) or previous
        self._changed = changes(previous, recipe) if previous else {}
        if self._changed:
            say("resuming with " + "; ".join(f"{key} {change}" for key, change in self._changed.items()))
        storage.write_json(storage.join(output, RUN_FILE), self._record)
        self._rows: list[Report] = []
        self._exported = Exported(output, recipe.train.max_steps, recipe.train.global_batch)
        self._start: int | None = None
        self._csv_due = 0.0
        self._run: Run | None = None
        self._nested: Run | None = None
        self._opened = False
        self._board = Board(output, say) if recipe.train.tensorboard else None

    def track(self, step: int = 0) -> None:
        """Open the MLflow run (seconds: import and database) with the recipe and the dataset it reads; once.

        A run that goes on keeps the settings that it began with; where some have changed, a nested run has the new
        ones, what changed, and the curves from here on. A tracking fault never stops a training.
        """
        if self._opened:
            return
        self._opened, name = True, run_name("train", self._recipe.name, self._dataset, self._output)
        params = flatten(self._recipe)
        tags = {"output": self._output, "dataset": self._dataset, "fingerprint": self._fingerprint}
        try:
            self._run = Run(self._output, name, self._record["mlflow_run"], params, tags)
            nested = self._record.get("mlflow_nested")
            if self._run.run_id != self._record["mlflow_run"]:
                nested = None
            elif self._changed or nested:
                change = "; ".join(f"{key} {change}" for key, change in self._changed.items())
                tags |= {"changed": change, "resumed_at_step": str(step)} if change else {}
                again = None if change else nested
                self._nested = Run(self._output, name, again, params, tags, parent=self._run.run_id)
                nested = self._nested.run_id
        except Exception as error:
            self._lost(error)
            return
        self._record |= {"mlflow_run": self._run.run_id, "mlflow_uri": self._run.uri, "mlflow_nested": nested}
        self._record |= {"recipe": self._recipe.model_dump(mode="json")}
        storage.write_json(storage.join(self._output, RUN_FILE), self._record)
        self._say(self._run.hint)
        self._tracked(lambda run: run.text("recipe.json", self._recipe.to_json()))
        self._tracked(lambda run: run.dataset(self._dataset, self._fingerprint, self._profile))

    def handle(self, event: Event) -> None:
        """Take up one event, in the order they were posted."""
        if isinstance(event, Report):
            self._rows.append(event)
            self._exported.report(event)
            for step, samples in event.unmoved.items():
                self._say(
                    f"warning: step {step} moved no weights: its gradient is not finite; samples {names_of(samples)} "
                    f"(--skip-steps {step} or --skip-sample leaves them out when an earlier checkpoint is resumed)"
                )
            self._say(self._line(event))
            self._curve(event.step, event.metrics())
            if time.monotonic() > self._csv_due:
                self._write_csv()
        elif isinstance(event, Resumed):
            if event.step:
                self._say(f"continuing at step {event.step}")
            elif self._start is not None:
                self._say("starting again at step 0")
            self._start = event.step if self._start is None else self._start
            self._exported.started(event.step)
            self._rows = list(event.history)
            # What a killed job had not yet sent, or could not; what is there already is left out.
            self._log(*((row.step, row.metrics()) for row in event.history))
            if self._board:
                self._board.resumed(event.step, event.history)
        elif isinstance(event, Saved):
            self._exported.saved()
            self._write_csv()
        elif isinstance(event, Notice):
            self._say(f"step {event.step}: {event.text}")
        elif isinstance(event, Grown):
            self._say(event.text)
            if event.fingerprint:
                grown = event.fingerprint, event.profile or {}
                self._tracked(lambda run: run.dataset(self._dataset, *grown))
        elif isinstance(event, Profiled):
            self._say(event.text)
            self._store(event.uris)
        else:
            self._watch(event)
            self._store(event.uris)
            if self._board:
                self._board.sheet(event.step, event.uris)

    def wait(self) -> None:
        """To be called often while no event comes."""
        self._exported.repeat()

    def finish(self, checkpoint: str) -> TrainSummary:
        """Write ``loss.csv`` and ``train.json``, end the MLflow run."""
        self._write_csv()
        losses = [row.loss for row in self._rows if math.isfinite(row.loss)] or [math.nan]
        tenth = max(1, len(losses) // 10)
        mfu = [row.mfu for row in self._rows if math.isfinite(row.mfu)]
        memory = [row.memory_gb for row in self._rows if math.isfinite(row.memory_gb)]
        validated = [row for row in self._rows if math.isfinite(row.val_loss)]
        names = ("val_loss", "val_loss_t0", "val_loss_t1", "val_loss_t2", "val_loss_t3")
        validation = {name: _known(getattr(validated[-1], name)) for name in names} if validated else {}
        summary = TrainSummary(
            steps=self._rows[-1].step,
            start_step=self._start or 0,
            first_loss=statistics.fmean(losses[:tenth]),
            last_loss=statistics.fmean(losses[-tenth:]),
            seconds=round(time.monotonic() - self._begun, 1),
            samples_per_second=round(statistics.median(row.samples_per_second for row in self._rows), 3),
            checkpoint=checkpoint,
            dataset=self._dataset,
            mlflow_run=self._record["mlflow_run"],
            mlflow_uri=self._record["mlflow_uri"],
            mfu=statistics.median(mfu) if mfu else None,
            memory_gb=round(max(memory), 3) if memory else None,
            skipped_steps=int(sum(row.skipped_steps for row in self._rows if math.isfinite(row.skipped_steps))),
            **validation,
        )
        storage.write_json(storage.join(self._output, SUMMARY_FILE), asdict(summary))

        def end(run: Run) -> None:
            for name in (LOSS_FILE, SUMMARY_FILE):
                _store(run, storage.join(self._output, name))

        self._tracked(end)
        self._end("FINISHED")
        return summary

    def fail(self, status: str = "FAILED") -> None:
        """Keep what is known of a training that did not get to its end (MLflow status ``FAILED`` or ``KILLED``)."""
        if self._rows:
            self._write_csv()
        self._end(status)

    def _line(self, report: Report) -> str:
        gone = time.monotonic() - self._begun
        left = (self._recipe.train.max_steps - report.step) * self._recipe.train.global_batch
        validation = f"validation {report.val_loss:.4f}  " if math.isfinite(report.val_loss) else ""
        mfu = f"mfu {report.mfu:.0%}  " if math.isfinite(report.mfu) else ""
        skipped = f"{report.skipped:g} samples left out  " if report.skipped > 0 else ""
        skipped += f"{report.skipped_steps:g} steps skipped  " if report.skipped_steps > 0 else ""
        return (
            f"step {report.step}/{self._recipe.train.max_steps}  loss {report.loss:.4f}  {validation}"
            f"lr {report.lr:.2e}  {report.samples_per_second:.1f} samples/s  {mfu}data wait {report.data_wait:.0%}  "
            f"{skipped}{times(gone, left / report.samples_per_second)}"
        )

    def _watch(self, sheet: Sheet) -> None:
        """Keep how much the samples move, and say so where fine-tuning kills the motion that the base had."""
        uri, kept = storage.join(self._output, MOTION_FILE), dict[str, dict[str, float]]()
        try:
            kept = dict(storage.read_json(uri)) if storage.exists(uri) else kept
            kept[str(sheet.step)] = dict(sheet.motion)
            storage.write_json(uri, kept)
        except (RunError, OSError, ValueError, TypeError) as error:  # not worth a training, as the curve is not
            self._say(f"{MOTION_FILE}: cannot be kept ({error}); training goes on")
        metrics = {f"sample_motion_{name}": value for name, value in sheet.motion.items()}
        self._curve(sheet.step, metrics)
        lost = motion_lost(kept.get("0", {}), sheet.motion)
        if lost is not None:
            self._say(
                f"warning: step {sheet.step}: motion is dying: samples move {lost:.0%} of what they did at step 0 "
                f"(1 - SSIM, {MOTION_FILE}); fewer steps, a lower train.lr or clips that move keep it alive"
            )

    def _write_csv(self) -> None:
        begun = time.monotonic()
        buffer = io.StringIO(newline="")
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(COLUMNS)
        for row in self._rows:
            table.writerow([row.step, *("" if value is None else f"{value:.8g}" for value in row.kept()[1:])])
        try:
            with s3.patience(_CSV_SECONDS):  # it is written again soon
                storage.write_bytes(storage.join(self._output, LOSS_FILE), buffer.getvalue().encode())
        except (RunError, OSError) as error:  # not worth a training; a checkpoint that finds no room ends it by itself
            self._say(f"{LOSS_FILE}: cannot be written ({error}); training goes on")
        # The whole table each time: what takes longer is done less often.
        now = time.monotonic()
        self._csv_due = now + max(_CSV_SECONDS, 20 * (now - begun))

    def _store(self, uris: Iterable[str]) -> None:
        """Files of the output directory, at the same place among the run's artifacts."""
        for uri in uris:
            folder = uri.removeprefix(self._output).strip("/").rpartition("/")[0]
            self._tracked(functools.partial(_store, uri=uri, folder=folder))

    def _curve(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log((step, metrics))
        if self._board:
            self._board.scalars(step, metrics)

    def _log(self, *entries: tuple[int, Mapping[str, float]]) -> None:
        """To the run, and what lies behind its beginning to the nested one."""
        self._tracked(lambda run: run.log_all(entries))
        if self._nested is not None:
            nested, begun = self._nested, self._start or 0
            self._tracked(lambda _: nested.log_all(entry for entry in entries if entry[0] > begun))

    def _end(self, status: str) -> None:
        if self._board:
            self._board.close()
        for run in (self._nested, self._run):
            if run is not None:
                self._tracked(lambda _, run=run: run.finish(status))  # type: ignore[misc]

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


def dataset_profile(index: DatasetIndex) -> dict[str, Any]:
    """What MLflow is told of a dataset beside its place and digest."""
    rows = hashlib.sha256(storage.read_bytes(storage.join(index.uri, "index.parquet"))).hexdigest()
    known = ("samples", "quarantined", "size", "frames", "shapes", "latent_shape", "bucket_edges", "fields")
    return {
        "fingerprint": index.info["fingerprint"],
        "index_sha256": rows,
        "shards": len(index.shards),
        **{name: index.info[name] for name in known if name in index.info},
    }


def motion_lost(before: Mapping[str, float], now: Mapping[str, float]) -> float | None:
    """The share that is left of the motion of the variant that moved most, where it is less than half; else None.

    What hardly moved before (1 - SSIM below 0.005) cannot lose it.
    """
    variants = {name: value for name, value in before.items() if name != "clips" and name in now}
    if not variants:
        return None
    most = max(variants, key=lambda name: variants[name])
    left = now[most] / max(before[most], 1e-9)
    return left if before[most] > 0.005 and left < 0.5 else None


def _recipe_of(record: Mapping[str, Any]) -> Recipe | None:
    """The recipe that ``run.json`` remembers; None where an earlier version wrote it, or it is not read any more."""
    try:
        return parse_recipe(record["recipe"], RUN_FILE) if "recipe" in record else None
    except InputError:
        return None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
