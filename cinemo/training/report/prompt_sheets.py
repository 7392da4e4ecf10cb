"""What the network makes of one's own pictures and prompts: a row of a contact sheet and an mp4 for each.

The same path as ``animate.py``, with encoders that are loaded for it where the training has none in memory. A row's
seed is its own, so that sheets of all steps compare.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cinemo import storage
from cinemo.config import Recipe
from cinemo.media.motion import MotionScale, mean_adjacent_ssim
from cinemo.media.mp4 import write_video
from cinemo.methods import Encoders, Method, image_encoder_place, long, run
from cinemo.networks.frozen import ImageEncoder, TextEncoder, Vae
from cinemo.training.report.progress import Sheet
from cinemo.training.report.prompts import Prompt
from cinemo.training.report.sheets import contact_sheet
from cinemo.training.run.batch import FrozenStates


@dataclass(frozen=True)
class Animated:
    """``latents_CFHW``: of the video. ``settings``: everything that was asked."""

    prompt: Prompt
    latents_CFHW: Tensor
    settings: Mapping[str, Any]


@torch.no_grad()
def animated(
    recipe: Recipe,
    method: Method,
    frozen: FrozenStates,
    prompts: Sequence[Prompt],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Animated]:
    """Animate each prompt. Under ZeRO-3 every rank calls this.

    Args:
        frozen: of the training; what it has loaded is used.
        dtype: of encoders that are loaded.
    """
    if not prompts:
        return []
    encoders, made = _encoders(recipe, method, frozen, device, dtype), []
    for prompt in prompts:
        request = prompt.request(recipe)
        settings = request.settings(recipe)
        inputs = {"image": np.ascontiguousarray(request.image), **request.inputs}
        sampling, _ = long.prepare(method, recipe, encoders, inputs, settings)
        made.append(Animated(prompt, run(method, sampling)[0].float(), settings))
    return made


def write_prompts(output: str, recipe: Recipe, step: int, vae: Vae, videos: Sequence[Animated]) -> Sheet:
    """Store ``samples/step-000100-prompts.png`` and the mp4s ``samples/step-000100/prompt-00.mp4``."""
    name, root, rows, moved = f"step-{step:06d}", storage.join(output, "samples"), [], []
    with tempfile.TemporaryDirectory(prefix="cinemo-prompts-") as scratch:
        files = [f"{name}/prompt-{number:02d}.mp4" for number in range(len(videos))]
        for file, video in zip(files, videos, strict=True):
            frames_FHWC = vae.decode(video.latents_CFHW.transpose(0, 1))
            told = {key: value for key, value in video.prompt.controls.items() if key != "seed"}
            asked = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items())
            rows.append((f"{video.prompt.text[:60]}{f' ({asked})' if asked else ''}", frames_FHWC))
            moved.append(1 - mean_adjacent_ssim(frames_FHWC, recipe.data.ssim))
            settings = {"step": step, "recipe": recipe.name, "prompt": video.prompt.text, **video.settings}
            metadata = {"comment": json.dumps(settings, sort_keys=True)}
            write_video(Path(scratch) / file, frames_FHWC, recipe.sample.fps, metadata)
        (Path(scratch) / f"{name}-prompts.png").write_bytes(contact_sheet(recipe, rows))
        storage.upload(Path(scratch), root)
    uris = (storage.join(root, f"{name}-prompts.png"), *(storage.join(root, file) for file in files))
    return Sheet(step, uris, {"prompts": float(np.mean(moved))})


def _encoders(
    recipe: Recipe, method: Method, frozen: FrozenStates, device: torch.device, dtype: torch.dtype
) -> Encoders:
    places, layers = recipe.encoders, method.text_layers(recipe)
    text, image = frozen.loaded
    if not isinstance(text, TextEncoder):
        text = TextEncoder(places.text_encoder, places.tokenizer, device, dtype, layers)
    if image is None and "image_encoder" in method.needs:
        image = ImageEncoder(image_encoder_place(recipe), device, dtype)
    vae = Vae(places.vae, device, dtype, places.statistics)
    return Encoders(vae, text, MotionScale(recipe.data.bucket_edges, recipe.data.ssim), image)
