"""What every image-animation method is, and the loss they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from cinemo.config import Checkpointing, DataConfig, Recipe, TrainConfig
from cinemo.diffusion.guidance import Query, Sampling
from cinemo.diffusion.schedule import NoiseSchedule
from cinemo.media.motion import MotionScale
from cinemo.methods.controls import Controls, Input, check_names
from cinemo.networks.features import DeepFeatures
from cinemo.networks.frozen import ImageEncoder, Picture, Text, TextEncoder, Vae
from cinemo.networks.memory import checkpoint_activations
from cinemo.types import Condition, InputError, LatentBatch, LatentSample

Reduction = Literal["mean", "none"]
"""Of a loss: its mean, or one value for each sample."""

Draw = Callable[[str], torch.Generator]
"""``draw(what)``: a generator for one draw of a training sample, keyed by seed, ``what``, step and sample."""

_SHAPES = 128  # kinds of blocks, by the widths and sizes that they meet, which a compiler may have to tell apart
_LARGER = 16  # times the pixels of what a network was trained for: beyond, memory ends before anything is said


@dataclass(frozen=True)
class Example:
    """What a method makes of one stored sample, on the host: tensors for a batch (all samples have the same names and
    shapes), and by condition slot the text and the picture that the frozen encoders are to read."""

    fields: Mapping[str, Tensor]
    texts: Mapping[str, Text]
    images: Mapping[str, Picture] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoders:
    """The frozen networks of a bundle that a method may ask, and what levels of motion mean to the bundle's network.

    ``image``: where the method ``needs`` one.
    """

    vae: Vae
    text: TextEncoder
    motion: MotionScale
    image: ImageEncoder | None = None


@dataclass(frozen=True)
class Imported:
    """Published weights as a bundle holds them, and a recipe that says what they are."""

    recipe: Recipe
    networks: Mapping[str, nn.Module]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """Weights that a paper's authors published, as a method reads them.

    ``takes``: what it reads (``DIR``, ``FILE``). ``whole``: a whole model, which becomes a bundle; else a base to train
    from, whose only network is written as a folder for ``train.init``. ``load``: from a place and a recipe, which says
    what the files do not; raises `InputError`.
    """

    takes: str
    description: str
    whole: bool
    load: Callable[[str, Recipe], Imported]


class Method(nn.Module, ABC):
    """The networks of one method, all that is trained, and the mathematics around them.

    Frozen encoders stay outside: a method sees latents and text states. Everything else (trainer, export, bundle, LoRA,
    compiler, server) iterates over `networks` and drives `sampling`, whatever the method is.

    ``name``: as a recipe has it. ``recipe_type``: a recipe with this method's keys. ``controls_type``: what may be
    asked. ``inputs``: pictures and videos that it takes beside the picture to animate, by name.
    ``needs``: the encoders whose output it uses (``vae``, ``text_encoder``, ``image_encoder``).
    ``untold``: texts and pictures of guidance's unconditional branch, where it differs from the conditional one.
    ``parts``: names of its networks, which are attributes of it: parameter ``unet.x`` is ``x`` of ``networks["unet"]``.
    ``published``: weights that `pipelines/export.py` imports, by the name of their flag (methods of this package).
    ``noise_variants``: ways to draw the initial noise, by name, as values of ``sample``; for comparison.
    ``variants``: what a sample sheet shows of each sample: by name, numbers in the place of its own fields.
    """

    name: ClassVar[str]
    recipe_type: ClassVar[type[Recipe]]
    controls_type: ClassVar[type[Controls]] = Controls
    inputs: ClassVar[Mapping[str, Input]] = {}
    needs: ClassVar[tuple[str, ...]]
    untold: ClassVar[Example] = Example({}, {"text": ""})
    variants: ClassVar[Mapping[str, Mapping[str, float]]] = {"sample": {}}
    noise_variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    parts: ClassVar[tuple[str, ...]]
    published: ClassVar[Mapping[str, Published]] = {}
    schedule: NoiseSchedule

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_names(cls.controls_type, cls.inputs)

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {part: getattr(self, part) for part in self.parts}

    @classmethod
    @abstractmethod
    def latent_channels(cls, recipe: Recipe) -> int:
        """Channels of the latents that a recipe's networks are made for."""

    @classmethod
    @abstractmethod
    def text_width(cls, recipe: Recipe) -> int:
        """Width D of the text states (B, L, D) that they are made for."""

    @classmethod
    @abstractmethod
    def fresh_networks(cls, recipe: Recipe) -> dict[str, nn.Module]:
        """The recipe's networks as a training from scratch begins with them (global torch RNG)."""

    @classmethod
    @abstractmethod
    def load_network(
        cls, recipe: Recipe, part: str, location: str, dtype: torch.dtype | None = None, base: bool = False
    ) -> nn.Module:
        """The network ``part`` with the weights of a folder or file.

        ``base``: they may lack what this method adds to the model that it starts from, which is then fresh.

        Raises:
            InputError: they are missing, or do not fit the recipe's network.
        """

    @classmethod
    def write_published(cls, recipe: Recipe, networks: Mapping[str, nn.Module], path: Path) -> None:
        """Write networks as their authors' code reads them.

        Raises:
            InputError: that is how a bundle holds them anyway, or there is no such code.
        """
        raise InputError(f"method {cls.name}: has no published form but the folders of a bundle")

    @classmethod
    @abstractmethod
    def of(cls, recipe: Recipe, networks: Mapping[str, nn.Module]) -> Self:
        """The method of a recipe around its networks."""

    @classmethod
    def sized(cls, recipe: Recipe, size: tuple[int, int]) -> Recipe:
        """The recipe for videos of another (height, width) by the same networks.

        Raises:
            InputError: they cannot make such videos.
        """
        try:
            data = DataConfig.model_validate(recipe.data.model_dump() | {"size": size, "other_shapes": ()})
        except ValidationError as error:
            message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise InputError(f"size {size[1]}x{size[0]}: {message}") from None
        (height, width), most = recipe.data.size, _LARGER * math.prod(recipe.data.size)
        if math.prod(size) > most:
            raise InputError(
                f"size {size[1]}x{size[0]}: {math.prod(size)} pixels, expected at most {most}, {_LARGER} times "
                f"{width}x{height}, for which {recipe.name} was trained"
            )
        return recipe.model_copy(update={"data": data})

    @classmethod
    def text_layers(cls, recipe: Recipe) -> int | None:
        """How many layers of the frozen text encoder they are made for; None: all of it."""
        return None

    @classmethod
    def image_tokens(cls, recipe: Recipe) -> tuple[int, int]:
        """(L, D) of what the frozen image encoder makes of a picture, where it is needed."""
        return 0, 0

    @classmethod
    def stored_fields(cls, recipe: Recipe) -> tuple[str, ...]:
        """What a training sample must carry beside its latents (`cinemo.data.dataset.fields`)."""
        return ()

    @classmethod
    @abstractmethod
    def example(cls, recipe: Recipe, sample: LatentSample, draw: Draw) -> Example:
        """What training needs of a sample, with what is dropped in this step."""

    @classmethod
    @abstractmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Condition:
        """The condition of a batch of `example`s, on the device.

        ``fields``: stacked. ``states``: (B, L, D) by slot, what the frozen encoders made of its texts and pictures.
        """

    @classmethod
    def target_shape(cls, latents_CFHW: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """The shape of what is diffused for one video whose latents have this shape; its noise has the same."""
        return latents_CFHW

    @classmethod
    @abstractmethod
    def learns(cls, name: str, trainable: str) -> bool:
        """Whether a parameter (``unet.x``) is among what a word of ``train.trainable`` means.

        ``temporal``: what an image model lacks. A method may know further words.
        """

    @classmethod
    def learning_rate(cls, name: str, train: TrainConfig) -> float:
        """Of a parameter (``unet.x``), before warm-up and decay."""
        return train.lr

    @abstractmethod
    def target(self, batch: LatentBatch) -> Tensor:
        """What is diffused, in float32: for Cinemo the residuals (B, C, F-1, h, w)."""

    @abstractmethod
    def forward(
        self,
        batch: LatentBatch,
        t_B: Tensor,
        noise: Tensor,
        reduction: Reduction = "mean",
        weighted: bool = True,
    ) -> Tensor:
        """The training loss: a scalar, or with ``reduction="none"`` that of every sample (B,).

        ``noise``: shaped like `target`.
        ``weighted``: by timestep, where the recipe asks for it; validation measures the plain error.
        """

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor | int, condition: Condition, deep: DeepFeatures | None = None) -> Tensor:
        """The network's output for x_t, shaped like it; ``condition`` as it is, or as `sampling` asks with it.

        ``deep``: inner features to keep or to use again, where `sampling` says so.
        """

    def asked(
        self,
        encoders: Encoders,
        video_BCFHW: Tensor,
        picture_HWC: np.ndarray,
        prompts: Sequence[str],
        controls: Sequence[Mapping[str, Any]],
    ) -> Condition:
        """What the network is told where a person asks for each prompt, with these controls, of one picture.

        ``video_BCFHW``: latents of one clip that begins with the picture. ``picture_HWC``: uint8, of the recipe's size.
        ``controls``: those that `controls_like` names.
        """
        raise InputError(f"method {self.name}: what its network makes of one prompt cannot be asked alone")

    @classmethod
    def controls_like(cls, recipe: Recipe, sample: LatentSample) -> dict[str, Any]:
        """What one would ask for a video that moves as a clip does, besides its caption."""
        return {}

    @abstractmethod
    def prepare(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]
    ) -> tuple[Sampling, int]:
        """A request -> its sampling, which returns the latents of a video (1, C, F, h, w), and how often that asks.

        Args:
            inputs: by name, uint8 pictures (H, W, 3) and videos (F, H, W, 3) of any size; ``image`` is the picture to
                animate, the others are among the class's ``inputs``.
            settings: the prompt and all controls (`Controls.settings`); what is measured on the inputs is added.

        Raises:
            InputError: an input or setting that does not fit.
        """

    @abstractmethod
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
        """From noise, shaped like `target`, to a video: solver and guidance, as a generator of queries.

        ``untold``: what the encoders made of the class's ``untold``, or of what a person wants in its place; not needed
        without guidance. ``generator``: of fresh noise, where the recipe's ``sample.eta`` or a longer video wants it.
        ``frames``: of the video; None: those of the noise.
        """

    def clean(self, query: Query, output: Tensor) -> Tensor:
        """Latents of the video (C, F, h, w) that the network's answer to a query of `sampling` predicts, from what it
        was told last: what one can see of it before it is done. Of a longer video, one of the parts asked for."""
        x, output = query.x[-1:], output[-1:]
        x_0, _ = self.schedule.predict_x0_eps(x, output, query.t)
        scale = self.schedule.data_scale
        if self.schedule.clean_scale is not None:
            scale *= float(self.schedule.clean_scale[query.t])
        return (x_0 / scale)[0]

    def checkpoint_activations(self, what: Checkpointing) -> None:
        """How much networks compute again in a training step to hold fewer activations, those that can."""
        for network in self.networks.values():
            checkpoint_activations(network, what)

    def compile_networks(self, regional: bool = False) -> None:
        """Compile every network in place (`Recipe.compile`): whole, or ``regional`` the blocks that it is made of
        (its ``regions``), of which those of one kind and shape share what the compiler made."""
        for network in self.networks.values():
            regions = getattr(network, "regions", ())
            if not regional or not regions:
                network.compile(dynamic=False)
                continue
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
            for module in network.modules():
                if isinstance(module, regions):
                    module.compile(dynamic=False)


