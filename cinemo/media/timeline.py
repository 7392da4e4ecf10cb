"""An open video file and the presentation times of its frames.

A timeline comes from a file's packets, not from its header, which lies often enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from cinemo.types import ClipError

MAX_SIDE = 16384
MAX_PIXELS = 8192 * 4352  # level 6.2 of H.264, HEVC and AV1; a file that claims more would only fill the memory

# An mp4's header says all we ask; FFmpeg would decode seven frames more to guess a delay that "strict" settles.
_HEADER_ONLY = {"skip_frame": "all", "probesize": "32", "analyzeduration": "1"}
_KEPT_BYTES = 128 << 20  # of frames that had to be decoded to be counted


@dataclass(frozen=True)
class Timeline:
    """Presentation times of all frames, in stream units; ``exact`` is false where only decoding can count them."""

    pts: list[int]
    frames: int
    exact: bool
    # (pts, timestamp to seek to) of every point where decoding can begin, ascending
    keys: list[tuple[int, int]]
    # all frames, where counting them meant decoding them and they are few
    decoded: list[Any] = field(default_factory=list)


@contextmanager
def open_video(path: str | Path, header_only: bool = False) -> Iterator[tuple[Any, Any]]:
    """An open container and its best video stream; every fault of the library becomes a `ClipError`.

    Args:
        header_only: do not decode to learn more than an mp4's header says (the pixel format, an aspect that it omits).
    """
    path = Path(path)
    if not path.is_file():
        raise ClipError("open", "missing", f"{path}: no such file")
    stage = "open"
    try:
        with _container(path, header_only) as container:
            stream = container.streams.best("video")
            if stream is None or "attached_pic" in str(stream.disposition):
                raise ClipError("open", "no_video", f"{path}: holds no video stream")
            codec = stream.codec_context
            if codec is None:
                raise ClipError("open", "unknown_codec", f"{path}: no decoder for its video stream")
            width, height = codec.width, codec.height
            if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
                limit = f"expected 1 to {MAX_SIDE} per side and at most {MAX_PIXELS} in all"
                raise ClipError("open", "absurd_dimensions", f"{path}: {width}x{height} pixels, {limit}")
            # Many single-threaded workers do more work a core than few with frame threads.
            codec.thread_count = 1
            # The bound also for what the stream itself says later on.
            codec.options = {"max_pixels": str(MAX_PIXELS)}
            if codec.codec.canonical_name == "h264":
                # Pictures come out in the order of the standard's buffer, not of a guess that drops what comes late.
                codec.options = {**codec.options, "strict": "1"}
            stage = "decode"
            yield container, stream
    except MemoryError as error:
        raise ClipError(stage, "out_of_memory", f"{path}: {type(error).__name__}") from error
    except (av.FFmpegError, OSError) as error:
        size = path.stat().st_size if path.is_file() else 0
        text = str(error).splitlines()[0] if str(error) else ""
        raise ClipError(stage, "unreadable", f"{type(error).__name__}: {text} ({size} bytes)") from error


def _container(path: Path, header_only: bool) -> Any:
    if header_only:
        with path.open("rb") as file:
            header_only = file.read(8)[4:] == b"ftyp"
    if header_only:
        container = av.open(str(path), options=_HEADER_ONLY, metadata_errors="ignore")
        videos = container.streams.video
        # Which of several is best takes a longer look.
        if len(videos) == 1 and videos[0].codec_context and videos[0].codec_context.width and videos[0].average_rate:
            return container
        container.close()
    return av.open(str(path), metadata_errors="ignore")


def read_timeline(container: Any, stream: Any, path: str | Path) -> Timeline:
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
        raise ClipError("decode", "truncated", f"only {packets} of {stream.frames} frames are in the file")
    if not pts:
        raise ClipError("decode", "no_frames", f"{path}: the video stream is empty")
    known = [value for value in pts if value is not None]
    if container.format.name == "avi" or len(set(known)) < len(pts):
        return _counted(path)
    return Timeline(sorted(known), len(known), True, sorted(keys))


def _counted(path: str | Path) -> Timeline:
    """AVI has no presentation times: counting what the decoder returns is exact, packet numbers are not."""
    with open_video(path) as (container, stream):
        room = _KEPT_BYTES // (2 * stream.codec_context.width * stream.codec_context.height)
        count, kept = 0, []
        for count, frame in enumerate(container.decode(stream), 1):
            if count <= room:
                kept.append(frame)
        return Timeline([], count, False, [], kept if count <= room else [])


def frame_rate(stream: Any) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ClipError("open", "no_frame_rate", "the video stream states no frame rate")
    return float(rate)


def displayed_size(stream: Any) -> tuple[int, int]:
    """Displayed ``(width, height)`` of an unrotated picture: pixels need not be square."""
    return max(1, round(stream.codec_context.width * pixel_aspect(stream))), stream.codec_context.height


def pixel_aspect(stream: Any) -> Fraction:
    """Width of a pixel by its height: the container's word before the codec's."""
    return stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
