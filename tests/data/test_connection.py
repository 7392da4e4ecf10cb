"""A private Ray ends with the process that started it, also where Ray's own end would wait for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

SCRIPT = """
import time
import psutil, ray
from ray._private import worker
from cinemo.data.precompute.cluster import connect, disconnect

connect()
print(*(process.pid for process in psutil.Process().children(recursive=True)))
if {hangs}:
    worker.disconnect = lambda *_: time.sleep(3600)
disconnect(patience={patience})
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
def test_no_process_is_left(hangs: bool) -> None:
    script = SCRIPT.format(hangs=hangs, patience=1 if hangs else 60)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ("Ray has not ended within 1 s" in done.stderr) == hangs
    started = [int(pid) for pid in done.stdout.split()]
    assert len(started) > 2
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in started if psutil.pid_exists(pid)], timeout=10)
    assert not alive
