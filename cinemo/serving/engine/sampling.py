"""Denoises several videos at once, each at its own timestep: they join and leave between steps.

A step is one call of the network for up to ``max_batch`` videos, taken in turns from all that joined, so that a short
one is not stuck behind long ones. Every video keeps its own sampling (a generator of queries that owns solver and
guidance) and features to use again; what shares a batch with it changes its result by rounding alone.

The host never waits for the step it has just given to an accelerator, only for the one before: the device always has
work, and yet a step is reported when it was done and not when it was asked for.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cinemo.animate import AnimateRequest, finish, prepare
from cinemo.bundle import ModelBundle
from cinemo.diffusion.guidance import Query
from cinemo.networks.features import OUTER_SHARE, DeepFeatures
from cinemo.networks.latent_colours import coloured
from cinemo.serving.engine.pace import Cost, Pace
from cinemo.types import Animation, Condition, InputError

log = logging.getLogger(__name__)

# Pieces (a few frames each) that are decoded after one step: joining and leaving wait for no more than these. Fewer
# would only keep finished videos waiting; what others lose to the decoding is the same.
_PIECES = 3
# Batches whose constant part is kept: with more videos than places the turns repeat after a few steps.
_BATCHES = 8
_SHOWN, _PREVIEW_SECONDS = 4, 0.5  # frames of a preview; at least between two of a video


@dataclass(frozen=True)
class Outcome:
    """What a step brought, by key. ``progress``: (steps done, all steps). ``failed``: (code, message for a person).
    ``previews``: the step, and a few small frames (F, h, w, 3) uint8 of the video as it is predicted there.
    ``calls``: seconds that a step took, and how many videos went on in it."""

    progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    finished: dict[str, Animation] = field(default_factory=dict)
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    previews: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)
    calls: list[tuple[float, int]] = field(default_factory=list)


class _Video:
    """One joined request: what its sampling asks next, and what it brings to every batch."""

    def __init__(self, key: str, number: int, bundle: ModelBundle, request: AnimateRequest, previews: bool) -> None:
        self.key, self.number = key, number
        self.preview_at = 0.0 if previews else float("inf")
        self.asked = prepare(bundle, request)
        self.calls = self.asked.calls
        self.query = next(self.asked.sampling)
        self.x = self.query.x  # at the end the video's latents (1, C, F, h, w)
        self.done = 0
        self.work = 0.0  # of the calls done, in rows of the model's own size
        self.is_sampled = False
        self.inner: Tensor | None = None  # of the last call that ran the whole network
        self.undecoded: deque[Tensor] = deque()
        self.frames: list[Tensor] = []

    def take(self, output: Tensor) -> None:
        """Go on to the next query, or to the end."""
        try:
            self.query = self.asked.sampling.send(output)
            self.x = self.query.x
        except StopIteration as end:
            self.x, self.inner, self.is_sampled = end.value, None, True
        self.done += 1


@dataclass(frozen=True)
class _Flight:
    """What was given to the device in one step; on the host once ``event`` (none on a CPU) has passed."""

    steps: list[tuple[_Video, int]]
    finite: Tensor | None  # one bool for each of ``steps``
    pieces: list[tuple[_Video, Tensor, Tensor | None]]  # frames, and with the last of them the latents
    event: torch.cuda.Event | None
    work: float  # in rows of the model's own size
    began: float
    previews: list[tuple[_Video, int, Tensor]]


class SamplingEngine:
    """Not safe for threads: one thread joins, steps and leaves.

    Args:
        max_batch: videos in one call of the network; each has as many rows of it as there are branches of guidance.
        ahead: steps that may be under way on the device while the host prepares the next; None: 1, on a CPU 0.
        before: what an earlier process measured of this bundle's steps.
        clock: seconds, by which steps are measured.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        max_batch: int = 4,
        ahead: int | None = None,
        before: Cost | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bundle, self.max_batch = bundle, max_batch
        self._pace, self._clock, self._landed = Pace(before), clock, -float("inf")
        self._row = _row_of(bundle)
        self._previews: list[tuple[_Video, int, Tensor]] = []  # of the step that is being made
        self._ahead = int(bundle.device.type != "cpu") if ahead is None else ahead
        self._places = max_batch  # fewer after the memory was exhausted
        self._numbers = 0
        self._videos: dict[str, _Video] = {}
        self._turns: deque[_Video] = deque()
        self._decoding: deque[_Video] = deque()
        self._flights: deque[_Flight] = deque()
        self._conditions: dict[tuple[int, ...], tuple[list[Condition], Condition]] = {}
        # A view of one entry is a timestep on the device without a copy to it.
        self._t_T = torch.arange(bundle.method.schedule.train_steps, device=bundle.device)

    def __len__(self) -> int:
        """Videos that joined and neither finished, failed nor left."""
        return len(self._videos)

    def join(self, key: str, request: AnimateRequest, previews: bool = False) -> int:
        """Take part from the next step on; returns how many steps it will take.

        ``previews``: show what it will look like, a few times while it is made.

        Raises:
            InputError: the request does not fit the bundle, or comes with a video.
        """
        for name, about in self.bundle.method.inputs.items():
            if name in request.inputs and about.kind == "video":  # whose preparation would hold up everybody's steps
                raise InputError(f"{name}: got a video, expected none: it is not served; use pipelines/animate.py")
        if key in self._videos:
            raise ValueError(f"{key} has joined already")
        if not self._videos:
            self._places = self.max_batch
        with torch.inference_mode():
            video = _Video(key, self._numbers, self.bundle, request, previews)
        self._numbers += 1
        self._videos[key] = video
        self._turns.append(video)
        return video.calls

    def leave(self, key: str) -> None:
        """Free a video's place at once; nothing more is heard of it. No error where it is not here."""
        video = self._videos.pop(key, None)
        if video is None:
            return
        for line in (self._turns, self._decoding):
            if video in line:
                line.remove(video)
        self._conditions.clear()

    @torch.inference_mode()
    def step(self) -> Outcome:
        """One call of the network for the videos whose turn it is (one for each shape, and again for those that use
        features again), and a piece of the decoding of those that are sampled.

        A fault ends its own video alone: where a batch fails, its videos are tried one by one.

        Raises:
            Exception: the device itself is lost; no later step can work.
        """
        outcome = Outcome()
        began = self._clock()
        turn = [self._turns[k] for k in range(min(self._places, len(self._turns)))]
        self._turns.rotate(-len(turn))
        queries = [video.query for video in turn]
        alike: dict[tuple[bool, torch.Size], list[_Video]] = {}
        for video in turn:
            alike.setdefault((video.query.features == "again", video.query.x.shape[1:]), []).append(video)
        steps = [step for (again, _), videos in alike.items() for step in self._advance(videos, again, outcome)]
        pieces = self._decode(outcome)
        if steps or pieces:
            work = sum(self._work_of(query) for query in queries)
            self._flights.append(_flight(steps, pieces, self.bundle.device, work, began, self._previews))
            self._previews = []
        while len(self._flights) > (self._ahead if steps or pieces else 0):
            self._land(self._flights.popleft(), outcome)
        return outcome

    def cost(self) -> Cost | None:
        """What steps were measured to take; None where there was none."""
        return self._pace.cost(_mean_rows(self._turns))

    def seconds_left(self, tail: float = 0.0) -> dict[str, float]:
        """Until each video that takes turns ends, by key, if no other joins; empty where nothing was measured.

        ``tail``: as `Cost.ends` has it.
        """
        cost, turns = self.cost(), list(self._turns)
        if cost is None:
            return {}
        left = [(video.calls - video.done, _rows_left(video, cost.rows)) for video in turns]
        return dict(zip((video.key for video in turns), cost.ends(left, self._places, tail), strict=True))

    def _work_of(self, query: Query) -> float:
        return query.x.numel() / self._row * (OUTER_SHARE if query.features == "again" else 1)

    def _advance(self, videos: list[_Video], again: bool, outcome: Outcome) -> list[tuple[_Video, int]]:
        """Answer the videos' queries; those that took a step, with its number."""
        if not videos:
            return []
        try:
            answers = self._answers(videos, again)
        except Exception as error:
            fault = fault_of(error)
        else:
            return [step for answer in answers for step in self._go_on(*answer, outcome)]
        # Outside the handler, which holds on to the memory of the call that failed.
        _free_memory(self.bundle.device)
        if len(videos) == 1:
            self._fail(videos[0], fault, outcome)
            return []
        if fault[0] == "out_of_memory":
            self._places = max(1, len(videos) // 2)
            log.warning("not enough memory for %d videos in a batch; %d from now on", len(videos), self._places)
        return [step for video in videos for step in self._advance([video], again, outcome)]

    def _go_on(self, video: _Video, output: Tensor, inner: Tensor | None, outcome: Outcome) -> list[tuple[_Video, int]]:
        """Lead one video's sampler to its next query, or the video to its decoding."""
        try:
            if inner is not None:
                video.inner = inner
            video.work += self._work_of(video.query)
            if self._clock() >= video.preview_at:
                self._preview(video, output)
            video.take(output)
        except Exception as error:
            self._fail(video, fault_of(error), outcome)
            return []
        if video.is_sampled:
            self._turns.remove(video)
            self._pace.video(video.done, video.work)
            video.undecoded.extend(self.bundle.decoder.pieces(video.x[0].transpose(0, 1)))
            self._decoding.append(video)
        return [(video, video.done)]

    def _preview(self, video: _Video, output: Tensor) -> None:
        """Show what the network now takes for the video."""
        latents_CFHW = self.bundle.method.clean(video.query, output)
        frames = latents_CFHW.shape[1]
        some = sorted({round(place * (frames - 1) / (_SHOWN - 1)) for place in range(_SHOWN)})
        self._previews.append((video, video.done + 1, coloured(latents_CFHW[:, some], self.bundle.colours)))
        video.preview_at = self._clock() + _PREVIEW_SECONDS

    def _answers(self, videos: Sequence[_Video], again: bool) -> list[tuple[_Video, Tensor, Tensor | None]]:
        """One call of the network: each video's output, and its inner features where they are new and to be kept."""
        queries = [video.query for video in videos]
        rows = [len(query.x) for query in queries]
        x_BCFHW = torch.cat([query.x for query in queries])
        t_B = torch.cat(
            [self._t_T[query.t : query.t + 1].expand(count) for query, count in zip(queries, rows, strict=True)]
        )
        deep = DeepFeatures() if any(query.features for query in queries) else None
        if deep is not None and again:
            deep.kept = torch.cat([video.inner for video in videos if video.inner is not None])
        adapters = [video.asked.adapter for video, count in zip(videos, rows, strict=True) for _ in range(count)]
        with self.bundle.adapters.using(adapters):
            output = self.bundle.method.predict(x_BCFHW, t_B, self._condition(videos), deep)
        inner: Sequence[Tensor | None] = [None] * len(videos)
        if deep is not None and deep.kept is not None and not again:
            per_row = len(deep.kept) // len(x_BCFHW)
            # Copies, or the features of all would live as long as those of one.
            parts = torch.split(deep.kept, [per_row * count for count in rows])
            inner = [part.clone() if query.features else None for part, query in zip(parts, queries, strict=True)]
        return list(zip(videos, torch.split(output, rows), inner, strict=True))

    def _condition(self, videos: Sequence[_Video]) -> Condition:
        """What the rows of a batch are told is mostly the same at every step: put together when it changes."""
        own = [video.query.condition for video in videos]
        key = tuple(map(id, own))
        if key not in self._conditions:
            while len(self._conditions) >= _BATCHES:
                del self._conditions[next(iter(self._conditions))]
            # With its parts, or another object could come to have an id of one that is gone.
            self._conditions[key] = own, Condition.cat(own)
        return self._conditions[key][1]

    def _decode(self, outcome: Outcome) -> list[tuple[_Video, Tensor, Tensor | None]]:
        """Frames of the next pieces of the videos that are sampled, the oldest first."""
        pieces: list[tuple[_Video, Tensor, Tensor | None]] = []
        while self._decoding and len(pieces) < _PIECES:
            video = self._decoding[0]
            frames, fault = self._decode_piece(video)
            if frames is None:  # memory is free now that was not: once more
                _free_memory(self.bundle.device)
                frames, fault = self._decode_piece(video)
            if frames is None:
                self._fail(video, fault, outcome)
                continue
            video.undecoded.popleft()
            if not video.undecoded:
                self._decoding.popleft()
            pieces.append((video, frames, None if video.undecoded else video.x.float()))
        return pieces

    def _decode_piece(self, video: _Video) -> tuple[Tensor | None, tuple[str, str]]:
        try:
            return self.bundle.decoder.decode_piece(video.undecoded[0]), ("", "")
        except Exception as error:
            return None, fault_of(error)

    def _land(self, flight: _Flight, outcome: Outcome) -> None:
        """Report what a step did, now that the device has done it."""
        if flight.event is not None:
            flight.event.synchronize()
        now = self._clock()
        if flight.work:
            seconds = now - max(flight.began, self._landed)
            self._pace.step(flight.work, seconds)
            outcome.calls.append((seconds, len(flight.steps)))
        self._landed = now
        finite = [] if flight.finite is None else flight.finite.tolist()
        for (video, done), good in zip(flight.steps, finite, strict=True):
            if self._videos.get(video.key) is not video:
                continue
            if not good:
                message = f"sampling went out of range at step {done}; try a lower guidance scale or another seed"
                self._fail(video, ("not_finite", message), outcome)
            else:
                outcome.progress[video.key] = (done, video.calls)
        for video, step, frames in flight.previews:
            if self._videos.get(video.key) is video:
                outcome.previews[video.key] = (step, frames.numpy())
        for video, frames, latents in flight.pieces:
            if self._videos.get(video.key) is not video:
                continue
            video.frames.append(frames)
            if latents is not None:
                outcome.finished[video.key] = finish(video.asked.settings, latents, torch.cat(video.frames).numpy())
                self.leave(video.key)

    def _fail(self, video: _Video, fault: tuple[str, str], outcome: Outcome) -> None:
        self.leave(video.key)
        outcome.progress.pop(video.key, None)
        outcome.failed[video.key] = fault


def fault_of(error: Exception) -> tuple[str, str]:
    """(code, one line for a person) of what ended one video; raises ``error`` again where it is the device's end."""
    if isinstance(error, InputError):
        return "invalid_request", str(error)
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out_of_memory", "the server ran out of memory for this video; try again later"
    if isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in text:
        raise error
    log.error("a video failed", exc_info=error)
    return "internal_error", "the server failed to make this video; the error was logged"


def _flight(
    steps: list[tuple[_Video, int]],
    pieces: list[tuple[_Video, Tensor, Tensor | None]],
    device: torch.device,
    work: float,
    began: float,
    previews: list[tuple[_Video, int, Tensor]],
) -> _Flight:
    """Send to the host what is asked of a step, without waiting for it."""
    finite = torch.stack([video.x.isfinite().all() for video, _ in steps]) if steps else None
    event = None
    if device.type == "cuda":
        finite = None if finite is None else finite.to("cpu", non_blocking=True)
        pieces = [
            (video, frames.to("cpu", non_blocking=True), None if x is None else x.to("cpu", non_blocking=True))
            for video, frames, x in pieces
        ]
        previews = [(video, step, frames.to("cpu", non_blocking=True)) for video, step, frames in previews]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
    return _Flight(steps, finite, pieces, event, work, began, previews)


def _row_of(bundle: ModelBundle) -> int:
    """Numbers in one row of x at the model's own size."""
    data, vae = bundle.recipe.data, bundle.vae
    rows, columns = (side // vae.downscale for side in data.size)
    return math.prod(bundle.method.target_shape((vae.latent_channels, data.frames, rows, columns)))


def _mean_rows(videos: Iterable[_Video]) -> float:
    """Mean work in the calls that were made; 1 where there were none."""
    begun = [video for video in videos if video.done]
    return sum(video.work for video in begun) / sum(video.done for video in begun) if begun else 1.0


def _rows_left(video: _Video, usual: float) -> float:
    """Work in each call that is left: what a usual video has beyond what was done, near what its calls had so far."""
    calls = video.calls - video.done
    if not video.done or not calls:
        return usual
    own = video.work / video.done
    return min(max((usual * video.calls - video.work) / calls, own / 3), 3 * own)


def _free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
