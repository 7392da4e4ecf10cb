"""The frozen networks around the UNet: image autoencoder and text encoder, as diffusers and transformers store them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cinemo.networks.weights import read_config, resolve, weights_digest
from cinemo.types import InputError

__all__ = ["TextEncoder", "Vae", "check_vae", "weights_digest"]

# Pixels that go through an autoencoder at once: 3 frames of 320x512 take SD's decoder 1.5 GB in float32.
_CHUNK_PIXELS = 2**19
# Frames the temporal decoder sees at once; fixed by the published pipeline, results depend on it.
_TEMPORAL_CHUNK = 14


class Vae:
    """An image autoencoder, with SVD's temporal decoder or without.

    Args:
        location: directory with ``config.json`` (an ``AutoencoderKL`` or ``AutoencoderKLTemporalDecoder``) and weights.

    Raises:
        InputError: something is missing in the directory, or the class is another one.
    """

    def __init__(self, location: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        import diffusers

        directory, name = check_vae(location)
        self.temporal = name == "AutoencoderKLTemporalDecoder"
        # Said in so many words, because the default warns about a library that is not needed.
        self.network: Any = getattr(diffusers, name).from_pretrained(
            directory, torch_dtype=dtype, low_cpu_mem_usage=False
        )
        self.network.to(device).eval().requires_grad_(False)
        config = self.network.config
        self.scale, self.shift = float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)
        self.latent_channels = int(config.latent_channels)
        self.downscale = 2 ** (len(config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, frames_NCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (N, c, h, w), float32, of frames in -1..1.

        With a CPU ``generator`` the posterior is sampled from it, as the published code does (noise of shape
        (N, c, h, w) is drawn at once, so the result does not depend on device or chunks); without one it is its mode.
        """
        moments = [
            self.network.encode(chunk.to(self.network.device, self.network.dtype)).latent_dist
            for chunk in torch.split(frames_NCHW, _chunk(*frames_NCHW.shape[2:]))
        ]
        latents = torch.cat([m.mean for m in moments]).float()
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator)
            latents = latents + torch.cat([m.std for m in moments]).float() * noise.to(latents.device)
        return (latents - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_FCHW: Tensor) -> np.ndarray:
        """Frames (F, H, W, 3), uint8, of one video's scaled latents.

        Rounding as published: to the nearest with the plain decoder, downwards with the temporal one.
        """
        latents = latents_FCHW.to(self.network.device, torch.float32) / self.scale + self.shift
        rounding = 0.0 if self.temporal else 0.5
        frames = [
            (((image.float() / 2 + 0.5) * 255 + rounding).clamp(0, 255)).to(torch.uint8).permute(0, 2, 3, 1).cpu()
            for image in self._images(latents.to(self.network.dtype))
        ]
        result: np.ndarray = torch.cat(frames).numpy()
        return result

    def _images(self, latents: Tensor) -> Iterator[Tensor]:
        height, width = (side * self.downscale for side in latents.shape[2:])
        for chunk in torch.split(latents, _TEMPORAL_CHUNK if self.temporal else _chunk(height, width)):
            if self.temporal:
                yield self.network.decode(chunk, num_frames=len(chunk)).sample
            else:
                yield self.network.decode(chunk).sample


def _chunk(height: int, width: int) -> int:
    """Frames of this size that go through at once."""
    return max(1, _CHUNK_PIXELS // (height * width))


def check_vae(location: str) -> tuple[Path, str]:
    """The local directory and class name of an autoencoder, without loading it.

    Raises:
        InputError: as `Vae`.
    """
    directory = _directory(location)
    name = read_config(directory, location).get("_class_name")
    if name not in ("AutoencoderKL", "AutoencoderKLTemporalDecoder"):
        raise InputError(f"{location}: config.json is of {name}, expected AutoencoderKL[TemporalDecoder]")
    _require_one(directory, location, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    return directory, name


class TextEncoder:
    """CLIP's text model and its tokenizer.

    Args:
        location: directory of the text model (``config.json``, weights).
        tokenizer: directory of its tokenizer.
    """

    def __init__(
        self,
        location: str,
        tokenizer: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        directory, words = _directory(location), _directory(tokenizer)
        config = read_config(directory, location)
        _require_one(directory, location, "model.safetensors", "pytorch_model.bin")
        _require_one(words, tokenizer, "tokenizer.json", "vocab.json")
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(words)
        self.network: Any = CLIPTextModel.from_pretrained(directory, dtype=dtype)
        self.network.to(device).eval().requires_grad_(False)
        positions = config.get(
            "max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings", 77)
        )
        self.length = min(int(self.tokenizer.model_max_length), int(positions))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Last hidden states (B, L, D): padded and cut to the full length L, no mask (the published pipeline)."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        states: Tensor = self.network(tokens.input_ids.to(self.network.device)).last_hidden_state
        return states


def _directory(location: str) -> Path:
    path = resolve(location)
    if not path.is_dir():
        raise InputError(f"{location}: is a file, expected a network's directory")
    return path


def _require_one(directory: Path, location: str, *names: str) -> None:
    if not any((directory / name).is_file() for name in names):
        raise InputError(f"{location}: {' (or '.join(names)}{')' * (len(names) - 1)} is missing there")
