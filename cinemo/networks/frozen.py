"""The frozen networks around the UNet: image autoencoder and text encoder, as diffusers and transformers store them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cinemo.networks.tokenizer import Tokenizer
from cinemo.networks.transfer import upload
from cinemo.networks.weight_files import DIFFUSERS, TRANSFORMERS, WeightFiles
from cinemo.networks.weights import read_config, resolve
from cinemo.types import InputError

# Of Stable Diffusion's autoencoder, whose own config.json is older than the entry.
_SCALING_FACTOR = 0.18215
# What a library notes about itself in a config.json; nothing is computed from it.
_NOTES = frozenset({"_diffusers_version", "_name_or_path", "architectures", "transformers_version"})

# Pixels that go through an autoencoder at once on a CPU: 3 frames of 320x512 take SD's decoder 1.5 GB in float32, that
# is, 768 values a pixel.
_CHUNK_PIXELS, _VALUES_PER_PIXEL = 2**19, 768
# Frames the temporal decoder sees at once; fixed by the published pipeline, results depend on it.
_TEMPORAL_CHUNK = 14


Statistics = tuple[Sequence[float], Sequence[float]]
Picture = np.ndarray | Tensor | None
"""For `ImageEncoder`: uint8 RGB (H, W, 3); its own tokens (L, D) of one; or None, one of zeros in -1..1 (grey)."""
Text = str | Tensor
"""What a text encoder is to read, or its own states (L, D) of that."""


class Vae:
    """An image autoencoder, with SVD's temporal decoder or without.

    Args:
        location: directory with ``config.json`` (an ``AutoencoderKL`` or ``AutoencoderKLTemporalDecoder``) and weights.
        statistics: (mean, deviation) of each channel of its scaled latents, to normalise them by.

    Raises:
        InputError: something is missing or damaged in the directory, or the class is another one.
    """

    def __init__(
        self,
        location: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        statistics: Statistics | None = None,
    ) -> None:
        import diffusers
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
        directory, name = check_vae(location)
        self.temporal = name == "AutoencoderKLTemporalDecoder"
        # Said in so many words, because the default warns about a library that is not needed.
        options = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
        self.network: Any = _load(getattr(diffusers, name), directory, location, DIFFUSERS, **options)
        self.network.to(device).eval().requires_grad_(False)
        config = self.network.config
        if statistics:
            config = SimpleNamespace(**{**config, **normalised(config, statistics)})
        # Numbers, or (c, 1, 1) where the configuration has statistics of each channel.
        self.scale, self.shift = (_on(value, device) for value in _normalisation(config))
        self.latent_channels = int(config.latent_channels)
        self.downscale = 2 ** (len(config.block_out_channels) - 1)

    def _together(self, height: int, width: int) -> int:
        """Frames of this size that go through at once."""
        return max(1, pixels_at_once(self.network.device, self.network.dtype) // (height * width))

    @torch.no_grad()
    def encode(self, frames_NCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (N, c, h, w), float32, of frames in -1..1.

        With a CPU ``generator`` the posterior is sampled from it, as the published code does (noise of shape
        (N, c, h, w) is drawn at once, so the result does not depend on device or chunks); without one it is its mode.
        """
        moments = [
            self.network.encode(chunk.to(self.network.device, self.network.dtype)).latent_dist
            for chunk in torch.split(frames_NCHW, self._together(*frames_NCHW.shape[2:]))
        ]
        latents = torch.cat([m.mean for m in moments]).float()
        if generator is not None:
            noise = upload(torch.randn(latents.shape, generator=generator), latents.device)
            latents = latents + torch.cat([m.std for m in moments]).float() * noise
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_FCHW: Tensor) -> np.ndarray:
        """Frames (F, H, W, 3), uint8, of one video's scaled latents.

        Rounding as published: to the nearest with the plain decoder, downwards with the temporal one.
        """
        return np.concatenate([*self.decoding(latents_FCHW)])

    def decoding(self, latents_FCHW: Tensor) -> Iterator[np.ndarray]:
        """The same a few frames at a time: a long video need not be in memory."""
        for piece in self.pieces(latents_FCHW):
            yield self.decode_piece(piece).cpu().numpy()

    def pieces(self, latents_FCHW: Tensor) -> tuple[Tensor, ...]:
        """Latents of frames that go through the decoder together; a piece's frames depend on that piece alone."""
        height, width = (side * self.downscale for side in latents_FCHW.shape[2:])
        return torch.split(latents_FCHW, _TEMPORAL_CHUNK if self.temporal else self._together(height, width))

    @torch.no_grad()
    def decode_piece(self, latents_FCHW: Tensor) -> Tensor:
        """Frames (F, H, W, 3), uint8, on the network's device, of one of the `pieces` of a video."""
        latents = latents_FCHW.to(self.network.device, torch.float32)
        latents = latents / self.scale + self.shift
        extra = {"num_frames": len(latents)} if self.temporal else {}
        images: Tensor = self.network.decode(latents.to(self.network.dtype), **extra).sample
        rounding = 0.0 if self.temporal else 0.5
        return ((images.float() / 2 + 0.5) * 255 + rounding).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _normalisation(config: Any) -> tuple[Tensor | float, Tensor | float]:
    """(scale, shift): latents of an encoder become (latents - shift) * scale.

    ``latents_mean`` and ``latents_std``, one number a channel as newer diffusers autoencoders carry them, give every
    channel mean 0 and deviation 1 before ``scaling_factor``; without them all channels share one factor.
    """
    scale, shift = float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return scale, shift
    return scale / torch.tensor(deviation).view(-1, 1, 1), shift + torch.tensor(mean).view(-1, 1, 1)


