"""Shared test set-up: where outside material lies, one private Ray for all tests, and what is skipped where."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch and Ray are imported anywhere: several test processes share a few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell's background job ignores SIGINT, and so would every server that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import pytest
import torch
from postgres_server import PostgresServer, find_programs

if TYPE_CHECKING:
    from faulty_s3 import FaultyS3

hypothesis.settings.register_profile("untimed", deadline=None)  # a machine may be busy
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent
# No accelerator, no sandbox inside a container, and nothing that a browser asks of its maker by itself.
CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Slow tests of a file that start Ray or a server share them in one process. Groups take longest and go first.
    for item in items:
        if item.get_closest_marker("slow") and item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(ROOT).as_posix()))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    # The same tests run without an accelerator where that is asked for, to show that they are whole.
    if not torch.cuda.is_available() and os.environ.get("CINEMO_TEST_DEVICE") != "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for name, line in report.user_properties:
            if name == "line":
                print(f"\n{line}")


@pytest.fixture
def say(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Prints a line in pytest's own output, also from the processes of pytest-xdist, which have no terminal."""
    return lambda line: record_property("line", line)


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """A directory of real video files: ``$CINEMO_CLIPS``, or ``../shared/clips`` beside the checkout."""
    directory = Path(os.environ.get("CINEMO_CLIPS") or ROOT.parent / "shared" / "clips")
    if not directory.is_dir():
        pytest.skip(f"no real clips: {directory} does not exist (set CINEMO_CLIPS)")
    return directory


@pytest.fixture(scope="session")
def ray_ends() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def ray_session(s3_endpoint: str, ray_ends: None) -> None:
    """One private local Ray, shared by every module that asks for it; its workers know the S3 server.

    A module that starts another one ends this one, and the next module has a new one.
    """
    from cinemo.data.precompute.cluster import connect

    connect()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    programs = find_programs()
    if programs is None:
        pytest.skip("no PostgreSQL: neither initdb on the PATH nor /usr/lib/postgresql/*/bin")
    server = PostgresServer(programs)
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3_endpoint(s3_proxy: FaultyS3) -> str:
    """A real S3 protocol server on loopback with an empty bucket ``cinemo-test``; sets the AWS_* environment."""
    return s3_proxy.endpoint


@pytest.fixture
def s3_faults(s3_proxy: FaultyS3) -> Iterator[FaultyS3]:
    """The proxy before that server, which fails as a test asks with `FaultyS3.meet`, for all processes; then mended."""
    s3_proxy.meet()
    yield s3_proxy
    s3_proxy.meet()


@pytest.fixture(scope="session")
def s3_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyS3]:
    import boto3
    from faulty_s3 import faulty_s3
    from moto.server import ThreadedMotoServer

    from cinemo import s3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("CINEMO_CACHE", str(tmp_path_factory.mktemp("s3-cache")))
    patch.setenv(s3.PATIENCE, "5")
    with faulty_s3(f"http://{host}:{port}") as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3.client.cache_clear()
        boto3.client("s3").create_bucket(Bucket="cinemo-test")
        yield proxy
    s3.client.cache_clear()
    patch.undo()
    server.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()
