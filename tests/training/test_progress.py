"""Reports become lines, a table, an MLflow curve and a summary, through restarts and without a tracking server."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from cinemo.config import Recipe
from cinemo.training.loop import Report
from cinemo.training.progress import Progress, Resumed, Saved, Sheet, read_run, read_summary


def _report(step: int, loss: float = 1.0) -> Report:
    return Report(step, loss, 1e-3, 0.5, 8.0, 0.25)


def test_a_run_and_its_continuation(tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small = small.model_copy(update={"train": small.train.model_copy(update={"max_steps": 200})})
    output, lines = str(tmp_path), []
    assert read_run(output) is None
    first = Progress(small, output, "/data", "digest", lines.append)
    assert read_run(output) is not None  # from the first moment on, `--resume never` sees it
    first.track()
    first.handle(Resumed(0, ()))
    for step in (1, 2, 3):
        first.handle(_report(step, 2.0))
    first.handle(Resumed(2, (_report(1, 2.0), _report(2, 2.0))))  # a worker died: step 3 is done again
    first.handle(_report(3, 1.5))
    first.handle(Saved(3))
    (tmp_path / "sheet.png").write_bytes(b"png")
    first.handle(Sheet(3, str(tmp_path / "sheet.png")))
    assert lines[1] == "step 1/200  loss 2.0000  lr 1.00e-03  8.0 samples/s  data wait 25%  eta 1:40"
    assert "continuing at step 2" in lines
    with (tmp_path / "loss.csv").open() as file:
        assert [(row["step"], row["loss"]) for row in csv.DictReader(file)] == [("1", "2"), ("2", "2"), ("3", "1.5")]
    assert read_summary(output) is None
    first.fail()

    second = Progress(small, output, "/data", "digest", lines.append)
    second.track()
    second.handle(Resumed(3, (_report(1, 2.0), _report(2, 2.0), _report(3, 1.5))))
    second.handle(_report(4, 0.5))
    summary = second.finish("/checkpoint")
    assert (summary.steps, summary.start_step, summary.first_loss, summary.last_loss) == (4, 3, 2.0, 0.5)
    assert read_summary(output) == summary
    assert json.loads((tmp_path / "train.json").read_text())["checkpoint"] == "/checkpoint"

    client = MlflowClient(summary.mlflow_uri)
    run = client.get_run(summary.mlflow_run)
    assert run.info.status == "FINISHED"
    losses = {metric.step: metric.value for metric in client.get_metric_history(summary.mlflow_run, "loss")}
    assert losses.keys() == {1, 2, 3, 4}
    assert losses[4] == 0.5
    names = {item.path for item in client.list_artifacts(summary.mlflow_run)}
    assert names == {"loss.csv", "recipe.json", "samples", "train.json"}


def test_a_lost_tracking_server_costs_its_curves_only(
    tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://tracker")
    lines: list[str] = []
    progress = Progress(small, str(tmp_path), "/data", "digest", lines.append)
    progress.track()
    progress.handle(Resumed(0, ()))
    progress.handle(_report(1))
    summary = progress.finish("/checkpoint")
    assert summary.mlflow_run is None
    assert [line for line in lines if line.startswith("mlflow: ") and "training goes on" in line]
