"""Settings of a server: flags and config file say the same, and what is wrong with them is one line and exit code 2."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from ports import free_port
from serving.process import eventually
from tiny import tiny_bundle

from cinemo import cli
from cinemo.serving.haproxy import ProxyLimits
from cinemo.serving.proxy import proxy_environment
from cinemo.serving.scaling import QueueDemand
from cinemo.serving.settings import ServeSettings, open_keys, open_store, parse_settings, read_config
from cinemo.types import InputError
from pipelines import serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refusal(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.run(serve.main, [str(flag) for flag in flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_bad_input_is_one_line(
    bundle: Path, taken_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.yaml").write_text("applications: []")
    good = ["--bundle", bundle, "--state", tmp_path / "state", "--port", taken_port]
    assert f"--port {taken_port}" in refusal(capsys, *good)
    assert "--bundle: required" in refusal(capsys, "--state", tmp_path)
    assert f"{tmp_path}/none: no such" in refusal(capsys, *good, "--bundle", tmp_path / "none")
    assert "MLFLOW_TRACKING_URI" in refusal(capsys, *good, "--bundle", "models:/walker/latest")
    free = [*good, "--port", 0]
    assert str(tmp_path / "file") in refusal(capsys, *free, "--state", tmp_path / "file")
    assert "mysql" in refusal(capsys, *free, "--database", "mysql://somewhere/else")
    assert "absolute path" in refusal(capsys, *free, "--database", "sqlite:///relative.sqlite")
    assert "--max-batch '0'" in refusal(capsys, *good, "--max-batch", 0).replace("0:", "'0':")
    assert "max_joined is 2" in refusal(capsys, *good, "--max-joined", 2)
    assert "s3://b/s cannot hold the job database" in refusal(capsys, "--bundle", bundle, "--state", "s3://b/s")
    assert "bad.yaml" in refusal(capsys, "--config", tmp_path / "bad.yaml")
    assert "none.yaml" in refusal(capsys, "--config", tmp_path / "none.yaml")


def test_the_shipped_config_file_is_valid() -> None:
    values, http = read_config(ROOT / "cluster/serve.yaml")
    settings = parse_settings(values)
    assert (settings.max_replicas, settings.require_keys, http["port"]) == (4, True, 8000)


def test_a_bundle_for_the_animator_goes_before_the_first_one(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    content["applications"][0]["deployments"] = [{"name": "animator", "user_config": {"bundle": "s3://models/next"}}]
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    assert read_config(path)[0]["bundle"] == "s3://models/next"


def test_absolute_settings_mean_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ServeSettings(bundle="bundle", state="state").absolute()
    monkeypatch.chdir(ROOT)
    assert settings.absolute() == settings
    assert (settings.bundle, settings.state) == (str(tmp_path / "bundle"), str(tmp_path / "state"))
    assert settings.database_url == f"sqlite:///{tmp_path}/state/serving.sqlite"
    for location in ("s3://models/a", "models:/a/1"):
        assert settings.model_copy(update={"bundle": location}).absolute().bundle == location
    with pytest.raises(InputError, match="--color 'red': Extra"):
        parse_settings({"bundle": "b", "color": "red"})


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state", str(tmp_path / "state")]
    serve.main([*state, "--add-key", "an app", "--max-active", "2", "--per-day", "9"])
    key_id, *_, token = capsys.readouterr().out.split()
    keys = open_keys(parse_settings({"bundle": "", "state": state[1]}))
    found = keys.check(token)
    assert found is not None
    assert (found.id, found.name, found.quota.max_active, found.quota.per_day) == (key_id, "an app", 2, 9)
    serve.main([*state, "--list-keys"])
    listed = capsys.readouterr().out
    assert key_id in listed
    assert token not in listed
    serve.main([*state, "--revoke-key", key_id])
    assert keys.check(token) is None
    assert "no such key" in refusal(capsys, *state, "--revoke-key", "0" * 12)


def test_demand_follows_the_queue(tmp_path: Path) -> None:
    settings = ServeSettings(bundle="", state=str(tmp_path))
    store = open_store(settings)
    demand = QueueDemand(settings.database_url, slots=2)
    context = SimpleNamespace(target_num_replicas=3)
    demand._asked = time.monotonic()  # a moment ago, and there is no answer yet
    assert demand(context)[0] == 3

    def asked() -> int:
        demand._asked = float("-inf")
        demand(context)
        assert demand._asking is not None
        demand._asking.join()
        return demand(context)[0]

    assert asked() == 0
    for _ in range(5):
        store.submit({}, b"picture")
    assert asked() == 3
    first, *_ = store.claim("worker", 2)
    assert asked() == 3  # a running job needs its animator
    store.fail(first, "internal_error", "x")
    store.cancel(store.page(1)[0].id)
    store.cancel(store.page(2)[1].id)
    assert asked() == 1


def test_demand_stays_where_no_database_answers(tmp_path: Path) -> None:
    demand = QueueDemand(f"sqlite:///{tmp_path}/state/none.sqlite", slots=2)
    (tmp_path / "state").write_text("a file in the way")
    began = time.monotonic()
    for _ in range(20):
        assert demand(SimpleNamespace(target_num_replicas=7)) == (7, {})
    assert time.monotonic() - began < 1


def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    wrapper = proxy_environment(tmp_path, ProxyLimits(), tmp_path / "standby.sock").get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if wrapper is None:
        pytest.skip("ray[serve] brings HAProxy on Linux alone")
    assert "HAProxy version" in subprocess.run([wrapper, "-v"], capture_output=True, text=True, check=True).stdout
    config = tmp_path / "haproxy.cfg"
    config.write_text(f"defaults\n  mode http\nfrontend http_frontend\n  bind 127.0.0.1:{free_port()}\n")
    start = f"import subprocess, time; p = subprocess.Popen([{wrapper!r}, '-db', '-f', {str(config)!r}]); "
    parent = subprocess.Popen([sys.executable, "-c", start + "print(p.pid, flush=True); time.sleep(60)"], stdout=-1)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        eventually(lambda: "".join(child.cmdline()[:1]).endswith("bin/haproxy"))  # empty until it is executed
    finally:
        parent.kill()
        parent.wait()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
