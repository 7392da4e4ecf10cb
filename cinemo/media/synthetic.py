"""Rendered sample clips: captioned H.264 files whose true motion is known and written beside them.

Six kinds: an object moving in a named direction at a named speed, a camera pan, a zoom, a flowing texture, flickering
light, and nearly nothing. Velocities are in pixels per frame at the rendered size, x to the right and y down.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cinemo import storage
from cinemo.media.mp4 import write_video
from cinemo.types import keyed_seed

Canvas = np.ndarray  # HWC float32 in 0..1, periodic in both axes
Painter = Callable[[np.random.Generator, tuple[int, int], int], tuple[np.ndarray, str, dict[str, Any]]]

DIRECTIONS = {
    "to the right": (1.0, 0.0),
    "to the left": (-1.0, 0.0),
    "down": (0.0, 1.0),
    "up": (0.0, -1.0),
    "up and to the right": (0.7071, -0.7071),
    "up and to the left": (-0.7071, -0.7071),
    "down and to the right": (0.7071, 0.7071),
    "down and to the left": (-0.7071, 0.7071),
}
# Shares of the frame's height that pass per frame; wide enough apart that the words mean something.
SPEEDS = {"slowly": (0.0012, 0.0025), "steadily": (0.004, 0.007), "quickly": (0.011, 0.018)}
COLOURS = {
    "red": (0.86, 0.16, 0.14),
    "orange": (0.95, 0.55, 0.12),
    "yellow": (0.95, 0.85, 0.20),
    "green": (0.20, 0.65, 0.25),
    "blue": (0.15, 0.35, 0.85),
    "purple": (0.52, 0.25, 0.72),
    "white": (0.94, 0.94, 0.92),
    "black": (0.07, 0.07, 0.09),
}
SHAPES = ("ball", "square", "triangle", "star", "diamond")
# Two palette ends each: shadow and light.
SCENES = {
    "green hills": ((0.10, 0.22, 0.08), (0.62, 0.75, 0.40)),
    "a sandy desert": ((0.45, 0.30, 0.16), (0.93, 0.82, 0.60)),
    "a cloudy sky": ((0.30, 0.47, 0.72), (0.95, 0.96, 0.98)),
    "grey rocks": ((0.14, 0.14, 0.16), (0.70, 0.69, 0.66)),
    "an autumn forest": ((0.16, 0.09, 0.05), (0.85, 0.52, 0.18)),
    "a night city": ((0.03, 0.03, 0.10), (0.75, 0.60, 0.35)),
    "fresh snow": ((0.55, 0.62, 0.74), (0.98, 0.98, 1.00)),
    "a brick wall": ((0.28, 0.10, 0.07), (0.74, 0.42, 0.32)),
}
FLUIDS = {
    "water": ((0.02, 0.16, 0.30), (0.45, 0.75, 0.85)),
    "lava": ((0.20, 0.02, 0.00), (1.00, 0.65, 0.10)),
    "smoke": ((0.10, 0.10, 0.11), (0.80, 0.80, 0.82)),
    "tall grass": ((0.08, 0.18, 0.03), (0.65, 0.80, 0.30)),
}


@dataclass(frozen=True)
class SyntheticClip:
    """``frames_FHWC``: uint8 RGB. ``motion``: kind and true velocities, JSON-ready."""

    frames_FHWC: np.ndarray
    caption: str
    motion: dict[str, Any]


def render_clip(
    seed: int, index: int, size: tuple[int, int] = (96, 144), frames: int = 160, fps: float = 24
) -> SyntheticClip:
    """Clip number ``index``; the same arguments give the same pixels. ``size`` is (height, width)."""
    rng = np.random.default_rng(keyed_seed(seed, "synthetic", index))
    kind = clip_kind(index)
    frames_FHWC, caption, motion = PAINTERS[kind](rng, size, frames)
    return SyntheticClip(frames_FHWC, caption, {"kind": kind, "fps": fps, **motion})


def clip_kind(index: int) -> str:
    """The kind of clip number ``index``: two of twelve hardly move, so that a set has something to learn."""
    return _ROUND[index % len(_ROUND)]


def render_clips(
    directory: Path, count: int, seed: int = 0, size: tuple[int, int] = (96, 144), frames: int = 160, fps: float = 24
) -> Path:
    """Write ``count`` clips as KEY.mp4 with KEY.motion.json, and a ``manifest.jsonl`` (last); returns its path.

    The pixels handed to the encoder are the same every time; x264's own bytes may differ in a few bits.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        key = f"clip-{seed}-{index:05d}"
        clip = render_clip(seed, index, size, frames, fps)
        write_video(directory / f"{key}.mp4", clip.frames_FHWC, fps)
        storage.write_json(str(directory / f"{key}.motion.json"), clip.motion | {"caption": clip.caption})
        rows.append(json.dumps({"clip_id": key, "uri": f"{key}.mp4", "caption": clip.caption}))
    manifest = directory / "manifest.jsonl"
    storage.write_bytes(str(manifest), ("\n".join(rows) + "\n").encode())
    return manifest


