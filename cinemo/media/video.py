"""Video files: what they hold, exact frames at given indices, and writing mp4. The only place that decodes video.

Frame numbers count presented frames from 0: edit lists and reordering are resolved, so frame ``k`` is the k-th picture
a player shows. A file's timeline comes from its packets, not from its header, which lies often enough.
"""

from __future__ import annotations

import bisect
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from cinemo import storage
from cinemo.config import DataConfig
from cinemo.types import Clip, ClipError, Frames, InputError, keyed_seed

EXTENSIONS = frozenset(
    {"avi", "flv", "gif", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv", "y4m"}
)
MAX_SIDE = 16384

# Where a frame that nothing refers to may be left undecoded. Elsewhere frames went missing (AV1) or nothing was won.
_SKIPPABLE = frozenset({"h264", "hevc"})
# Averages when shrinking, linear when enlarging; without full chroma, colours of even widths come out 2.4 too dark.
_SCALING = Interpolation.AREA | Interpolation.FULL_CHR_H_INT
_BT709 = 1  # ISO/IEC 23091-2 code point for matrix, primaries and transfer
_LIMITED_RANGE = 1
_CONTAINER_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})

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


@dataclass(frozen=True)
class _Timeline:
    """Presentation times of all frames, in stream units; ``exact`` is false where only decoding can count them."""

    pts: list[int]
    frames: int
    exact: bool
    # (pts, timestamp to seek to) of every point where decoding can begin, ascending
    keys: list[tuple[int, int]]


def probe(path: str | Path) -> VideoInfo:
    """Read a file's timeline without decoding (AVI and files without timestamps are decoded once, to count).

    Raises:
        ClipError: the file is missing, is no video, has no frames, or ends early.
    """
    with _open(path) as (container, stream):
        timeline = _timeline(container, stream, path)
        width, height = _displayed(stream)
        fps = _fps(stream)
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
    with _fetched(clip.uri) as path, _open(path) as (container, stream):
        timeline = _timeline(container, stream, path)
        first, last = _usable(clip, timeline, stream)
        views = [draw_view(last - first, data, clip.clip_id, view) for view in range(data.views)]
        views = [(interval, first + start) for interval, start in views]
        indices = {start + k * interval for interval, start in views for k in range(data.frames)}
        if data.decoder == "decord":
            frames = _decord(path, sorted(indices), data.size)
        else:
            frames = _decode(container, stream, timeline, path, indices, data.size)
        fps = _fps(stream)
    return [
        Frames(np.stack([frames[start + k * interval] for k in range(data.frames)]), fps, interval, start)
        for interval, start in views
    ]


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
    with _open(path) as (container, stream):
        timeline = _timeline(container, stream, path)
        outside = [index for index in wanted if not 0 <= index < timeline.frames]
        if outside:
            raise ClipError("decode", "too_few_frames", f"frame {outside[0]} asked, {path} has {timeline.frames}")
        if decoder == "decord":
            frames = _decord(path, sorted(set(wanted)), size)
        else:
            frames = _decode(container, stream, timeline, path, set(wanted), size)
    return np.stack([frames[index] for index in wanted])


