"""TRIP (arXiv 2403.17005): a shortcut path with the noise that the picture implies, and a residual path through a UNet.

The first half of this file reads beside the paper's section 3; numbers are its equations'. There is no published code:
what the paper leaves open is ours, and said where it is decided. Frames are counted from 1 as there, steps from 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn

from cinemo.config import Part, Recipe, SampleConfig, TrainConfig
from cinemo.diffusion.guidance import Sampling
from cinemo.diffusion.schedule import NoiseSchedule, noise_schedule
from cinemo.media.transforms import prepare_image
from cinemo.methods.base import Draw, Encoders, Example, Method, Reduction, chance, training_loss
from cinemo.methods.controls import control
from cinemo.methods.sampling import calls, long_config, solved
from cinemo.methods.sampling_controls import FastSampling, LongVideo
from cinemo.methods.trip_backbones import BACKBONES
from cinemo.networks.dynamicrafter_unet import DynamiCrafterConfig
from cinemo.networks.features import DeepFeatures
from cinemo.networks.lavie_unet import UNetConfig
from cinemo.networks.noise_fusion import FusionConfig, TemporalNoiseFusion
from cinemo.networks.weights import load_network, resolve
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator

# --- section 3.2: the image noise prior ------------------------------------------------------------------------------


def image_noise_prior(schedule: NoiseSchedule, z_t: Tensor, z_1: Tensor, t: Tensor | int) -> Tensor:
    """r = (z_t - sqrt(a_t) z_0^1) / sqrt(1 - a_t) (equation 8): the noise of every frame if each were the picture.

    On frame 1 it is the noise itself. Elsewhere it is off by C = sqrt(a_t / (1 - a_t)) (z_0 - z_0^1) (equation 5),
    which reaches a hundred times the difference at small t: hence float32 at least.

    Args:
        z_t: (B, C, N, h, w), noised latents as the schedule has them.
        z_1: (B, C, 1, h, w), the picture's clean latent, on the same scale.
        t: the same step for all frames, an int or (B,).
    """
    return schedule.noise_in(z_t.to(torch.promote_types(z_t.dtype, torch.float32)), z_1, t)


def reference_output(schedule: NoiseSchedule, z_t: Tensor, z_1: Tensor, t: Tensor | int) -> Tensor:
    """The image noise prior as a network's output: r, or v = sqrt(a_t) r - sqrt(1 - a_t) z_0^1, as it predicts.

    Arguments as `image_noise_prior` has them.
    """
    return schedule.target(z_1.expand_as(z_t), image_noise_prior(schedule, z_t, z_1, t), t)


def noise_as_output(schedule: NoiseSchedule, z_t: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
    """What a network would have returned that finds this noise in z_t: the noise, or v where there is some signal."""
    if schedule.prediction == "epsilon":
        return noise
    as_noise = replace(schedule, prediction="epsilon", clean_scale=None)  # x_0 as it stands at step t
    z_0, _ = as_noise.predict_x0_eps(z_t, noise, t)
    return replace(as_noise, prediction=schedule.prediction).target(z_0, noise, t)


# --- section 3.3: temporal residual learning -------------------------------------------------------------------------


def linear_fusion(reference: Tensor, residual: Tensor, lambda_N: Tensor) -> Tensor:
    """lambda^i r^i + (1 - lambda^i) d^i (equation 9) of (B, C, N, h, w) and one weight for each frame.

    As the weights sum to one, noise may be fused, or v, or x_0, with the same result. In x_0 it is lambda z_0^1 +
    (1 - lambda) x_0(d) at every step: a constant pull towards the standing picture.
    """
    weights = lambda_N.to(residual).view(1, 1, -1, 1, 1)
    return weights * reference + (1 - weights) * residual


def lambda_schedule(frames: int, start: float = 1.0, end: float = 0.0, device: torch.device | str = "cpu") -> Tensor:
    """(N,) float64: from ``start`` on frame 1 to ``end`` on frame N.

    The paper says "linear decay with respect to frame index" and no ends. 1 is exact on frame 1, where the reference is
    the noise, and 0 leaves the last frame to the network.
    """
    return start + (end - start) * torch.arange(frames, dtype=torch.float64, device=device) / max(frames - 1, 1)


Layout = Literal["trip", "te", "c", "replace"]
"""How the UNet sees the picture. ``trip``: before the N noised frames, N + 1 in all; ``te``: behind them (the paper's
ablation TRIP_TE); ``c``: beside each of them on the channels, which are twice as many (TRIP_C). ``replace``: in the
place of frame 1, N in all, of which N - 1 are denoised (ConsistI2V, arXiv 2402.04324): what stands for frame 1 in the
output is the reference, which is exact there, and the loss leaves it out.

