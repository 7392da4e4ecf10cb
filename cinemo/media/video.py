"""Video files: what they hold, and exact frames at given indices. The only place that decodes video.

Frame numbers count presented frames from 0: edit lists and reordering are resolved, so frame ``k`` is the k-th picture
a player shows. A file's timeline comes from its packets, not from its header, which lies often enough.

PyAV is the default because it is both exact and fastest (BENCHMARKS.md). decord stays selectable: it is slower and
cannot open AV1, and beside that right wherever it was compared. torchcodec was wrong on AVI and edit lists.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.logging
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from cinemo.config import DataConfig
from cinemo.media.sources import fetched
from cinemo.media.timeline import (
    MAX_PIXELS,
    Timeline,
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
# Averages when shrinking, linear when enlarging; without full chroma, colours of even widths come out 2.4 too dark.
_SCALING = Interpolation.AREA | Interpolation.FULL_CHR_H_INT

Size = tuple[int, int]  # height, width


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
    """Read a file's timeline without decoding (AVI and files without timestamps are decoded once, to count).

    Raises:
        ClipError: the file is missing, is no video, has no frames, or ends early.
    """
    with open_video(path) as (container, stream):
        timeline = read_timeline(container, stream, path)
        width, height = displayed_size(stream)
        fps = frame_rate(stream)
        return VideoInfo(
            width=width,
            height=height,
            fps=fps,
            frames=timeline.frames,
            duration=timeline.frames / fps,
            codec=stream.codec_context.codec.canonical_name,
            container=container.format.name,
        )


def cover(width: int, height: int, size: Size) -> tuple[int, int, int, int]:
    """``(scaled width, scaled height, left, top)``: the smallest scaling that covers ``size``, and its centre crop."""
    rows, columns = size
    if width * rows >= height * columns:
        scaled = max(columns, (2 * width * rows + height) // (2 * height)), rows
    else:
        scaled = columns, max(rows, (2 * height * columns + width) // (2 * width))
    return scaled[0], scaled[1], (scaled[0] - columns) // 2, (scaled[1] - rows) // 2


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
    several = len(clips) > 1
    if several and data.decoder == "decord":
        raise ClipError("decode", "not_in_one_pass", "decord decodes one clip at a time")
    if out_NVFHWC is None:
        out_NVFHWC = np.empty((len(clips), data.views, data.frames, *data.size, 3), np.uint8)
    windows: list[list[tuple[int, int]] | ClipError] = []
    places: dict[int, list[np.ndarray]] = {}
    with open_video(path, header_only=True) as (container, stream):
        timeline = read_timeline(container, stream, path)
        for clip, out_VFHWC in zip(clips, out_NVFHWC, strict=False):
            first, last = _usable(clip, timeline, stream)
            try:
                views = [draw_view(last - first, data, clip.clip_id, view) for view in range(data.views)]
            except ClipError as error:
                windows.append(error)
                continue
            windows.append([(interval, first + start) for interval, start in views])
            for frames_FHWC, (interval, start) in zip(out_VFHWC, views, strict=True):
                for k, frame_HWC in enumerate(frames_FHWC):
                    places.setdefault(first + start + k * interval, []).append(frame_HWC)
        if data.decoder == "decord":
            for index, frame_HWC in _decord(path, sorted(places), data.size).items() if places else ():
                for place_HWC in places[index]:
                    place_HWC[:] = frame_HWC
        elif places:
            fit = _fitter(stream, data.size)

            def keep(index: int, frame: Any) -> None:
                place_HWC, *others = places[index]
                fit(frame, place_HWC)
                for other_HWC in others:
                    other_HWC[:] = place_HWC

            with _undamaged() if several else nullcontext():
                _decode(container, stream, timeline, path, places.keys(), keep, settle=not several)
        fps = frame_rate(stream) if places else 0.0
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
            Without it frames keep the size the file stores.
        decoder: ``pyav`` or ``decord``.

    Raises:
        ClipError: a file that cannot be read, or an index outside it.
    """
    wanted = list(indices)
    frames: dict[int, np.ndarray] = {}
    with open_video(path, header_only=True) as (container, stream):
        timeline = read_timeline(container, stream, path)
        outside = [index for index in wanted if not 0 <= index < timeline.frames]
        if outside:
            raise ClipError(
                "decode", "too_few_frames", f"frame {outside[0]} was requested, {path} has {timeline.frames}"
            )
        if decoder == "decord":
            frames = _decord(path, sorted(set(wanted)), size)
        else:
            fit = _fitter(stream, size)
            _decode(
                container, stream, timeline, path, set(wanted), lambda index, frame: frames.update({index: fit(frame)})
            )
    return np.stack([frames[index] for index in wanted])