def chance(draw: Draw, what: str, probability: float) -> bool:
    """Whether something happens in this step and to this sample."""
    return bool(torch.rand((), generator=draw(what)) < probability)


def diffusion_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample (B,) in float32, whatever the network's precision (Cinemo, equation 3)."""
    errors = F.mse_loss(output.float(), target.to(output.device, torch.float32), reduction="none")
    return errors.flatten(1).mean(1)


def training_loss(
    output: Tensor,
    target: Tensor,
    schedule: NoiseSchedule,
    t_B: Tensor,
    reduction: Reduction,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """`diffusion_loss`, weighted by timestep where there is a gamma (`NoiseSchedule.min_snr_weights`).

    Returns:
        Its mean, or with ``reduction="none"`` that of every sample (B,).
    """
    losses_B = diffusion_loss(output, target)
    if min_snr_gamma is not None:
        losses_B = losses_B * schedule.min_snr_weights(t_B, min_snr_gamma).to(losses_B.device)
    return losses_B if reduction == "none" else losses_B.mean()


Progress = Callable[[int], None]
"""Called as ``progress(done)`` after each call of the network; an exception it raises stops the sampling."""


def run(method: Method, sampling: Sampling, progress: Progress | None = None) -> Tensor:
    """What ``sampling`` returns, every query answered by ``method``: the latents of a video, or noise.

    The server's engine answers the queries of many videos at once instead.
    """
    deep, done = DeepFeatures(), 0
    query = next(sampling)
    while True:
        if query.features == "keep":
            deep.kept = None
        output = method.predict(query.x, query.t, query.condition, deep if query.features else None)
        done += 1
        if progress is not None:
            progress(done)
        try:
            query = sampling.send(output)
        except StopIteration as end:
            result: Tensor = end.value
            return result
