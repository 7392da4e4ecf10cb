"""Animations as files: an mp4 or the latents, each with the settings it was made from."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cinemo import storage
from cinemo.media.mp4 import write_video
from cinemo.types import Animation


def save_animation(path: str | Path, animation: Animation) -> None:
    """Write an mp4 (local or s3://) whose metadata hold the settings: each by its name, all as JSON in ``comment``."""
    metadata = {key: _text(value) for key, value in animation.settings.items()}
    metadata["comment"] = json.dumps(dict(animation.settings), sort_keys=True)
    metadata["title"] = str(animation.settings.get("prompt", ""))
    if not storage.is_remote(str(path)):
        write_video(storage.local_path(str(path)), animation.frames_FHWC, animation.fps, metadata)
        return
    with tempfile.TemporaryDirectory(prefix="cinemo-") as scratch:
        write_video(Path(scratch) / "video.mp4", animation.frames_FHWC, animation.fps, metadata)
        storage.write_bytes(str(path), (Path(scratch) / "video.mp4").read_bytes())


def save_latents(path: str | Path, animation: Animation) -> None:
    """Write ``latents`` (C, F, h, w) float32 and ``settings`` (JSON text) as .npz, atomically."""
    buffer = io.BytesIO()
    settings = np.array(json.dumps(dict(animation.settings), sort_keys=True))
    np.savez(buffer, latents=animation.latents_CFHW.numpy(), settings=settings)
    storage.write_bytes(str(path), buffer.getvalue())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
