"""Rendered sample clips: a small world whose true motion is known, as captioned H.264 files or as bare frames.

Five kinds: a camera pan, a large shape that moves over a standing backdrop, a fluid that flows between standing banks,
a zoom, and nothing. The world is made so that a network of a few million weights can master it:

- Textures are smooth, with structure down to about a quarter of the frame's height, in few palettes.
- A canvas repeats after one frame's width and height: what a pan brings in is what it has taken out, so that a video
  follows from its first frame, its caption and how fast it is.
- Four directions, three words for speed; half of the captions leave the speed to the motion bucket.

Velocities are in pixels per rendered frame at the rendered size, x to the right and y down.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cinemo import storage
from cinemo.media.mp4 import write_video
from cinemo.progress import counted
from cinemo.types import keyed_seed

Canvas = np.ndarray  # HWC float32 in 0..1, periodic in both axes

CLIP_FRAMES, FPS = 160, 24.0
DIRECTIONS = {"to the right": (1.0, 0.0), "to the left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
OPPOSITES = {
    "to the right": "to the left",
    "to the left": "to the right",
    "down": "up",
    "up": "down",
    "in": "out",
    "out": "in",
}
# Shares of the frame's height that pass per frame; wide enough apart that the words mean something. At an interval of
# 10 frames the fastest moves 1.7 of 64 pixels a frame, and a quarter of the frame's width in a video.
SPEEDS = {"slowly": (0.0004, 0.0007), "steadily": (0.0011, 0.0015), "quickly": (0.0021, 0.0026)}
FASTEST = 0.0026
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
SHAPES = ("ball", "square", "triangle", "diamond")
# Two palette ends each: shadow and light.
SCENES = {
    "green hills": ((0.08, 0.26, 0.10), (0.66, 0.80, 0.40)),
    "a sandy desert": ((0.50, 0.28, 0.12), (0.95, 0.84, 0.60)),
    "a cloudy sky": ((0.22, 0.45, 0.78), (0.96, 0.97, 0.99)),
    "grey rocks": ((0.14, 0.14, 0.17), (0.74, 0.72, 0.68)),
    "an autumn forest": ((0.25, 0.10, 0.05), (0.92, 0.58, 0.16)),
    "a night city": ((0.03, 0.03, 0.12), (0.72, 0.50, 0.62)),
}
# Shadow, light, and the banks on either side.
FLUIDS = {
    "water": ((0.02, 0.20, 0.42), (0.60, 0.86, 0.95), (0.45, 0.58, 0.25)),
    "lava": ((0.30, 0.02, 0.00), (1.00, 0.72, 0.12), (0.13, 0.11, 0.12)),
    "smoke": ((0.22, 0.22, 0.24), (0.86, 0.86, 0.88), (0.30, 0.38, 0.55)),
    "tall grass": ((0.06, 0.24, 0.04), (0.72, 0.86, 0.32), (0.55, 0.75, 0.92)),
}


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn: any frame of it, and its truth, at any time.

    Args:
        caption: what is seen and how it moves.
        motion: kind, true velocities and the words for them, JSON-ready.
        draw: frame number (may be fractional) to (H, W, 3) uint8.
        flow: two frame numbers to where each pixel of the first has gone in the second, (H, W, 2) pixels, x then y.
        moving: frame number to the part that moves by itself, (H, W) in 0..1: the shape, the fluid; all for a camera.
        paint, backdrop: of a moving shape, its colour before shading (RGB 0..255) and what is behind it, (H, W, 3)
            uint8.
    """

    caption: str
    motion: dict[str, Any]
    draw: Callable[[float], np.ndarray]
    flow: Callable[[float, float], np.ndarray]
    moving: Callable[[float], np.ndarray]
    paint: tuple[float, float, float] | None = None
    backdrop: np.ndarray | None = None

    def frames(self, times: Iterable[float]) -> np.ndarray:
        """(F, H, W, 3) uint8."""
        return np.stack([self.draw(time) for time in times])

    def opposite(self) -> str:
        """The caption with its direction turned round; that of a still scene as it is."""
        direction = self.motion.get("direction")
        return self.caption if direction is None else turned(self.caption, direction)

    def without_speed(self) -> str:
        """The caption without its word for speed, so that the motion bucket says how fast."""
        return self.caption.replace(f" {self.motion.get('speed')} ", " ")


@dataclass(frozen=True)
class SyntheticClip:
    """``frames_FHWC``: uint8 RGB. ``motion``: kind and true velocities, JSON-ready."""

    frames_FHWC: np.ndarray
    caption: str
    motion: dict[str, Any]


