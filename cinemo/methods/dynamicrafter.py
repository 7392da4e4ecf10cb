"""DynamiCrafter (arXiv 2310.12190): what a picture shows, as tokens beside the text, and what it looks like exactly, as
channels beside the noisy latents.

Where paper and published code differ, the published weights decide: the gate of the image tokens is tanh(alpha) + 1
where section 3.2 has tanh, and guidance takes fresh noise in every step (eta 1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cinemo.config import MOTION_BUCKETS, Part, Recipe, SampleConfig, TrainConfig
from cinemo.diffusion.ddim import timesteps
from cinemo.diffusion.guidance import Sampling
from cinemo.diffusion.schedule import NoiseSchedule, noise_schedule
from cinemo.media.stills import frame_of
from cinemo.media.transforms import prepare_image
from cinemo.methods.base import Draw, Encoders, Example, Method, Published, Reduction, training_loss
from cinemo.methods.controls import control
from cinemo.methods.dynamicrafter_weights import import_dynamicrafter
from cinemo.methods.sampling import calls, long_config, solved
from cinemo.methods.sampling_controls import LongVideo, MotionStrength
from cinemo.networks.dynamicrafter_unet import DynamiCrafterConfig, DynamiCrafterUNet, is_image_context, is_temporal
from cinemo.networks.dynamicrafter_weights import Base, has_resampler, load_resampler, load_unet, save_published
from cinemo.networks.features import DeepFeatures
from cinemo.networks.frozen import Picture
from cinemo.networks.resampler import Resampler, ResamplerConfig
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator

FPS = 24  # of a usual clip, where frames in a second are asked for


class DynamiCrafterModel(Part):
    """The networks, what the frozen encoders give them, and what they are told of a video's speed."""

    unet: DynamiCrafterConfig = DynamiCrafterConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    text_layers: int | None = Field(23, ge=1, description="layers of the text encoder that run; null: all")
    image_tokens: int = Field(257, ge=1, description="tokens that the image encoder makes of a picture")
    rate: Literal["stride", "fps"] = Field(
        "stride", description="what it is told: the interval of a clip's frames, or how many it has in a second"
    )


class DynamiCrafterTrain(TrainConfig):
    """Optimisation (section 4.1), what a sample may go without, and where its image tokens come from."""

    prompt_dropout: float = Field(0.0, ge=0, le=0, description="not used: see condition_dropout")
    condition_dropout: float = Field(
        0.05, ge=0, le=1 / 3, description="share of samples without prompt, without picture, and without either"
    )
    condition_frame: Literal["random", "first"] = Field(
        "random", description="which frame of a clip is the given picture; first is worse (table 3)"
    )
    image_tokens: Literal["encoded", "stored"] = Field(
        "encoded", description="made in training of stored frames, or read: a field of frames, or of tokens"
    )
    image_values: Literal["zero", "published"] = Field(
        "zero", description="of a fresh start: zero leaves the text-to-video model as it is; published: drawn"
    )
    context_init: str | None = Field(
        None,
        description="weights of an earlier stage whose query transformer and attention to its tokens a training "
        "begins with, beside those of init; null: init's, or fresh ones",
    )
    trainable: Literal["all", "temporal", "lora", "spatial", "context"] = Field(  # type: ignore[assignment]
        "spatial",
        description="what is trained: spatial: all but the layers along time (stages 2 and 3); context: the query "
        "transformer and what attends to its tokens, but not how much (stage 1); all: as the published fine-tuning; "
        "temporal; lora",
    )


class DynamiCrafterSample(SampleConfig):
    """Sampling defaults (the published code's)."""

    eta: float = Field(1.0, ge=0, le=1, description="fresh noise in each DDIM step; 0: none, 1: as much as DDPM")
    image_guidance_scale: float | None = Field(
        None, ge=1, description="of what the picture adds, beside guidance_scale of what the text adds; null: the same"
    )
    frame_rate: int = Field(3, ge=1, description="interval of frames, or frames in a second, as model.rate says")
    undo_rescale: bool = Field(
        False, description="divide the result by diffusion.dynamic_rescale's factor of the last step (not published)"
    )


