"""Image + prompt (+ controls) -> frames: the one path used by command line, server, page, notebook and evaluation.

The bundle's method says what happens (for Cinemo: arXiv 2407.15642, sections 3.2-3.3 and 4.4): it encodes pictures and
prompt, takes noise, and samples; here the request is checked, and its result decoded.
"""

from __future__ import annotations

import hashlib
import io
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
from cinemo.config import Recipe
from cinemo.diffusion.guidance import Sampling
from cinemo.media.sources import fetched
from cinemo.media.stills import rgb
from cinemo.media.video import probe, read_frames
from cinemo.methods import long, method_class, run
from cinemo.methods.controls import check_text
from cinemo.methods.quality import QualityTable
from cinemo.networks.adapters import Adapters, Choice
from cinemo.types import Animation, ClipError, InputError, Sampled

MAX_PIXELS = 80_000_000  # below the size at which Pillow suspects a decompression bomb
_MIN_SIDE, _MAX_ASPECT = 8, 20


class AnimateRequest:
    """What to animate and how.

    Args:
        image: RGB picture of any size, (H, W, 3) uint8 or PIL; it is resized and centre-cropped to the video's size.
        prompt: text; the encoder reads its first 77 tokens.
        size: (height, width) of the video; None: the recipe's. Networks make what they were trained for best.
        lora: ``NAME`` or ``NAME:SCALE`` of an adapter that the bundle was loaded with.
        inputs: other pictures (H, W, 3) and videos (F, H, W, 3) that the bundle's method takes, uint8, by name.
        controls: what the method can be asked, by name (its ``controls_type``; Cinemo: ``motion_bucket``, ``steps``,
            ``seed``, ...). None stands for the default of the bundle's recipe.

    Raises:
        InputError: the prompt is no text, or an input no picture or video. Controls are checked where the bundle is
            known (`prepare`).
    """

    def __init__(
        self,
        image: np.ndarray | Image.Image,
        prompt: str,
        *,
        size: tuple[int, int] | None = None,
        inputs: Mapping[str, np.ndarray] | None = None,
        lora: str | None = None,
        **controls: Any,
    ) -> None:
        check_text("prompt", prompt)
        self.lora = lora
        self.image, self.prompt, self.size = image, prompt, size
        self.inputs, self.controls = dict(inputs or {}), controls
        for name, pixels in self.inputs.items():
            if not isinstance(pixels, np.ndarray) or pixels.ndim not in (3, 4) or pixels.dtype != np.uint8:
                got = f"{pixels.shape} {pixels.dtype}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
                raise InputError(f"{name}: got {got}, expected uint8 (H, W, 3), or (F, H, W, 3) for a video")

    def settings(
        self,
        recipe: Recipe,
        calibration: Mapping[str, Any] | None = None,
        quality: QualityTable | None = None,
    ) -> dict[str, Any]:
        """The prompt and every control with its value, the recipe's defaults filled in.

        Args:
            calibration: of the bundle (`MotionScale.calibration`), by which a motion strength is linear in motion.
            quality: of the bundle, by which a quality that is asked for becomes steps, solver and so on.

        Raises:
            InputError: a control or input that the recipe's method does not have, or a value out of range.
        """
        method = method_class(recipe)
        for name in self.inputs:
            if name not in method.inputs:
                has = ", ".join(("image", *method.inputs))
                raise InputError(f"{name}: {recipe.name} takes no such input; it takes {has}")
        for name, about in method.inputs.items():
            if about.required and name not in self.inputs:
                raise InputError(f"{name}: {recipe.name} needs it: {about.description}")
            if name in self.inputs and self.inputs[name].ndim != (4 if about.kind == "video" else 3):
                raise InputError(f"{name}: got {self.inputs[name].shape}, expected the frames of a {about.kind}")
        for name in self.controls.keys() & method.inputs.keys():
            raise InputError(
                f"{name}: is no control but a {method.inputs[name].kind}; give it as inputs={{{name!r}: ...}}"
            )
        controls = method.controls_type.of(self.controls, recipe.name)
        calibrated = controls.calibrated(recipe, calibration, quality)
        filled = calibrated.settings(recipe, self.inputs.keys())
        is_measured = self.lora is None and self.size in (None, recipe.data.size) and "frames" not in filled
        said = controls.predicted(recipe, calibration, quality) if is_measured else {}
        return {"prompt": self.prompt, **filled, **said}


def blank_inputs(recipe: Recipe) -> dict[str, np.ndarray]:
    """Grey pictures and videos for what the recipe's method needs beside the picture to animate."""
    height, width = recipe.data.size
    shapes = {"image": (height, width, 3), "video": (recipe.data.frames, height, width, 3)}
    required = {name: about for name, about in method_class(recipe).inputs.items() if about.required}
    return {name: np.full(shapes[about.kind], 128, np.uint8) for name, about in required.items()}


@dataclass(frozen=True)
class Prepared:
    """A request made ready for the network, on the bundle's device, a batch of one.

    ``sampling``: asks ``calls`` times, and returns the video's latents (1, C, F, h, w). ``settings``: everything needed
    to make the result again. ``adapter``: that the network is to be asked with.
    """

    sampling: Sampling
    calls: int
    settings: Mapping[str, Any]
    adapter: Choice | None = None


