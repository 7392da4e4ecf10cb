"""Stored samples -> training batches (Cinemo, arXiv 2407.15642, Algorithm 1, lines 2-8).

Every draw (diffusion step, noise, what is dropped) is keyed by (seed, step, sample), so that a batch is the same
whichever rank holds which sample, and after a resume. A step may see a sample again in the next epoch (a dataset may be
smaller than a global batch): such further turns have draws of their own.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from cinemo.config import Recipe
from cinemo.data.dataset.shards import pixels
from cinemo.media.motion import motion_bucket
from cinemo.media.stills import jpeg, jpeg_strip
from cinemo.methods import Example, Method, image_encoder_place, method_class
from cinemo.networks.frozen import ImageEncoder, Picture, TextEncoder
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator

TOKENS = 77  # of CLIP's text encoder
TEXT_CACHE = 512  # captions whose text states are kept; "" is half of what is asked for


class Encoder(Protocol):
    """What is needed of a frozen text encoder."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text states (B, L, D)."""
        ...


@dataclass(frozen=True)
class HostBatch:
    """One micro batch in host memory, before text encoding.

    ``fields``, ``texts`` and ``images``: what ``method`` wants to be told of its samples
    (`cinemo.methods.base.Example`).
    ``bucket_B``: of the samples themselves, by which losses are reported, whatever the network is told.
    """

    method: type[Method]
    video_BCFHW: Tensor
    bucket_B: Tensor
    fields: Mapping[str, Tensor]
    t_B: Tensor
    noise_BCFHW: Tensor
    texts: Mapping[str, tuple[str, ...]]
    images: Mapping[str, tuple[Picture, ...]]
    keys: tuple[str, ...]

    def pin(self) -> HostBatch:
        """The same batch in page-locked memory, from which copies to an accelerator do not block."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("video_BCFHW", "t_B", "noise_BCFHW")}
        return replace(self, fields={name: tensor.pin_memory() for name, tensor in self.fields.items()}, **pinned)


def host_batch(
    samples: Sequence[LatentSample], step: int, recipe: Recipe, turns: Sequence[int] | None = None
) -> HostBatch:
    """A micro batch with its draws: t by `drawn_timestep`, noise ~ N(0, 1) of the method's `target_shape`.

    ``turns``: how many epochs after the one in which the step begins a sample comes (all 0 where absent).

    ``train.noise_offset`` s adds s N(0, 1) to it, one value for all frames and cells of a channel ("Diffusion with
    offset noise", N. Guttenberg, 2023), so that the network also learns to move a picture's mean.

    Raises:
        InputError: a sample has another shape than the first one, or than the recipe asks for.
    """
    recipe = recipe_of(samples[0], recipe)
    train, expected, method = recipe.train, latent_shape(recipe), method_class(recipe)
    shifted = train.timestep_shift_steps is None or step < train.timestep_shift_steps
    shift = train.timestep_shift if shifted else 1.0
    steps, noises, videos, examples = [], [], [], []
    keys: list[tuple[str] | tuple[str, int]] = [
        (sample.key, turn) if turn else (sample.key,)
        for sample, turn in zip(samples, turns or [0] * len(samples), strict=True)
    ]
    for sample, key in zip(samples, keys, strict=True):
        if sample.latents_FCHW.shape != expected:
            raise InputError(
                f"sample {sample.key}: latents are {dimensions(sample.latents_FCHW.shape)}, recipe {recipe.name} "
                f"expects {dimensions(expected)} (frames x channels x rows x columns); precompute it with this recipe"
            )
        video_CFHW = stored_latents(sample, recipe).transpose(0, 1)
        videos.append(video_CFHW)
        generator = keyed_generator(train.seed, "t", step, *key)
        steps.append(drawn_timestep(recipe.diffusion.train_steps, shift, generator))
        generator = keyed_generator(train.seed, "noise", step, *key)
        channels, frames, rows, columns = video_CFHW.shape
        noise_CFHW = torch.randn(method.target_shape((channels, frames, rows, columns)), generator=generator)
        if train.noise_offset:
            generator = keyed_generator(train.seed, "noise offset", step, *key)
            noise_CFHW += train.noise_offset * torch.randn(len(noise_CFHW), 1, 1, 1, generator=generator)
        noises.append(noise_CFHW)
        examples.append(method.example(recipe, sample, functools.partial(_keyed, train.seed, step, key)))
    buckets = [float(motion_bucket(sample.ssim, recipe.data.bucket_edges)) for sample in samples]
    return HostBatch(
        method,
        torch.stack(videos),
        torch.tensor(buckets),
        {name: torch.stack([example.fields[name] for example in examples]) for name in examples[0].fields},
        torch.stack(steps),
        torch.stack(noises),
        {slot: tuple(example.texts[slot] for example in examples) for slot in examples[0].texts},
        {slot: tuple(example.images[slot] for example in examples) for slot in examples[0].images},
        tuple(sample.key for sample in samples),
    )


def _keyed(seed: int, step: int, key: tuple[str | int, ...], what: str) -> torch.Generator:
    return keyed_generator(seed, what, step, *key)


def undropped(recipe: Recipe) -> Recipe:
    """Without what training does to make samples harder: what a user asks for is told whole."""
    plain = {name: 0.0 for name in type(recipe.train).model_fields if name.endswith("_dropout")}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=plain)})


def stored_latents(sample: LatentSample, recipe: Recipe) -> Tensor:
    """A sample's latents (F, C, h, w) as the network learns them, float32: normalised where the recipe asks for it."""
    latents_FCHW = torch.from_numpy(sample.latents_FCHW.astype(np.float32))
    if not (statistics := recipe.encoders.statistics):
        return latents_FCHW
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
    return (latents_FCHW - mean) / deviation


def drawn_timestep(train_steps: int, shift: float, generator: torch.Generator) -> Tensor:
    """A diffusion step 0..T-1: uniform (Algorithm 1, line 6), or where ``shift`` s is not 1, u moved to
    s u / (1 + (s - 1) u) (arXiv 2403.03206, equation 23): with s = 4 half of the steps lie in the last fifth.
    """
    if shift == 1:
        return torch.randint(train_steps, (), generator=generator)
    share = torch.rand((), generator=generator, dtype=torch.float64)
    moved = shift * share / (1 + (shift - 1) * share)
    return (moved * train_steps).long().clamp(max=train_steps - 1)


def recipe_of(sample: LatentSample, recipe: Recipe) -> Recipe:
    """A recipe for samples of one's shape alone, where it has several."""
    shape = pixels(sample.latents_FCHW.shape)
    return recipe.of_shape(shape) if recipe.data.other_shapes and shape in recipe.data.shapes else recipe


def latent_shape(recipe: Recipe) -> tuple[int, int, int, int]:
    """(frames, channels, rows, columns) of a sample's latents; the VAE reduces each side by 8."""
    height, width = recipe.data.size
    return recipe.data.frames, method_class(recipe).latent_channels(recipe), height // 8, width // 8


class FrozenStates:
    """What frozen encoders make of texts and pictures; of a caption once, while it stays among the last `TEXT_CACHE`.

    Args:
        image: where the recipe's method needs one.
    """

    def __init__(self, text: Encoder, image: ImageEncoder | None = None) -> None:
        self._encoder, self._image = text, image
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        """With the encoders that a recipe names.

        Raises:
            InputError: one is missing.
        """
        encoders, method = recipe.encoders, method_class(recipe)
        text = TextEncoder(encoders.text_encoder, encoders.tokenizer, device, dtype, method.text_layers(recipe))
        needed = "image_encoder" in method.needs
        return cls(text, ImageEncoder(image_encoder_place(recipe), device, dtype) if needed else None)

    def __call__(
        self, texts: Mapping[str, Sequence[str]], images: Mapping[str, Sequence[Picture]]
    ) -> dict[str, Tensor]:
        """(B, L, D) by slot, on the encoders' device."""
        states = {slot: self.texts(captions) for slot, captions in texts.items()}
        if images:
            assert self._image is not None, "the method shows pictures to an encoder that it does not need"
            states |= {slot: self._image.tokens(pictures) for slot, pictures in images.items()}
        return states

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Text states (B, L, D)."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        if missing:
            with torch.no_grad():
                self._kept.update(zip(missing, self._encoder.encode(missing).unbind(0), strict=True))
        for caption in captions:
            self._kept.move_to_end(caption)
        states_BLD = torch.stack([self._kept[caption] for caption in captions])
        while len(self._kept) > TEXT_CACHE:
            self._kept.popitem(last=False)
        return states_BLD


def on_device(
    batch: HostBatch, frozen: FrozenStates, device: torch.device, dtype: torch.dtype
) -> tuple[LatentBatch, Tensor, Tensor]:
    """(batch, t, noise) on ``device``. Latents and noise stay float32; encoded states take the network's ``dtype``."""
    video_BCFHW = batch.video_BCFHW.to(device, non_blocking=True)
    fields = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.fields.items()}
    states = {slot: states.to(device, dtype) for slot, states in frozen(batch.texts, batch.images).items()}
    made = LatentBatch(video_BCFHW, batch.method.condition(video_BCFHW, fields, states), batch.keys)
    return made, batch.t_B.to(device, non_blocking=True), batch.noise_BCFHW.to(device, non_blocking=True)