In the first three frame 1 is there twice, clean and noised, as the paper writes it."""


def unet_input(layout: Layout, z_1: Tensor, z_t: Tensor) -> Tensor:
    """The residual path's input, {z_0^1, z_t^1, ..., z_t^N} for ``trip``, from (B, C, 1, h, w) and (B, C, N, h, w)."""
    if layout == "c":
        return torch.cat([z_t, z_1.expand_as(z_t)], dim=1)
    if layout == "te":
        return torch.cat([z_t, z_1], dim=2)
    return torch.cat([z_1, z_t[:, :, 1:] if layout == "replace" else z_t], dim=2)


def unet_output(layout: Layout, output: Tensor) -> Tensor:
    """What it says of the N frames: without its answer for the picture, where that was a frame more."""
    if layout == "trip":
        return output[:, :, 1:]
    return output[:, :, :-1] if layout == "te" else output


def replace_first(video: Tensor, z_1: Tensor) -> Tensor:
    """A sampled video (B, C, N, h, w) that begins with the given picture (B, C, 1, h, w) itself."""
    return torch.cat([z_1.to(video), video[:, :, 1:]], dim=2)


# --- recipes ---------------------------------------------------------------------------------------------------------


class TripUNet(Part):
    """The residual path."""

    backbone: Literal["lavie", "dynamicrafter"] = Field("lavie", description="whose UNet")
    unet: UNetConfig | DynamiCrafterConfig = Field(UNetConfig(), validate_default=True, description="its arguments")
    text_layers: int | None = Field(None, ge=1, description="layers of the text encoder that run; null: all")
    layout: Layout = Field("trip", description="where the UNet sees the picture: a frame before, behind, ...")

    @field_validator("unet", mode="before")
    @classmethod
    def _of_backbone(cls, value: Any, info: ValidationInfo) -> Any:
        backbone = info.data.get("backbone")  # None: it was refused
        return UNetConfig() if backbone is None else BACKBONES[backbone].config.model_validate(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        expected = self.unet.out_channels * (2 if self.layout == "c" else 1)
        if self.unet.in_channels != expected:
            raise ValueError(
                f"unet.in_channels is {self.unet.in_channels} with layout {self.layout} and "
                f"{self.unet.out_channels} latent channels (unet.out_channels), expected {expected}"
            )
        return self


class TripModel(TripUNet):
    """TRIP: with the fusion module of section 3.4."""

    fusion: FusionConfig = FusionConfig()
    tnf_space: Literal["noise", "output"] = Field(
        "noise",
        description="what the fusion module merges: noise, as in the paper; output: what the UNet predicts, which is "
        "the better one of v",
    )
    tnf_ref_scale: bool = Field(
        False, description="give the fusion module the reference times sqrt(1 - a_t), which stays small"
    )


class TripLinearModel(TripUNet):
    """TRIP^W: with equation 9."""

    lambda_start: float = Field(1.0, ge=0, le=1, description="share of the reference noise on frame 1")
    lambda_end: float = Field(0.0, ge=0, le=1, description="and on the last frame; linear between them")


class TripTrain(TrainConfig):
    """Optimisation (section 4.1): the UNet learns at ``lr``."""

    fusion_lr: float = Field(2e-4, gt=0, description="learning rate of the fusion module")


class TripSample(SampleConfig):
    replace_first: bool = Field(True, description="the video begins with the picture itself, not with its sample")


class TripRecipe(Recipe):
    """A run of TRIP."""

    method: str = "trip"
    model: TripModel = TripModel()
    train: TripTrain = TripTrain()
    sample: TripSample = TripSample()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.diffusion.zero_terminal_snr and self.model.tnf_space == "noise":
            raise ValueError(
                "diffusion.zero_terminal_snr is true, but the fusion module works on noise, which says nothing about "
                "the data at a step without signal; set model.tnf_space=output, or use method trip-w"
            )
        return self


class TripLinearRecipe(Recipe):
    """A run of TRIP^W."""

    method: str = "trip-w"
    model: TripLinearModel = TripLinearModel()
    sample: TripSample = TripSample()


class TripControls(FastSampling, LongVideo):
    """How much moves cannot be asked."""

    replace_first: bool | None = control(
        None, "begin with the picture itself, not with what is sampled for it", title="Keep the picture", place="folded"
    )


# --- the methods -----------------------------------------------------------------------------------------------------


class _Trip(Method):
    """What TRIP and TRIP^W share: all but the fusion of the two paths. Plain latents of all frames are diffused.

    Args:
        networks: by part.
        schedule: noise schedule of training and sampling.
        min_snr_gamma: weighs the losses, see `NoiseSchedule.min_snr_weights`; None is the paper's equation 10.
    """

    controls_type: ClassVar[type[FastSampling]] = TripControls
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    unet: Any  # see `Backbone`

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        schedule: NoiseSchedule,
        model: TripUNet,
        sample: TripSample,
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        for part in self.parts:
            setattr(self, part, networks[part])
        self.schedule, self.model, self.sample, self.min_snr_gamma = schedule, model, sample, min_snr_gamma
        for name, parameter in self.unet.named_parameters():
            if BACKBONES[model.backbone].is_unused(name):
                parameter.requires_grad_(False)

    @classmethod
    def latent_channels(cls, recipe: Recipe) -> int:
        return _residual_path(recipe).unet.out_channels

    @classmethod
    def text_width(cls, recipe: Recipe) -> int:
        model = _residual_path(recipe)
        return BACKBONES[model.backbone].text_width(model.unet)

    @classmethod
    def text_layers(cls, recipe: Recipe) -> int | None:
        return _residual_path(recipe).text_layers

    @classmethod
    def fresh_networks(cls, recipe: Recipe) -> dict[str, nn.Module]:
        model = _residual_path(recipe)
        return {"unet": BACKBONES[model.backbone].network(**model.unet.model_dump())}

    @classmethod
    def load_network(
        cls, recipe: Recipe, part: str, location: str, dtype: torch.dtype | None = None, base: bool = False
    ) -> nn.Module:
        """A base of layout ``c`` may be a UNet for the noised latents alone: what it is given beside them adds nothing
        at first."""
        model = _residual_path(recipe)
        return BACKBONES[model.backbone].load(model.unet, location, dtype, base)

    @classmethod
    def of(cls, recipe: Recipe, networks: Mapping[str, nn.Module]) -> Self:
        sample = cast(TripSample, recipe.sample)
        model, schedule = _residual_path(recipe), noise_schedule(recipe.diffusion)
        return cls(networks, schedule, model, sample, recipe.train.min_snr_gamma)

    @classmethod
    def example(cls, recipe: Recipe, sample: LatentSample, draw: Draw) -> Example:
        """Prompts are dropped for classifier-free guidance, of which the paper does not speak."""
        return Example({}, {"text": "" if chance(draw, "drop", recipe.train.prompt_dropout) else sample.caption})

    @classmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Condition:
        return Condition(image=video_BCFHW[:, :, 0], text=states["text"])

    @classmethod
    def learns(cls, name: str, trainable: str) -> bool:
        """An image model has no fusion module either."""
        of_unet = any(each.is_temporal(name) and not each.is_unused(name) for each in BACKBONES.values())
        return trainable == "temporal" and (name.startswith("fusion.") or of_unet)

    def target(self, batch: LatentBatch) -> Tensor:
        """z_0 times the schedule's ``data_scale``: (B, C, N, h, w), float32."""
        return self._scaled(batch.video_BCFHW.float())

    def forward(
        self,
        batch: LatentBatch,
        t_B: Tensor,
        noise_BCFHW: Tensor,
        reduction: Reduction = "mean",
        weighted: bool = True,
    ) -> Tensor:
        """Equation 10: both paths and their fusion learn from one error. A network that predicts v learns that of v.

        Args:
            batch: latents of N frames and their condition.
            t_B: (B,) steps 0..T-1.
            noise_BCFHW: (B, C, N, h, w), N(0, 1).
        """
        z_0, noise = self.target(batch), noise_BCFHW.float()
        z_t = self.schedule.add_noise(z_0, noise, t_B)  # equation 1
        output, target = self.predict(z_t, t_B, batch.condition), self.schedule.target(z_0, noise, t_B)
        if self.model.layout == "replace":  # frame 1 is no prediction
            output, target = output[:, :, 1:], target[:, :, 1:]
        return training_loss(output, target, self.schedule, t_B, reduction, self.min_snr_gamma if weighted else None)

    def ready(self, condition: Condition) -> Condition:
        """A condition for many calls of `predict`: keys and values of its text, made once, in the text's place."""
        condition = condition.to(next(self.unet.parameters()).device)
        keys_values = self.unet.keys_values(condition["text"].to(self.unet.dtype))
        return Condition(image=condition["image"], text=keys_values)

    def predict(self, x_t: Tensor, t: Tensor | int, condition: Condition, deep: DeepFeatures | None = None) -> Tensor:
        """The fused noise (or v) of all frames, float32: guidance and solvers know of one network.

        ``condition``: as it is, or `ready`. ``deep``: inner features of the UNet; the fusion is made at every step.
        """
        condition = condition.to(x_t.device)
        z_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        z_1, text, dtype = self._picture(condition, z_t), condition["text"], self.unet.dtype
        output = self.unet(
            unet_input(self.model.layout, z_1, z_t).to(dtype),
            _step(t, x_t.device),
            text.to(dtype) if isinstance(text, Tensor) else text,
            deep=deep,
        )
        fused = self.fused(unet_output(self.model.layout, output).to(z_t.dtype), z_t, z_1, t)
        if self.model.layout != "replace":
            return fused
        return replace_first(fused, reference_output(self.schedule, z_t[:, :, :1], z_1, t))

    @abstractmethod
    def fused(self, residual: Tensor, z_t: Tensor, z_1: Tensor, t: Tensor | int) -> Tensor:
        """Both paths in one, (B, C, N, h, w) as the UNet's own output.

        Args:
            residual: that of the UNet for the N frames.
            z_t, z_1: as `image_noise_prior` has them.
        """

    def asked(
        self,
        encoders: Encoders,
        video_BCFHW: Tensor,
        picture_HWC: np.ndarray,
        prompts: Sequence[str],
        controls: Sequence[Mapping[str, Any]],
    ) -> Condition:
        image_BCHW = video_BCFHW[:, :, 0].expand(len(prompts), -1, -1, -1)
        return Condition(image=image_BCHW, text=encoders.text.encode(prompts))

    def prepare(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]
    ) -> tuple[Sampling, int]:
        seed, steps = settings["seed"], int(settings["steps"])
        posterior = keyed_generator(seed, "image") if recipe.encoders.latent == "sample" else None
        image_BCHW = encoders.vae.encode(prepare_image(inputs["image"], recipe.data.size)[None], posterior)
        text_BLD, negative_BLD = encoders.text.encode([settings["prompt"], settings["negative_prompt"]]).chunk(2)
        channels, h, w = image_BCHW.shape[1:]
        shape = self.target_shape((channels, recipe.data.frames, h, w))
        noise = torch.randn(1, *shape, generator=keyed_generator(seed, "noise")).to(image_BCHW.device)
        wanted = {name: settings[name] for name in ("replace_first", "solver", "reuse_features")}
        wanted["guidance_interval"] = tuple(settings["guidance_interval"])
        wanted["long"] = long_config(self.sample, settings)
        frames = settings.get("frames", recipe.data.frames)
        sample = self.sample.model_copy(update=wanted)
        asked = type(self)(self.networks, self.schedule, self.model, sample)
        scale, fresh = float(settings["guidance_scale"]), keyed_generator(seed, "fresh noise")
        condition = Condition(image=image_BCHW, text=text_BLD)
        sampling = asked.sampling(condition, Condition(text=negative_BLD), noise, steps, scale, fresh, frames)
        return sampling, calls(sample, steps, recipe.data.frames, frames)

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
        """Noise -> video latents (B, C, N, h, w), scaled: ``steps`` queries (more for more frames), each for the fused
        output.

        Branches differ in their text alone; the reference is the same in both, so guidance moves frame i by
        1 - lambda^i of what it would (TRIP^W).

        Args:
            noise: N(0, 1), float32: the sampler's arithmetic runs in its dtype.
            untold: ``text`` of the unconditional branch; not needed where ``guidance_scale`` is 1.
            generator: of the fresh noise that ``sample.eta`` asks for.
        """
        if guidance_scale > 1 and untold is None:
            raise InputError(f"guidance scale is {guidance_scale}, expected text states of the negative prompt")
        negative = condition["text"] if untold is None else untold["text"].to(condition["text"])
        branches = (Condition(condition, text=negative), condition)
        scales = (guidance_scale,)
        still = self._scaled(condition["image"][:, :, None].to(noise)).expand_as(noise)
        z_0 = yield from solved(
            noise, self.schedule, self.sample, steps, branches, scales, self.ready, generator, frames, still
        )
        video = z_0 / self.schedule.data_scale
        return replace_first(video, condition["image"][:, :, None]) if self.sample.replace_first else video

    def _picture(self, condition: Condition, like: Tensor) -> Tensor:
        """z_0^1 (B, C, 1, h, w) on the scale of what is diffused."""
        return self._scaled(condition["image"][:, :, None].to(like))

    def _scaled(self, latents: Tensor) -> Tensor:
        return latents if self.schedule.data_scale == 1 else latents * self.schedule.data_scale


