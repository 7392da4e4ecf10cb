"""The reports of a training, for Prometheus: from the job's own process, so no worker waits for it."""

from __future__ import annotations

import math
import time

from cinemo import monitoring
from cinemo.training.report.metrics import Report

_REPEAT_SECONDS = 5.0  # Ray forgets a gauge that is not set again for twenty


class Exported:
    """Records what a training's reports say.

    Args:
        output: its output directory, which all its metrics are labelled with.
        max_steps, global_batch: of the recipe's ``train``.
    """

    def __init__(self, output: str, max_steps: int, global_batch: int) -> None:
        self._output, self._max_steps, self._global_batch = output, max_steps, global_batch
        self._skipped, self._step = 0.0, 0
        self._gauges: dict[monitoring.Metric, float] = {}
        self._due = 0.0
        self._tell(monitoring.SKIPPED, 0.0)
        self._tell(monitoring.REPORTED_AT, time.time())

    def started(self, step: int) -> None:
        """A worker group goes on from ``step``: what it does again counts again, as it takes its time again."""
        self._step = step
        self._tell(monitoring.STARTS, 1)
        self._tell(monitoring.STEP, step)
        self._tell(monitoring.STEPS_PLANNED, self._max_steps)

    def report(self, report: Report) -> None:
        done, self._step = report.step - self._step, report.step
        self._skipped += report.skipped_steps if math.isfinite(report.skipped_steps) else 0
        for metric, value in (
            (monitoring.STEPS, done),
            (monitoring.SAMPLES, done * self._global_batch),
            (monitoring.STEP, report.step),
            (monitoring.STEPS_PLANNED, self._max_steps),
            (monitoring.STEP_SECONDS, self._global_batch / report.samples_per_second),
            (monitoring.SPEED, report.samples_per_second),
            (monitoring.DATA_WAIT, report.data_wait),
            (monitoring.MFU, report.mfu),
            (monitoring.MEMORY, report.memory_gb * 1e9),
            (monitoring.LOSS, report.loss),
            (monitoring.VAL_LOSS, report.val_loss),
            (monitoring.GRAD_NORM, report.grad_norm),
            (monitoring.SKIPPED, self._skipped),
            (monitoring.REPORTED_AT, time.time()),
        ):
            self._tell(metric, value)

    def saved(self) -> None:
        """A checkpoint is stored."""
        self._tell(monitoring.CHECKPOINTS, 1)

    def repeat(self) -> None:
        """Set all gauges again, to be called often: reports may be rare, and a training that hangs has none."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _REPEAT_SECONDS
            for metric, value in self._gauges.items():
                monitoring.record(metric, value, output=self._output)

    def _tell(self, metric: monitoring.Metric, value: float) -> None:
        if math.isfinite(value):
            monitoring.record(metric, value, output=self._output)
            if metric.kind == "gauge":
                self._gauges[metric] = value
