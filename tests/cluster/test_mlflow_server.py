"""The MLflow server as `cluster/mlflow.yaml` starts it: runs in a real PostgreSQL, artifacts on an S3 server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import pytest
from cluster.published import pods
from ports import free_port
from postgres_server import PostgresServer, find_programs

pytestmark = [pytest.mark.slow, pytest.mark.s3, pytest.mark.postgres]


def answer(url: str, host: str | None = None) -> int:
    """The status of a GET; 0 where nothing listens."""
    try:
        headers = {"Host": host} if host else {}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_a_run_and_its_artifact_reach_the_database_and_the_bucket(s3_endpoint: str, tmp_path: Path) -> None:
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    (container,) = next(pod for name, pod in pods() if name == "mlflow.yaml mlflow")["spec"]["containers"]
    port, database = free_port(), PostgresServer(programs)
    arguments = [
        f"--port={port}" if each.startswith("--port=") else each.replace("s3://cinemo/", "s3://cinemo-test/")
        for each in container["args"]
    ]
    (place,) = (number for number, each in enumerate(arguments) if each.startswith("--backend-store-uri="))
    driver = arguments[place].removeprefix("--backend-store-uri=").partition("://")[0]
    arguments[place] = "--backend-store-uri=" + database.new_database().replace("postgresql://", f"{driver}://", 1)
    arguments = [each.replace("--host=0.0.0.0", "--host=127.0.0.1") for each in arguments]  # within this machine
    log = (tmp_path / "server.log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", *container["command"], *arguments, "--workers=1"],
        cwd=tmp_path,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    url = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 240
        while answer(f"{url}/health") != 200:
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        experiments = f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0"
        assert answer(experiments, "mlflow.cinemo.svc:5000") == 200
        assert answer(experiments, "elsewhere.example") == 403
        script = "import mlflow; mlflow.start_run(); mlflow.log_metric('loss', 0.5); mlflow.log_text('a', 'note.txt')"
        # A client has the address alone, and no credentials.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        subprocess.run(
            [sys.executable, "-c", script], env=environment | {"MLFLOW_TRACKING_URI": url}, check=True, timeout=120
        )
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()
        database.close()
    keys = [
        item["Key"] for item in boto3.client("s3").list_objects_v2(Bucket="cinemo-test", Prefix="mlflow/")["Contents"]
    ]
    assert [key.rsplit("/", 1)[1] for key in keys] == ["note.txt"]
