"""A precompute run in MLflow: there where a server is named, and never in its way."""

from __future__ import annotations

from pathlib import Path

import pytest

import cinemo
from cinemo.data.precompute.progress import Figures
from cinemo.data.precompute.tracker import tracked
from cinemo.recipes.cinemo import cinemo_tiny
from cinemo.types import InputError

FIGURES = Figures(100, 30, 20, 10, 1, 10, 4096, 5.0, 2.5, 0.5, {"decode": 0.9, "encode": 0.4}, {"missing": 3})
SUMMARY = {
    "clips": 100, "samples": 97, "quarantined": 3, "shards": 10, "bytes": 5000, "seconds": 40.0,
    "stage_seconds": {"decode": 60.0, "encode": 30.0},
}  # fmt: skip


def test_without_a_server_there_is_no_run_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with tracked(cinemo_tiny(), str(tmp_path)) as tracker:
        assert tracker is None
    assert not list(tmp_path.iterdir())


def test_figures_totals_and_page_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'server.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    with tracked(cinemo_tiny(), "s3://bucket/made") as tracker:
        assert tracker is not None
        tracker(FIGURES)
        tracker.close(SUMMARY, "<html>page</html>")
    for error, figures in (
        (RuntimeError("a run that fails"), [FIGURES]),
        (InputError("is refused: leaves no run"), []),
    ):
        with pytest.raises(type(error)):
            _failing(error, figures)
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("cinemo").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]
    stored = next(run for run in runs if run.info.status == "FINISHED")
    assert stored.info.run_name.startswith("precompute cinemo-tiny made 20")
    assert stored.data.tags["cinemo.version"] == cinemo.__version__
    assert stored.data.params["output"] == "s3://bucket/made"
    values = stored.data.metrics
    assert (values["clips_per_second"], values["use.decode"], values["quarantined.missing"]) == (2.5, 0.9, 3)
    assert (values["total.samples"], values["total.decode_seconds"]) == (97, 60)
    assert [item.path for item in client.list_artifacts(stored.info.run_id)] == ["report.html"]


def _failing(error: Exception, figures: list[Figures]) -> None:
    with tracked(cinemo_tiny(), "s3://bucket/made") as tracker:
        assert tracker is not None
        for one in figures:
            tracker(one)
        raise error


def test_a_server_that_fails_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'server.db'}")
    monkeypatch.chdir(tmp_path)
    with tracked(cinemo_tiny(), "s3://bucket/made") as tracker:
        assert tracker is not None
        monkeypatch.setattr(tracker.run, "run_id", "0" * 32)  # as if somebody had removed it
        tracker(FIGURES)
        tracker.close(SUMMARY, None)
        tracker.finish("FINISHED")
        assert tracker.lost
    assert capsys.readouterr().out.count("no longer tracked") == 1
