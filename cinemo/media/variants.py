"""Small pictures that stand for a video, still or moving."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cinemo.media.gif import write_gif
from cinemo.media.video import probe, read_frames

COLUMNS = ROWS = 4  # of a sprite sheet
_THUMBNAIL_SIDE, _SPRITE_SIDE, _GIF_SIDE = 512, 256, 480  # pixels of the longer side, at most
_GIF_FRAMES = 64


def thumbnail(path: Path) -> bytes:
    """The frame in the middle of a video, as WebP. Raises `ClipError`: it cannot be read."""
    info = probe(path)
    size = _within(info.height, info.width, _THUMBNAIL_SIDE)
    return _written(read_frames(path, [info.frames // 2], size)[0], "WEBP", quality=85)


def spritesheet(path: Path) -> bytes:
    """At most 16 frames of a video from its first to its last, evenly spread, as JPEG: row by row, `COLUMNS` in each,
    places without a frame black. Raises `ClipError`: it cannot be read."""
    info = probe(path)
    height, width = size = _within(info.height, info.width, _SPRITE_SIDE)
    count = min(info.frames, COLUMNS * ROWS)
    frames = read_frames(path, np.linspace(0, info.frames - 1, count).round().astype(int).tolist(), size)
    rows = -(-count // COLUMNS)
    sheet = np.zeros((rows, COLUMNS, height, width, 3), np.uint8)
    sheet.reshape(-1, height, width, 3)[:count] = frames
    return _written(sheet.swapaxes(1, 2).reshape(rows * height, COLUMNS * width, 3), "JPEG", quality=85)


def gif(path: Path) -> bytes:
    """A video as a GIF: its own frames or, of a longer one, `_GIF_FRAMES` evenly spread over it, in the same time.
    Raises `ClipError`: it cannot be read."""
    info = probe(path)
    count = min(info.frames, _GIF_FRAMES)
    chosen = np.linspace(0, info.frames, count, endpoint=False).astype(int).tolist()
    frames = read_frames(path, chosen, _within(info.height, info.width, _GIF_SIDE))
    buffer = io.BytesIO()
    write_gif(buffer, [Image.fromarray(frame) for frame in frames], info.fps * count / info.frames)
    return buffer.getvalue()


PREVIEWS: dict[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "thumbnail": ("thumbnail.webp", "image/webp", thumbnail),
    "spritesheet": ("spritesheet.jpg", "image/jpeg", spritesheet),
    "gif": ("animation.gif", "image/gif", gif),
}
"""By name: the end of its file's name, its media type, and what makes it."""


def _within(height: int, width: int, side: int) -> tuple[int, int]:
    share = min(1.0, side / max(height, width))
    return max(2, round(height * share)), max(2, round(width * share))


def _written(frame_HWC: np.ndarray, form: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, form, **options)
    return buffer.getvalue()
