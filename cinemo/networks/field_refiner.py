"""From the field of a few arrows to one that fits the picture (Controllable Longer Image Animation, arXiv 2405.17306,
section 3.2): pix2pix (arXiv 1611.07004) on motion fields, with the critic that it is trained against.

Fields and pictures are on the latents' grid, where fields are stored. The generator's answer is added to the arrows'
field, and its last layer begins at zero: a fresh network leaves fields as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cinemo.config import Count, Part
from cinemo.networks.weights import find_weights, load_network, read_tensors

L1_WEIGHT = 100.0  # beside the critic's opinion, as pix2pix has it
_FIELD, _PICTURE = 2, 3  # channels


class RefinerConfig(Part):
    """Arguments of `FieldRefiner`."""

    widths: tuple[Count, ...] = Field(
        (64, 128, 256, 512), min_length=1, description="of the levels, each half as large"
    )
    critic_widths: tuple[Count, ...] = Field((64, 128, 256), min_length=1, description="of the critic's levels")
    scale: float = Field(20.0, gt=0, description="pixels a frame that are 1 in the loss and to the critic")


class FieldRefiner(nn.Module):
    """Generator and critic.

    Args:
        widths, critic_widths, scale: see `RefinerConfig`.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512),
        critic_widths: Sequence[int] = (64, 128, 256),
        scale: float = 20.0,
    ) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "critic_widths": list(critic_widths), "scale": scale}
        self.scale = scale
        self.entry = _layer(_FIELD + _PICTURE, widths[0])
        self.down = nn.ModuleList(_layer(a, b, stride=2) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(_layer(a + b, a) for a, b in reversed([*itertools.pairwise(widths)]))
        self.exit = nn.Conv2d(widths[0], _FIELD, 3, padding=1)
        nn.init.zeros_(self.exit.weight)
        nn.init.zeros_(self.exit.get_parameter("bias"))
        levels = [2 * _FIELD + _PICTURE, *critic_widths]
        judges: Iterable[nn.Module] = (_layer(a, b, stride=2) for a, b in itertools.pairwise(levels))
        self.critic = nn.Sequential(*judges, nn.Conv2d(critic_widths[-1], 1, 3, padding=1))

    def forward(self, field_B2hw: Tensor, picture_B3hw: Tensor) -> Tensor:
        """The refined field, float32 like the one given.

        Twice as fast arrows make a field of twice the speed: the network sees a field divided by its mean speed.

        Args:
            field_B2hw: pixels a frame (`cinemo.media.arrows.dense_field`).
            picture_B3hw: the picture, -1..1.
        """
        speed_B111 = field_B2hw.square().sum(1, keepdim=True).mean((2, 3), keepdim=True).sqrt()
        plain = field_B2hw / speed_B111.clamp_min(torch.finfo(torch.float32).tiny)
        x = self.entry(torch.cat([plain, picture_B3hw], dim=1).to(self.exit.weight.dtype))
        levels = [x]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        x = levels.pop()
        for layer in self.up:
            larger = levels.pop()
            x = layer(torch.cat([larger, F.interpolate(x, size=larger.shape[2:])], dim=1))
        refined: Tensor = field_B2hw + speed_B111 * self.exit(x).float()
        return refined

    def loss(self, field_B2hw: Tensor, picture_B3hw: Tensor, truth_B2hw: Tensor, plain: bool = False) -> Tensor:
        """Of each sample (B,): what the generator and what the critic have to learn, for one optimizer.

        Each party's part holds the other one still. Both learn by cross-entropy, of every patch that the critic sees.

        Args:
            plain: the mean absolute error alone, in units of ``scale``.
        """
        made_B2hw = self(field_B2hw, picture_B3hw)
        error_B: Tensor = (made_B2hw - truth_B2hw).abs().flatten(1).mean(1) / self.scale
        if plain:
            return error_B
        given = torch.cat([field_B2hw / self.scale, picture_B3hw], dim=1)
        held = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
        fooled = torch.func.functional_call(self.critic, held, (self._pair(given, made_B2hw),))
        true, false = self.critic(self._pair(given, truth_B2hw)), self.critic(self._pair(given, made_B2hw.detach()))
        generator_B = F.softplus(-fooled.float()).flatten(1).mean(1) + L1_WEIGHT * error_B
        critic_B = (F.softplus(-true.float()) + F.softplus(false.float())).flatten(1).mean(1) / 2
        losses_B: Tensor = generator_B + critic_B
        return losses_B

    def _pair(self, given: Tensor, field_B2hw: Tensor) -> Tensor:
        return torch.cat([given, field_B2hw / self.scale], dim=1).to(self.exit.weight.dtype)


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    groups = min(32, outputs)
    while outputs % groups:
        groups -= 1
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(groups, outputs), nn.SiLU())


def load_refiner(
    config: RefinerConfig, location: str, dtype: torch.dtype | None = None, base: bool = False
) -> FieldRefiner:
    """A network with the weights at ``location``, on the CPU.

    Args:
        base: where there are none, as beside a text-to-video model, it is fresh (global torch RNG).

    Raises:
        InputError: they are missing, or do not fit.
    """
    if base and not _has_refiner(location):
        return FieldRefiner(**config.model_dump()).to(dtype)
    with torch.device("meta"):
        refiner = FieldRefiner(**config.model_dump())
    load_network(refiner, location, "refiner", dtype)
    return refiner


def _has_refiner(location: str) -> bool:
    files = find_weights(location, "refiner")
    return files is not None and "exit.weight" in read_tensors(files, location)
