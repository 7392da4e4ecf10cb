"""A chain of stages with visible progress: each is timed, logged, and reused while what it depends on is unchanged.

``stages.json`` in the output directory holds, per stage, the key of what went in and how long it took. A stage whose
key changed is done anew, and so is all behind it, because each key contains the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cinemo
from cinemo import diagnostics, storage
from cinemo.progress import clock, doing, indented, say
from cinemo.types import InputError

RECORD = "stages.json"
_TAIL = 15
_PATIENCE = 9.0  # a command speaks for itself; this is for its start and its end


class Stages:
    """The stages of one output directory, in order.

    Args:
        directory: new, empty, or one that an earlier chain wrote.
        scripts: directory of the entry scripts that `command` runs.
        fresh: forget, and remove, what an earlier chain left in ``directory``.

    Raises:
        InputError: ``directory`` holds something else.
    """

    def __init__(self, directory: Path, scripts: Path, fresh: bool = False) -> None:
        record = directory / RECORD
        if directory.exists() and (not directory.is_dir() or (any(directory.iterdir()) and not record.is_file())):
            raise InputError(f"--output {directory}: is not empty and not an earlier demo; choose another directory")
        self.directory, self._scripts = directory, scripts
        self._stored: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.is_file() else {}
        if fresh:
            for entry in self._stored.values():
                self._remove(entry["products"])
            self._stored = {}
        self._key = cinemo.__version__
        self.seconds: dict[str, float] = {}
        self.commands: dict[str, str] = {}
        (directory / "logs").mkdir(parents=True, exist_ok=True)
        self._store()

    def run(self, name: str, inputs: Any, products: Sequence[str], action: Callable[[], None]) -> None:
        """Do a stage unless its products are there and its inputs, and those of all before it, are as they were.

        Args:
            inputs: JSON values that decide the result.
            products: names under the directory that the stage makes; removed before it starts anew, kept where it was
                only interrupted, so that it can go on.
        """
        self._key = hashlib.sha256(json.dumps([self._key, name, inputs], sort_keys=True).encode()).hexdigest()
        entry = self._stored.get(name)
        if entry and entry["key"] == self._key and entry["done"] and all(map(self._exists, products)):
            self.seconds[name] = entry["seconds"]
            say(f"== {name}: done before, in {clock(entry['seconds'])}")
            return
        interrupted = entry is not None and entry["key"] == self._key and not entry["done"]
        spent = entry["seconds"] if entry and interrupted else 0.0
        if not interrupted:
            self._remove(products)
        say(f"== {name}")
        begun = time.monotonic()

        def note(done: bool) -> None:
            seconds = round(spent + time.monotonic() - begun, 1)
            self.seconds[name] = seconds
            self._stored[name] = {"key": self._key, "done": done, "seconds": seconds, "products": list(products)}
            self._store()

        note(done=False)  # at once: even one that is killed is known to have begun
        try:
            with indented():
                action()
        except BaseException:
            note(done=False)
            raise
        note(done=True)
        say(f"== {name}: done in {clock(self.seconds[name])}")

    def note(self, name: str, script: str, *arguments: object) -> list[str]:
        """Remember the command of a stage for the report; returns what to run."""
        words = [f"pipelines/{script}.py", *map(str, arguments)]
        self.commands[name] = shlex.join(["python", *words])
        return [sys.executable, "-u", str(self._scripts / f"{script}.py"), *words[1:]]

    def command(self, name: str, words: Sequence[str]) -> None:
        """Run a command, show its output as it comes and keep it in ``logs/NAME.log``.

        Raises:
            SystemExit: the command failed; with its exit code, after the tail of its log.
        """
        log = self.directory / "logs" / f"{name}.log"
        lines: list[str] = []
        with log.open("w") as file, running(words) as process, doing(name, patience=_PATIENCE):
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                file.write(line)
                say(line.rstrip())
            code = process.wait()
        if code:
            tail = "".join(f"\n   {line}" for line in lines[-_TAIL:])
            print(f"== {name} failed with exit code {code}; the end of {log}:{tail}", file=diagnostics.errors())
            raise SystemExit(code)

    def _exists(self, product: str) -> bool:
        return (self.directory / product).exists()

    def _remove(self, products: Sequence[str]) -> None:
        for product in products:
            path = self.directory / product
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _store(self) -> None:
        storage.write_json(str(self.directory / RECORD), self._stored)


@contextmanager
def running(words: Sequence[str], stdout: Any = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """A child process that does not outlive the ``with`` block: it is interrupted, then killed, where it still runs."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(words, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with doing("stopping"):
                try:
                    process.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