def normalised(config: Mapping[str, Any], statistics: Statistics) -> dict[str, list[float]]:
    """What an autoencoder's ``config.json`` has to say for its latents to be normalised by ``statistics``.

    These are of latents as the configuration scales them now; what it already has is taken into account.

    Raises:
        InputError: there are not as many numbers as latent channels.
    """
    channels, scale = int(config.get("latent_channels", 4)), float(config.get("scaling_factor", _SCALING_FACTOR))
    mean, deviation = statistics
    if not len(mean) == len(deviation) == channels:
        raise InputError(f"latents_mean has {len(mean)} numbers, but the autoencoder has {channels} latent channels")
    mean_before = config.get("latents_mean") or [0.0] * channels
    std_before = config.get("latents_std") or [1.0] * channels
    return {
        "latents_mean": [m0 + m * s0 / scale for m, m0, s0 in zip(mean, mean_before, std_before, strict=True)],
        "latents_std": [s0 * s for s, s0 in zip(deviation, std_before, strict=True)],
    }


def _on(value: Tensor | float, device: torch.device | str) -> Tensor | float:
    return value.to(device) if isinstance(value, Tensor) else value


def pixels_at_once(device: torch.device, dtype: torch.dtype) -> int:
    """How many pixels go through an autoencoder at once.

    Of an accelerator an eighth of its memory may be taken: of what it has, not of what is free now, so that the same
    machine always does the same arithmetic.
    """
    if device.type != "cuda":
        return _CHUNK_PIXELS
    return int(torch.cuda.get_device_properties(device).total_memory / 8 / (_VALUES_PER_PIXEL * dtype.itemsize))


def check_vae(location: str) -> tuple[Path, str]:
    """The local directory and class name of an autoencoder, without loading it.

    Raises:
        InputError: as `Vae`.
    """
    directory = _directory(location)
    name = read_config(directory, location).get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderKLTemporalDecoder"):
        raise InputError(f"{location}: config.json is for {name}, expected AutoencoderKL[TemporalDecoder]")
    _weights(directory, location, DIFFUSERS)
    return directory, name


def vae_scaling(location: str) -> tuple[float, float]:
    """Scaling and shift factor of an autoencoder's latents, without loading it."""
    config = read_config(_directory(location), location)
    return float(config.get("scaling_factor", _SCALING_FACTOR)), float(config.get("shift_factor") or 0.0)


def network_digest(location: str) -> str:
    """sha256 (hex) over what decides a frozen network's output: its weights (file or shards) and its configuration.

    Left out are files that are not read (a README, the same weights in another format) and the names and versions that
    libraries note in ``config.json``.

    Raises:
        InputError: there is no network.
    """
    directory = _directory(location)
    config = {name: value for name, value in read_config(directory, location).items() if name not in _NOTES}
    contents = []
    for path in _weights(directory, location, (*DIFFUSERS, *TRANSFORMERS)).paths:
        with path.open("rb") as stream:
            contents.append(hashlib.file_digest(stream, "sha256").hexdigest())
    content = "\n".join(contents)
    return hashlib.sha256(f"{json.dumps(config, sort_keys=True)}\n{content}".encode()).hexdigest()


