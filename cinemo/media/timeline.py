"""An open video file and the frames that a player shows of it.

A timeline comes from a file's packets, not from its header, which lies often enough. Where packets do not say either
which frames are shown, and in which order, all of them are decoded and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from cinemo.media.bitstream import decoding_begins, is_bidirectional, is_empty, is_hidden, may_hide
from cinemo.media.faults import missing_bytes, opening_fault
from cinemo.types import ClipError

MAX_SIDE = 16384
MAX_PIXELS = 8192 * 4352  # level 6.2 of H.264, HEVC and AV1; a file that claims more would only fill the memory

# AVI's times are those of decoding; a program stream's are guessed for most packets, otherwise after a seek.
_TIMELESS = ("avi", "mpeg")
_MAX_DELAY = 16  # pictures that a decoder may hold back to put them in order (H.264 and HEVC)

# An mp4's header says all we ask; FFmpeg would decode seven frames more to guess a delay that "strict" settles.
_HEADER_ONLY = {"skip_frame": "all", "probesize": "32", "analyzeduration": "1"}
_KEPT_BYTES = 128 << 20  # of frames that had to be decoded to be counted


@dataclass(frozen=True)
class Timeline:
    """The frames that a player shows, in order.

    Args:
        frames: how many there are.
        pts: presentation time of each in stream units, ascending; empty where only counting tells frames apart.
        keys: (pts, timestamp to seek to) of every point where decoding can begin, ascending.
        seconds: when each is shown, from the first one on; empty where that is not known.
        plain: every packet is a frame, and all that is decoded from a keyframe on can be shown; which simpler readers
            take for granted.
        rate: frames a second, where the header's word is known to be wrong.
        corrupt: "corrupt packets N of M" of a file that was decoded to count its frames and has some.
        decoded: all frames, where counting them meant decoding them and they are few.
    """

    frames: int
    pts: list[int] = field(default_factory=list)
    keys: list[tuple[int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    plain: bool = False
    rate: float | None = None
    corrupt: str | None = None
    decoded: list[Any] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether a frame is known by its time, so that decoding may begin anywhere."""
        return bool(self.pts)


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
        known = opening_fault(path) if stage == "open" and path.is_file() else None
        text = str(error).splitlines()[0] if str(error) else ""
        raise ClipError(stage, "unreadable", known or f"{type(error).__name__}: {text} ({size} bytes)") from error


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
    """Demux the whole stream into its timeline; decode only where packets do not say which frames are shown."""
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
    hides = may_hide(codec, extradata)
    shown: list[int | None] = []
    keys: list[tuple[int, int]] = []
    packets = 0
    latest = last_dts = None
    restarts = reorders = waits = has_empty = has_late_b = begins_late = opens = False
    for packet in container.demux(stream):
        if not packet.size:
            continue
        pts, dts, is_key = packet.pts, packet.dts, packet.is_keyframe
        packets += 1
        if is_key:
            opens |= not decoding_begins(codec, memoryview(packet), extradata)
            if pts is not None:
                keys.append((pts, pts if dts is None else min(pts, dts)))
        if packets == 1:
            begins_late = opens or not is_key
        if dts is not None:
            restarts |= last_dts is not None and dts < last_dts
            last_dts = dts
        if pts is not None:
            waits |= dts is not None and pts > dts
            if latest is not None and pts < latest:
                reorders = True
                restarts |= is_key  # nothing decoded before it may be shown after it
                opens |= bool(keys) and pts < keys[-1][0]
            else:
                latest = pts
                has_late_b = has_late_b or is_bidirectional(codec, memoryview(packet), extradata)
        if hides:
            data = memoryview(packet)
            has_empty |= is_empty(codec, data)
            if is_hidden(codec, data, extradata):
                continue
        if not packet.is_discard:  # outside of an edit list
            shown.append(pts)
    lacking = missing_bytes(Path(path), container.format.name, stream)
    if lacking:
        raise ClipError("decode", "truncated", lacking)
    if not shown:
        raise ClipError("decode", "no_frames", f"{path}: the video stream is empty")
    times = {time for time in shown if time is not None}
    if (
        container.format.name in _TIMELESS
        or has_late_b  # as from an AVI into another container, or where a join was mended
        or (waits and not reorders)
        or restarts
        or has_empty
        or len(times) < len(shown)
    ):
        return count_frames(path)
    plain = len(shown) == packets and not opens
    if begins_late or not keys or min(times) < keys[0][0]:
        # Cut between keyframes: which pictures can be shown before the second one, decoding must tell.
        first, until = _shown_first(path)
        if not first:
            raise ClipError("decode", "no_frames", f"{path}: no picture of its video stream can be decoded")
        times = {time for time in times if time >= until} | first
        plain = False
    ordered = sorted(times)
    return Timeline(len(ordered), ordered, sorted(keys), _seconds(ordered, stream), plain)


