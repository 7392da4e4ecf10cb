"""Runs reach a real MLflow store, are continued, and never cost a training."""

from __future__ import annotations

from pathlib import Path

import pytest

from cinemo import tracking
from cinemo.recipes import cinemo_tiny


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_run_is_stored_and_continued(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    output = str(tmp_path / "run")
    run = tracking.Run(output, "first", params=tracking.flatten(cinemo_tiny()) | {"long": "x" * 9000}, tags={"a": "b"})
    for step in range(450):
        run.log(step, {"loss": 1.0 / (step + 1), "skipped": float("nan")})
    figure = tmp_path / "sheet.png"
    figure.write_bytes(b"png")
    run.artifact(figure, "samples")
    run.text("recipe.json", "{}")
    run.finish("FAILED")

    again = tracking.Run(output, "second", run_id=run.run_id)
    again.log(450, {"loss": 0.5})
    again.finish()
    assert again.run_id == run.run_id

    client = MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    stored = client.get_run(run.run_id)
    history = client.get_metric_history(run.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(451))
    assert "skipped" not in stored.data.metrics
    assert stored.data.params["train.lr"] == str(cinemo_tiny().train.lr)
    assert stored.data.params["data.size"] == "[64, 96]"
    assert stored.data.params["long"] == "x" * 500
    assert stored.data.tags["a"] == "b"
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "first")
    assert client.get_experiment(stored.info.experiment_id).name == "cinemo"
    assert [item.path for item in client.list_artifacts(run.run_id, "samples")] == ["samples/sheet.png"]
    assert (tmp_path / "run" / "mlartifacts").is_dir()
    assert run.hint == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/run/mlflow.db"


def test_a_run_that_is_gone_is_started_anew(tmp_path: Path) -> None:
    run = tracking.Run(str(tmp_path), "x", run_id="0" * 32)
    assert run.run_id != "0" * 32
    run.finish()


def test_where_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri, artifacts, hint = tracking.locate("s3://bucket/run")
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert artifacts == (tmp_path / "mlartifacts").as_uri()
    assert "set MLFLOW_TRACKING_URI" in hint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking.locate("s3://bucket/run")[:2] == ("http://tracker:5000", None)
