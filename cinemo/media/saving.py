"""Animations as files: an mp4 or the latents, each with the settings it was made from."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cinemo import storage
from cinemo.media.mp4 import write_video
from cinemo.types import Animation, Sampled


def save_animation(path: str | Path, animation: Animation) -> None:
    """Write an mp4 (local or s3://) whose metadata hold the settings: each by its name, all as JSON in ``comment``."""
    save_frames(path, [animation.frames_FHWC], animation)


def save_frames(path: str | Path, pieces: Iterable[np.ndarray], sampled: Sampled) -> None:
    """The same with frames (F, H, W, 3) that come a few at a time, of which no more are held."""
    metadata = {key: _text(value) for key, value in sampled.settings.items()}
    metadata["comment"] = json.dumps(dict(sampled.settings), sort_keys=True)
    metadata["title"] = str(sampled.settings.get("prompt", ""))
    if not storage.is_remote(str(path)):
        write_video(storage.local_path(str(path)), pieces, sampled.fps, metadata)
        return
    with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
        write_video(Path(scratch) / "video.mp4", pieces, sampled.fps, metadata)
        storage.write_bytes(str(path), (Path(scratch) / "video.mp4").read_bytes())


def save_latents(path: str | Path, sampled: Sampled) -> None:
    """Write ``latents`` (C, F, h, w) float32 and ``settings`` (JSON text) as .npz, atomically."""
    buffer = io.BytesIO()
    settings = np.array(json.dumps(dict(sampled.settings), sort_keys=True))
    np.savez(buffer, latents=sampled.latents_CFHW.numpy(), settings=settings)
    storage.write_bytes(str(path), buffer.getvalue())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
