"""Controllable Longer Image Animation (arXiv 2405.17306): motion that is drawn, and how strong it is.

The paper's modules on Cinemo's backbone in the place of Stable Video Diffusion: residuals are diffused, with the
picture as the first frame inside the network. Motion fields enter by equation 4 (`cinemo.networks.motion_field`),
arrows become fields by equations 5-7 (`cinemo.media.arrows`), the motion strength of equation 8 is embedded beside the
timestep. Long videos (equations 9-12) are every method's (`cinemo.diffusion.phased`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from cinemo.config import Part, Recipe, SampleConfig, TrainConfig
from cinemo.diffusion.guidance import Query, Sampling
from cinemo.diffusion.schedule import NoiseSchedule, noise_schedule
from cinemo.media.arrows import check_arrows, dense_field
from cinemo.media.flow import speed
from cinemo.media.stills import frame_of
from cinemo.media.transforms import cropped_points, prepare_image
from cinemo.methods.base import Draw, Encoders, Example, Method, Published, Reduction, chance
from cinemo.methods.cinemo import CinemoMethod
from cinemo.methods.controls import Arrows, Controls, Input, control
from cinemo.methods.quality import QualityTable
from cinemo.methods.sampling import calls, long_config, solved
from cinemo.methods.sampling_controls import LongVideo, MotionStrength
from cinemo.networks.features import DeepFeatures
from cinemo.networks.field_refiner import FieldRefiner, RefinerConfig, load_refiner
from cinemo.networks.motion_field import FieldUNet, FieldUNetConfig, learns, load_field_unet
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator

LEVELS = 20  # of the speed, where a motion strength is measured
UNIT = 100  # motion_speed of one pixel a frame, where the shorter side has 512 (section 4.3 has 100..400)
MAX_SPEED = 10_000
_MOVING = 0.1  # of a clip's fastest cell: where hints are taken


class LongerModel(Part):
    """The networks, and how motion strength enters the first."""

    unet: FieldUNetConfig = FieldUNetConfig()
    refiner: RefinerConfig = RefinerConfig()
    strength_factor: float = Field(
        100.0, gt=0, description="what the network is told of 1 pixel a frame, where the shorter side has 512"
    )


class LongerTrain(TrainConfig):
    """Optimisation (section 4.1), and what a sample may go without."""

    trainable: Literal["all", "temporal", "lora", "refiner"] = Field(  # type: ignore[assignment]
        "temporal",
        description="what is trained: temporal: all but the spatial layers; refiner: the refinement network alone; "
        "all: everything else; lora",
    )
    field_dropout: float = Field(0.1, ge=0, le=1, description="share of samples without a motion field")
    strength_dropout: float = Field(0.1, ge=0, le=1, description="share of samples without a motion strength")
    hint_share: float = Field(
        0.0, ge=0, le=1, description="share of samples whose field is made of 1-5 arrows along their motion"
    )

    @model_validator(mode="after")
    def _whole_critic(self) -> Self:
        if self.trainable == "refiner" and self.zero_stage == 3:
            raise ValueError("zero_stage is 3, expected 0..2: the refinement network is small, and used whole")
        return self


class LongerSample(SampleConfig):
    """Sampling defaults."""

    motion_speed: int = Field(150, ge=0, le=MAX_SPEED, description="where neither it nor arrows are given")
    fastest: int = Field(400, ge=1, le=MAX_SPEED, description="motion_speed at motion strength 1")
    motion_guidance_scale: float = Field(1.0, ge=1, description="of what field and strength add; 1: not guided")
    refine: bool = Field(True, description="show the network what the refinement network makes of arrows")


class LongerRecipe(Recipe):
    """A run of Controllable Longer Image Animation."""

    method: str = "longer"
    model: LongerModel = LongerModel()
    train: LongerTrain = LongerTrain()
    sample: LongerSample = LongerSample()


class LongerControls(MotionStrength, LongVideo):
    """Arrows (section 3.2) and motion strength (3.3)."""

    strength_of: ClassVar[str] = "motion_speed"

    arrows: Arrows | None = control(
        None,
        "what is at x0,y0 of the picture is at x1,y1 when the model's frames end (pixels); an arrow of no length holds "
        "what is around it",
        title="Arrows",
        place="front",
    )
    motion_speed: int | None = control(
        None,
        "mean speed over the picture, in hundredths of a pixel a frame where the shorter side has 512; without it as "
        "fast as the arrows say",
        title="Speed",
        place="front",
        ge=0,
        le=MAX_SPEED,
    )
    motion_guidance_scale: float | None = control(
        None, "how closely to follow arrows and speed, 1 = off", title="Follow the arrows", place="folded", ge=1, le=50
    )

    @classmethod
    def motion_values(cls, recipe: Recipe) -> tuple[str, Sequence[float]] | None:
        fastest = _own(recipe).sample.fastest
        return "motion_speed", [round(fastest * level / (LEVELS - 1)) for level in range(LEVELS)]

    def check_picture(self, size: tuple[int, int]) -> None:
        check_arrows(self.arrows or (), size)

    def predicted(
        self, recipe: Recipe, calibration: Mapping[str, Any] | None, quality: QualityTable | None
    ) -> dict[str, Any]:
        """No motion where there are arrows: it was measured without."""
        said = super().predicted(recipe, calibration, quality)
        return {name: each for name, each in said.items() if name != "predicted_motion" or not self.arrows}

    def settings(self, recipe: Recipe, inputs: Collection[str] = ()) -> dict[str, Any]:
        """``motion_speed`` is measured on the arrows (None) where they alone are given."""
        filled = super().settings(recipe, inputs)
        if "mask" in inputs and not self.arrows:
            raise InputError("mask: says where arrows move the picture, but there are none; draw one, or leave it out")
        if self.arrows and self.motion_speed is None and self.motion_strength is None:
            filled["motion_speed"] = None
        return filled


class LongerMethod(CinemoMethod):
    """Motion residuals with a motion field; see `cinemo.methods.base.Method` for the contract.

    A condition has ``image`` and ``text`` as Cinemo's, ``flow`` (B, 2, F, h, w), the field that led to each frame in
    pixels a frame (the first has none: zeros), and ``strength`` (B,), NaN where none is given. Where the refinement
    network learns, also ``arrows`` (B, 2, h, w), a field made of hints, ``truth``, the mean of the clip's, and
    ``picture`` (B, 3, h, w).
    """

    name: ClassVar[str] = "longer"
    recipe_type: ClassVar[type[Recipe]] = LongerRecipe
    controls_type: ClassVar[type[Controls]] = LongerControls  # type: ignore[assignment]
    inputs: ClassVar[Mapping[str, Input]] = {
        "mask": Input("image", "what arrows may move: white; what stands still: black")
    }
    published: ClassVar[Mapping[str, Published]] = {}
    variants: ClassVar[Mapping[str, Mapping[str, float]]] = {"sample": {}}
    noise_variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    parts: ClassVar[tuple[str, ...]] = ("unet", "refiner")
    unet: FieldUNet
    refiner: FieldRefiner
    model: LongerModel

    def __init__(
        self,
        unet: FieldUNet,
        refiner: FieldRefiner,
        schedule: NoiseSchedule,
        sample: LongerSample,
        model: LongerModel,
        min_snr_gamma: float | None = None,
    ) -> None:
        Method.__init__(self)
        self.unet, self.refiner, self.schedule, self.min_snr_gamma = unet, refiner, schedule, min_snr_gamma
        self.sample, self.model = sample, model  # type: ignore[assignment]

    @classmethod
    def latent_channels(cls, recipe: Recipe) -> int:
        return _own(recipe).model.unet.in_channels

    @classmethod
    def text_width(cls, recipe: Recipe) -> int:
        return _own(recipe).model.unet.cross_attention_dim

    @classmethod
    def fresh_networks(cls, recipe: Recipe) -> dict[str, nn.Module]:
        model = _own(recipe).model
        return {"unet": FieldUNet(**model.unet.model_dump()), "refiner": FieldRefiner(**model.refiner.model_dump())}

    @classmethod
    def load_network(
        cls, recipe: Recipe, part: str, location: str, dtype: torch.dtype | None = None, base: bool = False
    ) -> nn.Module:
        if part == "refiner":
            return load_refiner(_own(recipe).model.refiner, location, dtype, base)
        return load_field_unet(_own(recipe).model.unet, location, dtype, base)

    @classmethod
    def of(cls, recipe: Recipe, networks: Mapping[str, nn.Module]) -> Self:
        own, schedule = _own(recipe), noise_schedule(recipe.diffusion)
        unet, refiner = cast(FieldUNet, networks["unet"]), cast(FieldRefiner, networks["refiner"])
        refiner.requires_grad_(own.train.trainable == "refiner")  # no other loss reaches it
        return cls(unet, refiner, schedule, own.sample, own.model, recipe.train.min_snr_gamma)

    @classmethod
    def stored_fields(cls, recipe: Recipe) -> tuple[str, ...]:
        return ("flow", "first_frame") if _own(recipe).train.trainable == "refiner" else ("flow",)

    @classmethod
    def example(cls, recipe: Recipe, sample: LatentSample, draw: Draw) -> Example:
        """The clip's field, or one made of a few arrows along it; its strength is that of what is shown."""
        train = _own(recipe).train
        flow_F2HW = np.asarray(sample.fields["flow"], np.float32)
        to_refine = _to_refine(flow_F2HW, sample, draw("hints to refine")) if train.trainable == "refiner" else {}
        if chance(draw, "hints", train.hint_share):
            flow_F2HW = hinted(flow_F2HW, draw("arrows"))
        strength = _strength(speed(flow_F2HW), recipe)
        if chance(draw, "drop field", train.field_dropout):
            flow_F2HW = np.zeros_like(flow_F2HW)
        given = not chance(draw, "drop strength", train.strength_dropout)
        fields = {
            "flow": _of_frames(torch.from_numpy(flow_F2HW).transpose(0, 1)),
            "strength": torch.tensor(strength if given else float("nan"), dtype=torch.float32),
            **to_refine,
        }
        return Example(fields, {"text": "" if chance(draw, "drop", train.prompt_dropout) else sample.caption})

    @classmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Condition:
        return Condition(image=video_BCFHW[:, :, 0], text=states["text"], **fields)

    @classmethod
    def learns(cls, name: str, trainable: str) -> bool:
        if name.startswith("refiner."):
            return trainable == "refiner"
        return trainable == "temporal" and learns(name)

    def forward(
        self,
        batch: LatentBatch,
        t_B: Tensor,
        noise: Tensor,
        reduction: Reduction = "mean",
        weighted: bool = True,
    ) -> Tensor:
        """As Cinemo's; where a batch has arrows' fields, the loss of the refinement network."""
        shown = batch.condition
        if "arrows" not in shown:
            return super().forward(batch, t_B, noise, reduction, weighted)
        losses_B = self.refiner.loss(shown["arrows"], shown["picture"], shown["truth"], plain=not weighted)
        return losses_B if reduction == "none" else losses_B.mean()

    def ready(self, condition: Condition) -> Condition:
        """A condition for many calls of `predict`: what its text and its field are to every layer, made once."""
        condition = condition.to(next(self.unet.parameters()).device)
        contexts = self.unet.contexts(condition["text"].to(self.unet.dtype), condition["flow"])
        return Condition(image=condition["image"], contexts=contexts, strength=condition["strength"])

    def predict(self, x_t: Tensor, t: Tensor | int, condition: Condition, deep: DeepFeatures | None = None) -> Tensor:
        """As Cinemo's, with the field beside the text."""
        condition = condition.to(x_t.device)
        if not isinstance(t, Tensor):  # a compiler would build a number in
            t = torch.full((), t, device=x_t.device)
        if "contexts" not in condition:
            condition = self.ready(condition)
        z_1 = condition["image"][:, :, None].to(x_t.dtype)
        frames = torch.cat([z_1, z_1 + x_t], dim=2).to(self.unet.dtype)
        output: Tensor = self.unet(frames, t, condition["contexts"], None, condition["strength"], deep)
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
        _, _, frames, h, w = video_BCFHW.shape
        factor = self.model.strength_factor / UNIT
        strengths = [values["motion_speed"] * factor if "motion_speed" in values else np.nan for values in controls]
        return Condition(
            image=video_BCFHW[:, :, 0].expand(len(prompts), -1, -1, -1),
            text=encoders.text.encode(prompts),
            flow=video_BCFHW.new_zeros(len(prompts), 2, frames, h, w),
            strength=torch.tensor(strengths, dtype=torch.float32, device=video_BCFHW.device),
        )

    @classmethod
    def controls_like(cls, recipe: Recipe, sample: LatentSample) -> dict[str, Any]:
        """How fast the clip is, where its flow is stored."""
        if "flow" not in sample.fields:
            return {}
        at_512 = speed(np.asarray(sample.fields["flow"])) * 512 / min(recipe.data.size)
        return {"motion_speed": min(MAX_SPEED, round(UNIT * at_512))}

    def prepare(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]
    ) -> tuple[Sampling, int]:
        seed, steps, size = settings["seed"], int(settings["steps"]), recipe.data.size
        field_2hw = self._field(recipe, inputs, settings)
        posterior = keyed_generator(seed, "image") if recipe.encoders.latent == "sample" else None
        image_BCHW = encoders.vae.encode(prepare_image(inputs["image"], size)[None], posterior)
        text_BLD, negative_BLD = encoders.text.encode([settings["prompt"], settings["negative_prompt"]]).chunk(2)
        channels, h, w = image_BCHW.shape[1:]
        device, native = image_BCHW.device, recipe.data.frames
        flow = _of_frames(field_2hw[:, None].expand(-1, native - 1, -1, -1))[None].to(device)
        strength = _strength(settings["motion_speed"] / UNIT / 512 * min(size), recipe)
        condition = Condition(
            image=image_BCHW, text=text_BLD, flow=flow, strength=torch.tensor([strength], device=device)
        )
        wanted = {name: settings[name] for name in ("solver", "reuse_features", "motion_guidance_scale")}
        wanted["guidance_interval"] = tuple(settings["guidance_interval"])
        wanted["long"] = long_config(self.sample, settings)
        sample = cast(LongerSample, self.sample.model_copy(update=wanted))
        asked = LongerMethod(self.unet, self.refiner, self.schedule, sample, self.model)
        noise = torch.randn(1, *self.target_shape((channels, native, h, w)), generator=keyed_generator(seed, "noise"))
        scale, fresh = float(settings["guidance_scale"]), keyed_generator(seed, "fresh noise")
        frames = settings.get("frames", native)
        untold = Condition(text=negative_BLD)
        sampling = asked.sampling(condition, untold, noise.to(device), steps, scale, fresh, frames)
        return sampling, calls(asked.sample, steps, native - 1, frames - 1)

    def _field(self, recipe: Recipe, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]) -> Tensor:
        """The field (2, h, w) of a request in pixels a frame of the recipe's size, refined, and as fast as
        ``motion_speed`` says; where that is None it is measured.

        Where there are arrows, ``picture_size`` (height, width) is added to the settings: the picture that they are
        drawn on. A later part of a chain begins with another one.
        """
        size, arrows = recipe.data.size, settings.get("arrows") or []
        drawn_on = inputs["image"].shape[:2]
        if arrows:
            drawn_on = tuple(settings.setdefault("picture_size", list(drawn_on)))
        points = cropped_points(check_arrows(arrows, drawn_on).reshape(-1, 2), drawn_on, size).reshape(-1, 4)
        field_2hw = _in_cells(torch.from_numpy(dense_field(points, 1 / (recipe.data.frames - 1), size)))
        if arrows and cast(LongerSample, self.sample).refine:
            device = next(self.refiner.parameters()).device
            picture_3hw = _in_cells(prepare_image(inputs["image"], size))
            field_2hw = self.refiner(field_2hw[None].to(device), picture_3hw[None].to(device))[0].cpu()
        if "mask" in inputs:
            field_2hw = field_2hw * _in_cells((prepare_image(inputs["mask"], size).mean(0, keepdim=True) > 0).float())
        at_512 = speed(field_2hw[None].numpy()) * 512 / min(size)
        if settings["motion_speed"] is None:
            settings["motion_speed"] = min(MAX_SPEED, round(UNIT * at_512))
        # Also where it was measured, and rounded: the settings of a video then make the same one again.
        return field_2hw * (settings["motion_speed"] / UNIT / at_512) if at_512 > 0 else field_2hw

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
        """As Cinemo's, with three branches: neither motion nor text, motion alone, both.

        With a motion guidance of 1 the first cancels out, and is not asked.
        """
        if guidance_scale > 1 and untold is None:
            raise InputError(f"guidance scale is {guidance_scale}, expected text states of the negative prompt")
        negative = condition["text"] if untold is None else untold["text"].to(condition["text"])
        moving = Condition(condition, text=negative)
        nothing = Condition(
            moving,
            flow=torch.zeros_like(condition["flow"]),
            strength=torch.full_like(condition["strength"], float("nan")),
        )
        scales = (cast(LongerSample, self.sample).motion_guidance_scale, guidance_scale)
        residuals, branches = None if frames is None else frames - 1, (nothing, moving, condition)
        still = torch.zeros_like(noise)
        x_0 = yield from solved(
            noise, self.schedule, self.sample, steps, branches, scales, self.ready, generator, residuals, still
        )
        return self.finish(x_0, condition)


