"""A real MLflow server: trainings and precompute runs reach it, bundles are registered, its death stops nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

from cinemo import tracking
from cinemo.config import Recipe
from cinemo.data.precompute.progress import Figures
from cinemo.data.precompute.tracker import tracked
from cinemo.training.report.metrics import Report
from cinemo.training.report.progress import Progress, Resumed, Sheet

pytestmark = [pytest.mark.slow, pytest.mark.slow]


class Server:
    """``mlflow server`` with its artifacts behind it, as a team would run it."""

    def __init__(self, directory: Path) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        store = ["--backend-store-uri", f"sqlite:///{directory}/server.db", "--artifacts-destination", f"{directory}/a"]
        command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port)]
        with (directory / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", "1"], stdout=log, stderr=log, cwd=directory, start_new_session=True
            )
        deadline = time.monotonic() + 240
        while not self._answers():
            assert self.process.poll() is None, (directory / "server.log").read_text()
            assert time.monotonic() < deadline, (directory / "server.log").read_text()
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow"))
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)


def _report(step: int) -> Report:
    return Report(step, 1.0 / step, 1e-3, 0.5, 8.0, 0.25, buckets={"loss_bucket_03": 1.0})


def test_a_training_and_its_continuation_are_one_run(server: Server, small: Recipe, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    first = Progress(small, str(tmp_path), "/data/clips", "digest", profile={"fingerprint": "f" * 64})
    first.track()
    first.handle(Resumed(0, ()))
    for step in range(1, 4):
        first.handle(_report(step))
    (tmp_path / "sheet.png").write_bytes(b"png")
    first.handle(Sheet(3, (str(tmp_path / "sheet.png"),), {"clips": 0.1}))
    del first  # killed: nothing was ended, some was not sent

    second = Progress(small, str(tmp_path), "/data/clips", "digest", profile={"fingerprint": "f" * 64})
    second.track()
    second.handle(Resumed(2, (_report(1), _report(2))))
    for step in (3, 4):
        second.handle(_report(step))
    summary = second.finish("/checkpoint")
    assert summary.mlflow_uri == server.uri
    assert not (tmp_path / "mlflow.db").exists()

    client = MlflowClient(server.uri)
    for key in ("loss", "loss_bucket_03"):
        steps = [metric.step for metric in client.get_metric_history(summary.mlflow_run, key)]
        assert steps[-2:] == [3, 4]
        assert len(steps) == len(set(steps))
    assert [m.step for m in client.get_metric_history(summary.mlflow_run, "loss")] == [1, 2, 3, 4]
    run = client.get_run(summary.mlflow_run)
    assert run.info.status == "FINISHED"
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("clips", "digest")
    assert run.data.params["name"] == small.name
    recipe = client.download_artifacts(summary.mlflow_run, "recipe.json", str(tmp_path))
    assert json.loads(Path(recipe).read_text()) == json.loads(small.to_json())
    names = {item.path for item in client.list_artifacts(summary.mlflow_run)}
    assert names == {"loss.csv", "recipe.json", "sheet.png", "train.json"}


def test_a_bundle_is_registered(server: Server, tmp_path: Path) -> None:
    from mlflow.artifacts import download_artifacts
    from mlflow.tracking import MlflowClient

    run = tracking.Run(str(tmp_path), "train")
    run.finish()
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_text("{}")
    assert tracking.register_bundle(bundle, run.run_id, run.uri, "walker", {"step": "4"}) == 1
    version = MlflowClient(server.uri).get_model_version("walker", "1")
    assert (version.run_id, version.status) == (run.run_id, "READY")
    fetched = download_artifacts(artifact_uri="models:/walker/latest", tracking_uri=server.uri, dst_path=str(tmp_path))
    assert (Path(fetched) / "bundle.json").read_text() == "{}"


def test_a_precompute_run_is_tracked(server: Server, small: Recipe) -> None:
    from mlflow.tracking import MlflowClient

    figures = Figures(100, 30, 20, 10, 1, 10, 4096, 5.0, 2.5, 0.5, {"decode": 0.9}, {"missing": 3})
    totals = {"clips": 100, "samples": 97, "quarantined": 3, "shards": 10, "bytes": 5000, "seconds": 40.0}
    with tracked(small, "s3://bucket/made") as tracker:
        assert tracker is not None
        tracker(figures)
        tracker.close(totals | {"stage_seconds": {"decode": 60.0}}, "<html>page</html>")
    assert not tracker.lost
    client = MlflowClient(server.uri)
    stored = client.get_run(tracker.run.run_id)
    assert (stored.info.status, stored.data.params["output"]) == ("FINISHED", "s3://bucket/made")
    assert stored.data.metrics["total.samples"] == 97
    assert stored.data.metrics["quarantined.missing"] == 3
    assert [item.path for item in client.list_artifacts(stored.info.run_id)] == ["report.html"]


@pytest.mark.release
def test_a_server_that_dies_stops_nothing(small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server").mkdir()
    mortal = Server(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mortal.uri)
    lines: list[str] = []
    progress = Progress(small, str(tmp_path), "/data", "digest", lines.append)
    progress.track()
    progress.handle(Resumed(0, ()))
    progress.handle(_report(1))
    mortal.kill()
    begun = time.monotonic()
    (tmp_path / "sheet.png").write_bytes(b"png")
    progress.handle(Sheet(1, (str(tmp_path / "sheet.png"),), {}))
    progress.handle(_report(2))
    summary = progress.finish("/checkpoint")
    assert time.monotonic() - begun < 60
    assert (summary.steps, len((tmp_path / "loss.csv").read_text().splitlines())) == (2, 3)
    assert len([line for line in lines if "training goes on" in line]) == 1
