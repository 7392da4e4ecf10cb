"""Image + prompt (+ controls) -> frames: the one path used by command line, server, page, notebook and evaluation.

Order (arXiv 2407.15642, sections 3.2-3.3): prepare the image to the recipe's size, encode it, take noise, put the
image's layout into it (DCTInit), DDIM with classifier-free guidance over the residuals, add the first frame, decode.

With a source video (section 4.4: motion transfer and video editing) the noise is that of its motion residuals, found
by DDIM inversion; the image is then its edited first frame, or another picture that shall move like it.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import cinemo
from cinemo import storage
from cinemo.bundle import ModelBundle
from cinemo.config import MOTION_BUCKETS, Recipe
from cinemo.diffusion.guidance import Sampling
from cinemo.media.motion import strength_to_bucket
from cinemo.media.video import probe, read_frames
from cinemo.methods import run
from cinemo.types import Animation, ClipError, InputError

MAX_PIXELS = 80_000_000  # below the size at which Pillow suspects a decompression bomb
MAX_STEPS = 999
MAX_GUIDANCE = 50.0
MAX_PROMPT = 4000
_MIN_SIDE, _MAX_ASPECT = 8, 20


@dataclass(frozen=True)
class AnimateRequest:
    """What to animate and how. ``None`` stands for the default of the bundle's recipe.

    Args:
        image: RGB picture of any size, (H, W, 3) uint8 or PIL; it is resized and centre-cropped to the recipe's size.
        prompt: text; the encoder reads its first 77 tokens.
        negative_prompt: text of the unconditional branch.
        motion_bucket: 0..19, larger = more motion. ``motion_strength``: the same as a share 0..1; give at most one.
        steps: DDIM steps, 1..999. ``guidance_scale``: 1 (off) .. 50. ``seed``: 0 .. 2^63 - 1.
        dct_init: put the image's layout into the initial noise (DCTInit).
        solver, guidance_interval, reuse_features: less work per video, see `cinemo.config.SampleConfig`.
        source: frames of a video to take the motion from, (F, H, W, 3) uint8 of any size, as many as the recipe has.
            Defaults then are the recipe's for editing, and the bucket is the one measured on these frames.
        source_prompt: what is seen in ``source``.

    Raises:
        InputError: a value out of range.
    """

    image: np.ndarray | Image.Image
    prompt: str
    negative_prompt: str = ""
    motion_bucket: int | None = None
    motion_strength: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    dct_init: bool | None = None
    solver: str | None = None
    guidance_interval: tuple[float, float] | None = None
    reuse_features: int | None = None
    source: np.ndarray | None = None
    source_prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "source_prompt"):
            check_text(name, getattr(self, name))
        if self.source is not None and (self.source.ndim != 4 or self.source.dtype != np.uint8):
            got = f"{self.source.shape} {self.source.dtype}"
            raise InputError(f"source: got {got}, expected uint8 frames (F, H, W, 3)")
        if self.motion_bucket is not None and self.motion_strength is not None:
            raise InputError("motion_bucket and motion_strength: both given, expected at most one of them")
        _in_range("motion_bucket", self.motion_bucket, 0, MOTION_BUCKETS - 1, int)
        _in_range("motion_strength", self.motion_strength, 0, 1, float)
        _in_range("steps", self.steps, 1, MAX_STEPS, int)
        _in_range("guidance_scale", self.guidance_scale, 1, MAX_GUIDANCE, float)
        _in_range("seed", self.seed, 0, 2**63 - 1, int)
        _in_range("reuse_features", self.reuse_features, 1, MAX_STEPS, int)
        if self.solver not in (None, "ddim", "multistep"):
            raise InputError(f"solver is {self.solver!r}, expected ddim or multistep")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low <= high <= 1:
                raise InputError(f"guidance_interval is {low}, {high}; expected 0 <= low <= high <= 1")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """Every control with its value, the recipe's defaults filled in."""
        sample = recipe.sample
        bucket = sample.motion_bucket if self.motion_bucket is None else self.motion_bucket
        if self.motion_strength is not None:
            bucket = strength_to_bucket(self.motion_strength)
        usual_scale = sample.guidance_scale if self.source is None else sample.edit_guidance_scale
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "motion_bucket": bucket,
            "steps": self.steps or sample.steps,
            "guidance_scale": float(self.guidance_scale or usual_scale),
            "seed": self.seed,
            "dct_init": sample.dct_init if self.dct_init is None else self.dct_init,
            "solver": self.solver or sample.solver,
            "guidance_interval": list(self.guidance_interval or sample.guidance_interval),
            "reuse_features": self.reuse_features or sample.reuse_features,
        }


@dataclass(frozen=True)
class Prepared:
    """A request made ready for the network, on the bundle's device, a batch of one.

    ``sampling``: asks ``calls`` times, and returns the video's latents (1, C, F, h, w). ``settings``: everything needed
    to make the result again.
    """

    sampling: Sampling
    calls: int
    settings: Mapping[str, Any]


