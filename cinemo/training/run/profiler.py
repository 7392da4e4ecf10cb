"""What some steps of a training spend their time on: torch.profiler on request, and the spans that it shows.

::

    <output>/profile/steps-000010-000013/rank-0.trace.json.gz   for ui.perfetto.dev or chrome://tracing
    <output>/profile/steps-000010-000013/rank-0.txt             times by span, then by operator
    <output>/profile/steps-000010-000013/rank-0.memory.pickle   for pytorch.org/memory_viz; on CUDA alone

A CPU's allocations are in the trace and the table. Reports that contain profiled steps show them slower than they are.
"""

from __future__ import annotations

import bisect
import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from cinemo import storage
from cinemo.training.report.profiled import Profiled
from cinemo.types import RunError

DATA, FORWARD, BACKWARD, OPTIMIZER = SPANS = ("data", "forward", "backward", "optimizer")
COMMUNICATION, OTHER = "communication", "other"
# What torch.distributed calls its collectives in a trace: the operator, then the backend's work, its kernels on a GPU.
_COLLECTIVES = ("c10d::", "gloo:", "nccl:", "record_param_comms")
_OPERATORS = 60  # rows of the table
_HISTORY = 200_000  # allocations and releases that a snapshot holds
_NOTHING = contextlib.nullcontext()
_recording = False


def span(name: str) -> AbstractContextManager[Any]:
    """A named part of a step in the trace; nothing at all while no profile is taken."""
    return torch.profiler.record_function(name) if _recording else _NOTHING


class Profiler:
    """Profiles some steps of this rank, stores the result under a run's output, and says so.

    Args:
        steps: counted from 1, consecutive; empty: none. Steps before ``done``, the steps that the run begins after,
            were profiled by the workers before these, or never will be.
        post: takes the event.
    """

    def __init__(
        self, steps: range, done: int, output: str, rank: int, device: torch.device, post: Callable[[Profiled], None]
    ) -> None:
        self._steps = steps if steps and done < steps[0] else range(0)
        self._rank, self._device, self._post = rank, device, post
        name = f"steps-{steps[0]:06d}-{steps[-1]:06d}" if steps else ""
        self._output = storage.join(output, "profile", name)
        self._profile: torch.profiler.profile | None = None
        self._step: AbstractContextManager[Any] = _NOTHING
        self.after(done)

    def after(self, done: int) -> None:
        """To be called after each step, ``done`` of which there were; begins and ends the profile."""
        if not self._steps or not self._steps[0] - 2 <= done <= self._steps[-1]:
            return
        if self._profile is None:  # one step ahead where there is one: its first events take longest
            self._begin()
        if done == self._steps[0] - 1:
            self._start()
        self._step.__exit__(None, None, None)
        self._step = span(f"step {done + 1}") if done < self._steps[-1] else _NOTHING
        self._step.__enter__()
        if done == self._steps[-1]:
            self._finish()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profile.prepare_trace()

    def _start(self) -> None:
        global _recording
        assert self._profile is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY, stacks="python")
        self._profile.start_trace()
        _recording = True

    def _finish(self) -> None:
        global _recording
        assert self._profile is not None
        _recording = False
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        self._profile.stop_trace()
        name, steps, uris = f"rank-{self._rank}", self._steps, list[str]()
        first = f"profile of steps {steps[0]}-{steps[-1]}, rank {self._rank}: "
        try:
            with tempfile.TemporaryDirectory(prefix="cinemo-profile-") as scratch:
                trace, table, memory = (
                    Path(scratch) / f"{name}.{end}" for end in ("trace.json.gz", "txt", "memory.pickle")
                )
                if cuda:
                    torch.cuda.memory._dump_snapshot(str(memory))  # type: ignore[no-untyped-call]
                    torch.cuda.memory._record_memory_history(enabled=None)
                spans = by_span(self._profile.events() or [], len(steps))  # type: ignore[no-untyped-call]
                table.write_text(f"{first}{self._device}\n\n{_table(spans, cuda)}\n\n{self._operators()}\n")
                self._profile.export_chrome_trace(str(trace))
                names = sorted(path.name for path in Path(scratch).iterdir())
                storage.upload(Path(scratch), self._output)
            uris = [storage.join(self._output, each) for each in names]
            text = f"{_sentence(spans)}; {self._output}"
        except (RunError, OSError) as error:  # not worth a training
            text = f"cannot be stored ({error}); training goes on"
        self._profile, self._steps = None, range(0)
        self._post(Profiled(first + text, tuple(uris)))

    def _operators(self) -> str:
        assert self._profile is not None
        order = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        rows = self._profile.key_averages()
        return str(rows.table(sort_by=order, row_limit=_OPERATORS, max_name_column_width=60))


@dataclass(frozen=True)
class SpanTime:
    """Milliseconds of a step that a span takes on the host, and the kernels that are launched in it on the device.

    What communicates is part of other spans on the host. On the device it has kernels of its own.
    """

    name: str
    host: float
    device: float


def by_span(events: Iterable[FunctionEvent], steps: int) -> list[SpanTime]:
    """The `SPANS`, what lies between them, communication, and the whole step (``step``): means over ``steps`` steps.

    A kernel belongs to the span in which it was launched, from whichever thread: autograd has its own.
    """
    on_host = [event for event in events if event.device_type.name == "CPU"]
    places = sorted((e.time_range.start, e.time_range.end, e.name) for e in on_host if e.name in SPANS)
    host, device = dict.fromkeys((*SPANS, OTHER), 0.0), dict.fromkeys((*SPANS, OTHER, COMMUNICATION), 0.0)
    for begin, end, name in places:
        host[name] += end - begin
    for event in on_host:
        place = bisect.bisect_right(places, (event.time_range.start, float("inf"), "")) - 1
        inside = place >= 0 and event.time_range.start < places[place][1]
        for kernel in event.kernels:
            name = COMMUNICATION if "nccl" in kernel.name.lower() else places[place][2] if inside else OTHER
            device[name] += kernel.duration
    whole = sum(e.time_range.end - e.time_range.start for e in on_host if e.name.startswith("step "))
    host[OTHER] = whole - sum(host[name] for name in SPANS)
    host[COMMUNICATION] = _covered(
        (e.time_range.start, e.time_range.end) for e in on_host if e.name.startswith(_COLLECTIVES)
    )
    rows = [SpanTime(name, host[name] / steps / 1e3, device[name] / steps / 1e3) for name in host]
    return [*rows, SpanTime("step", whole / steps / 1e3, sum(device.values()) / steps / 1e3)]


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How much of a line some intervals cover together."""
    length, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        length += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def _table(spans: Sequence[SpanTime], device: bool) -> str:
    whole = spans[-1].host or 1.0
    lines = [f"{'a step':<15}{'host ms':>10}{'of step':>9}" + (f"{'device ms':>12}" if device else "")]
    for row in spans:
        on_device = f"{row.device:>12.2f}" if device else ""
        lines.append(f"{row.name:<15}{row.host:>10.2f}{row.host / whole:>9.1%}{on_device}")
    return "\n".join([*lines, f"{COMMUNICATION}: within the others on the host"])


def _sentence(spans: Sequence[SpanTime]) -> str:
    *rows, step = spans
    parts = ", ".join(f"{row.name} {row.host / (step.host or 1.0):.0%}" for row in rows)
    return f"{step.host:.1f} ms a step: {parts}"
