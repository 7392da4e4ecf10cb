"""A precompute run in MLflow: figures while it goes on, totals and the report at its end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cinemo import tracking
from cinemo.config import Recipe
from cinemo.data.precompute.progress import Figures
from cinemo.progress import say


class Tracker:
    """Sends figures and results to a run; a server that fails is given up with a note, never the precompute run."""

    def __init__(self, run: tracking.Run) -> None:
        self.run = run
        self.lost = False

    def __call__(self, figures: Figures) -> None:
        self._try(lambda: self.run.log(int(figures.seconds), figures.metrics()))

    def close(self, summary: Mapping[str, Any], report: str | None) -> None:
        """The totals, and the page (its content)."""
        totals = {name: summary[name] for name in ("clips", "samples", "quarantined", "shards", "bytes", "seconds")}
        seconds = {f"{stage}_seconds": value for stage, value in summary["stage_seconds"].items()}
        metrics = {f"total.{name}": float(value) for name, value in (totals | seconds).items()}
        self._try(lambda: self.run.log(int(summary["seconds"]), metrics))
        if report:
            self._try(lambda: self.run.text("report.html", report))

    def finish(self, status: str) -> None:
        self._try(lambda: self.run.finish(status))

    def _try(self, work: Callable[[], None]) -> None:
        if self.lost:
            return
        try:
            work()
        except Exception as error:  # of whatever kind the store raises
            self.lost = True
            say(f"mlflow: {type(error).__name__}: {error}; this run is no longer tracked")


@contextlib.contextmanager
def tracked(recipe: Recipe, output: str) -> Iterator[Tracker | None]:
    """An MLflow run named "precompute" where ``MLFLOW_TRACKING_URI`` is set, else None.

    Without a server there is none: its database would be a stray file inside the dataset. A dataset is made on machines
    without mlflow as well, and a tracker that cannot be reached stops no run.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        yield None
        return
    if importlib.util.find_spec("mlflow") is None:
        say("MLFLOW_TRACKING_URI is set but mlflow is not installed: this run is not tracked")
        yield None
        return
    tracker = Tracker(tracking.Run(output, "precompute", params=tracking.flatten(recipe) | {"output": output}))
    say(tracker.run.hint)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
