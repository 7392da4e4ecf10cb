"""Animated GIFs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from PIL import Image

_TICK = 10  # milliseconds: in whole numbers of these a GIF says how long a picture is shown
_SAMPLES = 4  # pictures from which all get their colours


def write_gif(target: str | Path | BinaryIO, pictures: Sequence[Image.Image], fps: float) -> None:
    """Write RGB pictures of one size as a GIF that plays for ever, all of them with one palette.

    Args:
        fps: pictures a second, at most 50, above which viewers play slowly. No rounding adds up: n pictures last
            ``n / fps`` seconds to within 10 ms.
    """
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width, height * _SAMPLES))
    for place in range(_SAMPLES):
        sheet.paste(pictures[round(place * (len(pictures) - 1) / (_SAMPLES - 1))], (0, height * place))
    palette = sheet.quantize(255)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
    ends = [round(1000 / fps / _TICK * shown) * _TICK for shown in range(len(frames) + 1)]
    duration = [end - start for start, end in pairwise(ends)]
    frames[0].save(target, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
