"""How large a clip's picture is and how many frames it has, without decoding more than one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cinemo.media.fitting import orientation
from cinemo.media.timeline import Tally, decode_all, displayed_size, open_video, read_timeline
from cinemo.media.video import usable
from cinemo.types import Clip, ClipError

Extent = tuple[int, int, int]
"""Width and height as a player shows it, frames between start and end."""


def clip_extents(path: Path, clips: Sequence[Clip]) -> list[Extent]:
    """Of several clips of one local file. Its packets are read; a picture says whether a player turns it.

    Raises:
        ClipError: the file is no video that can be used.
    """
    with open_video(path) as (container, stream):
        timeline = read_timeline(container, stream, path)
        ranges = [usable(clip, timeline, stream) for clip in clips]
        size = displayed_size(stream)[::-1]
    with open_video(path) as (container, stream):
        first = next(decode_all(container, stream, Tally()), None)
    if first is None:
        raise ClipError("decode", "no_frames", f"{path}: no picture of its video stream can be decoded")
    height, width = orientation(first).turned(size)
    return [(width, height, last - begin) for begin, last in ranges]
