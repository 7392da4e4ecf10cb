"""Runs reach a real MLflow store, are continued, and never cost a training."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cinemo import __version__, tracking
from cinemo.recipes import override
from cinemo.recipes.cinemo import cinemo_tiny
from cinemo.types import InputError


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("tables", [8, 30])
def test_a_job_that_is_killed_while_tables_are_made_leaves_none_half_made(tmp_path: Path, tables: int) -> None:
    output = tmp_path / "run"
    start = f"from cinemo import tracking; tracking.Run({str(output)!r}, 'first')"
    killed = subprocess.Popen([sys.executable, "-c", start])

    def made() -> int:
        with contextlib.suppress(sqlite3.Error, StopIteration), sqlite3.connect(next(output.rglob("*.db"))) as database:
            return int(database.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0])
        return 0

    while made() < tables and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    run = tracking.Run(str(output), "second")
    run.log(1, {"loss": 0.5})
    run.finish()


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
    assert stored.data.tags["cinemo.version"] == __version__
    root = Path(tracking.__file__).parent.parent
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert stored.data.tags["mlflow.source.git.commit"] == head.stdout.strip()
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "first")
    assert client.get_experiment(stored.info.experiment_id).name == "cinemo"
    assert [item.path for item in client.list_artifacts(run.run_id, "samples")] == ["samples/sheet.png"]
    assert (tmp_path / "run" / "mlartifacts").is_dir()
    assert run.hint == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/run/mlflow.db"


def test_names_tell_runs_apart_and_changes_are_words() -> None:
    name = tracking.run_name("train", "cinemo-tiny", "s3://bucket/webvid/", "/runs/third")
    assert re.fullmatch(r"train cinemo-tiny webvid third 20\d\d-\d\d-\d\d \d\d:\d\d", name)
    old, new = cinemo_tiny(), override(cinemo_tiny(), ["train.lr=3e-5", "train.workers=1"])
    lr, workers = old.train.lr, old.train.workers
    assert tracking.changes(old, new) == {"train.lr": f"{lr} -> 3e-05", "train.workers": f"{workers} -> 1"}
    assert tracking.changes(old, old) == {}


def test_a_run_that_is_gone_is_started_anew(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = tracking.Run(str(tmp_path), "x", run_id="0" * 32)
    assert run.run_id != "0" * 32
    run.finish()
    MlflowClient(run.uri).delete_run(run.run_id)
    again = tracking.Run(str(tmp_path), "x", run_id=run.run_id)
    assert again.run_id != run.run_id
    again.finish()


def test_a_step_is_stored_once_for_each_metric(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    first = tracking.Run(str(tmp_path), "x")
    first.log(10, {"loss": 1.0})
    first.log(20, {"loss": 2.0, "val_loss": 5.0})
    first.log(20, {"loss": 3.0})
    first.flush()  # and killed
    again = tracking.Run(str(tmp_path), "x", run_id=first.run_id)
    for step in (20, 30):
        again.log(step, {"loss": 9.0, "val_loss": 6.0, "memory": 7.0})
    again.finish()
    client = MlflowClient(first.uri)

    def stored(key: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(first.run_id, key)]

    assert stored("loss") == [(10, 1.0), (20, 2.0), (30, 9.0)]
    assert stored("val_loss") == [(20, 5.0), (30, 6.0)]
    assert stored("memory") == [(20, 7.0), (30, 7.0)]


def test_a_dataset_is_the_input_of_a_run(tmp_path: Path) -> None:
    import mlflow.data
    from mlflow.tracking import MlflowClient

    run = tracking.Run(str(tmp_path), "x")
    for _ in range(2):  # a continued run says it again
        run.dataset("s3://bucket/made/", "0123456789abcdef", {"samples": 3})
    (used,) = MlflowClient(run.uri).get_run(run.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest, used.dataset.source_type) == ("made", "0123456789abcdef", "s3")
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    assert mlflow.data.get_source(used.dataset).uri == "s3://bucket/made/"  # type: ignore[attr-defined]


def test_a_bundle_is_registered(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = tracking.Run(str(tmp_path / "run"), "x")
    run.finish()
    bundle = tmp_path / "bundle"
    (bundle / "unet").mkdir(parents=True)
    (bundle / "unet" / "weights").write_bytes(b"weights")
    for step in ("5", "9"):
        (bundle / "bundle.json").write_text(step)
        version = tracking.register_bundle(bundle, run.run_id, run.uri, "dog", {"step": step, "digest": "ab"})
    assert version == 2
    client = MlflowClient(run.uri, registry_uri=run.uri)
    made = client.get_model_version("dog", "1")
    assert (made.run_id, made.tags) == (run.run_id, {"step": "5", "digest": "ab"})
    for number, step in (("1", "5"), ("2", "9")):
        source = client.get_model_version_download_uri("dog", number)
        folder = source.rpartition("/")[2]
        fetched = Path(client.download_artifacts(run.run_id, folder, str(tmp_path)))
        assert (fetched / "bundle.json").read_text() == step
        assert (fetched / "unet" / "weights").read_bytes() == b"weights"

    with pytest.raises(InputError, match="run 000 cannot be read"):
        tracking.register_bundle(bundle, "000", run.uri, "dog")
    with pytest.raises(InputError, match="no such file"):
        tracking.register_bundle(bundle, run.run_id, f"sqlite:///{tmp_path}/elsewhere.db", "dog")
    assert not (tmp_path / "elsewhere.db").exists()
    with pytest.raises(InputError, match="model 'a/b'") as caught:
        tracking.register_bundle(bundle, run.run_id, run.uri, "a/b")
    assert "\n" not in str(caught.value)


def test_where_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri, artifacts, hint = tracking.locate("s3://bucket/run")
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert artifacts == (tmp_path / "mlartifacts").as_uri()
    assert "set MLFLOW_TRACKING_URI" in hint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking.locate("s3://bucket/run")[:2] == ("http://tracker:5000", None)


def test_a_registered_bundle_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CINEMO_CACHE", str(tmp_path / "cache"))
    run = tracking.Run(str(tmp_path), "train")
    run.finish()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    for version in (1, 2):
        bundle = tmp_path / f"bundle-{version}"
        bundle.mkdir()
        (bundle / "bundle.json").write_text(str(version))
        assert tracking.register_bundle(bundle, run.run_id, run.uri, "walker", {"step": str(version)}) == version
    assert tracking.pinned("models:/walker/latest") == "models:/walker/2"
    fetched = tracking.download_bundle("models:/walker/1")
    assert (fetched / "bundle.json").read_text() == "1"
    assert fetched.is_relative_to(tmp_path / "cache")
    assert (tracking.download_bundle("models:/walker/latest") / "bundle.json").read_text() == "2"
    (fetched / "bundle.json").write_text("kept")
    assert (tracking.download_bundle("models:/walker/1") / "bundle.json").read_text() == "kept"
    from mlflow.tracking import MlflowClient

    MlflowClient(run.uri).set_registered_model_alias("walker", "live", "1")
    assert tracking.pinned("models:/walker@live") == "models:/walker/1"


def test_a_registry_that_does_not_know_a_bundle_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI is not set"):
        tracking.pinned("models:/walker/1")
    run = tracking.Run(str(tmp_path), "train")
    run.finish()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.uri)
    for location in ("models:/walker/1", "models:/walker/latest", "models:/walker@live", "models:/walker"):
        with pytest.raises(InputError, match=location) as refused:
            tracking.download_bundle(location)
        assert "\n" not in str(refused.value)