# --- the six kinds -------------------------------------------------------------------------------------------------


def _object(rng: np.random.Generator, size: tuple[int, int], frames: int) -> tuple[np.ndarray, str, dict[str, Any]]:
    height, width = size
    scene, canvas = _scene(rng, size)
    backdrop = _view(canvas, size, 0, 0)
    shape, colour = _pick(rng, SHAPES), _pick(rng, COLOURS)
    direction, speed, velocity = _velocity(rng, height)
    radius = height * rng.uniform(0.15, 0.30)
    # It leaves on one side and comes back on the other, so that the direction holds for the whole clip.
    period = np.array([width + 2.5 * radius, height + 2.5 * radius])
    start = np.array([width, height]) * rng.uniform(0.25, 0.75, 2)
    paint = _textured(rng, COLOURS[colour], size)
    made = np.empty((frames, height, width, 3), np.uint8)
    for index in range(frames):
        centre = (start + index * np.array(velocity) + 1.25 * radius) % period - 1.25 * radius
        mask = _mask(shape, centre, radius, size)[..., None]
        # The paint travels with the object.
        shift = centre - start
        made[index] = _to_uint8(backdrop * (1 - mask) + _view(paint, size, -shift[0], -shift[1]) * mask)
    verb = _pick(rng, ("moves", "flies", "glides"))
    caption = f"a {colour} {shape} {verb} {speed} {direction} over {scene}"
    return made, caption, {"object_px_per_frame": velocity, "direction": direction, "speed": speed, "shape": shape}


def _pan(rng: np.random.Generator, size: tuple[int, int], frames: int) -> tuple[np.ndarray, str, dict[str, Any]]:
    scene, canvas = _scene(rng, size)
    direction, speed, velocity = _velocity(rng, size[0])
    made = np.stack([_to_uint8(_view(canvas, size, k * velocity[0], k * velocity[1])) for k in range(frames)])
    caption = f"the camera {_pick(rng, ('pans', 'moves'))} {speed} {direction} across {scene}"
    content = [-velocity[0], -velocity[1]]
    motion = {"camera_px_per_frame": velocity, "content_px_per_frame": content, "direction": direction, "speed": speed}
    return made, caption, motion


def _zoom(rng: np.random.Generator, size: tuple[int, int], frames: int) -> tuple[np.ndarray, str, dict[str, Any]]:
    scene, canvas = _scene(rng, size)
    speed = _pick(rng, tuple(SPEEDS))
    way = _pick(rng, ("in", "out"))
    per_frame = float(rng.uniform(*SPEEDS[speed])) * (0.6 if way == "in" else -0.6)
    # Centred in time, so that neither end is far from the canvas's own resolution.
    scales = np.exp(per_frame * (np.arange(frames) - frames / 2))
    made = np.stack([_to_uint8(_view(canvas, size, 0, 0, float(scale))) for scale in scales])
    return made, f"the camera zooms {way} {speed} on {scene}", {"zoom_per_frame": per_frame, "speed": speed}


def _flow(rng: np.random.Generator, size: tuple[int, int], frames: int) -> tuple[np.ndarray, str, dict[str, Any]]:
    height, width = size
    fluid = _pick(rng, FLUIDS)
    direction, speed, velocity = _velocity(rng, height)
    layers = [_noise(rng, size, slope) for slope in (1.6, 1.2)]
    low, high = (np.array(end, np.float32) for end in FLUIDS[fluid])
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    made = np.empty((frames, height, width, 3), np.uint8)
    waves = rng.uniform(0, 2 * np.pi, 2)
    for k in range(frames):
        swell_x = height * 0.02 * np.sin(rows / height * 9 + k * 0.11 + waves[0])
        swell_y = height * 0.02 * np.sin(columns / height * 9 + k * 0.13 + waves[1])
        # Two layers at different pace: the eye sees a surface, not a sliding picture.
        light = sum(
            weight * _warp(layer, columns + swell_x - pace * k * velocity[0], rows + swell_y - pace * k * velocity[1])
            for layer, pace, weight in zip(layers, (1.0, 0.6), (0.6, 0.4), strict=True)
        )
        made[k] = _to_uint8(low + (high - low) * np.clip(light, 0, 1)[..., None])
    caption = f"{fluid} {_pick(rng, ('flows', 'drifts', 'streams'))} {speed} {direction}"
    return made, caption, {"flow_px_per_frame": velocity, "direction": direction, "speed": speed}


def _flicker(rng: np.random.Generator, size: tuple[int, int], frames: int) -> tuple[np.ndarray, str, dict[str, Any]]:
    scene, canvas = _scene(rng, size)
    backdrop = _view(canvas, size, 0, 0)
    strength = float(rng.uniform(0.15, 0.6))
    # Smooth random light: white noise through a short window, so that neighbouring frames differ but do not strobe.
    light = np.convolve(rng.normal(size=frames + 6), np.hanning(7), "valid")
    light = 1 + strength * light / np.abs(light).max()
    made = np.stack([_to_uint8(backdrop * level) for level in light])
    return made, f"{scene} in flickering light", {"brightness": [round(float(level), 4) for level in light]}


