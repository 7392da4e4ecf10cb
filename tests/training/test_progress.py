"""Reports become lines, a table, an MLflow curve and a summary, through restarts and without a tracking server."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cinemo import storage
from cinemo.config import Recipe
from cinemo.data.dataset.shards import DatasetIndex
from cinemo.recipes import override
from cinemo.training.report.metrics import COLUMNS, Losses, Report
from cinemo.training.report.progress import (
    Progress,
    Resumed,
    Saved,
    Sheet,
    dataset_profile,
    motion_lost,
    read_run,
    read_summary,
)
from cinemo.types import RunError


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
    (tmp_path / "samples" / "step-3").mkdir(parents=True)
    uris = [str(tmp_path / "samples" / name) for name in ("step-3.png", "step-3/image.mp4")]
    for uri in uris:
        Path(uri).write_bytes(b"picture")
    first.handle(Sheet(3, tuple(uris), {"clips": 0.1}))
    said = r"step 1/200  loss 2.0000  lr 1.00e-03  8.0 samples/s  data wait 25%  \d:\d\d:\d\d gone, 0:01:40 left"
    assert re.fullmatch(said, lines[1]), lines[1]
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
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(summary.mlflow_run, "loss")]
    assert sorted(losses) == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 0.5)]  # step 3 as it was the first time
    names = {item.path for item in client.list_artifacts(summary.mlflow_run)}
    assert names == {"loss.csv", "recipe.json", "samples", "train.json"}
    assert [item.path for item in client.list_artifacts(summary.mlflow_run, "samples/step-3")] == [
        "samples/step-3/image.mp4"
    ]


def test_motion_that_dies_while_training_is_told(tmp_path: Path, small: Recipe) -> None:
    """Against what the base did at step 0, also by an invocation that goes on."""
    base = {"clips": 0.001, "bucket-03": 0.02, "bucket-16": 0.1}
    lines: list[str] = []
    Progress(small, str(tmp_path), "/data", "digest", lines.append).handle(Sheet(0, (), base))
    again = Progress(small, str(tmp_path), "/data", "digest", lines.append)
    again.handle(Sheet(100, (), base | {"bucket-16": 0.06}))
    assert not lines
    again.handle(Sheet(200, (), base | {"bucket-16": 0.03}))
    assert [line.partition(";")[0] for line in lines] == [
        "warning: step 200: motion is dying: samples move 30% of what they did at step 0 (1 - SSIM, motion.json)"
    ]
    assert json.loads((tmp_path / "motion.json").read_text())["200"]["bucket-16"] == 0.03


def test_a_damaged_record_of_motion_does_not_end_a_training(tmp_path: Path, small: Recipe) -> None:
    (tmp_path / "motion.json").write_text('{"0": {"bucket-16": 0.')
    lines: list[str] = []
    Progress(small, str(tmp_path), "/data", "digest", lines.append).handle(Sheet(100, (), {"bucket-16": 0.03}))
    assert len(lines) == 1
    assert lines[0].startswith("motion.json: cannot be kept")


def test_what_never_moved_cannot_lose_its_motion() -> None:
    assert motion_lost({}, {"clips": 0.1, "bucket-16": 0.0}) is None
    assert motion_lost({"clips": 0.1, "bucket-16": 0.001}, {"clips": 0.1, "bucket-16": 0.0}) is None
    assert motion_lost({"clips": 0.1, "bucket-16": 0.1}, {"clips": 0.0, "bucket-16": 0.1}) is None
    assert motion_lost({"clips": 0.1, "sample": 0.1}, {"clips": 0.1, "sample": 0.02}) == pytest.approx(0.2)


def test_what_mlflow_missed_is_sent_when_a_run_goes_on(
    tmp_path: Path, small: Recipe, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed job loses what it has not sent; a checkpoint has it all."""
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    profile = dataset_profile(DatasetIndex.load(dataset))
    first = Progress(small, str(tmp_path), dataset, "digest", print, profile)
    first.track()
    first.handle(Resumed(0, ()))
    assert first._run is not None
    for step in range(1, 7):
        first.handle(_report(step))
        if step == 2:
            first._run.flush()
    # Killed here, with reports 3..6 unsent and a checkpoint of step 5.
    second = Progress(small, str(tmp_path), dataset, "digest", print, profile)
    second.track()
    second.handle(Resumed(5, tuple(_report(step) for step in range(1, 6))))
    second.handle(_report(6))
    summary = second.finish("/checkpoint")
    client = MlflowClient(summary.mlflow_uri)
    assert len(client.search_runs([client.get_experiment_by_name("cinemo").experiment_id])) == 1
    for key in ("loss", "lr", "grad_norm"):
        history = client.get_metric_history(summary.mlflow_run, key)
        assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]
    run = client.get_run(summary.mlflow_run)
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == (Path(dataset).name, "digest")
    assert json.loads(used.dataset.source) == {"uri": dataset}
    assert json.loads(used.dataset.profile)["fingerprint"] == DatasetIndex.load(dataset).info["fingerprint"]
    assert len(json.loads(used.dataset.profile)["index_sha256"]) == 64
    assert run.data.params["train.lr"] == str(small.train.lr)


