"""``pipelines/serve.py`` as a process, clients that ask it, and the processes of it that can be killed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FINAL = ("completed", "failed", "cancelled")


def png(height: int = 40, width: int = 60) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def eventually(done: Callable[[], Any], seconds: float = 60, every: float = 0.1) -> Any:
    """What ``done`` returns once it is true; a connection that fails meanwhile counts as false."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := done():
                return found
        except (httpx.TransportError, httpx.HTTPStatusError):
            pass
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(every)


class Server:
    """A server of its own Ray, ready when this returns.

    Args:
        command: what is started, after the interpreter; it serves at ``port``.
        environment: beside that of the tests, which has no ``RAY_ADDRESS``.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        port: int,
        environment: Mapping[str, str] | None = None,
        seconds: float = 300,
    ) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile(prefix="serve-", suffix=".log")  # noqa: SIM115
        known = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=self.log, stderr=self.log, start_new_session=True,
            env=known | {"PYTHONPATH": str(ROOT)} | dict(environment or {}),
        )  # fmt: skip
        self.client = httpx.Client(base_url=self.url, timeout=30)
        self.family: dict[int, psutil.Process] = {}
        try:
            eventually(self._is_ready, seconds, every=0.3)
        except BaseException:
            self.kill()
            raise

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.output()
        assert "DEPLOY_FAILED" not in (output := self.output()), output
        assert "Exception importing application" not in output, output
        return self.client.get("/readyz").status_code == 200

    def output(self) -> str:
        return Path(self.log.name).read_text()

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Living processes of the server whose title has ``name``, such as ``animator``, ``http`` or ``ProxyActor``."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self.family[process.pid] = process
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def replicas(self, deployment: str) -> list[psutil.Process]:
        return self.processes(f"ServeReplica:cinemo:{deployment}")

    def post(self, **fields: Any) -> httpx.Response:
        files = {"input_reference": ("a.png", png())}
        return self.client.post("/v1/videos", data={"prompt": "waves"} | fields, files=files)

    def submit(self, **fields: Any) -> str:
        answer = self.post(**fields)
        assert answer.status_code in (200, 202), answer.text
        return str(answer.json()["id"])

    def video(self, video_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/v1/videos/{video_id}")
        answer.raise_for_status()
        return dict(answer.json())

    def wait(self, video_id: str, seconds: float = 90) -> dict[str, Any]:
        """The job in its final state."""

        def final() -> dict[str, Any] | None:
            video = self.video(video_id)
            return video if video["status"] in FINAL else None

        return dict(eventually(final, seconds))

    def begun(self, video_id: str, percent: int = 1) -> dict[str, Any]:
        """The job once it is under way."""

        def under_way() -> dict[str, Any] | None:
            video = self.video(video_id)
            assert video["status"] not in FINAL, video
            return video if video["progress"] >= percent else None

        return dict(eventually(under_way))

    def stop(self, with_signal: int = signal.SIGTERM, seconds: float = 120) -> str:
        """What it printed; it must leave with 0. Where it does not, the error shows what its threads were doing."""
        self.process.send_signal(with_signal)
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            eventually(lambda: self.process.poll() is not None)
            self.kill()
            raise AssertionError(f"still there {seconds:g} s after signal {with_signal}: {self.output()}") from None
        self.client.close()
        assert self.process.returncode == 0, self.output()
        return self.output()

    def kill(self) -> None:
        """SIGKILL for every process of it, at once."""
        with_children = [*self.processes(), *self.family.values()] if self.process.poll() is None else []
        for process in {process.pid: process for process in [*with_children, *self.family.values()]}.values():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.kill()
        self.process.wait()
        self.client.close()