def turned(caption: str, direction: str) -> str:
    """``caption`` with its ``direction`` replaced by the opposite one."""
    before, _, after = f" {caption} ".rpartition(f" {direction} ")
    return f"{before} {OPPOSITES[direction]} {after}".strip()


def render_scene(
    seed: int, index: int, size: tuple[int, int] = (96, 144), frames: int = CLIP_FRAMES, kind: str | None = None
) -> Scene:
    """Scene number ``index``; the same arguments give the same pixels. ``size`` is (height, width).

    ``frames``: how long it is made to last; a shape's way has its middle at half of it. ``kind``: instead of
    `clip_kind`'s.
    """
    kind = kind or clip_kind(index)
    rng = np.random.default_rng(keyed_seed(seed, "synthetic", kind, index))
    return PAINTERS[kind](rng, size, frames)


def render_clip(
    seed: int, index: int, size: tuple[int, int] = (96, 144), frames: int = CLIP_FRAMES, fps: float = FPS
) -> SyntheticClip:
    """Clip number ``index`` of the world, every frame of it."""
    scene = render_scene(seed, index, size, frames)
    return SyntheticClip(scene.frames(range(frames)), scene.caption, scene.motion | {"fps": fps})


def clip_kind(index: int) -> str:
    """The kind of clip number ``index``."""
    return _ROUND[index % len(_ROUND)]


