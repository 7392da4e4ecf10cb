"""Video files: what they hold, and exact frames at given indices. The only place that decodes video.

Frame numbers count presented frames from 0: edit lists and reordering are resolved, so frame ``k`` is the k-th picture
a player shows. A file's timeline comes from its packets, not from its header, which lies often enough.

PyAV is the default because it is both exact and fastest (BENCHMARKS.md). decord stays selectable for files that it
shows as players do: it counts frames that an edit list hides, gives others in open groups of pictures, knows neither
pixel aspects nor reflections, and cannot open AV1, so PyAV decodes such files whatever was chosen. torchcodec was wrong
on AVI and edit lists.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
import av.logging
import numpy as np

from cinemo.config import DataConfig
from cinemo.media.fitting import Size, cover, fitter, orientation
from cinemo.media.sources import fetched
from cinemo.media.timeline import (
    Tally,
    Timeline,
    count_frames,
    decode_all,
    displayed_size,
    frame_rate,
    open_video,
    pixel_aspect,
    read_timeline,
)
from cinemo.types import Clip, ClipError, Frames, keyed_seed

EXTENSIONS = frozenset(
    {"avi", "flv", "gif", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv", "y4m"}
)
# Where a frame that nothing refers to may be left undecoded. Elsewhere frames went missing (AV1) or nothing was won.
_SKIPPABLE = frozenset({"h264", "hevc"})
# What decord reads as players do; in others, pictures may change their size or begin before a keyframe.
_DECORD_FORMATS = ("mov,", "matroska,")

T = TypeVar("T")


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds: picture size in pixels (pixel aspect applied, before any rotation), rate, frame count."""

    width: int
    height: int
    fps: float
    frames: int
    duration: float
    codec: str
    container: str


def probe(path: str | Path) -> VideoInfo:
    """Read a file's timeline, without decoding where its packets tell which frames are shown (in AVI they never do).

    Raises:
        ClipError: the file is missing, is no video, has no frames, or ends early.
    """
    with open_video(path) as (container, stream):
        timeline = read_timeline(container, stream, path)
        width, height = displayed_size(stream)
        fps = frame_rate(stream, timeline)
        return VideoInfo(
            width=width,
            height=height,
            fps=fps,
            frames=timeline.frames,
            duration=timeline.frames / fps,
            codec=stream.codec_context.codec.canonical_name,
            container=container.format.name,
        )