def blank_example(recipe: Recipe) -> Example:
    """What the recipe's method makes of a sample of zeros: names, shapes and dtypes of a batch's fields and texts."""
    latents = np.zeros(latent_shape(recipe), np.float16)
    method, interval = method_class(recipe), recipe.data.frame_interval[0]
    fields = {field: _blank_field(recipe, field) for field in method.stored_fields(recipe)}
    sample = LatentSample("blank", "blank", "", "", latents, 0.5, 24.0, interval, 0, fields=fields)
    return method.example(recipe, sample, lambda what: keyed_generator(0, what))


def _blank_field(recipe: Recipe, field: str) -> np.ndarray | bytes:
    """What a dataset would hold, as `LatentSample.fields` has it."""
    frames, _, h, w = latent_shape(recipe)
    method = method_class(recipe)
    tokens = method.image_tokens(recipe)
    match field:
        case "first_frame":
            return jpeg(np.zeros((*recipe.data.size, 3), np.uint8))
        case "frames":
            return jpeg_strip(np.zeros((frames, *recipe.data.size, 3), np.uint8))
        case "image_tokens" | "frame_tokens":
            return np.zeros(tokens if field == "image_tokens" else (frames, *tokens), np.float16)
        case "text_states":
            return np.zeros((TOKENS, method.text_width(recipe)), np.float16)
        case _:
            return np.zeros((frames - 1, 2, h, w), np.float16)


def blank_condition(recipe: Recipe, example: Example, video_BCFHW: Tensor, dtype: torch.dtype) -> Condition:
    """A condition of the right shapes on the video's device, for whoever measures or plans a training."""
    batch, device = len(video_BCFHW), video_BCFHW.device
    fields = {
        name: torch.zeros(batch, *field.shape, dtype=field.dtype, device=device)
        for name, field in example.fields.items()
    }
    method = method_class(recipe)
    text_BLD = torch.zeros(batch, TOKENS, method.text_width(recipe), dtype=dtype, device=device)
    states = dict.fromkeys(example.texts, text_BLD)
    if example.images:
        tokens_BLD = torch.zeros(batch, *method.image_tokens(recipe), dtype=dtype, device=device)
        states |= dict.fromkeys(example.images, tokens_BLD)
    return method.condition(video_BCFHW, fields, states)


def dimensions(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