def hinted(flow_F2HW: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """The field that 1-5 arrows along a clip's motion make, the same for all frames: what a person would draw.

    Args:
        flow_F2HW: cells of any size, pixels a frame. Arrows start where it moves at least a tenth as fast as anywhere.
    """
    mean_2HW = flow_F2HW.mean(0, dtype=np.float64)
    length = np.hypot(*mean_2HW)
    rows, columns = np.nonzero(length >= max(_MOVING * length.max(), 1e-9))
    if not len(rows):
        return np.zeros_like(flow_F2HW)
    count = int(torch.randint(1, 6, (), generator=generator))
    places = torch.randperm(len(rows), generator=generator)[:count].tolist()
    starts = np.stack([columns[places], rows[places]], 1).astype(np.float64)
    ways = mean_2HW[:, rows[places], columns[places]].T
    field = dense_field(np.concatenate([starts, starts + ways], 1), 1.0, mean_2HW.shape[1:])
    return np.repeat(field.astype(flow_F2HW.dtype)[None], len(flow_F2HW), 0)


def _to_refine(flow_F2HW: np.ndarray, sample: LatentSample, generator: torch.Generator) -> dict[str, Tensor]:
    """What the refinement network is given of a clip, and what it should find: one field for all frames."""
    picture_HWC = np.array(frame_of(cast(bytes, sample.fields["first_frame"])))
    pixels = torch.from_numpy(picture_HWC).permute(2, 0, 1).float() / 127.5 - 1
    mean_2hw = torch.from_numpy(flow_F2HW.mean(0))
    arrows_2hw = torch.from_numpy(hinted(flow_F2HW, generator)[0])
    return {"arrows": arrows_2hw.float(), "truth": mean_2hw, "picture": _in_cells(pixels)}


def _in_cells(pixels_CHW: Tensor) -> Tensor:
    """Means over the latents' cells: float32 (C, H/8, W/8)."""
    return F.avg_pool2d(pixels_CHW.float(), 8)


def _strength(pixels_a_frame: float, recipe: Recipe) -> float:
    """What the network is told of a mean speed at the recipe's size."""
    return _own(recipe).model.strength_factor * pixels_a_frame * 512 / min(recipe.data.size)


def _of_frames(flow_2FHW: Tensor) -> Tensor:
    """To each frame the field that led to it: none to the first."""
    return torch.cat([torch.zeros_like(flow_2FHW[:, :1]), flow_2FHW], dim=1)


def _own(recipe: Recipe) -> LongerRecipe:
    if not isinstance(recipe, LongerRecipe):
        raise TypeError(f"recipe {recipe.name} is a {type(recipe).__name__}, expected a LongerRecipe")
    return recipe
