"""One job on one output: whoever comes second is refused, the dead are followed at once, races have one winner."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import FaultyS3

from cinemo import compare_and_swap, lock, s3, storage
from cinemo.lock import NAME, Lock, hold
from cinemo.types import InputError, RunError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(
    params=["local", *(pytest.param(kind, marks=pytest.mark.s3) for kind in ("s3", "s3-ignored", "s3-501"))]
)
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory, on S3 also behind servers that ignore conditions of a PUT, or do not know them."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.4)
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_faults").meet(conditions=request.param.partition("-")[2])
    return f"s3://cinemo-test/{tmp_path.name}"


def is_weak(output: str) -> bool:
    return not compare_and_swap.has_conditions(output)


def content(output: str) -> dict[str, object]:
    return dict(storage.read_json(storage.join(output, NAME)))


def pretend(output: str, **change: object) -> None:
    """A lock of somebody else."""
    facts = {"token": "x", "host": "far-away", "pid": 7, "machine": "another boot", "process_started": "1"}
    facts |= {"since": "2024-01-01T00:00:00Z", "heartbeat": "2024-01-01T00:00:10Z"} | change
    storage.write_json(storage.join(output, NAME), facts)


def test_the_second_is_refused_and_told_by_whom(output: str) -> None:
    with hold(output) as held:
        before = content(output)
        with (
            pytest.raises(
                InputError, match=rf"another job is working on it .*process {os.getpid()}, since 2.*--output"
            ),
            hold(output),
        ):
            pass
        deadline = time.monotonic() + 20
        while (after := content(output))["heartbeat"] == before["heartbeat"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert {**after, "heartbeat": 0} == {**before, "heartbeat": 0}
        held.check()
    assert storage.names(output) == []


def test_it_is_released_when_the_work_fails(output: str) -> None:
    with pytest.raises(KeyboardInterrupt), hold(output):
        raise KeyboardInterrupt
    assert storage.names(output) == []


def test_a_killed_process_of_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    program = f"import time\nfrom cinemo.lock import hold\nwith hold({str(tmp_path)!r}):\n    time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not (tmp_path / NAME).exists():
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(InputError, match=f"process {process.pid}"), hold(str(tmp_path)):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    begun = time.monotonic()
    with hold(str(tmp_path)):
        assert time.monotonic() - begun < 5


def test_another_process_under_an_old_number_is_not_the_holder(output: str) -> None:
    pretend(output, machine=lock._machine(), pid=os.getpid(), process_started="1")
    with hold(output):
        assert content(output)["pid"] == os.getpid()


def test_a_silent_holder_elsewhere_is_given_up_after_watching(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(output)
    begun = time.monotonic()
    with hold(output) as held:
        assert time.monotonic() - begun >= 0.6
        held.check()
        assert content(output)["host"] != "far-away"
    assert "host far-away, process 7" in capsys.readouterr().out


def test_a_living_holder_elsewhere_is_respected(output: str) -> None:
    stop = threading.Event()

    def live() -> None:
        for beat in range(1000):
            pretend(output, heartbeat=beat)
            if stop.wait(0.1):
                return

    pretend(output)
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(InputError, match="host far-away"), hold(output):
            pass
    finally:
        stop.set()
        thread.join()


def test_one_of_many_wins_a_dead_lock(output: str) -> None:
    pretend(output, machine=lock._machine(), pid=2**22 + 1)
    done = threading.Event()

    def contend(_: int) -> bool:
        try:
            with hold(output):
                return done.wait(20)
        except InputError:
            return False

    with ThreadPoolExecutor(8) as pool:
        results = [pool.submit(contend, k) for k in range(8)]
        while sum(result.done() for result in results) < 7:
            time.sleep(0.02)
        done.set()
        assert sum(result.result() for result in results) == 1
    assert storage.names(output) == []


def _add(path: str, times: int) -> None:
    for _ in range(times):
        while True:
            data, version = compare_and_swap.read_version(path)
            if compare_and_swap.write_if(path, b"%d" % (int(data) + 1), version):
                break


def test_conditional_writes_of_processes_lose_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "count")
    assert compare_and_swap.write_if(path, b"0", None)
    assert compare_and_swap.write_if(path, b"9", None) is None
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(path, 25)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "count").read_bytes() == b"75"


def test_whoever_lost_the_lock_stops(output: str) -> None:
    with hold(output) as held:
        pretend(output)
        while held.lost is None:
            time.sleep(0.02)
        with pytest.raises(RunError, match=r"has lost its lock .host far-away"):
            held.check()
    assert json.dumps(content(output)["host"]) == '"far-away"'


def test_a_weaker_lock_is_said_aloud_in_one_line(
    output: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = request.node.callspec.params["output"] in ("s3-ignored", "s3-501")
    with hold(output) as held:
        assert held.weak == weak == is_weak(output)
        assert storage.names(output) == [NAME], "the probe is removed again"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == weak
    assert all("knows no conditional PUT" in line for line in said)


def test_break_lock_replaces_a_holder_elsewhere_at_once_and_says_whom(
    output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 1000)
    pretend(output)
    with hold(output, break_lock=True) as held:
        held.check()
        assert content(output)["host"] != "far-away"
    assert "--break-lock takes it from host far-away, process 7, since 2024-01-01" in capsys.readouterr().out


def test_break_lock_does_not_break_what_is_alive_here(output: str) -> None:
    with hold(output) as held:
        with pytest.raises(InputError, match=f"process {os.getpid()}"), hold(output, break_lock=True):
            pass
        held.check()


@pytest.mark.s3
def test_a_put_that_a_newer_one_overtakes_has_lost(
    s3_faults: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    output = f"s3://cinemo-test/{tmp_path.name}"
    uri = storage.join(output, NAME)
    s3_faults.meet({"overtaken": 1.0}, only=NAME, conditions="501")
    assert compare_and_swap.write_and_look(uri, b"mine", None, 0) is None
    assert compare_and_swap.write_if(f"{uri}.other", b"mine", None) is None
    with pytest.raises(RunError, match="its lock could not be taken in"), hold(output):
        pass
    s3_faults.meet(conditions="501")
    version = compare_and_swap.write_and_look(uri, b"mine", None, 0)
    s3_faults.meet({"overtaken": 1.0}, only=NAME, conditions="501")
    assert compare_and_swap.write_and_look(uri, b"mine", version, 0) == version, "by an earlier attempt of our own"
    s3_faults.meet()


@pytest.mark.s3
def test_what_can_be_read_but_not_written_for_a_while_is_still_held(
    s3_faults: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    output = f"s3://cinemo-test/{tmp_path.name}"
    with hold(output) as held:
        s3_faults.meet(conditions="501")
        before = content(output)
        time.sleep(2)
        held.check()
        assert content(output) == before
        s3_faults.meet()
        deadline = time.monotonic() + 20
        while content(output) == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert storage.names(output) == []


def test_a_heartbeat_whose_reply_was_lost_is_still_our_own(output: str) -> None:
    with hold(output) as held:
        storage.write_json(storage.join(output, NAME), content(output) | {"heartbeat": "ours, but unknown to us"})
        deadline = time.monotonic() + 20
        while content(output)["heartbeat"] == "ours, but unknown to us":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        held.check()
    assert storage.names(output) == []


@pytest.fixture
def away(s3_faults: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Lock]:
    """A lock whose storage has been away until that was said; `FaultyS3.meet` brings it back."""
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.6)
    with hold(f"s3://cinemo-test/{tmp_path.name}") as held:
        s3_faults.meet({"501": 1.0})  # an answer that is not tried again, so that the test need not wait for it
        said, deadline = "", time.monotonic() + 20
        while "its storage has been away for" not in said:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            said += capsys.readouterr().out
        yield held
        s3_faults.meet()


@pytest.mark.s3
def test_a_job_whose_storage_is_away_goes_on_once_it_is_back(away: Lock, s3_faults: FaultyS3, capsys: Any) -> None:
    assert away.lost is None
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(away.check)
        with pytest.raises(TimeoutError):  # nobody knows whose the output is
            checked.result(0.5)
        s3_faults.meet()
        checked.result(20)
    assert "its storage is back, and the output is still held by this job" in capsys.readouterr().out
    assert content(away.output)["pid"] == os.getpid()


@pytest.mark.s3
def test_a_job_that_lost_its_output_while_the_storage_was_away_ends(away: Lock, s3_faults: FaultyS3) -> None:
    import boto3

    behind = boto3.client("s3", endpoint_url=s3_faults.upstream.geturl())
    bucket, key = s3.split(away.uri)
    behind.put_object(Bucket=bucket, Key=key, Body=json.dumps({"host": "far-away", "token": "x"}).encode())
    assert away.lost is None
    s3_faults.meet()
    with pytest.raises(RunError, match=r"has lost its lock .host far-away"):
        away.check()
    assert content(away.output)["host"] == "far-away"


@pytest.mark.s3
def test_a_storage_that_stays_away_ends_the_job(away: Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lock.PATIENCE, "0.8")
    with pytest.raises(RunError, match=r"has lost its lock .no heartbeat could be written for \d+ s"):
        away.check()


@pytest.mark.s3
def test_a_fault_of_the_release_does_not_fail_a_finished_run(
    s3_faults: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1000)
    output = f"s3://cinemo-test/{tmp_path.name}"
    with hold(output):
        s3_faults.meet({"403": 1.0}, only=NAME)
    assert [record for record in caplog.records if "could not be removed, which harms nothing" in record.getMessage()]


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_bad_input(s3_endpoint: str) -> None:
    with pytest.raises(InputError, match=r"s3://nowhere/out.*the bucket does not exist"), hold("s3://nowhere/out"):
        pass


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", tmp_path / ("long" * 100)):
        with pytest.raises(InputError, match=r"cannot write there \(.*choose another place"), hold(str(place)):
            pass