def animate(
    bundle: ModelBundle, request: AnimateRequest, progress: Callable[[int, int], None] | None = None
) -> Animation:
    """Animate one image. Equal bundle, request and machine give equal frames; every draw is keyed by the seed.

    Args:
        progress: called as ``progress(done, calls)`` after each call of the network; what it raises stops the sampling.

    Returns:
        frames (F, H, W, 3) uint8 whose first one is the encoded and decoded input, the latents, and all settings.
    """
    sampled = sample(bundle, request, progress)
    frames_FHWC = bundle.decoder.decode(sampled.latents_CFHW.transpose(0, 1))
    return Animation(sampled.latents_CFHW, sampled.fps, sampled.settings, frames_FHWC)


@torch.inference_mode()
def sample(bundle: ModelBundle, request: AnimateRequest, progress: Callable[[int, int], None] | None = None) -> Sampled:
    """As `animate`, but for the frames, which `Vae.decoding` makes a few at a time."""
    asked = prepare(bundle, request)
    report = None if progress is None else lambda done: progress(done, asked.calls)
    with bundle.adapters.using((asked.adapter,)):
        video_BCFHW = run(bundle.method, asked.sampling, report)
    return Sampled(video_BCFHW[0].float().cpu(), asked.settings["fps"], asked.settings)


@torch.inference_mode()
def prepare(bundle: ModelBundle, request: AnimateRequest) -> Prepared:
    """All that comes before the sampling: encode, take noise, and with a source video find that of its motion.

    Raises:
        InputError: the request does not fit the bundle.
    """
    recipe, settings = bundle.recipe, request.settings(bundle.recipe, bundle.motion.calibration, bundle.quality)
    if request.size is not None:
        recipe = bundle.method.sized(recipe, request.size)
    image = rgb(request.image) if isinstance(request.image, Image.Image) else request.image
    inputs = {name: np.ascontiguousarray(pixels) for name, pixels in {"image": image, **request.inputs}.items()}
    adapter = None if request.lora is None else bundle.adapters.choose(request.lora)
    with bundle.adapters.using((adapter,)):
        sampling, calls = long.prepare(bundle.method, recipe, bundle.encoders, inputs, settings)
    if adapter is not None:
        sampling = _adapted(sampling, bundle.adapters, adapter)
    known = {
        "recipe": recipe.name,
        "bundle": bundle.digest,
        "cinemo_version": cinemo.__version__,
        "size": list(recipe.data.size),
        "frames": recipe.data.frames,
        "fps": recipe.sample.fps,
        **{f"{name}_sha256": hashlib.sha256(pixels.data).hexdigest() for name, pixels in inputs.items()},
    }
    if adapter is not None:
        known |= {"lora": f"{adapter[0].name}:{adapter[1]:g}", "lora_sha256": adapter[0].sha256}
    return Prepared(sampling, calls, known | settings, adapter)  # a method may know of another number of frames


def _adapted(sampling: Sampling, adapters: Adapters, adapter: Choice) -> Sampling:
    """A sampling whose own use of the network (keys and values of its text) has the adapter, too."""
    with adapters.using((adapter,)):
        query = next(sampling)
    while True:
        output = yield query
        try:
            with adapters.using((adapter,)):
                query = sampling.send(output)
        except StopIteration as end:
            result: Tensor = end.value
            return result


def sentences(sampled: Sampled) -> list[str]:
    """What was made and with which settings, for a person; checksums are left to the file's metadata."""
    settings = {name: value for name, value in sampled.settings.items() if value not in (None, "")}
    (height, width), frames, fps = settings["size"], settings["frames"], settings["fps"]
    made = f"{frames} frames of {width}x{height} at {fps:g} a second, by {settings['recipe']}"
    told = {"recipe", "bundle", "cinemo_version", "size", "frames", "fps"}
    asked = {name: value for name, value in settings.items() if name not in told and not name.endswith("_sha256")}
    return [
        f"{made}, bundle {settings['bundle'][:12]}",
        *(f"  {name.replace('_', ' ')}: {_in_words(value)}" for name, value in asked.items()),
    ]


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_in_words(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        nested = any(isinstance(each, list | tuple) for each in value)
        return ("; " if nested else ", ").join(map(_in_words, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def finish(settings: Mapping[str, Any], video_BCFHW: Tensor, frames_FHWC: np.ndarray) -> Animation:
    """The result: the sampled latents (1, C, F, h, w) of what was `prepare`-d, and the frames they decode to."""
    return Animation(video_BCFHW[0].float().cpu(), settings["fps"], settings, frames_FHWC)


def load_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB: upright by its EXIF orientation, transparency over white, 16 bit made 8.

    Args:
        source: a file (local or s3://) or the content of one.
        max_pixels: refused above, before anything is decoded.

    Raises:
        InputError: missing, not a picture, truncated, too large, too long and thin, or of levels without a known range
            (32-bit integers, floats).
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
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{name}: is damaged ({error})") from None
    return rgb(image, name)


def load_source(uri: str, recipe: Recipe, interval: int = 1) -> np.ndarray:
    """The first frames of a video for `AnimateRequest`: every ``interval``-th, as many as the recipe has.

    Raises:
        InputError: missing, no video, or too short.
    """
    if interval < 1:
        raise InputError(f"source interval is {interval}, expected at least 1")
    indices = range(0, recipe.data.frames * interval, interval)
    try:
        with fetched(uri) as path:
            frames = probe(path).frames
            if frames <= indices[-1]:
                raise InputError(
                    f"source {uri}: {frames} frames, recipe {recipe.name} needs {indices[-1] + 1} (interval {interval})"
                )
            return read_frames(path, indices)
    except ClipError as error:
        raise InputError(f"source {uri}: {error}") from None