class TextEncoder:
    """CLIP's text model and its tokenizer.

    Args:
        location: directory of the text model (``config.json``, weights).
        tokenizer: directory of its tokenizer.
        layers: how many of its layers run before the final norm; None: all. Networks often see what 23 of OpenCLIP's 24
            make, and some folders hold no more than these.

    Raises:
        InputError: something is missing or damaged in the directories, or the model has fewer layers.
    """

    def __init__(
        self,
        location: str,
        tokenizer: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layers: int | None = None,
    ) -> None:
        from transformers import CLIPTextModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        directory = _directory(location)
        read_config(directory, location)
        _weights(directory, location, TRANSFORMERS)
        self.tokenizer = Tokenizer(tokenizer, location)
        self.network: Any = _load(CLIPTextModel, directory, location, TRANSFORMERS, dtype=dtype)
        if layers is not None:
            there = getattr(self.network, "text_model", self.network).encoder.layers
            if len(there) < layers:
                raise InputError(f"{location}: has {len(there)} layers, expected at least {layers}")
            del there[layers:]
        self.network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Last hidden states (B, L, D): of tokens as `Tokenizer.ids` makes them, no mask (the published pipeline)."""
        tokens = upload(self.tokenizer.ids(texts), self.network.device)
        states: Tensor = self.network(tokens).last_hidden_state
        return states


class ImageEncoder:
    """CLIP's image model (transformers' ``CLIPVisionModel``).

    Args:
        location: directory of the image model (``config.json``, weights).

    Raises:
        InputError: something is missing or damaged in the directory, or it is another network.
    """

    # What decides its input; part of the fingerprint of stored image tokens.
    PREPROCESSING = "whole picture to the model's square, kornia bicubic with aligned corners, CLIP mean and deviation"
    MEAN = (0.48145466, 0.4578275, 0.40821073)
    DEVIATION = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, location: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import CLIPVisionModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        directory = check_image_encoder(location)
        self.network: Any = _load(CLIPVisionModel, directory, location, TRANSFORMERS, dtype=dtype)
        self.network.to(device).eval().requires_grad_(False)
        self.side = int(self.network.config.image_size)

    def prepare(self, image_HWC: np.ndarray) -> Tensor:
        """A picture (uint8 RGB) as the model takes it: (3, side, side), float32.

        As DynamiCrafter's weights saw theirs: bicubic with aligned corners, blurred first where it shrinks; a wide
        frame is squeezed, not cut, so that tokens speak of all that the latents show.
        """
        return self.square(image_HWC, self.side)

    @classmethod
    def square(cls, image_HWC: np.ndarray, side: int) -> Tensor:
        """`prepare` for a model of this side."""
        from kornia.geometry.transform import resize

        levels_CHW = torch.from_numpy(image_HWC.astype(np.float32)).permute(2, 0, 1) / 255
        resized_CHW: Tensor = resize(levels_CHW, (side, side), "bicubic", align_corners=True, antialias=True)
        return (resized_CHW - _per_channel(cls.MEAN)) / _per_channel(cls.DEVIATION)

    @torch.no_grad()
    def encode(self, images_BHWC: Sequence[np.ndarray]) -> Tensor:
        """Last hidden states (B, L, D), L the class token and then every patch: before the last norm and projection."""
        return self._states(torch.stack([self.prepare(image) for image in images_BHWC]))

    def tokens(self, pictures: Sequence[Picture]) -> Tensor:
        """(B, L, D) on the network's device: `encode` of those that are not tokens yet; grey is encoded once."""
        device, dtype = self.network.device, self.network.dtype
        pixels = [picture for picture in pictures if isinstance(picture, np.ndarray)]
        made = iter(self.encode(pixels) if pixels else ())
        rows = []
        for picture in pictures:
            if isinstance(picture, Tensor):
                rows.append(upload(picture, device, dtype))
            else:
                rows.append(self.grey_LD if picture is None else next(made))
        return torch.stack(rows)

    @functools.cached_property
    def grey_LD(self) -> Tensor:
        """What it makes of zeros in -1..1: what DynamiCrafter's unconditional branch is shown."""
        level_C11 = (0.5 - _per_channel(self.MEAN)) / _per_channel(self.DEVIATION)
        return self._states(level_C11.expand(1, 3, self.side, self.side))[0]

    @torch.no_grad()
    def _states(self, pixels_BCHW: Tensor) -> Tensor:
        pixels_BCHW = upload(pixels_BCHW, self.network.device, self.network.dtype)
        states: Tensor = self.network(pixels_BCHW).last_hidden_state
        return states


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def check_image_encoder(location: str) -> Path:
    """The local directory of an image encoder, without loading it.

    Raises:
        InputError: as `ImageEncoder`.
    """
    directory = _directory(location)
    kind = read_config(directory, location).get("model_type")
    if kind not in ("clip_vision_model", "clip"):
        raise InputError(f"{location}: config.json is of model_type {kind}, expected clip_vision_model")
    _weights(directory, location, TRANSFORMERS)
    return directory


def _directory(location: str) -> Path:
    path = resolve(location)
    if not path.is_dir():
        raise InputError(f"{location}: is a file, expected a network's directory")
    return path


def _weights(directory: Path, location: str, names: Sequence[str]) -> WeightFiles:
    files = WeightFiles.find(directory, location, *names)
    if files is None:
        raise InputError(f"{location}: {' (or '.join(names)}{')' * (len(names) - 1)} is missing there")
    files.check(location)
    return files


def _load(kind: Any, directory: Path, location: str, names: Sequence[str], **options: Any) -> Any:
    """``kind.from_pretrained``, whose faults are the user's, and which would draw weights that are not there."""
    files = _weights(directory, location, names)
    options |= {"variant": files.variant, "use_safetensors": files.paths[0].suffix == ".safetensors"}
    with _readable(location, kind.__name__):
        network, report = kind.from_pretrained(directory, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise InputError(f"{location}: weights of another network, {kind.__name__} needs also {shown}")
    return network


@contextlib.contextmanager
def _readable(location: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(f"{location}: cannot be read as {kind} ({reason[:300]})") from error