def test_settings_that_changed_are_a_nested_run_with_what_changed(
    tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run keeps the settings that it began with; nothing of the curve is lost, whoever resumes how often."""
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    gentle = override(small, ["train.lr=3e-5"])
    lines: list[str] = []

    def life(recipe: Recipe, steps: range, previous: Recipe | None) -> str | None:
        progress = Progress(recipe, str(tmp_path), "/sets/clips", "digest", lines.append, previous=previous)
        progress.track(steps.start)
        progress.handle(Resumed(steps.start, tuple(_report(step) for step in range(1, steps.start + 1))))
        for step in steps:
            progress.handle(_report(step + 1))
        return progress.finish("/checkpoint").mlflow_run

    run = life(small, range(2), None)
    assert "resuming" not in " ".join(lines)
    assert life(gentle, range(2, 4), small) == run
    assert [line for line in lines if "resuming" in line] == ["resuming with train.lr 0.002 -> 3e-05"]
    assert life(gentle, range(4, 5), gentle) == run  # as it was: the same nested run goes on
    assert len([line for line in lines if "resuming" in line]) == 1
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("cinemo").experiment_id])
    by_parent = {one.data.tags.get("mlflow.parentRunId"): one for one in runs}
    assert by_parent.keys() == {None, run}
    whole, nested = by_parent[None], by_parent[run]
    assert (whole.data.params["train.lr"], nested.data.params["train.lr"]) == ("0.002", "3e-05")
    assert (nested.data.tags["changed"], nested.data.tags["resumed_at_step"]) == ("train.lr 0.002 -> 3e-05", "2")
    assert "changed" not in whole.data.tags
    assert {one.info.status for one in runs} == {"FINISHED"}
    assert all(one.info.run_name.startswith(f"train {small.name} clips {tmp_path.name} 20") for one in runs)
    for one, steps in ((whole, [1, 2, 3, 4, 5]), (nested, [3, 4, 5])):
        assert [metric.step for metric in client.get_metric_history(one.info.run_id, "loss")] == steps


def test_a_skipped_step_is_told_everywhere(tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines: list[str] = []
    progress = Progress(small, str(tmp_path), "/data", "digest", lines.append)
    progress.track()
    before = replace(_report(1), skipped_steps=1.0)  # of an earlier life: a checkpoint has it
    progress.handle(Resumed(1, (Report.of_kept(before.kept()),)))
    progress.handle(replace(_report(4), skipped_steps=2.0, unmoved={3: ("clip7",), 4: ("clip7", "clip8")}))
    summary = progress.finish("/checkpoint")
    assert [line.partition(" (--skip")[0] for line in lines if "warning" in line] == [
        "warning: step 3 moved no weights: its gradient is not finite; samples clip7",
        "warning: step 4 moved no weights: its gradient is not finite; samples clip7, clip8",
    ]
    assert "2 steps skipped" in lines[-1]
    assert summary.skipped_steps == 3
    with (tmp_path / "loss.csv").open() as file:
        assert [row["skipped_steps"] for row in csv.DictReader(file)] == ["1", "2"]
    history = MlflowClient(summary.mlflow_uri).get_metric_history(summary.mlflow_run, "skipped_steps")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1), (4, 2)]


def test_every_value_finds_its_way(tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines: list[str] = []
    progress = Progress(small, str(tmp_path), "/data", "digest", lines.append)
    progress.track()
    progress.handle(Resumed(0, ()))
    quartiles = {"loss_t0": 0.1, "loss_t1": 0.2, "loss_t3": 0.4}
    measured = {"mfu": 0.31, "memory_gb": 2.5, **quartiles, "buckets": {"loss_bucket_07": 0.5}}
    full = Report(1, 1.0, 1e-3, 0.5, 8.0, 0.25, **measured)
    progress.handle(full.validated(Losses(0.75, (0.7, 0.8, 0.9, 1.0), {7: 0.6})))
    progress.handle(_report(2))
    summary = progress.finish("/checkpoint")
    assert "loss 1.0000  validation 0.7500  lr" in lines[1]
    assert "8.0 samples/s  mfu 31%  data wait 25%" in lines[1]
    assert "validation" not in lines[2]
    assert all("\n" not in line for line in lines)
    assert (summary.val_loss, summary.val_loss_t3, summary.mfu, summary.memory_gb) == (0.75, 1.0, 0.31, 2.5)
    with (tmp_path / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert (rows[0]["loss_t2"], rows[0]["val_loss_t1"], rows[1]["val_loss"]) == ("", "0.8", "")
    stored = MlflowClient(summary.mlflow_uri).get_run(summary.mlflow_run).data.metrics
    assert stored.keys() == {*COLUMNS[1:], "loss_bucket_07", "val_loss_bucket_07"} - {
        "loss_t2",
        "skipped",
        "skipped_steps",
    }
    assert (stored["val_loss_bucket_07"], stored["memory_gb"]) == (0.6, 2.5)


def test_a_summary_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old = {
        "steps": 4, "start_step": 0, "first_loss": 2.0, "last_loss": 1.0, "seconds": 1.0, "samples_per_second": 2.0,
        "checkpoint": "c", "dataset": "d", "mlflow_run": None, "mlflow_uri": None,
    }  # fmt: skip
    (tmp_path / "train.json").write_text(json.dumps(old))
    summary = read_summary(str(tmp_path))
    assert summary is not None
    assert summary.val_loss is None


def test_an_outage_of_the_storage_costs_the_curve_some_time_only(
    tmp_path: Path, small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    progress = Progress(small, str(tmp_path), "/data", "digest", lines.append)
    progress.handle(Resumed(0, ()))

    def away(uri: str, data: object) -> None:
        raise RunError(f"{uri}: storage has been failing for 5 s")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", away)
        progress.handle(_report(1))
    assert [line for line in lines if line.startswith("loss.csv: cannot be written") and "training goes on" in line]
    progress.finish("/checkpoint")
    assert len((tmp_path / "loss.csv").read_text().splitlines()) == 2


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
