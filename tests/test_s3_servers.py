"""The same on three S3 servers: moto does all that Amazon's does, Swift and s3rver do not (`s3_servers`)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3_servers
from faulty_s3 import FaultyS3, faulty_s3

from cinemo import compare_and_swap, lock, s3, storage
from cinemo.media.synthetic import render_clips
from cinemo.training.checkpoint import checkpoints
from cinemo.types import InputError

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "s3://cinemo-test"
SMALL = [
    *("--set", "data.size=[32,48]", "--set", "data.frames=6", "--set", "data.frame_interval=[1,3]"),
    *("--set", "data.clips_per_shard=4"),
]
TRAIN = [
    *("--max-steps", "4", "--set", "train.global_batch=4", "--set", "train.micro_batch=4", "--set", "train.workers=1"),
    *("--set", "model.block_out_channels=[32,64]", "--set", "model.norm_num_groups=8", "--set", "train.init=null"),
    *("--set", "train.checkpoint_every=2", "--set", "train.log_every=1", "--set", "sample.steps=2"),
]

pytestmark = pytest.mark.s3


def client() -> Any:
    return boto3.Session().client("s3")  # the default session remembers the credentials of its first client


@pytest.fixture(
    scope="module",
    params=["moto", pytest.param("swift", marks=pytest.mark.slow), pytest.param("s3rver", marks=pytest.mark.slow)],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyS3]:
    """A proxy that counts requests before a server with an empty bucket ``cinemo-test``; sets the AWS_* environment."""
    start = getattr(s3_servers, request.param)
    with (
        start(tmp_path_factory.mktemp(request.param)) as upstream,
        faulty_s3(upstream.endpoint) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in upstream.environment.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        patch.setenv("CINEMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv(s3.PATIENCE, "5")
        s3.client.cache_clear()
        client().create_bucket(Bucket="cinemo-test")
        yield proxy
    s3.client.cache_clear()


# Runs one command after the other in one process, each when it is told on stdin; says how each ended.
PROGRAM = """
import importlib, json, sys
from cinemo import cli
for line in sys.stdin:
    script, *arguments = json.loads(line)
    try:
        cli.run(importlib.import_module(f"pipelines.{script}").main, arguments)
        code = 0
    except SystemExit as error:
        code = error.code
    print(f"ended with {code}", flush=True)
"""


@contextmanager
def commands(log: Path) -> Iterator[Callable[..., str]]:
    """A function that runs an entry point, and returns its output."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, text=True, stdin=-1, stdout=-1, stderr=errors
        )
    assert process.stdin
    assert process.stdout

    def run(script: str, *arguments: str) -> str:
        print(json.dumps([script, *arguments]), file=process.stdin, flush=True)
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("ended with "):
                break
        assert lines[-1:] == ["ended with 0\n"], f"{script}: {''.join(lines[-30:])}\n{log.read_text()[-5000:]}"
        return "".join(lines)

    try:
        yield run
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def root(server: FaultyS3, tmp_path: Path) -> str:
    server.meet()
    return f"{BUCKET}/{tmp_path.name}"


def test_files_are_written_listed_and_removed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 << 20)  # S3's smallest part: 11 MB are a multipart upload
    large = os.urandom(11 << 20)
    storage.write_bytes(f"{root}/a/large", [large[:7], large[7:]])
    assert storage.read_bytes(f"{root}/a/large") == large
    for number in range(20):
        storage.write_json(f"{root}/a/b/{number}.json", number)
    storage.write_json(f"{root}/ab.json", 1)
    assert storage.names(f"{root}/a") == ["b", "large"]
    assert storage.read_json(f"{root}/a/b/7.json") == 7
    storage.remove(f"{root}/a")
    assert storage.names(root) == ["ab.json"]
    assert storage.names("s3://nowhere/x") == []
    with pytest.raises(InputError, match="the bucket does not exist"):
        storage.write_bytes("s3://nowhere/x", b"")


