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
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from cinemo.config import Recipe
from cinemo.data.dataset.shards import pixels
from cinemo.media.motion import motion_bucket
from cinemo.media.stills import jpeg, jpeg_strip
from cinemo.methods import Example, Method, image_encoder_place, method_class
from cinemo.methods.base import Draw
from cinemo.networks.frozen import ImageEncoder, Picture, Text, TextEncoder
from cinemo.networks.transfer import upload
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator

TOKENS = 77  # of CLIP's text encoder
TEXT_STATES, IMAGE_TOKENS = "text_states", frozenset({"image_tokens", "frame_tokens"})  # fields that encoders make
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
    texts: Mapping[str, tuple[Text, ...]]
    images: Mapping[str, tuple[Picture, ...]]
    keys: tuple[str, ...]

    def pin(self) -> HostBatch:
        """The same batch in page-locked memory, from which copies to an accelerator do not block."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("video_BCFHW", "t_B", "noise_BCFHW")}
        pinned |= {"texts": _pinned(self.texts), "images": _pinned(self.images)}
        return replace(self, fields={name: tensor.pin_memory() for name, tensor in self.fields.items()}, **pinned)


def _pinned(told: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    return {slot: tuple(x.pin_memory() if isinstance(x, Tensor) else x for x in each) for slot, each in told.items()}


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
        examples.append(example_of(recipe, sample, functools.partial(_keyed, train.seed, step, key)))
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


def example_of(recipe: Recipe, sample: LatentSample, draw: Draw) -> Example:
    """What the recipe's method makes of a sample, with the states of its caption in its place where it carries them."""
    example = method_class(recipe).example(recipe, sample, draw)
    if TEXT_STATES not in sample.fields:
        return example
    states_LD = torch.from_numpy(np.array(sample.fields[TEXT_STATES]))  # a copy: what is mapped cannot be written
    texts = {slot: states_LD if text == sample.caption else text for slot, text in example.texts.items()}
    return replace(example, texts=texts)


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


def stored_fields(recipe: Recipe) -> tuple[str, ...]:
    """What a training reads beside latents: what its method needs, and states that take the text encoder's place."""
    own = method_class(recipe).stored_fields(recipe)
    return (*own, TEXT_STATES) if recipe.train.text_states == "stored" and TEXT_STATES not in own else own


@dataclass(frozen=True)
class KnownStates:
    """What encoders made once, in float32 on the host, so that no rank needs them: states (L, D) of texts that no
    sample has, and tokens (L, D) of a grey picture. None: the encoder is needed.
    """

    texts: Mapping[str, Tensor] | None = None
    grey_LD: Tensor | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """For a recipe; nothing is encoded where the dataset does not have the rest.

        Raises:
            InputError: an encoder is missing.
        """
        encoders, method, stored = recipe.encoders, method_class(recipe), stored_fields(recipe)
        texts = grey_LD = None
        if TEXT_STATES in stored:
            untold = ["", *(text for text in method.untold.texts.values() if isinstance(text, str))]
            encoder = TextEncoder(encoders.text_encoder, encoders.tokenizer, layers=method.text_layers(recipe))
            texts = {text: encoder.encode([text])[0] for text in dict.fromkeys(untold)}
        if not IMAGE_TOKENS.isdisjoint(stored) and "image_encoder" in method.needs:
            grey_LD = ImageEncoder(image_encoder_place(recipe)).grey_LD
        return cls(texts, grey_LD)


class FrozenStates:
    """What frozen encoders make of texts and pictures; of a caption once, while it stays among the last `TEXT_CACHE`.

    Args:
        text: None where a dataset has the states of its captions, and ``known`` those of other texts.
        image: where the recipe's method needs one.
    """

    def __init__(
        self,
        text: Encoder | None,
        image: ImageEncoder | None = None,
        known: KnownStates | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._encoder, self._image, self._device, self._dtype = text, image, device, dtype
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        texts, grey_LD = (known.texts or {}, known.grey_LD) if known else ({}, None)
        self._known = {text: states_LD.to(device, dtype) for text, states_LD in texts.items()}
        self._grey_LD = None if grey_LD is None else grey_LD.to(device, dtype)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        known: KnownStates | None = None,
    ) -> Self:
        """With the encoders that a recipe names, or what is ``known`` in their place (None: it is made here).

        Raises:
            InputError: one is missing.
        """
        encoders, method = recipe.encoders, method_class(recipe)
        known = known or KnownStates.of(recipe)
        text = image = None
        if known.texts is None:
            text = TextEncoder(encoders.text_encoder, encoders.tokenizer, device, dtype, method.text_layers(recipe))
        if known.grey_LD is None and "image_encoder" in method.needs:
            image = ImageEncoder(image_encoder_place(recipe), device, dtype)
        return cls(text, image, known, device, dtype)

    @property
    def loaded(self) -> tuple[Encoder | None, ImageEncoder | None]:
        """The encoders that are in memory."""
        return self._encoder, self._image

    def __call__(
        self, texts: Mapping[str, Sequence[Text]], images: Mapping[str, Sequence[Picture]]
    ) -> dict[str, Tensor]:
        """(B, L, D) by slot, on the encoders' device."""
        states = {slot: self.texts(captions) for slot, captions in texts.items()}
        return states | {slot: self._tokens(pictures) for slot, pictures in images.items()}

    def texts(self, captions: Sequence[Text]) -> Tensor:
        """Text states (B, L, D)."""
        asked = [caption for caption in captions if isinstance(caption, str) and caption not in self._known]
        missing = [caption for caption in dict.fromkeys(asked) if caption not in self._kept]
        if missing:
            if self._encoder is None:
                raise InputError(
                    f"text {missing[0][:60]!r}: the dataset has no states of it, and no text encoder is loaded; "
                    "--set train.text_states=encoded loads one"
                )
            with torch.no_grad():
                self._kept.update(zip(missing, self._encoder.encode(missing).unbind(0), strict=True))
        for caption in asked:
            self._kept.move_to_end(caption)
        states_BLD = torch.stack([self._states(caption) for caption in captions])
        while len(self._kept) > TEXT_CACHE:
            self._kept.popitem(last=False)
        return states_BLD

    def _states(self, caption: Text) -> Tensor:
        if isinstance(caption, Tensor):
            return upload(caption, self._device, self._dtype)
        return self._known[caption] if caption in self._known else self._kept[caption]

    def _tokens(self, pictures: Sequence[Picture]) -> Tensor:
        if self._grey_LD is None:
            assert self._image is not None, "the method shows pictures to an encoder that it does not need"
            return self._image.tokens(pictures)
        if any(isinstance(picture, np.ndarray) for picture in pictures):
            raise InputError("a picture: the dataset has no tokens of it, and no image encoder is loaded")
        rows = [
            upload(picture, self._device, self._dtype) if isinstance(picture, Tensor) else self._grey_LD
            for picture in pictures
        ]
        return torch.stack(rows)


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