class DynamiCrafterRecipe(Recipe):
    """A run of DynamiCrafter."""

    method: str = "dynamicrafter"
    model: DynamiCrafterModel = DynamiCrafterModel()
    train: DynamiCrafterTrain = DynamiCrafterTrain()
    sample: DynamiCrafterSample = DynamiCrafterSample()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        unet, resampler = self.model.unet, self.model.resampler
        if resampler.output_dim != unet.context_dim:
            raise ValueError(
                f"model.resampler.output_dim is {resampler.output_dim}, expected model.unet.context_dim = "
                f"{unet.context_dim}"
            )
        if resampler.video_length not in (None, self.data.frames):
            raise ValueError(
                f"model.resampler.video_length is {resampler.video_length}, expected data.frames = {self.data.frames}, "
                "or null for tokens that all frames share"
            )
        return self


class FrameRate(MotionStrength):
    """The speed that the network is told (section 3.3), and multi-condition guidance (equation 5)."""

    strength_of: ClassVar[str] = "frame_rate"

    frame_rate: float | None = control(
        None,
        "what the network is told of the video's speed: the frame interval of its training clips (model 256; larger = "
        "more motion), or their frames per second (others; smaller = more motion); it may lie between two of them",
        title="Frame rate",
        place="front",
        ge=1,
        le=60,
    )
    image_guidance_scale: float | None = control(
        None, "how closely to follow the picture, where it is not as the text", title="Follow the picture", ge=1, le=50
    )

    @classmethod
    def motion_values(cls, recipe: Recipe) -> tuple[str, Sequence[float]] | None:
        """A wider stride of frames is more motion, more of them in a second is less. Training knows whole strides; the
        embedding of a number is smooth between them."""
        strides = np.linspace(*recipe.data.frame_interval, MOTION_BUCKETS)
        told = strides if _own(recipe).model.rate == "stride" else np.maximum(FPS / strides, 1)
        return "frame_rate", [round(float(value), 2) for value in told]

    def settings(self, recipe: Recipe, inputs: Collection[str] = ()) -> dict[str, Any]:
        filled = super().settings(recipe, inputs)
        if filled["solver"] != "ddim" and recipe.diffusion.dynamic_rescale is not None:
            raise InputError(f"solver is {filled['solver']!r}; {recipe.name} has dynamic_rescale, which only ddim can")
        return filled


class DynamiCrafterControls(FrameRate, LongVideo):
    """What an animation can be asked."""