def _shown_first(path: str | Path) -> tuple[set[int], float]:
    """(times, until): the frames that decoding shows before a second keyframe, whose time is ``until``."""
    times: set[int] = set()
    with open_video(path) as (container, stream):
        for frame in decode_all(container, stream, Tally()):
            if frame.key_frame and times:
                return times, frame.pts
            times.add(frame.pts)
    return times, math.inf


def count_frames(path: str | Path) -> Timeline:
    """The timeline of a file whose packets do not tell which frames are shown, from decoding all of it."""
    tally = Tally()
    with open_video(path) as (container, stream):
        room = _KEPT_BYTES // (2 * stream.codec_context.width * stream.codec_context.height)
        times: list[int | None] = []
        kept: list[Any] = []
        for frame in decode_all(container, stream, tally):
            times.append(frame.pts)
            if len(times) <= room:
                kept.append(frame)
        if not times:
            raise ClipError("decode", "no_frames", f"{path}: no picture of its video stream can be decoded")
        known = [time for time in times if time is not None]
        ordered = sorted(known)
        # Times that begin again, or are missing, say nothing about when a frame is shown.
        moved = np.abs(np.argsort(known, kind="stable") - np.arange(len(known)))
        timed = len(known) == len(times) and moved.max() <= _MAX_DELAY
        rate = None
        if timed and container.format.name == "avi" and len(times) > 1 and stream.frames > len(times):
            step = float(np.median(np.diff(ordered)))  # of the header's frames, which may be fields or repeats
            rate = 1 / (step * float(stream.time_base)) if step > 1 else None
        return Timeline(
            frames=len(times),
            seconds=_seconds(ordered, stream) if timed else [],
            rate=rate,
            corrupt=f"corrupt packets {len(tally.corrupt)} of {tally.packets}" if tally.corrupt else None,
            decoded=kept if len(times) <= room else [],
        )


@dataclass
class Tally:
    """What `decode_all` met: how many packets, and the numbers of those that gave no picture or a spoilt one."""

    packets: int = 0
    corrupt: set[int] = field(default_factory=set)


def decode_all(container: Any, stream: Any, tally: Tally) -> Iterator[Any]:
    """Every frame that a player shows, from the beginning on. What cannot be decoded is passed over, as players do."""
    begun = False
    for packet in container.demux(stream):
        tally.packets += bool(packet.size)
        try:
            frames = stream.codec_context.decode(packet if packet.size else None)
        except av.InvalidDataError:
            if begun:  # pictures before the first keyframe are no loss
                tally.corrupt.add(tally.packets)
            continue
        for frame in frames:
            begun = True
            if frame.is_corrupt:
                tally.corrupt.add(tally.packets)
            yield frame


def _seconds(ordered: list[int], stream: Any) -> list[float]:
    ticks = float(stream.time_base)
    return [(time - ordered[0]) * ticks for time in ordered]


def frame_rate(stream: Any, timeline: Timeline) -> float:
    rate = timeline.rate or stream.average_rate or stream.guessed_rate
    if not rate:
        raise ClipError("open", "no_frame_rate", "the video stream states no frame rate")
    return float(rate)


def displayed_size(stream: Any) -> tuple[int, int]:
    """Displayed ``(width, height)`` of an unrotated picture: pixels need not be square."""
    return max(1, round(stream.codec_context.width * pixel_aspect(stream))), stream.codec_context.height


def pixel_aspect(stream: Any) -> Fraction:
    """Width of a pixel by its height: the container's word before the codec's."""
    return stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
