"""Cinemo (arXiv 2407.15642): diffuse motion residuals, with the image itself as the first frame inside the network.

`CinemoMethod.forward` reads beside the paper's Algorithm 1; the numbers in its comments are that algorithm's lines.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cinemo.config import MOTION_BUCKETS, Recipe, SampleConfig, TrainConfig
from cinemo.diffusion.dct import dct_init
from cinemo.diffusion.ddim import ddim_invert_steps
from cinemo.diffusion.guidance import Query, Sampling, guided
from cinemo.diffusion.schedule import NoiseSchedule, noise_schedule
from cinemo.media.motion import MotionScale, mean_adjacent_ssim, motion_bucket
from cinemo.media.transforms import prepare_image
from cinemo.methods.base import Draw, Encoders, Example, Method, Published, Reduction, chance, run, training_loss
from cinemo.methods.cinemo_weights import import_cinemo, import_lavie
from cinemo.methods.controls import MAX_PROMPT, Input, control
from cinemo.methods.sampling import calls, long_config, solved
from cinemo.methods.sampling_controls import FastSampling, LongVideo, MotionStrength
from cinemo.networks.features import DeepFeatures
from cinemo.networks.lavie_unet import LavieUNet, UNetConfig, is_temporal
from cinemo.networks.weights import load_unet
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator


class CinemoTrain(TrainConfig):
    """Optimisation (section 4.1), and what a sample may go without."""

    image_dropout: float = Field(0.0, ge=0, le=1, description="share of samples whose given frame is zeroed")
    motion_dropout: float = Field(0.0, ge=0, le=1, description="share of samples without a motion embedding")


class CinemoSample(SampleConfig):
    """Sampling defaults (sections 3.3 and 4.1; values the paper leaves open are the published code's)."""

    dct_init: bool = True
    dct_tau: int = Field(975, ge=0, description="diffusion step of the layout guidance")
    dct_keep: float = Field(0.23, ge=0, le=1, description="share of each axis that is kept as low frequency")
    dct_mode: Literal["spatial", "3d", "fft"] = Field(
        "spatial", description="spatial = published, 3d = the paper's text"
    )
    motion_bucket: int = Field(10, ge=0, lt=MOTION_BUCKETS)
    edit_guidance_scale: float = Field(1.0, ge=1, description="for editing: the published code's; the paper says 7.5")
    edit_dct_tau: int = Field(985, ge=0, description="for editing: the published code's step of the layout guidance")


class CinemoRecipe(Recipe):
    """A run of Cinemo."""

    method: str = "cinemo"
    model: UNetConfig = UNetConfig()
    train: CinemoTrain = CinemoTrain()
    sample: CinemoSample = CinemoSample()

    @model_validator(mode="after")
    def _noise_of_a_step(self) -> Self:
        for name in ("dct_tau", "edit_dct_tau"):
            if getattr(self.sample, name) >= self.diffusion.train_steps:
                raise ValueError(
                    f"sample.{name} is {getattr(self.sample, name)}, expected less than diffusion.train_steps = "
                    f"{self.diffusion.train_steps}"
                )
        return self


class CinemoControls(MotionStrength, LongVideo):
    """Motion intensity (section 3.2), DCTInit (3.3), and the source of motion transfer and editing (4.4)."""

    motion: ClassVar[str | None] = "motion_bucket"
    strength_of: ClassVar[str] = "motion_bucket"

    motion_bucket: int | None = control(
        None,
        "larger = more motion; 0 stays still",
        title="How much it moves",
        place="front",
        words={0: "almost still", 4: "gentle", 8: "moderate", 12: "lively", 16: "strong", 19: "maximum"},
        ge=0,
        le=MOTION_BUCKETS - 1,
    )
    dct_init: bool | None = control(
        None, "begin from the picture's own layout, so that less flickers", title="Steadier motion", place="folded"
    )
    source_prompt: str = control(
        "", "what the source video shows", title="Source prompt", of="source", max_length=MAX_PROMPT
    )

    def settings(self, recipe: Recipe, inputs: Collection[str] = ()) -> dict[str, Any]:
        """With a source video the defaults are the recipe's for editing, and the bucket is measured on it (None)."""
        values: dict[str, Any] = {}
        edits = "source" in inputs
        if edits and self.guidance_scale is None:
            values["guidance_scale"] = _own(recipe).sample.edit_guidance_scale
        filled = super().settings(recipe, inputs) | values
        if edits and self.motion_bucket is None and self.motion_strength is None:
            filled["motion_bucket"] = None
        if not edits:
            del filled["source_prompt"]
        elif "long_video" in filled:
            raise InputError(
                f"frames is {self.frames}, expected at most {recipe.data.frames} where a source video gives the motion"
            )
        return filled


class CinemoMethod(Method):
    """Motion residuals with DCTInit; see `cinemo.methods.base.Method` for the contract.

    Args:
        unet: its parameters are all that is trained.
        schedule: noise schedule of training and sampling.
        sample: of it, the DCTInit settings are used here.
        min_snr_gamma: weighs the losses, see `NoiseSchedule.min_snr_weights`; None is the paper's equation 3.
    """

    name: ClassVar[str] = "cinemo"
    recipe_type: ClassVar[type[Recipe]] = CinemoRecipe
    controls_type: ClassVar[type[FastSampling]] = CinemoControls
    inputs: ClassVar[Mapping[str, Input]] = {
        "source": Input(
            "video", "take the motion from this video; --image is its edited first frame, or any other picture"
        )
    }
    published: ClassVar[Mapping[str, Published]] = {"cinemo": import_cinemo, "lavie": import_lavie}
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    parts: ClassVar[tuple[str, ...]] = ("unet",)
    variants: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "bucket-03": {"motion_bucket": 3.0},
        "bucket-16": {"motion_bucket": 16.0},
    }
    noise_variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "plain noise": {"dct_init": False},
        "DCTInit, spatial": {"dct_mode": "spatial"},
        "DCTInit, 3d": {"dct_mode": "3d"},
        "FFT": {"dct_mode": "fft"},
    }

    def __init__(
        self, unet: LavieUNet, schedule: NoiseSchedule, sample: CinemoSample, min_snr_gamma: float | None = None
    ) -> None:
        super().__init__()
        if not 0 <= sample.dct_tau < schedule.train_steps:
            raise InputError(f"sample.dct_tau is {sample.dct_tau}, expected 0..{schedule.train_steps - 1}")
        self.unet = unet
        self.schedule = schedule
        self.sample = sample
        self.min_snr_gamma = min_snr_gamma

    @classmethod
    def latent_channels(cls, recipe: Recipe) -> int:
        return _own(recipe).model.in_channels

    @classmethod
    def text_width(cls, recipe: Recipe) -> int:
        return _own(recipe).model.cross_attention_dim

    @classmethod
    def fresh_networks(cls, recipe: Recipe) -> dict[str, nn.Module]:
        return {"unet": LavieUNet(**_own(recipe).model.model_dump())}

    @classmethod
    def load_network(
        cls, recipe: Recipe, part: str, location: str, dtype: torch.dtype | None = None, base: bool = False
    ) -> nn.Module:
        return load_unet(_own(recipe).model, location, dtype, motion_optional=base)

    @classmethod
    def of(cls, recipe: Recipe, networks: Mapping[str, nn.Module]) -> Self:
        unet = cast(LavieUNet, networks["unet"])
        return cls(unet, noise_schedule(recipe.diffusion), _own(recipe).sample, recipe.train.min_snr_gamma)

    @classmethod
    def example(cls, recipe: Recipe, sample: LatentSample, draw: Draw) -> Example:
        """The bucket, and what the network goes without in this step.

        Prompts are dropped for classifier-free guidance (section 4.1). That images and buckets may be is our choice:
        the network's input is then cat([0, M_t]) where Algorithm 1 has cat([z_1, M_t + z_1]), for the same residuals,
        and there is no motion embedding, as in LaVie; what either adds can then be guided as what a prompt adds.
        """
        train = _own(recipe).train
        fields = {
            "motion_bucket": torch.tensor(float(motion_bucket(sample.ssim, recipe.data.bucket_edges))),
            "image_given": torch.tensor(not chance(draw, "drop image", train.image_dropout)),
            "motion_given": torch.tensor(not chance(draw, "drop motion", train.motion_dropout)),
        }
        return Example(fields, {"text": "" if chance(draw, "drop", train.prompt_dropout) else sample.caption})

    @classmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Condition:
        return Condition(
            image=torch.where(fields["image_given"][:, None, None, None], video_BCFHW[:, :, 0], 0.0),
            text=states["text"],
            motion_bucket=torch.where(fields["motion_given"], fields["motion_bucket"], torch.nan),
        )

    @classmethod
    def target_shape(cls, latents_CFHW: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        channels, frames, rows, columns = latents_CFHW
        return channels, frames - 1, rows, columns

    @classmethod
    def learns(cls, name: str, trainable: str) -> bool:
        return trainable == "temporal" and is_temporal(name)

    def target(self, batch: LatentBatch) -> Tensor:
        """M = (z_2 - z_1, ..., z_N - z_1) times the schedule's ``data_scale``: (B, C, F-1, h, w), float32."""
        video = batch.video_BCFHW.float()
        motion = video[:, :, 1:] - video[:, :, :1]
        return motion if self.schedule.data_scale == 1 else motion * self.schedule.data_scale

    def forward(
        self,
        batch: LatentBatch,
        t_B: Tensor,
        noise_BCFHW: Tensor,
        reduction: Reduction = "mean",
        weighted: bool = True,
    ) -> Tensor:
        """The loss of one batch (scalar, float32), with ``reduction="none"`` that of every sample (B,).

        It is what is optimised: with ``min_snr_gamma``, the weighted error. Without ``weighted``, the plain one.

        Args:
            batch: latents of N frames and their condition (lines 2-4).
            t_B: (B,) steps 0..T-1 (line 6).
            noise_BCFHW: (B, C, N-1, h, w), N(0, 1) (line 7).
        """
        motion = self.target(batch)  # line 5
        noise = noise_BCFHW.float()
        motion_t = self.schedule.add_noise(motion, noise, t_B)  # line 8
        output = self.predict(motion_t, t_B, batch.condition)  # line 9
        target, gamma = self.schedule.target(motion, noise, t_B), self.min_snr_gamma if weighted else None
        return training_loss(output, target, self.schedule, t_B, reduction, gamma)  # line 10

    def start(self, condition: Condition, noise: Tensor) -> Tensor:
        """x_T: the noise, its low frequencies replaced by the image's layout where DCTInit is on (section 3.3)."""
        if not self.sample.dct_init:
            return noise
        alpha_bar_tau = float(self.schedule.alpha_bar[self.sample.dct_tau])
        z_1 = condition["image"][:, :, None].to(noise.device, noise.dtype)
        return dct_init(z_1, noise, alpha_bar_tau, self.sample.dct_keep, self.sample.dct_mode)

    def ready(self, condition: Condition) -> Condition:
        """A condition for many calls of `predict`: keys and values of its text, made once, in the text's place."""
        condition = condition.to(next(self.unet.parameters()).device)
        keys_values = self.unet.keys_values(condition["text"].to(self.unet.dtype))
        return Condition(image=condition["image"], text=keys_values, motion_bucket=condition["motion_bucket"])

    def predict(self, x_t: Tensor, t: Tensor | int, condition: Condition, deep: DeepFeatures | None = None) -> Tensor:
        """The network sees X_t = cat([z_1, z_1 + M_t]) along frames; its answer for z_1 itself is dropped (line 9).

        ``condition``: as it is, or `ready`. ``deep``: inner features of a nearby step, see
        `cinemo.networks.lavie_unet.DeepFeatures`.
        """
        condition = condition.to(x_t.device)
        dtype = self.unet.dtype
        if not isinstance(t, Tensor):  # a compiler would build a number in
            t = torch.full((), t, device=x_t.device)
        z_1, text = condition["image"][:, :, None].to(x_t.dtype), condition["text"]
        frames = torch.cat([z_1, z_1 + x_t], dim=2).to(dtype)
        text = text.to(dtype) if isinstance(text, Tensor) else text
        output: Tensor = self.unet(frames, t, text, condition["motion_bucket"], deep)
        return output[:, :, 1:]

    def clean(self, query: Query, output: Tensor) -> Tensor:
        z_1 = query.condition["image"][-1, :, None].to(output.device)
        return torch.cat([z_1, z_1 + super().clean(query, output)], dim=1)

    def asked(
        self,
        encoders: Encoders,
        video_BCFHW: Tensor,
        picture_HWC: np.ndarray,
        prompts: Sequence[str],
        controls: Sequence[Mapping[str, Any]],
    ) -> Condition:
        ids = [encoders.motion.motion_id(values["motion_bucket"]) for values in controls]
        return Condition(
            image=video_BCFHW[:, :, 0].expand(len(prompts), -1, -1, -1),
            text=encoders.text.encode(prompts),
            motion_bucket=torch.tensor(ids, device=video_BCFHW.device),
        )

    @classmethod
    def controls_like(cls, recipe: Recipe, sample: LatentSample) -> dict[str, Any]:
        return {"motion_bucket": motion_bucket(sample.ssim, recipe.data.bucket_edges)}

    def prepare(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]
    ) -> tuple[Sampling, int]:
        """With a ``source`` video (section 4.4: motion transfer and editing), noise is that of its motion residuals,
        found by DDIM inversion, and the bucket the one measured on it where ``settings`` has None."""
        source_FCHW = None if "source" not in inputs else _frames(inputs["source"], recipe)
        if settings["motion_bucket"] is None:
            assert source_FCHW is not None
            settings["motion_bucket"] = _measured_bucket(source_FCHW, encoders.motion)
        sampled, seed, steps = recipe.encoders.latent == "sample", settings["seed"], int(settings["steps"])
        posterior = keyed_generator(seed, "image") if sampled else None
        image_BCHW = encoders.vae.encode(prepare_image(inputs["image"], recipe.data.size)[None], posterior)
        text_BLD, negative_BLD = encoders.text.encode([settings["prompt"], settings["negative_prompt"]]).chunk(2)
        bucket_B = torch.tensor([encoders.motion.motion_id(settings["motion_bucket"])], device=image_BCHW.device)
        condition = Condition(image=image_BCHW, text=text_BLD, motion_bucket=bucket_B)
        wanted = {name: settings[name] for name in ("dct_init", "solver", "reuse_features")}
        wanted["guidance_interval"] = tuple(settings["guidance_interval"])
        wanted["long"] = long_config(self.sample, settings)
        frames = settings.get("frames", recipe.data.frames)
        channels, h, w = image_BCHW.shape[1:]
        shape = self.target_shape((channels, recipe.data.frames, h, w))
        noise = torch.randn(1, *shape, generator=keyed_generator(seed, "noise")).to(image_BCHW.device)
        if source_FCHW is not None:
            posterior = keyed_generator(seed, "source") if sampled else None
            video_BCFHW = encoders.vae.encode(source_FCHW, posterior).transpose(0, 1)[None]
            source_text_BLD = encoders.text.encode([settings["source_prompt"]])
            source = Condition(image=video_BCFHW[:, :, 0], text=source_text_BLD, motion_bucket=bucket_B)
            noise = run(self, self.inversion(video_BCFHW, source, steps))
            wanted["dct_tau"] = _own(recipe).sample.edit_dct_tau
        asked = CinemoMethod(self.unet, self.schedule, self.sample.model_copy(update=wanted))
        scale, fresh = float(settings["guidance_scale"]), keyed_generator(seed, "fresh noise")
        sampling = asked.sampling(condition, Condition(text=negative_BLD), noise, steps, scale, fresh, frames)
        return sampling, calls(asked.sample, steps, recipe.data.frames - 1, frames - 1)

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
        """Noise -> video latents (B, C, F, h, w), scaled, the first being the condition's image: ``steps`` queries.

        Further segments of a longer video have no first frame: their residuals follow those of the first one.

        Args:
            noise: N(0, 1) for frames 2..F, float32: the sampler's arithmetic runs in its dtype.
            untold: ``text`` of the unconditional branch, the only thing that it is told otherwise; not needed where
                ``guidance_scale`` is 1.
            generator: of fresh noise, where ``sample.eta`` or a longer video asks for it.
            frames: of the video; None: one more than the noise has.
        """
        if guidance_scale > 1 and untold is None:
            raise InputError(f"guidance scale is {guidance_scale}, expected text states of the negative prompt")
        negative = condition["text"] if untold is None else untold["text"].to(condition["text"])
        branches = (Condition(condition, text=negative), condition)
        x_T, scales = self.start(condition, noise), (guidance_scale,)
        residuals, still = None if frames is None else frames - 1, torch.zeros_like(noise)
        x_0 = yield from solved(
            x_T, self.schedule, self.sample, steps, branches, scales, self.ready, generator, residuals, still
        )
        return self.finish(x_0, condition)

    def inversion(self, video_BCFHW: Tensor, condition: Condition, steps: int) -> Sampling:
        """Video latents -> the noise (B, C, F-1, h, w) that `sampling` turns back into their residuals.

        DDIM inversion without guidance (the published editing code). ``condition``: the video's own first frame, its
        prompt and bucket.
        """
        motion = self.target(LatentBatch(video_BCFHW, condition))
        queries = ddim_invert_steps(motion, self.schedule, steps, self.sample.spacing)
        return (yield from guided(queries, (condition,), (), ready=self.ready))

    def finish(self, x_0: Tensor, condition: Condition) -> Tensor:
        """(B, C, F, h, w): z_1, then z_1 + M."""
        z_1 = condition["image"][:, :, None].to(x_0.device, x_0.dtype)
        if self.schedule.data_scale != 1:
            x_0 = x_0 / self.schedule.data_scale
        return torch.cat([z_1, z_1 + x_0], dim=2)


def _own(recipe: Recipe) -> CinemoRecipe:
    if not isinstance(recipe, CinemoRecipe):
        raise TypeError(f"recipe {recipe.name} is a {type(recipe).__name__}, expected a CinemoRecipe")
    return recipe


def _frames(source_FHWC: np.ndarray, recipe: Recipe) -> Tensor:
    """(F, C, H, W), -1..1."""
    if len(source_FHWC) != recipe.data.frames:
        raise InputError(f"source: got {len(source_FHWC)} frames, recipe {recipe.name} takes {recipe.data.frames}")
    return torch.stack([prepare_image(frame_HWC, recipe.data.size) for frame_HWC in source_FHWC])


def _measured_bucket(frames_FCHW: Tensor, scale: MotionScale) -> int:
    frames_FHWC = ((frames_FCHW / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return motion_bucket(mean_adjacent_ssim(frames_FHWC, scale.metric), scale.edges)
