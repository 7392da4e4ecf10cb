"""A method that nothing in `cinemo` knows: a network, a recipe, a control and an input of its own, three branches.

It diffuses all frames, and is told the picture, the caption and the clip's frame rate, or the pace that a person asks
for; it may be given the picture to end at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cinemo.config import Part, Recipe, SampleConfig
from cinemo.diffusion.ddim import ddim_steps
from cinemo.diffusion.guidance import Sampling, guided
from cinemo.diffusion.schedule import NoiseSchedule, noise_schedule
from cinemo.media.transforms import prepare_image
from cinemo.methods.base import Draw, Encoders, Example, Method, Reduction, chance, diffusion_loss
from cinemo.methods.controls import Controls, Input, control
from cinemo.networks.weights import resolve
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator


class Painter(nn.Module):
    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.config = {"channels": channels, "text_width": text_width}
        self.paint = nn.Conv3d(2 * channels, channels, 3, padding=1)
        self.words = nn.Linear(text_width, channels)
        self.pace = nn.Linear(1, channels)

    def forward(self, x: Tensor, image: Tensor, text: Tensor, pace: Tensor) -> Tensor:
        told = self.words(text.mean(1)) + self.pace(pace[:, None])
        return self.paint(torch.cat([x, image[:, :, None].expand_as(x)], 1)) + told[:, :, None, None, None]


HERE = f"{Path(__file__).parent.parent.name}.{Path(__file__).parent.name}.fifth:FifthMethod"


class PainterConfig(Part):
    channels: int = 4
    text_width: int = 32


class FifthSample(SampleConfig):
    pace: float = 1.0


class FifthRecipe(Recipe):
    method: str = HERE
    model: PainterConfig = PainterConfig()
    sample: FifthSample = FifthSample(steps=4, guidance_scale=2.0)


class FifthControls(Controls):
    pace: float | None = control(None, "how fast everything goes", title="Pace", place="front", ge=0, le=4)


class FifthMethod(Method):
    name: ClassVar[str] = "fifth"
    recipe_type: ClassVar[type[Recipe]] = FifthRecipe
    controls_type: ClassVar[type[Controls]] = FifthControls
    inputs: ClassVar[Mapping[str, Input]] = {"last_image": Input("image", "the picture to end at")}
    needs: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    parts: ClassVar[tuple[str, ...]] = ("painter",)
    untold: ClassVar[Example] = Example({}, {"words": ""})
    variants: ClassVar[Mapping[str, Mapping[str, float]]] = {"slow": {"pace": 0.5}, "fast": {"pace": 2.0}}

    def __init__(self, painter: Painter, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.painter, self.schedule = painter, schedule

    @classmethod
    def fresh_networks(cls, recipe: Recipe) -> dict[str, nn.Module]:
        return {"painter": Painter(**recipe.model.model_dump())}

    @classmethod
    def latent_channels(cls, recipe: Recipe) -> int:
        return recipe.model.channels

    @classmethod
    def text_width(cls, recipe: Recipe) -> int:
        return recipe.model.text_width

    @classmethod
    def load_network(
        cls, recipe: Recipe, part: str, location: str, dtype: torch.dtype | None = None, base: bool = False
    ) -> nn.Module:
        network = cls.fresh_networks(recipe)[part]
        try:
            network.load_state_dict(load_file(resolve(location) / "diffusion_pytorch_model.safetensors"))
        except (OSError, RuntimeError) as error:
            raise InputError(f"{location}: no painter there ({str(error).splitlines()[0]})") from None
        return network.to(dtype or torch.float32)

    @classmethod
    def of(cls, recipe: Recipe, networks: Mapping[str, nn.Module]) -> FifthMethod:
        return cls(networks["painter"], noise_schedule(recipe.diffusion))

    @classmethod
    def example(cls, recipe: Recipe, sample: LatentSample, draw: Draw) -> Example:
        caption = "" if chance(draw, "words", recipe.train.prompt_dropout) else sample.caption
        return Example({"pace": torch.tensor(sample.fps / 24)}, {"words": caption})

    @classmethod
    def condition(cls, video_BCFHW: Tensor, fields: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Condition:
        return Condition(picture=video_BCFHW[:, :, 0], words=states["words"], pace=fields["pace"])

    @classmethod
    def learns(cls, name: str, trainable: str) -> bool:
        return trainable == "temporal" and name.startswith("painter.pace")

    def target(self, batch: LatentBatch) -> Tensor:
        return batch.video_BCFHW.float()

    def forward(
        self,
        batch: LatentBatch,
        t_B: Tensor,
        noise: Tensor,
        reduction: Reduction = "mean",
        weighted: bool = True,
    ) -> Tensor:
        video = self.target(batch)
        output = self.predict(self.schedule.add_noise(video, noise, t_B), t_B, batch.condition)
        losses_B = diffusion_loss(output, self.schedule.target(video, noise, t_B))
        return losses_B if reduction == "none" else losses_B.mean()

    def predict(self, x_t: Tensor, t: Any, condition: Condition, deep: Any = None) -> Tensor:
        told = condition.to(x_t.device, self.painter.pace.weight.dtype)
        return self.painter(x_t.to(self.painter.pace.weight.dtype), told["picture"], told["words"], told["pace"])

    def sampling(
        self,
        condition: Condition,
        untold: Condition | None,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        generator: torch.Generator | None = None,
    ) -> Sampling:
        words = condition["words"] if untold is None else untold["words"]
        still = Condition(condition, words=words, pace=torch.zeros_like(condition["pace"]))
        branches = (still, Condition(condition, words=words), condition)
        queries = ddim_steps(noise, self.schedule, steps, spacing="trailing")
        return (yield from guided(queries, branches, (1.5, guidance_scale)))

    def prepare(
        self, recipe: Recipe, encoders: Encoders, inputs: Mapping[str, np.ndarray], settings: dict[str, Any]
    ) -> tuple[Sampling, int]:
        image_BCHW = encoders.vae.encode(prepare_image(inputs["image"], recipe.data.size)[None])
        if "last_image" in inputs:
            image_BCHW = (
                image_BCHW + encoders.vae.encode(prepare_image(inputs["last_image"], recipe.data.size)[None])
            ) / 2
        text_BLD, negative_BLD = encoders.text.encode([settings["prompt"], settings["negative_prompt"]]).chunk(2)
        condition = Condition(picture=image_BCHW, words=text_BLD, pace=torch.tensor([settings["pace"]]))
        channels, h, w = image_BCHW.shape[1:]
        shape = (1, channels, recipe.data.frames, h, w)
        noise = torch.randn(shape, generator=keyed_generator(settings["seed"], "noise"))
        steps = settings["steps"]
        return self.sampling(condition, Condition(words=negative_BLD), noise, steps, settings["guidance_scale"]), steps
