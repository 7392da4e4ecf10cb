"""What a run says of itself: before the first shard is full, over the last minute only, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest

from cinemo.data.precompute import progress
from cinemo.data.precompute.progress import Figures, Meter, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", made.perf_counter)
    return made


def shard(clips: int, reasons: dict[str, int] | None = None) -> dict[str, Any]:
    return {"clips": clips, "bytes": 3_000_000, "reasons": json.dumps(reasons or {})}


def make(meter: Meter, stream: io.StringIO | None = None, **more: Any) -> Progress:
    return Progress(100, 10, {"decode": 2, "encode": 1}, meter.read, stream=stream or io.StringIO(), **more)


def test_a_run_that_is_over_before_it_is_looked_at_twice_has_a_rate(clock: Clock) -> None:
    meter = Meter()
    run = make(meter)
    clock.now += 5
    meter.add("encode", 100, {"encode": 4.0}, {})
    first = run.figures()
    clock.now += 5
    last = run.figures()
    assert (first.rate, first.seconds_left) == (pytest.approx(20), 0)
    assert (last.rate, last.seconds_left) == (pytest.approx(10), 0)


def test_figures_before_the_first_shard(clock: Clock) -> None:
    meter = Meter()
    run = make(meter)
    clock.now += 20
    figures = run.figures()
    assert "starting workers, 0:00:20 gone" in figures.line()
    clock.now += 10
    meter.add("decode", 20, {"decode": 15.0}, {"missing": 2})
    meter.add("encode", 10, {"encode": 5.0}, {})
    figures = run.figures()
    assert (figures.decoded, figures.encoded, figures.committed) == (20, 10, 0)
    assert figures.rate == pytest.approx(1.0), "workers' start is not part of it"
    assert figures.seconds_left == pytest.approx(90)
    assert figures.use == {"decode": pytest.approx(0.75), "encode": pytest.approx(0.5)}
    assert figures.line() == (
        "0/100 clips in 0/10 shards (decoded 20, encoded 10), 1.00 clips/s, 0.0 MB/s, 0:00:30 gone, 0:01:30 left, "
        "busy: decode 75% encode 50%, refused 2: missing 2"
    )
    run.add(shard(10, {"missing": 2, "unreadable": 1}))
    assert run.figures().reasons == {"missing": 2, "unreadable": 1}, "a refused clip is counted once"


def test_the_rate_is_that_of_the_last_minute(clock: Clock) -> None:
    meter = Meter()
    run = make(meter)
    run.figures()
    for _ in range(30):
        clock.now += 5
        meter.add("encode", 1, {"encode": 1.0}, {})
        run.figures()
    for _ in range(14):
        clock.now += 5
        meter.add("encode", 5, {"encode": 5.0}, {})
        figures = run.figures()
    assert figures.rate == pytest.approx(1.0)
    assert figures.use["encode"] == pytest.approx(1.0)


def test_a_lost_meter_leaves_what_was_committed(clock: Clock) -> None:
    run = Progress(100, 10, {"decode": 2, "encode": 1}, lambda: None, stream=io.StringIO())
    run.figures()
    clock.now += 10
    run.add(shard(10))
    figures = run.figures()
    assert (figures.encoded, figures.committed, figures.shards) == (10, 10, 1)
    assert figures.megabytes_per_second == pytest.approx(0.3)


def test_lines_come_while_nothing_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.02)
    monkeypatch.setattr(progress, "REWRITE_SECONDS", 0.02)
    for stream in (io.StringIO(), Terminal()):
        heard: list[Figures] = []
        meter = Meter()
        with make(meter, stream, listener=heard.append) as run:
            while len(heard) < 3:
                pass
            run.add(shard(100))
        assert heard[-1].committed == 100
        text = stream.getvalue()
        if stream.isatty():
            assert text.count("\n") == 1
            assert text.count("\r\x1b[K") == len(heard)
        else:
            assert text.count("\n") == len(heard)
            assert "\r" not in text


def test_the_meter_starts_without_torch() -> None:
    code = "import sys, cinemo.data.precompute.progress; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