def _still(rng: np.random.Generator, size: tuple[int, int], frames: int) -> tuple[np.ndarray, str, dict[str, Any]]:
    scene, canvas = _scene(rng, size)
    drift = float(rng.uniform(0, 0.0002)) * size[0]
    made = np.stack([_to_uint8(_view(canvas, size, k * drift, 0)) for k in range(frames)])
    return made, f"a still view of {scene}, nothing moves", {"camera_px_per_frame": [drift, 0.0]}


PAINTERS: dict[str, Painter] = {
    "object": _object,
    "pan": _pan,
    "zoom": _zoom,
    "flow": _flow,
    "flicker": _flicker,
    "still": _still,
}
_ROUND = (*PAINTERS, "object", "pan", "zoom", "flow", "object", "pan")


# --- what they are painted with ------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: Any) -> str:
    names = tuple(options)
    return str(names[int(rng.integers(len(names)))])


def _velocity(rng: np.random.Generator, height: int) -> tuple[str, str, list[float]]:
    direction, speed = _pick(rng, DIRECTIONS), _pick(rng, SPEEDS)
    pace = float(rng.uniform(*SPEEDS[speed])) * height
    x, y = DIRECTIONS[direction]
    return direction, speed, [round(pace * x, 6), round(pace * y, 6)]


def _noise(rng: np.random.Generator, size: tuple[int, int], slope: float) -> np.ndarray:
    """Periodic 1/f^slope noise in 0..1 of twice the given size: the spectrum of natural images."""
    height, width = 2 * size[0], 2 * size[1]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(height, width))) / np.maximum(frequency, 2) ** slope
    noise = np.fft.irfft2(spectrum, (height, width))
    low, high = np.percentile(noise, (1, 99))
    return np.asarray(np.clip((noise - low) / (high - low), 0, 1), np.float32)


def _scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[str, Canvas]:
    """A named, textured backdrop: palette over 1/f noise, a second noise for colour, and bricks where named so."""
    scene = _pick(rng, SCENES)
    low, high = (np.array(end, np.float32) for end in SCENES[scene])
    light = _noise(rng, size, float(rng.uniform(1.1, 1.6)))
    tint = _noise(rng, size, 1.8)[..., None] - 0.5
    canvas = low + (high - low) * light[..., None]
    canvas += tint * rng.uniform(-0.25, 0.25, 3).astype(np.float32)
    if scene == "a brick wall":
        canvas *= _bricks(canvas.shape[0], canvas.shape[1])[..., None]
    return scene, np.clip(canvas, 0, 1).astype(np.float32)


def _bricks(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    course, brick = max(height // 16, 4), max(width // 12, 6)
    shifted = columns + (rows // course % 2) * (brick // 2)
    mortar = (rows % course < max(course // 6, 1)) | (shifted % brick < max(brick // 10, 1))
    return np.where(mortar, 1.25, 1.0).astype(np.float32)


def _textured(rng: np.random.Generator, colour: tuple[float, float, float], size: tuple[int, int]) -> Canvas:
    return np.asarray(np.clip(np.array(colour) * (0.7 + 0.6 * _noise(rng, size, 1.3)[..., None]), 0, 1), np.float32)


def _view(canvas: Canvas, size: tuple[int, int], x: float, y: float, scale: float = 1.0) -> np.ndarray:
    """The periodic canvas seen through a window of ``size`` at (x, y), magnified ``scale`` times about its centre."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    columns = (columns - width / 2) / scale + width / 2 + x
    rows = (rows - height / 2) / scale + height / 2 + y
    return _warp(canvas, columns, rows)


def _warp(canvas: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    # One extra period's edge, so that interpolation across the seam sees its true neighbours.
    padded = np.pad(canvas, ((2, 2), (2, 2), *(((0, 0),) if canvas.ndim == 3 else ())), mode="wrap")
    x = (columns % width + 2).astype(np.float32)
    y = (rows % height + 2).astype(np.float32)
    return np.asarray(cv2.remap(padded, x, y, cv2.INTER_LINEAR))


def _mask(shape: str, centre: np.ndarray, radius: float, size: tuple[int, int]) -> np.ndarray:
    """Anti-aliased coverage in 0..1, placed to a sixteenth of a pixel."""
    mask = np.zeros(size, np.uint8)
    fixed = 16
    if shape == "ball":
        point = tuple(int(v) for v in np.round(centre * fixed))
        cv2.circle(mask, (point[0], point[1]), round(radius * fixed), 255, -1, cv2.LINE_AA, 4)
    else:
        corners = {"square": 4, "triangle": 3, "star": 10, "diamond": 4}[shape]
        turn = {"square": np.pi / 4, "triangle": -np.pi / 2, "star": -np.pi / 2, "diamond": 0.0}[shape]
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        reach = radius * (np.where(np.arange(corners) % 2, 0.45, 1.0) if shape == "star" else np.ones(corners))
        points = centre + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(mask, [np.round(points * fixed).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return np.asarray(mask, np.float32) / 255


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.asarray(np.round(np.clip(image, 0, 1) * 255), np.uint8)