def draw_view(available: int, data: DataConfig, clip_id: str, view: int) -> tuple[int, int]:
    """``(frame_interval, start_frame)`` of one view of a clip with ``available`` usable frames.

    The interval is uniform over those of the recipe's range that fit, the start uniform over those that fit it
    (Cinemo section 4.1: interval 3 to 10). Depends on ``data.seed``, clip id and view alone.

    Raises:
        ClipError: ``decode: too_few_frames``.
    """
    low, high = data.frame_interval
    steps = data.frames - 1
    high = min(high, (available - 1) // steps)
    if high < low:
        needed = steps * low + 1
        raise ClipError("decode", "too_few_frames", f"{available} frames, recipe needs {needed} (interval {low})")
    interval = low + keyed_seed(data.seed, clip_id, view, "interval") % (high - low + 1)
    return interval, keyed_seed(data.seed, clip_id, view, "start") % (available - steps * interval)


def decode_clip(clip: Clip, data: DataConfig) -> list[Frames]:
    """All views of a clip, ``data.frames`` frames each at ``data.size``, in one pass over the file.

    Raises:
        ClipError: the clip cannot be used; the reason is its slug.
    """
    with fetched(clip.uri) as path:
        return decode_views(path, clip, data)


def decode_views(path: Path, clip: Clip, data: DataConfig, out_VFHWC: np.ndarray | None = None) -> list[Frames]:
    """`decode_clip` of a local file, into ``out_VFHWC`` where it is given (uint8, ``V`` views)."""
    [views] = decode_windows(path, [clip], data, None if out_VFHWC is None else out_VFHWC[None])
    if isinstance(views, ClipError):
        raise views
    return views


def decode_windows(
    path: Path, clips: Sequence[Clip], data: DataConfig, out_NVFHWC: np.ndarray | None = None
) -> list[list[Frames] | ClipError]:
    """`decode_views` of several clips of one file, in one pass; or why a clip cannot be used, whatever the others are.

    Raises:
        ClipError: none of them can be used, or not in one pass.
    """
    if len(clips) > 1 and data.decoder == "decord":
        raise ClipError("decode", "not_in_one_pass", "decord decodes one clip at a time")
    if out_NVFHWC is None:
        out_NVFHWC = np.empty((len(clips), data.views, data.frames, *data.size, 3), np.uint8)
    return _with_timeline(path, functools.partial(_decode_windows, path, clips, data, out_NVFHWC))


def _decode_windows(
    path: Path,
    clips: Sequence[Clip],
    data: DataConfig,
    out_NVFHWC: np.ndarray,
    container: Any,
    stream: Any,
    timeline: Timeline,
) -> list[list[Frames] | ClipError]:
    several = len(clips) > 1
    windows: list[list[tuple[int, int]] | ClipError] = []
    places: dict[int, list[np.ndarray]] = {}
    for clip, out_VFHWC in zip(clips, out_NVFHWC, strict=False):
        first, last = usable(clip, timeline, stream)
        try:
            views = [draw_view(last - first, data, clip.clip_id, view) for view in range(data.views)]
        except ClipError as error:
            windows.append(error)
            continue
        windows.append([(interval, first + start) for interval, start in views])
        for frames_FHWC, (interval, start) in zip(out_VFHWC, views, strict=True):
            for k, frame_HWC in enumerate(frames_FHWC):
                places.setdefault(first + start + k * interval, []).append(frame_HWC)
    by_decord = (
        _decord(container, stream, timeline, path, sorted(places), data.size)
        if places and data.decoder == "decord"
        else None
    )
    if by_decord:
        for index, frame_HWC in by_decord.items():
            for place_HWC in places[index]:
                place_HWC[:] = frame_HWC
    elif places:
        fit = fitter(stream, data.size)

        def keep(index: int, frame: Any) -> None:
            place_HWC, *others = places[index]
            fit(frame, place_HWC)
            for other_HWC in others:
                other_HWC[:] = place_HWC

        with _undamaged() if several else nullcontext():
            _decode(container, stream, timeline, path, places.keys(), keep, settle=not several)
    fps = frame_rate(stream, timeline) if places else 0.0
    return [
        views
        if isinstance(views, ClipError)
        else [Frames(frames, fps, interval, start) for frames, (interval, start) in zip(out_VFHWC, views, strict=True)]
        for views, out_VFHWC in zip(windows, out_NVFHWC, strict=False)
    ]


@contextmanager
def _undamaged() -> Iterator[None]:
    """Raise a `ClipError` where a decoder complains: how it hides damage depends on what it decoded before."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as complaints:
            yield
    finally:
        av.logging.set_level(level)
    if complaints:
        raise ClipError("decode", "not_in_one_pass", complaints[0][2].strip())


def read_frames(
    path: str | Path, indices: Iterable[int], size: Size | None = None, decoder: str = "pyav"
) -> np.ndarray:
    """The frames at ``indices`` (any order, repeats allowed) as uint8 RGB, ``FHWC``.

    Args:
        size: height and width; frames are scaled (antialiased) until they cover it, and their centre is cut out.
            Without it frames keep the size the file stores; where that changes, all get the first one's.
        decoder: ``pyav``, or ``decord`` for files that it can be trusted with.

    Raises:
        ClipError: a file that cannot be read, or an index outside it.
    """
    wanted = list(indices)

    def read(container: Any, stream: Any, timeline: Timeline) -> np.ndarray:
        outside = [index for index in wanted if not 0 <= index < timeline.frames]
        if outside:
            detail = f"frame {outside[0]} was requested, {path} has {timeline.frames}"
            raise ClipError("decode", "too_few_frames", detail)
        each = sorted(set(wanted))
        frames = _decord(container, stream, timeline, path, each, size) if decoder == "decord" else None
        if frames is None:
            fit, decoded = fitter(stream, size), {}
            _decode(container, stream, timeline, path, each, lambda index, frame: decoded.update({index: fit(frame)}))
            frames = decoded
        return np.stack([frames[index] for index in wanted])

    return _with_timeline(path, read)


class _WrongTimeline(Exception):
    """A decoder shows other frames than the packets promise."""


def _with_timeline(path: str | Path, use: Callable[[Any, Any, Timeline], T]) -> T:
    """What ``use`` makes of an open file and its timeline; of counted frames, where the packets' turns out wrong."""
    with open_video(path, header_only=True) as (container, stream):
        try:
            return use(container, stream, read_timeline(container, stream, path))
        except _WrongTimeline:
            counted = count_frames(path)
            if counted.corrupt:
                raise ClipError("decode", "corrupt", counted.corrupt) from None
            return use(container, stream, counted)


def usable(clip: Clip, timeline: Timeline, stream: Any) -> tuple[int, int]:
    """The half-open range of frame numbers between a clip's ``start`` and ``end`` seconds."""
    seconds = timeline.seconds or [number / frame_rate(stream, timeline) for number in range(timeline.frames)]
    slack = 1e-6  # 1.0 s is written as 0.9999999 by some time bases
    first = 0 if clip.start is None else bisect.bisect_left(seconds, clip.start - slack)
    last = timeline.frames if clip.end is None else bisect.bisect_left(seconds, clip.end - slack)
    return first, max(first, last)


def _decode(
    container: Any,
    stream: Any,
    timeline: Timeline,
    path: str | Path,
    indices: Collection[int],
    keep: Callable[[int, Any], None],
    settle: bool = True,
) -> None:
    """Hand every wanted frame to ``keep``, by seeking where timestamps allow it; a linear decode settles the rest.

    Args:
        settle: whether it may; else a rest is a `ClipError`.

    Raises:
        _WrongTimeline: decoding all of the file shows other frames than an exact timeline has.
        ClipError: a counted file's frame is damaged.
    """
    if timeline.exact:
        left = set(indices)
        number = {timeline.pts[index]: index for index in indices}
        try:
            for key, seek_to, wanted in _runs(timeline, sorted(number)):
                for frame in _decode_run(container, stream, key, seek_to, wanted):
                    keep(number[frame.pts], frame)
                    left.discard(number[frame.pts])
        except (av.FFmpegError, _WrongTimeline):
            left = set(indices)
        if not left:
            return
        if not settle:
            raise ClipError("decode", "not_in_one_pass", f"{len(left)} of {len(indices)} frames need another pass")
    last = max(indices)
    for index, frame in enumerate(_decode_linear(timeline, path)):
        if timeline.exact and frame.pts != timeline.pts[index]:
            break
        if index in indices:
            if frame.is_corrupt:
                break
            keep(index, frame)
        if index == last:
            return
    if timeline.exact:
        raise _WrongTimeline
    raise ClipError("decode", "corrupt", timeline.corrupt or f"frame {last} cannot be decoded a second time")


def _runs(timeline: Timeline, wanted_pts: Sequence[int]) -> Iterator[tuple[int, int, set[int]]]:
    """Group wanted times into ``(keyframe's time, timestamp to seek to, times)``.

    A run ends where a jump skips at least one whole key interval.
    """
    times = [pts for pts, _ in timeline.keys]
    run: set[int] = set()
    begin = previous = 0
    for pts in wanted_pts:
        key = max(0, bisect.bisect_right(times, pts) - 1)
        if run and key > previous + 1:
            yield *timeline.keys[begin], run
            run = set()
        if not run:
            begin = key
        run.add(pts)
        previous = key
    if run:
        yield *timeline.keys[begin], run


def _decode_run(container: Any, stream: Any, key: int, seek_to: int, wanted: set[int]) -> Iterator[Any]:
    """Frames with the ``wanted`` times, decoding from one point on and no further than needed."""
    codec = stream.codec_context
    skippable = codec.codec.canonical_name in _SKIPPABLE
    container.seek(seek_to, stream=stream)
    missing = set(wanted)
    previous = None

    def chosen(frames: Iterable[Any]) -> Iterator[Any]:
        nonlocal previous
        for frame in frames:
            if frame.pts is None or (previous is not None and frame.pts <= previous):
                raise _WrongTimeline  # this decoder does not put frames in the order of their times
            if frame.pts == key and not frame.key_frame:
                raise _WrongTimeline  # decoding cannot begin there
            previous = frame.pts
            if frame.pts in wanted and not frame.is_corrupt:
                yield frame

    for packet in container.demux(stream):
        if skippable:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from chosen(codec.decode(packet if packet.size else None))
        missing.discard(packet.pts)
        if not missing or not packet.size:
            if packet.size:
                yield from chosen(codec.decode(None))
            break
    codec.flush_buffers()


def _decode_linear(timeline: Timeline, path: str | Path) -> Iterator[Any]:
    """The reference: decode from the beginning, leave nothing out."""
    if timeline.decoded:
        yield from timeline.decoded
        return
    with open_video(path) as (container, stream):
        yield from decode_all(container, stream, Tally())


def _decord(
    container: Any, stream: Any, timeline: Timeline, path: str | Path, indices: Sequence[int], size: Size | None
) -> dict[int, np.ndarray] | None:
    """The frames as decord decodes them; None where it would show others than players do, or cannot read the file."""
    if not (timeline.plain and container.format.name.startswith(_DECORD_FORMATS) and pixel_aspect(stream) == 1):
        return None
    with open_video(path) as (other, its_stream):
        first = next(decode_all(other, its_stream, Tally()), None)
        if first is None or orientation(first).changes:
            return None

    import decord

    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != timeline.frames:
            return None
        if size is not None:
            height, width = reader[0].shape[:2]
            scaled_width, scaled_height, left, top = cover(width, height, size)
            reader = decord.VideoReader(
                str(path), ctx=decord.cpu(0), num_threads=1, width=scaled_width, height=scaled_height
            )
        frames_FHWC = reader.get_batch(list(indices)).asnumpy()
    except (decord.DECORDError, IndexError):
        return None
    if size is not None:
        frames_FHWC = frames_FHWC[:, top : top + size[0], left : left + size[1]]
    return dict(zip(indices, frames_FHWC, strict=True))
