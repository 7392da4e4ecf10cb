"""An exported bundle reaches the model registry with the run that made it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_bundle

from cinemo.bundle import read_card
from cinemo.config import Recipe
from cinemo.training.checkpoint import registry
from cinemo.training.report.progress import Progress
from cinemo.types import InputError
from tests.training.test_export import ROOT, _checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("process_group")
def test_export_registers(small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output, bundle = tmp_path / "run", tmp_path / "bundle"
    _checkpoint(small, output)
    progress = Progress(small, str(output), "/data", "digest")

    def export() -> subprocess.CompletedProcess[str]:
        arguments = ["--checkpoint", str(output), "--output", str(bundle), "--register", "walker"]
        command = [sys.executable, str(ROOT / "pipelines" / "export.py"), *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    refused = export()
    assert (refused.returncode, bundle.exists()) == (2, False)
    assert "has no MLflow run; leave --register out" in refused.stderr
    progress.track()
    done = export()
    assert done.returncode == 0, done.stderr
    assert "model walker version 1 at sqlite:///" in done.stdout

    client = MlflowClient(f"sqlite:///{output}/mlflow.db", registry_uri=f"sqlite:///{output}/mlflow.db")
    version = client.get_model_version("walker", "1")
    assert version.tags["digest"] == read_card(bundle).digest
    assert (version.tags["step"], version.run_id) == ("1", registry.tracked_run(version.tags["checkpoint"])[0])
    fetched = client.download_artifacts(version.run_id, version.source.rpartition("/")[2], str(tmp_path))
    assert read_card(fetched, full=True).digest == version.tags["digest"]


def test_a_bundle_without_a_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was not made from a checkpoint"):
        registry.register(str(tiny_bundle(tmp_path)), "walker")
