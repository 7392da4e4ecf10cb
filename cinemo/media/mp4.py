"""mp4 files that play everywhere, with the settings they were made from inside."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from cinemo.types import InputError

_BT709 = 1  # ISO/IEC 23091-2 code point for matrix, primaries and transfer
_LIMITED_RANGE = 1
_CONTAINER_TAGS = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder"})


def write_video(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    metadata: Mapping[str, str] | None = None,
    crf: int = 17,
) -> None:
    """Write an H.264 mp4 (yuv420p, BT.709, index first) that plays everywhere. Equal frames give equal bytes.

    Args:
        path: where to write; missing directories are made, and the file appears whole or not at all.
        frames: uint8 RGB (F, H, W, 3), even height and width; or such arrays, one after the other.
        fps: frames per second, above 0.
        metadata: free keys and values, kept in the container (`read_metadata`, ``ffprobe -show_format``).
        crf: x264's constant quality, 0 (lossless) to 51; 17 is visually transparent.
    """
    if not fps > 0:
        raise InputError(f"{path}: fps is {fps}, expected a number above 0")
    path, pieces = Path(path), iter([frames] if isinstance(frames, np.ndarray) else frames)
    first_FHWC = next(pieces, np.empty((0, 0, 0, 3), np.uint8))
    _check(path, first_FHWC, first_FHWC.shape[1:3])
    height, width = first_FHWC.shape[1:3]
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
            for piece_FHWC in itertools.chain([first_FHWC], pieces):
                _check(path, piece_FHWC, (height, width))
                for frame_HWC in piece_FHWC:
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


def _check(path: str | Path, frames_FHWC: np.ndarray, size: tuple[int, ...]) -> None:
    shape, dtype = frames_FHWC.shape, frames_FHWC.dtype
    if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or not len(frames_FHWC):
        raise InputError(f"{path}: got frames {shape} {dtype}, expected uint8 FxHxWx3, F >= 1")
    height, width = shape[1:3]
    if height % 2 or width % 2:
        raise InputError(f"{path}: frames are {width}x{height}, but yuv420p video needs even sides; crop or pad them")
    if (height, width) != size:
        raise InputError(f"{path}: a frame is {width}x{height}, expected {size[1]}x{size[0]} as the ones before it")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The free keys and values of a video file's container (what `write_video` was given)."""
    with av.open(str(path), metadata_errors="ignore") as container:
        return {key: value for key, value in container.metadata.items() if key not in _CONTAINER_TAGS}