def render_clips(
    directory: Path,
    count: int,
    seed: int = 0,
    size: tuple[int, int] = (96, 144),
    frames: int = CLIP_FRAMES,
    fps: float = FPS,
) -> Path:
    """Write ``count`` clips as KEY.mp4 with KEY.motion.json, and a ``manifest.jsonl`` (last); returns its path.

    The pixels handed to the encoder are the same every time; x264's own bytes may differ in a few bits.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in counted("rendering", range(count), count, "clips"):
        key = f"clip-{seed}-{index:05d}"
        clip = render_clip(seed, index, size, frames, fps)
        write_video(directory / f"{key}.mp4", clip.frames_FHWC, fps)
        storage.write_json(str(directory / f"{key}.motion.json"), clip.motion | {"caption": clip.caption})
        rows.append(json.dumps({"clip_id": key, "uri": f"{key}.mp4", "caption": clip.caption}))
    manifest = directory / "manifest.jsonl"
    storage.write_bytes(str(manifest), ("\n".join(rows) + "\n").encode())
    return manifest


# --- the five kinds ------------------------------------------------------------------------------------------------


def _pan(rng: np.random.Generator, size: tuple[int, int], frames: int) -> Scene:
    name, canvas = _backdrop(rng, size, structure=1.0)
    direction, speed, velocity = _velocity(rng, size[0])
    content = (-velocity[0], -velocity[1])

    def draw(k: float) -> np.ndarray:
        return _to_uint8(_shifted(canvas, k * content[0], k * content[1]))

    motion = {"kind": "pan", "camera_px_per_frame": list(velocity), "content_px_per_frame": list(content)}
    return Scene(
        f"the camera pans {_words(speed, direction)} across {name}",
        motion | {"direction": direction, "speed": speed},
        draw,
        _constant_flow(size, content),
        _everywhere(size),
    )


def _object(rng: np.random.Generator, size: tuple[int, int], frames: int) -> Scene:
    height, width = size
    name, canvas = _backdrop(rng, size, structure=0.35)
    shape = _pick(rng, SHAPES)
    # A colour that stands out.
    far = [c for c in COLOURS if np.abs(np.array(COLOURS[c]) - canvas.mean((0, 1))).sum() > 0.6]
    colour = _pick(rng, far)
    direction, speed, velocity = _velocity(rng, height)
    radius = height * rng.uniform(0.26, 0.34)
    # The middle of its way lies near the middle of the frame.
    middle = np.array([width, height]) * (0.5 + rng.uniform(-0.18, 0.18, 2) * (np.array(velocity) == 0))
    paint = np.array(COLOURS[colour], np.float32)
    pace = np.array(velocity)
    # Carried along: inside one flat colour neither an eye nor optical flow sees motion.
    grain = 0.3 * (_noise(rng, size, detail=1.0)[..., None] - 0.5)

    def moving(k: float) -> np.ndarray:
        return _mask(shape, middle + (k - frames / 2) * pace, radius, size)

    def draw(k: float) -> np.ndarray:
        mask = moving(k)[..., None]
        way = (k - frames / 2) * pace
        return _to_uint8(canvas * (1 - mask) + (paint + _shifted(grain, *way)[..., None]) * mask)

    def flow(k: float, later: float) -> np.ndarray:
        return np.asarray((moving(k) > 0.5)[..., None] * (later - k) * pace, np.float32)

    motion = {"kind": "object", "object_px_per_frame": list(velocity), "direction": direction, "speed": speed}
    caption = f"a {colour} {shape} moves {_words(speed, direction)} over {name}"
    red, green, blue = (255 * float(level) for level in paint)
    return Scene(caption, motion | {"shape": shape}, draw, flow, moving, (red, green, blue), _to_uint8(canvas))


def _flow(rng: np.random.Generator, size: tuple[int, int], frames: int) -> Scene:
    height, width = size
    fluid = _pick(rng, FLUIDS)
    direction, speed, velocity = _velocity(rng, height)
    light = _noise(rng, size, detail=1.0)[..., None]
    shadow, bright, bank = (np.array(end, np.float32) for end in FLUIDS[fluid])
    surface = shadow + (bright - shadow) * light
    banks = bank * (0.75 + 0.5 * _noise(rng, size, detail=0.4)[..., None])
    # A river across the frame, or a fall down it: its middle, half its width, and a soft edge, along the other axis.
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    across, extent = (rows, height) if velocity[0] else (columns, width)
    middle, half = extent * rng.uniform(0.42, 0.58), extent * rng.uniform(0.28, 0.40)
    bed = np.clip((half - np.abs(across + 0.5 - middle)) / (0.05 * height) + 0.5, 0, 1).astype(np.float32)
    # Faster in the middle than at the banks.
    profile = (1 - 0.3 * np.clip(np.abs(across + 0.5 - middle) / half, 0, 1) ** 2).astype(np.float32)

    def draw(k: float) -> np.ndarray:
        moved = _warp(surface, columns - k * velocity[0] * profile, rows - k * velocity[1] * profile)
        return _to_uint8(banks * (1 - bed[..., None]) + moved * bed[..., None])

    def flow(k: float, later: float) -> np.ndarray:
        pace = (later - k) * profile * (bed > 0.5)
        return np.stack([pace * velocity[0], pace * velocity[1]], axis=-1).astype(np.float32)

    motion = {"kind": "flow", "flow_px_per_frame": list(velocity), "direction": direction, "speed": speed}
    return Scene(f"{fluid} flows {_words(speed, direction)}", motion, draw, flow, lambda k: bed)


def _zoom(rng: np.random.Generator, size: tuple[int, int], frames: int) -> Scene:
    height, width = size
    name, canvas = _backdrop(rng, size, structure=1.0)
    speed = _speed_word(rng)
    way = _pick(rng, ("in", "out"))
    pace = _pace(rng, speed) * 0.8 * (1 if way == "in" else -1)
    columns, rows = np.meshgrid(
        np.arange(width, dtype=np.float32) - width / 2, np.arange(height, dtype=np.float32) - height / 2
    )

    def scale(k: float) -> float:
        # Centred in time, so that neither end is far from the canvas's own resolution.
        return float(np.exp(pace * (k - frames / 2)))

    def draw(k: float) -> np.ndarray:
        return _to_uint8(_warp(canvas, columns / scale(k) + width / 2, rows / scale(k) + height / 2))

    def flow(k: float, later: float) -> np.ndarray:
        growth = scale(later) / scale(k) - 1
        return np.stack([columns * growth, rows * growth], axis=-1).astype(np.float32)

    motion = {"kind": "zoom", "zoom_per_frame": pace, "direction": way, "speed": speed}
    return Scene(f"the camera zooms {_words(speed, way)} on {name}", motion, draw, flow, _everywhere(size))


def _still(rng: np.random.Generator, size: tuple[int, int], frames: int) -> Scene:
    name, canvas = _backdrop(rng, size, structure=1.0)
    picture = _to_uint8(canvas)
    return Scene(
        f"a still view of {name}, nothing moves",
        {"kind": "still", "camera_px_per_frame": [0.0, 0.0]},
        lambda k: picture,
        _constant_flow(size, (0.0, 0.0)),
        lambda k: np.zeros(size, np.float32),
    )


PAINTERS: dict[str, Callable[[np.random.Generator, tuple[int, int], int], Scene]] = {
    "pan": _pan,
    "object": _object,
    "flow": _flow,
    "zoom": _zoom,
    "still": _still,
}
# A still one and two zooms in twelve: what moves in a direction is what there is most to learn of.
_ROUND = ("pan", "object", "flow", "zoom", "pan", "object", "flow", "still", "pan", "object", "flow", "zoom")


# --- what they are painted with ------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: Iterable[str]) -> str:
    names = tuple(options)
    return str(names[int(rng.integers(len(names)))])


def _speed_word(rng: np.random.Generator) -> str | None:
    return _pick(rng, SPEEDS) if rng.random() < 0.5 else None


def _pace(rng: np.random.Generator, speed: str | None) -> float:
    """Share of the frame's height per frame. Without a word any, down to none."""
    return float(rng.uniform(*(SPEEDS[speed] if speed else (0.0, FASTEST))))


