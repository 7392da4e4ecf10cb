"""A real Prometheus, where Debian's package is installed: scrapes what it is given, and answers queries."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ports import free_port

ALERTS = Path(__file__).resolve().parents[1] / "cluster" / "prometheus" / "alerts.yaml"
_OURS_OR_RAYS = re.compile(r"\b(?:ray|cinemo)_\w+")


def find_programs() -> tuple[str, str] | None:
    """``prometheus`` and ``promtool``; None where they are not installed."""
    found = shutil.which("prometheus"), shutil.which("promtool")
    return (found[0], found[1]) if found[0] and found[1] else None


def rules_file(directory: Path) -> Path:
    """The alert rules as Prometheus itself reads them."""
    path = directory / "rules.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(ALERTS.read_text())["spec"]))
    return path


def names_in(expression: str) -> set[str]:
    """Metrics that an expression names, those of histograms without ``_bucket``, ``_count`` and ``_sum``."""
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in _OURS_OR_RAYS.findall(expression)}


class Prometheus:
    """Scrapes ``targets`` (``host:port``) every two seconds until `close`, and holds the alert rules against them."""

    def __init__(self, targets: Sequence[str], directory: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        config = directory / "prometheus.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "2s", "evaluation_interval": "5s"},
                    "rule_files": [str(rules_file(directory))],
                    "scrape_configs": [{"job_name": "cinemo", "static_configs": [{"targets": list(targets)}]}],
                }
            )
        )
        words = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}"]
        words += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"]
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(timeout=30)

    def get(self, path: str, **asked: Any) -> Any:
        """``data`` of an answer of the HTTP API (`/api/v1/PATH`)."""
        deadline = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(asked)}") as answer:
                    return json.load(answer)["data"]
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{path} {asked}: {error.read().decode()}") from None
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.2)

    def values(self, expression: str) -> dict[tuple[str, ...], float]:
        """The value now of every series of an expression, by the values of its labels in the order of their names."""
        found = self.get("query", query=expression)["result"]
        return {tuple(value for _, value in sorted(each["metric"].items())): float(each["value"][1]) for each in found}
