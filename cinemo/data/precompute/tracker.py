"""A precompute run in MLflow: figures while it goes on, totals and the report at its end."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cinemo import tracking
from cinemo.config import Recipe
from cinemo.data.precompute.progress import Figures
from cinemo.progress import say


class Tracker:
    """Sends figures and results to a run, which begins with the first of them: by then all input has been checked.

    A server that fails is given up with a note, never the precompute run.
    """

    def __init__(self, begin: Callable[[], tracking.Run]) -> None:
        self._begin = begin
        self.begun = False
        self.lost = False

    @functools.cached_property
    def run(self) -> tracking.Run:
        run = self._begin()
        self.begun = True
        say(run.hint)
        return run

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
        if self.begun:
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
    """An MLflow run where ``MLFLOW_TRACKING_URI`` is set, else None.

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
    name, params = tracking.run_name("precompute", recipe.name, output), tracking.flatten(recipe) | {"output": output}
    tracker = Tracker(lambda: tracking.Run(output, name, params=params))
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