def test_what_pyarrow_writes_is_what_is_stored(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints go this way."""
    for name, value in s3.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    filesystem, path = storage.arrow_filesystem(root)
    data = os.urandom(11 << 20)
    with filesystem.open_output_stream(f"{path}/x") as stream:
        stream.write(data)
    assert storage.read_bytes(f"{root}/x") == data


def test_sweeping_up_never_fails(root: str, caplog: pytest.LogCaptureFixture) -> None:
    client().create_multipart_upload(Bucket="cinemo-test", Key=f"{root.removeprefix(BUCKET + '/')}/x")
    begun = time.monotonic()
    storage.sweep(root)
    assert time.monotonic() - begun < 5, "what the server does not know is not tried again"
    lines = [record.getMessage() for record in caplog.records if record.name == "cinemo.storage"]
    try:
        assert storage.abort_uploads(root) == 0
        assert not lines
    except s3.NotSupported:
        (line,) = lines
        assert "does not know this ListMultipartUploads request" in line


def test_one_of_many_holds_an_output_and_a_dead_one_is_followed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 1.0)
    program = "import time\nfrom cinemo.lock import hold\n"
    program += f"with hold({root!r}):\n    print('held', flush=True)\n    time.sleep(100)"
    first = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-1)
    try:
        assert first.stdout is not None
        while first.stdout.readline() not in (b"held\n", b""):
            pass
        with pytest.raises(InputError, match=f"another job is working on it .*process {first.pid}"), lock.hold(root):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()

    done = threading.Event()

    def contend(_: int) -> bool:
        try:
            with lock.hold(root):
                return done.wait(60)
        except InputError:
            return False

    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(contend, k) for k in range(6)]
        while sum(result.done() for result in results) < 5:
            time.sleep(0.02)
        done.set()
        assert sum(result.result() for result in results) == 1
    assert storage.names(root) == []


def documented() -> dict[str, set[str]]:
    """The requests of each command, by `docs/s3.md`."""
    rows = re.findall(r"^\| `([^`|]+)` \| ([A-Za-z0-9, ]+) \|$", (ROOT / "docs" / "s3.md").read_text(), re.MULTILINE)
    return {command: set(requests.split(", ")) for command, requests in rows}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    "server",
    ["moto", *(pytest.param(name, marks=pytest.mark.release) for name in ("swift", "s3rver"))],
    indirect=True,
    scope="module",
)
def test_precompute_verify_and_train_send_what_is_documented(
    server: FaultyS3, root: str, tmp_path: Path, say: Callable[[str], None]
) -> None:
    manifest = render_clips(tmp_path, count=10, seed=7, size=(48, 64), frames=40)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        place = f"{root}/clips/{row['uri']}"
        storage.write_bytes(place, (tmp_path / row["uri"]).read_bytes())
        row["uri"] = place
    storage.write_bytes(f"{root}/clips.jsonl", "\n".join(map(json.dumps, rows)).encode())
    weak = not compare_and_swap.has_conditions(root)
    made = ["--manifest", f"{root}/clips.jsonl", "--output", f"{root}/data", *SMALL]
    outputs = []
    with commands(tmp_path / "stderr.log") as command:
        for name, arguments in (
            ("precompute.py", made),
            ("precompute.py", made),
            ("precompute.py --verify", ["--output", f"{root}/data", *SMALL]),
            ("train.py", ["--data", f"{root}/data", "--output", f"{root}/run", *SMALL, *TRAIN]),
        ):
            server.meet()
            begun = time.monotonic()
            script, *flags = name.split()
            outputs.append(command(script.removesuffix(".py"), *flags, *arguments))
            seconds, requests = time.monotonic() - begun, server.operations
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(requests.items()))
            say(f"{name}: {seconds:.1f} s, {requests.total()} requests: {counts}")
            assert set(requests) <= documented()[name], name
    precompute, again, verified, trained = outputs
    assert "10 samples in 3 shards" in precompute
    assert "nothing was left to do" in again
    assert "every checksum, size, member, record and total agrees" in verified
    assert "4 steps" in trained
    assert ["knows no conditional PUT" in output for output in outputs] == [weak, weak, False, weak]
    assert {"dataset.json", "index.parquet", "columns"} <= {*storage.names(f"{root}/data")}
    assert {"loss.csv", "train.json"} <= {*storage.names(f"{root}/run")}
    assert checkpoints.latest(f"{root}/run") is not None