def animate(
    bundle: ModelBundle, request: AnimateRequest, progress: Callable[[int, int], None] | None = None
) -> Animation:
    """Animate one image. Equal bundle, request and machine give equal frames; every draw is keyed by the seed.

    Args:
        progress: called as ``progress(done, calls)`` after each call of the network; what it raises stops the sampling.

    Returns:
        frames (F, H, W, 3) uint8 whose first one is the encoded and decoded input, the latents, and all settings.
    """
    with torch.inference_mode():
        asked = prepare(bundle, request)
        report = None if progress is None else lambda done: progress(done, asked.calls)
        video_BCFHW = run(bundle.method, asked.sampling, report)
        frames_FHWC = bundle.decoder.decode(video_BCFHW[0].transpose(0, 1))
    return finish(asked.settings, video_BCFHW, frames_FHWC)


@torch.inference_mode()
def prepare(bundle: ModelBundle, request: AnimateRequest) -> Prepared:
    """All that comes before the sampling: encode, take noise, and with a source video find that of its motion.

    Raises:
        InputError: the request does not fit the bundle.
    """
    recipe, settings = bundle.recipe, request.settings(bundle.recipe)
    image = request.image.convert("RGB") if isinstance(request.image, Image.Image) else request.image
    inputs = {"image": np.ascontiguousarray(image)}
    if request.source is not None:
        inputs["source"] = np.ascontiguousarray(request.source)
        settings["source_prompt"] = request.source_prompt
        if request.motion_bucket is None and request.motion_strength is None:
            settings["motion_bucket"] = None  # measured on the source
    sampling, calls = bundle.method.prepare(recipe, bundle.encoders, inputs, settings)
    settings |= {
        "recipe": recipe.name,
        "bundle": bundle.digest,
        "cinemo_version": cinemo.__version__,
        "size": list(recipe.data.size),
        "frames": recipe.data.frames,
        "fps": recipe.sample.fps,
        **{f"{name}_sha256": hashlib.sha256(pixels.data).hexdigest() for name, pixels in inputs.items()},
    }
    return Prepared(sampling, calls, settings)


def finish(settings: Mapping[str, Any], video_BCFHW: Tensor, frames_FHWC: np.ndarray) -> Animation:
    """The result: the sampled latents (1, C, F, h, w) of what was `prepare`-d, and the frames they decode to."""
    return Animation(frames_FHWC, video_BCFHW[0].float().cpu(), settings["fps"], settings)


def load_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB: upright by its EXIF orientation, transparency over white, 16 bit made 8.

    Args:
        source: a file (local or s3://) or the content of one.
        max_pixels: refused above, before anything is decoded.

    Raises:
        InputError: missing, not a picture, truncated, too large or too long and thin.
    """
    name = "image" if isinstance(source, bytes) else f"image {source}"
    try:
        content = source if isinstance(source, bytes) else storage.read_bytes(str(source))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or 'no such file'})") from None
    try:
        image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError:
        raise InputError(
            f"{name}: is too large, expected at most {max_pixels / 1e6:.0f} megapixels; scale it down"
        ) from None
    except (OSError, ValueError, SyntaxError):
        raise InputError(f"{name}: is not a picture this system can read; expected PNG, JPEG or WebP") from None
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"{name}: is {width}x{height} = {width * height / 1e6:.0f} megapixels, "
            f"expected at most {max_pixels / 1e6:.0f}; scale it down"
        )
    if min(image.size) < _MIN_SIDE or max(image.size) > _MAX_ASPECT * min(image.size):
        raise InputError(
            f"{name}: is {width}x{height}, expected sides of at least {_MIN_SIDE} pixels "
            f"and at most {_MAX_ASPECT}:1; crop it"
        )
    try:
        return np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{name}: is damaged ({error})") from None


def load_source(uri: str, recipe: Recipe, interval: int = 1) -> np.ndarray:
    """The first frames of a video for `AnimateRequest.source`: every ``interval``-th, as many as the recipe has.

    Raises:
        InputError: missing, no video, or too short.
    """
    if interval < 1:
        raise InputError(f"source interval is {interval}, expected at least 1")
    indices = range(0, recipe.data.frames * interval, interval)
    try:
        with storage.local_copy(uri) as path:
            frames = probe(path).frames
            if frames <= indices[-1]:
                raise InputError(
                    f"source {uri}: {frames} frames, recipe {recipe.name} needs {indices[-1] + 1} (interval {interval})"
                )
            return read_frames(path, indices)
    except FileNotFoundError:
        raise InputError(f"source {uri}: no such file") from None
    except ClipError as error:
        raise InputError(f"source {uri}: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image, dtype=np.int64)
        return Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def check_text(name: str, value: Any) -> None:
    """Raise `InputError` where ``value`` is no text that an encoder, a database and a video file can hold."""
    if not isinstance(value, str) or len(value) > MAX_PROMPT:
        got = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
        raise InputError(f"{name}: got {got}, expected a text of at most {MAX_PROMPT} characters")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{name}: holds a null character or half a surrogate pair, expected plain text")


def _in_range(name: str, value: Any, low: float, high: float, kind: type) -> None:
    if value is None:
        return
    fits = isinstance(value, int | np.integer) if kind is int else isinstance(value, int | float | np.number)
    if isinstance(value, bool) or not fits or not math.isfinite(value) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"{name} is {value!r}, expected {what} {low}..{high}")