class DynamiCrafterMethod(Method):
    """Animation of a picture; see `cinemo.methods.base.Method` for the contract.

    Args:
        unet: sees latents of all frames and, beside their channels, those of the given picture.
        image_proj: the query transformer P.
        sample: of it, all but steps and guidance scale is used here.
        min_snr_gamma: weighs the losses, see `NoiseSchedule.min_snr_weights`; None is the paper's equation 4.
    """

    name: ClassVar[str] = "dynamicrafter"
    recipe_type: ClassVar[type[Recipe]] = DynamiCrafterRecipe
    controls_type: ClassVar[type[FrameRate]] = DynamiCrafterControls
    published: ClassVar[Mapping[str, Published]] = {"dynamicrafter": import_dynamicrafter}
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "image_encoder")
    untold: ClassVar[Example] = Example({}, {"text": ""}, {"image_tokens": None})
    parts: ClassVar[tuple[str, ...]] = ("unet", "image_proj")
    base: ClassVar[Base] = "video"  # what a training may begin from

    def __init__(
        self,
        unet: DynamiCrafterUNet,
        image_proj: Resampler,
        schedule: NoiseSchedule,
        sample: DynamiCrafterSample,
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.image_proj = unet, image_proj
        self.schedule, self.sample, self.min_snr_gamma = schedule, sample, min_snr_gamma

    @classmethod
    def latent_channels(cls, recipe: Recipe) -> int:
        return _own(recipe).model.unet.out_channels

    @classmethod
    def text_width(cls, recipe: Recipe) -> int:
        return _own(recipe).model.unet.context_dim

    @classmethod
    def text_layers(cls, recipe: Recipe) -> int | None:
        return _own(recipe).model.text_layers

    @classmethod
    def image_tokens(cls, recipe: Recipe) -> tuple[int, int]:
        model = _own(recipe).model
        return model.image_tokens, model.resampler.embedding_dim

    @classmethod
    def fresh_networks(cls, recipe: Recipe) -> dict[str, nn.Module]:
        model = _own(recipe).model
        return {
            "unet": DynamiCrafterUNet(**model.unet.model_dump()),
            "image_proj": Resampler(**model.resampler.model_dump()),
        }

    @classmethod
    def load_network(
        cls, recipe: Recipe, part: str, location: str, dtype: torch.dtype | None = None, base: bool = False
    ) -> nn.Module:
        own = _own(recipe)
        context = own.train.context_init if base else None
        if part == "image_proj":
            if base and context is None and not has_resampler(location):  # a text-to-video model
                return Resampler(**own.model.resampler.model_dump()).to(dtype)
            return load_resampler(own.model.resampler, context or location, dtype)
        kind = cls.base if base else None
        return load_unet(own.model.unet, location, dtype, kind, own.train.image_values, context)

    @classmethod
    def write_published(cls, recipe: Recipe, networks: Mapping[str, nn.Module], path: Path) -> None:
        """A checkpoint for the published code, which calls the speed of the 256 model another name."""
        save_published(path, networks["unet"], networks["image_proj"], _own(recipe).model.rate == "stride")

    @classmethod
    def of(cls, recipe: Recipe, networks: Mapping[str, nn.Module]) -> Self:
        unet, image_proj = networks["unet"], networks["image_proj"]
        assert isinstance(unet, DynamiCrafterUNet)
        assert isinstance(image_proj, Resampler)
        schedule, gamma = noise_schedule(recipe.diffusion), recipe.train.min_snr_gamma
        return cls(unet, image_proj, schedule, _own(recipe).sample, gamma)

    @classmethod
    def stored_fields(cls, recipe: Recipe) -> tuple[str, ...]:
        return (_STORED[cls.condition_frame(recipe), _own(recipe).train.image_tokens],)

    @classmethod
    def example(cls, recipe: Recipe, sample: LatentSample, draw: Draw) -> Example:
        """The given frame, drawn from the clip's own (section 3.3), its speed, and what is dropped.

        A sample whose frames are gone is one without a picture: its latents are shown all the same.
        """
        train, frames = _own(recipe).train, recipe.data.frames
        place = 0
        if cls.condition_frame(recipe) == "random":
            place = int(torch.randint(frames, (), generator=draw("condition frame")))
        without_text, without_image = dropped(
            float(torch.rand((), generator=draw("conditions"))), train.condition_dropout
        )
        return Example(
            {"frame": torch.tensor(place), "frame_rate": torch.tensor(_rate(recipe, sample))},
            {"text": "" if without_text else sample.caption},
            {"image_tokens": None if without_image else _stored_picture(sample, frames, place)},
        )

    @classmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Condition:
        rows = torch.arange(len(video_BCFHW), device=video_BCFHW.device)
        return Condition(
            image=video_BCFHW[rows, :, fields["frame"]],
            image_tokens=states["image_tokens"],
            text=states["text"],
            frame_rate=fields["frame_rate"],
        )

    @classmethod
    def learns(cls, name: str, trainable: str) -> bool:
        if trainable == "temporal":
            return is_temporal(name)
        if trainable == "context":
            return name.startswith("image_proj.") or (is_image_context(name) and not name.endswith(".alpha"))
        return not is_temporal(name)  # spatial

    def target(self, batch: LatentBatch) -> Tensor:
        video = batch.video_BCFHW.float()
        return video if self.schedule.data_scale == 1 else video * self.schedule.data_scale

    def forward(
        self,
        batch: LatentBatch,
        t_B: Tensor,
        noise: Tensor,
        reduction: Reduction = "mean",
        weighted: bool = True,
    ) -> Tensor:
        """The error (equation 4) of the noise or v that the schedule asks for; ``noise``: (B, C, F, h, w)."""
        video, noise = self.target(batch), noise.float()
        output = self.predict(self.schedule.add_noise(video, noise, t_B), t_B, batch.condition)
        target, gamma = self.schedule.target(video, noise, t_B), self.min_snr_gamma if weighted else None
        return training_loss(output, target, self.schedule, t_B, reduction, gamma)

    def ready(self, condition: Condition) -> Condition:
        """A condition for many calls of `predict`: the keys and values of text and image tokens in their place."""
        condition = condition.to(next(self.unet.parameters()).device)
        kept = {name: value for name, value in condition.items() if name not in ("text", "image_tokens")}
        return Condition(kept, context=self.unet.keys_values(*self._context(condition)))

    def predict(self, x_t: Tensor, t: Tensor | int, condition: Condition, deep: DeepFeatures | None = None) -> Tensor:
        """``condition``: as it is, or `ready`. Visual detail guidance: the picture's latent stands beside each frame's
        noisy one, never noised, never scaled, in every branch."""
        condition = condition.to(x_t.device)
        if not isinstance(t, Tensor):  # a compiler would build a number in
            t = torch.full((), t, device=x_t.device)
        frames = x_t
        if self.unet.in_channels > x_t.shape[1]:  # else stage 2, before visual detail guidance
            shown = visual_detail(condition["image"], x_t.shape[2], condition.get("last_image"))
            frames = torch.cat([x_t, shown.to(x_t.dtype)], dim=1)
        made = (condition["context"], None) if "context" in condition else self._context(condition)
        output: Tensor = self.unet(frames.to(self.unet.dtype), t, *made, condition["frame_rate"], deep)
        return output

    def _context(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Text states, and the tokens of the query transformer: (B, F, Q, D), or (B, Q, D) for all frames."""
        dtype = self.unet.dtype
        return condition["text"].to(dtype), self.image_proj(condition["image_tokens"].to(dtype))

    def prepare(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]
    ) -> tuple[Sampling, int]:
        assert encoders.image is not None
        seed, steps = settings["seed"], int(settings["steps"])
        image_CHW = prepare_image(inputs["image"], recipe.data.size)
        text_BLD, negative_BLD = encoders.text.encode([settings["prompt"], settings["negative_prompt"]]).chunk(2)
        tokens_BLD, grey_BLD = encoders.image.tokens([_pixels(image_CHW), None]).chunk(2)
        condition = Condition(
            **self.given(recipe, encoders, inputs, settings),
            image_tokens=tokens_BLD,
            text=text_BLD,
            frame_rate=torch.tensor([settings["frame_rate"]], device=text_BLD.device),
        )
        wanted = {name: settings.get(name) for name in ("solver", "reuse_features", "image_guidance_scale")}
        wanted["guidance_interval"] = tuple(settings["guidance_interval"])
        wanted["long"] = long_config(self.sample, settings)
        frames = settings.get("frames")
        channels, h, w = condition["image"].shape[1:]
        shape = self.target_shape((channels, recipe.data.frames, h, w))
        noise = torch.randn(1, *shape, generator=keyed_generator(seed, "noise")).to(text_BLD.device)
        asked = type(self)(self.unet, self.image_proj, self.schedule, self.sample.model_copy(update=wanted))
        untold = Condition(text=negative_BLD, image_tokens=grey_BLD)
        scale, fresh = float(settings["guidance_scale"]), keyed_generator(seed, "fresh noise")
        sampling = asked.sampling(condition, untold, noise, steps, scale, fresh, frames)
        return sampling, calls(asked.sample, steps, recipe.data.frames, frames or recipe.data.frames)

    def asked(
        self,
        encoders: Encoders,
        video_BCFHW: Tensor,
        picture_HWC: np.ndarray,
        prompts: Sequence[str],
        controls: Sequence[Mapping[str, Any]],
    ) -> Condition:
        assert encoders.image is not None
        count, device = len(prompts), video_BCFHW.device
        fields = {
            "frame": torch.zeros(count, dtype=torch.long, device=device),
            "frame_rate": torch.tensor([values["frame_rate"] for values in controls], device=device),
        }
        tokens_BLD = encoders.image.tokens([picture_HWC]).expand(count, -1, -1)
        states = {"text": encoders.text.encode(prompts), "image_tokens": tokens_BLD}
        return self.condition(video_BCFHW.expand(count, -1, -1, -1, -1), fields, states)

    @classmethod
    def controls_like(cls, recipe: Recipe, sample: LatentSample) -> dict[str, Any]:
        return {"frame_rate": _rate(recipe, sample)}

    def given(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Latents (1, C, h, w) of the pictures that stand beside the noisy ones."""
        return {"image": picture_latent(recipe, encoders, inputs, "image", settings["seed"])}

    def sampling(
        self,
        condition: Condition,
        untold: Condition | None,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        generator: torch.Generator | None = None,
        frames: int | None = None,
    ) -> Sampling:
        """Noise -> video latents (B, C, F, h, w), scaled: ``steps`` queries, or more for more frames.

        Guidance has three branches (equation 5): neither text nor picture, the picture alone, both; with equal scales
        the middle one cancels out and is not asked. ``untold``: ``text`` and ``image_tokens`` of the first.
        """
        sample = self.sample
        scales = (sample.image_guidance_scale or guidance_scale, guidance_scale)
        if max(scales) > 1 and untold is None:
            raise InputError(f"guidance scale is {guidance_scale}, expected states of the unconditional branch")
        untold = Condition() if untold is None else untold.to(noise.device)
        alone = Condition(condition, **{name: value for name, value in untold.items() if name == "text"})
        branches = (Condition(condition, **untold), alone, condition)
        still = self.target(LatentBatch(condition["image"][:, :, None].expand_as(noise), condition))
        video = yield from solved(
            noise, self.schedule, sample, steps, branches, scales, self.ready, generator, frames, still
        )
        factor = self.schedule.data_scale
        if sample.undo_rescale and self.schedule.clean_scale is not None:
            # The published sampler leaves in its result the factor that clean latents had in its last step.
            factor *= float(self.schedule.clean_scale[timesteps(self.schedule, steps, sample.spacing)[-1]])
        return video if factor == 1 else video / factor

    @classmethod
    def condition_frame(cls, recipe: Recipe) -> str:
        return _own(recipe).train.condition_frame


def dropped(u: float, p: float) -> tuple[bool, bool]:
    """(without text, without picture) for a uniform ``u``: p of all samples lack the text, p both, p the picture."""
    return u < 2 * p, p <= u < 3 * p


def visual_detail(image_BCHW: Tensor, frames: int, last_image_BCHW: Tensor | None = None) -> Tensor:
    """Latents (B, C, F, h, w) to stand beside the noisy ones: the picture's at every frame; with a last picture each at
    its own end, and zeros between."""
    if last_image_BCHW is None:
        return image_BCHW[:, :, None].expand(-1, -1, frames, -1, -1)
    shown = image_BCHW.new_zeros(*image_BCHW.shape[:2], frames, *image_BCHW.shape[2:])
    shown[:, :, 0], shown[:, :, -1] = image_BCHW, last_image_BCHW
    return shown


# Field that a training reads, by ``train.condition_frame`` and ``train.image_tokens``.
_STORED = {
    ("random", "encoded"): "frames",
    ("random", "stored"): "frame_tokens",
    ("first", "encoded"): "first_frame",
    ("first", "stored"): "image_tokens",
}


def _stored_picture(sample: LatentSample, frames: int, place: int) -> Picture:
    for field, content in sample.fields.items():
        if field in ("frames", "first_frame"):
            return frame_of(content, frames if field == "frames" else 1, place)
        if field in ("frame_tokens", "image_tokens"):
            return torch.from_numpy((content[place] if field == "frame_tokens" else content).astype(np.float32))
    return None


def _rate(recipe: Recipe, sample: LatentSample) -> int:
    if _own(recipe).model.rate == "stride":
        return sample.frame_interval
    return max(1, int(sample.fps / sample.frame_interval))


def picture_latent(
    recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], name: str, seed: int
) -> Tensor:
    posterior = keyed_generator(seed, name) if recipe.encoders.latent == "sample" else None
    return encoders.vae.encode(prepare_image(inputs[name], recipe.data.size)[None], posterior)


def _pixels(image_CHW: Tensor) -> np.ndarray:
    """Of a prepared picture: what its stored frame would be, (H, W, 3) uint8."""
    pixels: np.ndarray = ((image_CHW / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels


def _own(recipe: Recipe) -> DynamiCrafterRecipe:
    if not isinstance(recipe, DynamiCrafterRecipe):
        raise TypeError(f"recipe {recipe.name} is a {type(recipe).__name__}, expected a DynamiCrafterRecipe")
    return recipe