def write_video(
    path: str | Path,
    frames_FHWC: np.ndarray,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    crf: int = 17,
) -> None:
    """Write an H.264 mp4 (yuv420p, BT.709, index first) that plays everywhere. Equal frames give equal bytes.

    Args:
        path: where to write; missing directories are made, and the file appears whole or not at all.
        frames_FHWC: uint8 RGB, even height and width.
        fps: frames per second, above 0.
        metadata: free keys and values, kept in the container (`read_metadata`, ``ffprobe -show_format``).
        crf: x264's constant quality, 0 (lossless) to 51; 17 is visually transparent.
    """
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3 or frames_FHWC.dtype != np.uint8 or not len(frames_FHWC):
        raise InputError(f"{path}: got frames {frames_FHWC.shape} {frames_FHWC.dtype}, expected uint8 FxHxWx3, F >= 1")
    height, width = frames_FHWC.shape[1:3]
    if height % 2 or width % 2:
        raise InputError(f"{path}: frames are {width}x{height}, yuv420p video needs even sides; crop or pad them")
    if not fps > 0:
        raise InputError(f"{path}: fps is {fps}, expected a number above 0")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    try:
        with av.open(temporary, "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as container:
            container.metadata.update(metadata or {})
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(60000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            # Without macroblock trees, whose vector code made unequal files of equal frames.
            stream.options = {"crf": str(crf), "preset": "medium", "mbtree": "0"}
            codec = stream.codec_context
            # Tagged, because players guess BT.601 or BT.709 by size and a guess shifts colours.
            codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
            codec.color_range = _LIMITED_RANGE
            for frame_HWC in frames_FHWC:
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
                yuv = rgb.reformat(
                    format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", interpolation="BICUBIC"
                )
                container.mux(stream.encode(yuv))
            container.mux(stream.encode(None))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free keys and values of a video file's container (what `write_video` was given)."""
    with av.open(str(path), metadata_errors="ignore") as container:
        return {key: value for key, value in container.metadata.items() if key not in _CONTAINER_TAGS}


@contextmanager
def _fetched(uri: str) -> Iterator[Path]:
    """A local file for a clip's uri; nothing there is the clip's fault, not the job's."""
    try:
        with storage.local_copy(uri) as path:
            try:
                yield path
            except ClipError as error:
                # Equal runs write equal ledgers: a fetched copy has another name every time.
                raise ClipError(error.stage, error.reason, error.detail.replace(str(path), uri)) from error
    except FileNotFoundError:
        raise ClipError("open", "missing", f"{uri}: no such file") from None
    except storage.AccessDenied as error:
        raise ClipError("open", "denied", str(error)) from None


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its best video stream; every fault of the library becomes a `ClipError`."""
    path = Path(path)
    if not path.is_file():
        raise ClipError("open", "missing", f"{path}: no such file")
    stage = "open"
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or "attached_pic" in str(stream.disposition):
                raise ClipError("open", "no_video", f"{path}: holds no video stream")
            if stream.codec_context is None:
                raise ClipError("open", "unknown_codec", f"{path}: no decoder for its video stream")
            _check_dimensions(stream, path)
            # Many single-threaded workers do more work a core than few with frame threads.
            stream.codec_context.thread_count = 1
            stage = "decode"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        text = str(error).splitlines()[0] if str(error) else ""
        raise ClipError(stage, "unreadable", f"{type(error).__name__}: {text} ({size} bytes)") from error


def _check_dimensions(stream: Any, path: Path) -> None:
    width, height = stream.codec_context.width, stream.codec_context.height
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ClipError(
            "open", "absurd_dimensions", f"{path}: {width}x{height} pixels, expected 1 to {MAX_SIDE} a side"
        )


def _timeline(container: Any, stream: Any, path: str | Path) -> _Timeline:
    """Demux the whole stream (no decoding) into its timeline."""
    pts: list[int | None] = []
    keys: list[tuple[int, int]] = []
    packets = 0
    vp8 = stream.codec_context.codec.canonical_name == "vp8"
    for packet in container.demux(stream):
        if not packet.size:
            continue
        packets += 1
        if packet.is_keyframe and packet.pts is not None:
            keys.append((packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
        # Before an edit list's beginning, or VP8's alternate reference (show_frame bit, RFC 6386 section 9.1).
        hidden = packet.is_discard or (vp8 and not memoryview(packet)[0] & 0x10)
        if not hidden:
            pts.append(packet.pts)
    if packets < stream.frames:
        # A cut file's index still promises all of them, and the demuxer stops without a word.
        raise ClipError("decode", "truncated", f"{packets} of {stream.frames} frames are in the file")
    if not pts:
        raise ClipError("decode", "no_frames", f"{path}: the video stream is empty")
    known = [value for value in pts if value is not None]
    if container.format.name == "avi" or len(set(known)) < len(pts):
        # AVI has no presentation times: counting what the decoder returns is exact, packet numbers are not.
        with _open(path) as (again, fresh):
            return _Timeline([], sum(1 for _ in again.decode(fresh)), False, [])
    return _Timeline(sorted(known), len(known), True, sorted(keys))


def _usable(clip: Clip, timeline: _Timeline, stream: Any) -> tuple[int, int]:
    """The half-open range of frame numbers between a clip's ``start`` and ``end`` seconds."""
    if timeline.exact:
        ticks = float(stream.time_base)
        seconds = [(value - timeline.pts[0]) * ticks for value in timeline.pts]
    else:
        seconds = [number / _fps(stream) for number in range(timeline.frames)]
    slack = 1e-6  # 1.0 s is written as 0.9999999 by some time bases
    first = 0 if clip.start is None else bisect.bisect_left(seconds, clip.start - slack)
    last = timeline.frames if clip.end is None else bisect.bisect_left(seconds, clip.end - slack)
    return first, max(first, last)


def _fps(stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ClipError("open", "no_frame_rate", "the video stream names no frame rate")
    return float(rate)


def _displayed(stream: Any) -> Size:
    """Displayed ``(width, height)`` of an unrotated picture: pixels need not be square."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    return max(1, round(stream.codec_context.width * aspect)), stream.codec_context.height


def _decode(
    container: Any, stream: Any, timeline: _Timeline, path: str | Path, indices: set[int], size: Size | None
) -> dict[int, np.ndarray]:
    """The wanted frames by seeking where timestamps allow it; a linear decode settles whatever is left."""
    fit = _fitter(stream, size)
    frames: dict[int, np.ndarray] = {}
    if timeline.exact:
        number = {timeline.pts[index]: index for index in indices}
        try:
            for seek_to, wanted in _runs(timeline, sorted(number)):
                for frame in _decode_run(container, stream, seek_to, wanted):
                    frames[number[frame.pts]] = fit(frame)
        except av.FFmpegError:
            frames.clear()
    if len(frames) < len(indices):
        frames = _decode_linear(timeline, path, indices, size)
    if len(frames) < len(indices):
        raise ClipError("decode", "truncated", f"{len(frames)} of {len(indices)} wanted frames could be decoded")
    return frames


def _runs(timeline: _Timeline, wanted_pts: Sequence[int]) -> Iterator[tuple[int, set[int]]]:
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


def _decode_linear(
    timeline: _Timeline, path: str | Path, indices: set[int], size: Size | None
) -> dict[int, np.ndarray]:
    """The reference: decode from the beginning, leave nothing out."""
    frames: dict[int, np.ndarray] = {}
    number = {pts: index for index, pts in enumerate(timeline.pts)}
    with _open(path) as (container, stream):
        fit = _fitter(stream, size)
        for count, frame in enumerate(container.decode(stream)):
            index = number.get(frame.pts) if timeline.exact else count
            if index in indices and not frame.is_corrupt:
                frames[index] = fit(frame)
            if len(frames) == len(indices):
                break
    return frames


def _fitter(stream: Any, size: Size | None) -> Callable[[Any], np.ndarray]:
    """A function from a decoded frame to an RGB ``HWC`` array of ``size``, upright."""
    reformatter = VideoReformatter()
    aspect = stream.sample_aspect_ratio or Fraction(1)

    def fit(frame: Any) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4
        width, height = max(1, round(frame.width * aspect)), frame.height
        if size is None:
            scaled, box = (frame.width, frame.height), (0, frame.height, 0, frame.width)
        else:
            # In the stored orientation, so that the crop comes before the turn.
            rows, columns = size if turns % 2 == 0 else size[::-1]
            *scaled_size, left, top = cover(width, height, (rows, columns))
            scaled, box = (scaled_size[0], scaled_size[1]), (top, top + rows, left, left + columns)
        rgb = reformatter.reformat(frame, *scaled, format="rgb24", interpolation=_SCALING, threads=1)
        plane = rgb.planes[0]
        picture = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[
            :, : 3 * plane.width
        ]
        cut = picture.reshape(plane.height, plane.width, 3)[box[0] : box[1], box[2] : box[3]]
        return np.ascontiguousarray(np.rot90(cut, turns))

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