def _velocity(rng: np.random.Generator, height: int) -> tuple[str, str | None, tuple[float, float]]:
    direction, speed = _pick(rng, DIRECTIONS), _speed_word(rng)
    pace = _pace(rng, speed) * height
    x, y = DIRECTIONS[direction]
    return direction, speed, (round(pace * x, 6), round(pace * y, 6))


def _words(speed: str | None, direction: str) -> str:
    return f"{speed} {direction}" if speed else direction


def _noise(rng: np.random.Generator, size: tuple[int, int], detail: float) -> np.ndarray:
    """Smooth noise in 0..1 that repeats after ``size``: waves of up to about 4 x ``detail`` to the frame's height."""
    height, width = size
    # Drawn at a fixed number of waves, so that a picture is the same at every size.
    waves_y, waves_x = np.arange(-7, 8), np.arange(0, 11)
    frequency = np.hypot(waves_y[:, None], waves_x[None] * height / width)
    strength = np.exp(-((frequency / (2.0 * detail)) ** 2)) * np.minimum(frequency, 1)
    drawn = (rng.normal(size=(*strength.shape, 2)) @ np.array([1, 1j])) * strength
    spectrum = np.zeros((height, width // 2 + 1), np.complex128)
    spectrum[waves_y[:, None] % height, waves_x[None]] = drawn
    noise = np.fft.irfft2(spectrum, (height, width))
    noise = noise / noise.std()
    return np.asarray(1 / (1 + np.exp(-1.7 * noise)), np.float32)


def _backdrop(rng: np.random.Generator, size: tuple[int, int], structure: float) -> tuple[str, Canvas]:
    """A named, textured canvas: a palette over smooth noise, and a second noise for colour."""
    name = _pick(rng, SCENES)
    low, high = (np.array(end, np.float32) for end in SCENES[name])
    light = 0.5 + (_noise(rng, size, detail=1.0 if structure >= 1 else 0.5) - 0.5) * (1 if structure >= 1 else 0.7)
    tint = _noise(rng, size, detail=0.5)[..., None] - 0.5
    canvas = low + (high - low) * light[..., None]
    canvas += tint * rng.uniform(-0.2, 0.2, 3).astype(np.float32)
    return name, np.clip(canvas, 0, 1).astype(np.float32)


def _everywhere(size: tuple[int, int]) -> Callable[[float], np.ndarray]:
    return lambda k: np.ones(size, np.float32)


def _constant_flow(size: tuple[int, int], velocity: Sequence[float]) -> Callable[[float, float], np.ndarray]:
    return lambda k, later: np.full((*size, 2), (later - k) * np.array(velocity), np.float32)


def _shifted(canvas: Canvas, x: float, y: float) -> np.ndarray:
    """The periodic canvas moved by (x, y) pixels."""
    height, width = canvas.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    return _warp(canvas, columns - np.float32(x), rows - np.float32(y))


def _warp(canvas: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    height, width = canvas.shape[:2]
    # One extra period's edge, so that interpolation across the seam sees its true neighbours.
    padded = np.pad(canvas, ((2, 2), (2, 2), (0, 0)), mode="wrap")
    x = (columns % width + 2).astype(np.float32)
    y = (rows % height + 2).astype(np.float32)
    return np.asarray(cv2.remap(padded, x, y, cv2.INTER_LINEAR))


def _mask(shape: str, centre: np.ndarray, radius: float, size: tuple[int, int]) -> np.ndarray:
    """Coverage in 0..1 with a soft edge, placed to a sixteenth of a pixel.

    A hard edge jumps in an autoencoder's latents where it passes from cell to cell; a soft one glides.
    """
    mask = np.zeros(size, np.uint8)
    fixed = 16
    if shape == "ball":
        point = tuple(int(v) for v in np.round(centre * fixed))
        cv2.circle(mask, (point[0], point[1]), round(radius * fixed), 255, -1, cv2.LINE_AA, 4)
    else:
        corners = {"square": 4, "triangle": 3, "diamond": 4}[shape]
        turn = {"square": np.pi / 4, "triangle": -np.pi / 2, "diamond": 0.0}[shape]
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(mask, [np.round(points * fixed).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return np.asarray(cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), 0.035 * size[0]), np.float32)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.asarray(np.round(np.clip(image, 0, 1) * 255), np.uint8)