class TripLinearMethod(_Trip):
    """TRIP^W, the paper's ablation: both paths by equation 9, on any schedule and prediction."""

    name: ClassVar[str] = "trip-w"
    recipe_type: ClassVar[type[Recipe]] = TripLinearRecipe
    parts: ClassVar[tuple[str, ...]] = ("unet",)
    model: TripLinearModel

    def fused(self, residual: Tensor, z_t: Tensor, z_1: Tensor, t: Tensor | int) -> Tensor:
        lambda_N = lambda_schedule(z_t.shape[2], self.model.lambda_start, self.model.lambda_end, z_t.device)
        return linear_fusion(reference_output(self.schedule, z_t, z_1, t), residual, lambda_N)


class TripMethod(_Trip):
    """TRIP: both paths by the Temporal Noise Fusion module (equation 11).

    It merges noise, as in the paper. For a network that predicts v that is the wrong space: near pure noise both paths
    hold the same noise to within sqrt(a_t), and what the module changes in it counts 1 / sqrt(a_t) times in v, up to
    150, so that its gradients drown the UNet's (12.7 beside 0.6 in norm, on rendered clips). Where weights sum to one v
    may be merged as well (`linear_fusion`), and so it may be here.
    """

    name: ClassVar[str] = "trip"
    recipe_type: ClassVar[type[Recipe]] = TripRecipe
    parts: ClassVar[tuple[str, ...]] = ("unet", "fusion")
    model: TripModel
    fusion: TemporalNoiseFusion

    @classmethod
    def fresh_networks(cls, recipe: Recipe) -> dict[str, nn.Module]:
        return {**super().fresh_networks(recipe), "fusion": TemporalNoiseFusion(**_fusion_arguments(recipe))}

    @classmethod
    def load_network(
        cls, recipe: Recipe, part: str, location: str, dtype: torch.dtype | None = None, base: bool = False
    ) -> nn.Module:
        """The fusion module of a base is the one in a bundle's ``fusion/``, else it is fresh."""
        if part == "unet":
            return super().load_network(recipe, part, location, dtype, base)
        arguments = _fusion_arguments(recipe)
        if base and not (resolve(location) / part).is_dir():
            return TemporalNoiseFusion(**arguments).to(dtype)
        with torch.device("meta"):
            fusion = TemporalNoiseFusion(**arguments)
        load_network(fusion, location, part, dtype)
        return fusion

    @classmethod
    def learning_rate(cls, name: str, train: TrainConfig) -> float:
        """Of a parameter (``unet.x``): the UNet is fine-tuned slowly, the fusion module is new (section 4.1)."""
        return cast(TripTrain, train).fusion_lr if name.startswith("fusion.") else train.lr

    def fused(self, residual: Tensor, z_t: Tensor, z_1: Tensor, t: Tensor | int) -> Tensor:
        schedule, in_noise = self.schedule, self.model.tnf_space == "noise"
        reference = (image_noise_prior if in_noise else reference_output)(schedule, z_t, z_1, t)
        if self.model.tnf_ref_scale:
            reference = schedule.add_noise(torch.zeros_like(reference), reference, t)
        if not in_noise:
            fused: Tensor = self.fusion(residual, reference, _step(t, z_t.device))
            return fused
        noise = self.fusion(schedule.predict_x0_eps(z_t, residual, t)[1], reference, _step(t, z_t.device))
        return noise_as_output(schedule, z_t, noise, t)


def _step(t: Tensor | int, device: torch.device) -> Tensor:
    """A step for a network: as a tensor, or a compiler would build the number in."""
    return t if isinstance(t, Tensor) else torch.full((), t, device=device)


def _residual_path(recipe: Recipe) -> TripUNet:
    if not isinstance(recipe.model, TripUNet):
        raise TypeError(f"recipe {recipe.name} is a {type(recipe).__name__}, expected one of TRIP")
    return recipe.model


def _fusion_arguments(recipe: Recipe) -> dict[str, Any]:
    model = cast(TripModel, recipe.model)
    patch = model.fusion.patch_for(*(side // 8 for side in recipe.data.size))  # cells, of the VAE
    return model.fusion.model_dump() | {"channels": model.unet.out_channels, "patch": patch}