def _usable(clip: Clip, timeline: Timeline, stream: Any) -> tuple[int, int]:
    """The half-open range of frame numbers between a clip's ``start`` and ``end`` seconds."""
    if timeline.exact:
        ticks = float(stream.time_base)
        seconds = [(value - timeline.pts[0]) * ticks for value in timeline.pts]
    else:
        seconds = [number / frame_rate(stream) for number in range(timeline.frames)]
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

    ``settle``: whether it may; else a rest is a `ClipError`.
    """
    left = set(indices)
    if timeline.exact:
        number = {timeline.pts[index]: index for index in indices}
        try:
            for seek_to, wanted in _runs(timeline, sorted(number)):
                for frame in _decode_run(container, stream, seek_to, wanted):
                    keep(number[frame.pts], frame)
                    left.discard(number[frame.pts])
        except av.FFmpegError:
            left = set(indices)
        if left and not settle:
            raise ClipError("decode", "not_in_one_pass", f"{len(left)} of {len(indices)} frames need another pass")
    if left:
        for index, frame in _decode_linear(timeline, path, left):
            keep(index, frame)
            left.discard(index)
            if not left:
                break
    if left:
        raise ClipError(
            "decode", "truncated", f"only {len(indices) - len(left)} of {len(indices)} wanted frames could be decoded"
        )


def _runs(timeline: Timeline, wanted_pts: Sequence[int]) -> Iterator[tuple[int, set[int]]]:
    """Group wanted times into ``(timestamp to seek to, times)``, where a jump skips at least one whole key interval."""
    times = [pts for pts, _ in timeline.keys]
    run: set[int] = set()
    seek_to = previous = 0
    for pts in wanted_pts:
        key = max(0, bisect.bisect_right(times, pts) - 1)
        if run and key > previous + 1:
            yield seek_to, run
            run = set()
        if not run:
            seek_to = timeline.keys[key][1] if timeline.keys else pts
        run.add(pts)
        previous = key
    if run:
        yield seek_to, run


def _decode_run(container: Any, stream: Any, seek_to: int, wanted: set[int]) -> Iterator[Any]:
    """Frames with the ``wanted`` times, decoding from one point on and no further than needed."""
    codec = stream.codec_context
    skippable = codec.codec.canonical_name in _SKIPPABLE
    container.seek(seek_to, stream=stream)
    missing = set(wanted)
    for packet in container.demux(stream):
        if skippable:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        for frame in codec.decode(packet if packet.size else None):
            if frame.pts in wanted and not frame.is_corrupt:
                yield frame
        missing.discard(packet.pts)
        if not missing or not packet.size:
            if packet.size:
                yield from (f for f in codec.decode(None) if f.pts in wanted and not f.is_corrupt)
            break
    codec.flush_buffers()


def _decode_linear(timeline: Timeline, path: str | Path, indices: Collection[int]) -> Iterator[tuple[int, Any]]:
    """The reference: decode from the beginning, leave nothing out."""
    if timeline.decoded:
        yield from ((index, timeline.decoded[index]) for index in sorted(indices))
        return
    number = {pts: index for index, pts in enumerate(timeline.pts)}
    wanted = set(indices)
    with open_video(path) as (container, stream):
        for count, frame in enumerate(container.decode(stream)):
            index = number.get(frame.pts) if timeline.exact else count
            if index in wanted and not frame.is_corrupt:
                yield index, frame


def _fitter(stream: Any, size: Size | None) -> Callable[..., np.ndarray]:
    """A function from a decoded frame to an RGB ``HWC`` array of ``size``, upright, and into ``out_HWC`` if given."""
    reformatter = VideoReformatter()

    def fit(frame: Any, out_HWC: np.ndarray | None = None) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        width, height = max(1, round(frame.width * pixel_aspect(stream))), frame.height
        if size is None:
            (scaled_width, scaled_height), (rows, columns), top, left = (
                (frame.width, height),
                (height, frame.width),
                0,
                0,
            )
        else:
            # In the stored orientation, so that the crop comes before the turn.
            rows, columns = size if turns % 2 == 0 else size[::-1]
            scaled_width, scaled_height, left, top = cover(width, height, (rows, columns))
        if scaled_width * scaled_height > MAX_PIXELS:
            raise ClipError(
                "decode",
                "absurd_dimensions",
                f"{width}x{height} pixels would become {scaled_width}x{scaled_height} to cover the target size",
            )
        box = slice(top, top + rows), slice(left, left + columns)
        if (scaled_width, scaled_height) == (frame.width, frame.height):
            # Without scaling, swscale leaves the last columns of planes unwritten where the width is no multiple of 16.
            rgb = reformatter.reformat(frame, format="rgb24", interpolation=_SCALING, threads=1)
            plane = rgb.planes[0]
            lines = np.frombuffer(memoryview(plane), np.uint8).reshape(scaled_height, plane.line_size)
            cut_HWC = lines[:, : 3 * scaled_width].reshape(scaled_height, scaled_width, 3)[box]
            rgb_HWC = np.ascontiguousarray(cut_HWC)
            if out_HWC is not None and not turns:
                out_HWC[:] = rgb_HWC
        else:
            # In planes, because swscale has vector code for that and not for interleaved RGB: 2.4 times as fast.
            gbr = reformatter.reformat(
                frame, scaled_width, scaled_height, format="gbrp", interpolation=_SCALING, threads=1
            )
            green, blue, red = (
                np.frombuffer(memoryview(plane), np.uint8).reshape(scaled_height, plane.line_size)[box]
                for plane in gbr.planes
            )
            rgb_HWC = cv2.merge([red, green, blue], None if turns else out_HWC)
        if turns:
            rgb_HWC = np.rot90(rgb_HWC, turns)
            if out_HWC is not None:
                out_HWC[:] = rgb_HWC
        return rgb_HWC

    return fit


def _decord(path: str | Path, indices: Sequence[int], size: Size | None) -> dict[int, np.ndarray]:
    import decord

    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if size is not None:
            height, width = reader[0].shape[:2]
            scaled_width, scaled_height, left, top = cover(width, height, size)
            reader = decord.VideoReader(
                str(path), ctx=decord.cpu(0), num_threads=1, width=scaled_width, height=scaled_height
            )
        frames_FHWC = reader.get_batch(list(indices)).asnumpy()
    except (decord.DECORDError, IndexError) as error:
        raise ClipError("decode", "unreadable", f"decord: {str(error).splitlines()[-1]}") from error
    if size is not None:
        frames_FHWC = frames_FHWC[:, top : top + size[0], left : left + size[1]]
    return dict(zip(indices, frames_FHWC, strict=True))
