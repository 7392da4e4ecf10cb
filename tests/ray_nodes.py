"""A Ray cluster of several nodes on this machine, started by `ray start`, each with the resources a test gives it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ports import free_port

_BIN = Path(sys.executable).parent
_READY_SECONDS = 90.0


@dataclass(frozen=True)
class Node:
    """One `ray start --block`, in a process group of its own."""

    process: subprocess.Popen[bytes]

    def tasks(self) -> list[str]:
        """What its workers are doing: ``ray::Name`` of each task or actor, without those that idle."""
        titles = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, IndexError):
                    titles.append(process.cmdline()[0])
        return [title for title in titles if title.startswith("ray::") and "IDLE" not in title]

    def kill(self) -> None:
        """All of its processes at once, as when a machine is taken away; workers are in no group of theirs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            for process in (self.process, *children):
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


@dataclass
class Nodes:
    """The head, which has no cores, and the nodes that were added; `environment` is what a client needs."""

    environment: dict[str, str]
    gcs: int
    scratch: Path
    nodes: list[Node] = field(default_factory=list)

    def add(self, cpus: int, **resources: float) -> Node:
        """A node with so many logical cores, and made-up resources beside them."""
        options = ["--address", f"127.0.0.1:{self.gcs}", "--resources", json.dumps(resources)]
        return self._start(*options, "--num-cpus", str(cpus))

    def start_head(self, dashboard: int) -> Node:
        options = ["--head", "--port", str(self.gcs), "--num-cpus", "0"]
        options += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        return self._start(*options, "--ray-client-server-port", str(free_port()))

    def _start(self, *options: str) -> Node:
        """Until it has joined; a second time where it ended, as when a port of its was taken meanwhile."""
        for _ in range(2):
            node, log = self._launch(*options)
            deadline = time.monotonic() + _READY_SECONDS
            while node.process.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return node
                assert time.monotonic() < deadline, f"not ready after {_READY_SECONDS:g} s: {log.read_text()}"
                time.sleep(0.2)
            node.kill()
        raise AssertionError(f"ray start ended with {node.process.returncode}: {log.read_text()}")

    def _launch(self, *options: str) -> tuple[Node, Path]:
        # As on a machine of its own: else nodes share sockets and unpack the job's files over each other.
        directory = self.scratch / str(len(self.nodes))
        directory.mkdir(parents=True)
        command = [str(_BIN / "ray"), "start", "--block", "--node-ip-address", "127.0.0.1", *options]
        command += ["--dashboard-agent-listen-port", str(free_port()), "--object-store-memory", str(256 << 20)]
        command += ["--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(directory)]
        log = directory / "start.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, env=self.environment, start_new_session=True, stdout=sink, stderr=subprocess.STDOUT
            )
        self.nodes.append(Node(process))
        return self.nodes[-1], log


@contextlib.contextmanager
def nodes() -> Iterator[Nodes]:
    """A head with token authentication that answers at its Jobs API; every process is gone afterwards."""
    dashboard = free_port()
    # Of machines of their own: not what this process has told Ray about a private one.
    own = [key for key in os.environ if key.startswith("RAY_") or key == "PYTHONPATH"]
    environment = {key: value for key, value in os.environ.items() if key not in own}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    address = f"http://127.0.0.1:{dashboard}"
    environment |= {"PATH": f"{_BIN}:{environment['PATH']}", "RAY_API_SERVER_ADDRESS": address}
    # Unix socket paths may not exceed 107 bytes, so not under pytest's own deep directory.
    cluster = Nodes(environment, free_port(), Path("/tmp") / f"cinemo-ray-{os.getpid()}")
    headers = {"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    try:
        head = cluster.start_head(dashboard)
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{address}/api/version", headers=headers), timeout=5)
                break
            except OSError:
                assert head.process.poll() is None, f"the head ended with {head.process.returncode}"
                assert time.monotonic() < deadline, f"the Jobs API does not answer after {_READY_SECONDS:g} s"
                time.sleep(0.5)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            node.kill()
        subprocess.run(["rm", "-rf", str(cluster.scratch)], check=False)
