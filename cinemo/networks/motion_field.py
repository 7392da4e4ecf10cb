"""Motion fields inside the LaVie UNet (Controllable Longer Image Animation, arXiv 2405.17306, section 3.2).

A field is encoded to a map for each level of the UNet; after every temporal attention, features attend to each other
and read those maps (equation 4). The last layer of that branch begins at zero, so that a network without fields starts
it unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cinemo.config import Count
from cinemo.networks.attention import TextKeysValues
from cinemo.networks.blocks import TransformerBlock
from cinemo.networks.features import DeepFeatures
from cinemo.networks.lavie_unet import LavieUNet, UNetConfig, is_temporal
from cinemo.networks.weights import compare, fresh_motion, read_tensors, weight_files


class FieldUNetConfig(UNetConfig):
    """Arguments of `FieldUNet`."""

    field_widths: tuple[Count, ...] = Field(
        (64, 128), min_length=1, description="of the motion encoder before the UNet's own"
    )
    field_tokens: int = Field(
        4096, ge=1, description="attention over frames and cells at once up to so many; above, over cells, then frames"
    )
    flow_scale: float = Field(20.0, gt=0, description="pixels a frame that are 1 in the network's input")


class FieldAttention(nn.Module):
    """Equation 4: x + W_o softmax(Q K^T / sqrt d) W_V z_m, queries and keys of the features x, values of the field's
    map z_m on the same grid of frames and cells."""

    def __init__(self, width: int, heads: int, most_tokens: int) -> None:
        super().__init__()
        self.heads, self.most_tokens = heads, most_tokens
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, y_BNLC: Tensor, values_BNLC: Tensor) -> Tensor:
        """``values_BNLC``: of `values`, N frames of L cells each."""
        normed = self.norm(y_BNLC)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.to_q(normed), self.to_k(normed), values_BNLC))
        if q.shape[1] * q.shape[2] <= self.most_tokens:
            mixed = _attend(*(x.flatten(1, 2) for x in (q, k, v))).view_as(v)
        else:
            mixed = _attend(*(x.flatten(0, 1) for x in (q, k, v))).view_as(v)
            q, k, mixed = (x.transpose(1, 2) for x in (q, k, mixed))
            over_time = _attend(*(x.flatten(0, 1) for x in (q, k, mixed)))
            mixed = over_time.view_as(q).transpose(1, 2)
        out: Tensor = y_BNLC + self.to_out(mixed.flatten(3))
        return out

    def values(self, map_BNLC: Tensor) -> Tensor:
        """W_V z_m, the same for all steps of a video."""
        out: Tensor = self.to_v(map_BNLC)
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, N, heads, d)."""
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return mixed.transpose(1, 2)


class MotionEncoder(nn.Module):
    """Convolutions from the field at the latents' resolution to a map for each level.

    The paper says no more than "CNN-based". There is no norm: it would take away how fast a field is that is the same
    everywhere.
    """

    def __init__(self, widths: Sequence[int], levels: Sequence[int]) -> None:
        super().__init__()
        entries = [2, *widths, levels[0]]
        self.entry = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(entries))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(levels))

        for conv in (*self.entry, *self.down):  # or little of the field would be left beside the biases
            nn.init.kaiming_normal_(conv.get_parameter("weight"), nonlinearity="relu")
            nn.init.zeros_(conv.get_parameter("bias"))

    def forward(self, field: Tensor) -> list[Tensor]:
        """(B*N, 2, h, w) -> (B*N, C, h, w) of every level, each half as high and wide as the one before."""
        x = field
        for conv in self.entry:
            x = F.silu(conv(x))
        maps = [x]
        for conv in self.down:
            maps.append(F.silu(conv(maps[-1])))
        return maps


class FieldUNet(LavieUNet):
    """LaVie's UNet that sees a motion field.

    Args:
        field_widths, field_tokens, flow_scale: see `FieldUNetConfig`.
        others: those of `LavieUNet`.
    """

    def __init__(
        self, field_widths: Sequence[int] = (64, 128), field_tokens: int = 4096, flow_scale: float = 20.0, **others: Any
    ) -> None:
        super().__init__(**others)
        self.config |= {"field_widths": list(field_widths), "field_tokens": field_tokens, "flow_scale": flow_scale}
        self.flow_scale = flow_scale
        widths = cast(list[int], self.config["block_out_channels"])
        self.motion_encoder = MotionEncoder(field_widths, widths)
        for block in self._blocks():
            width = block.norm1.normalized_shape[0]
            block.field = FieldAttention(width, cast(int, self.config["attention_head_dim"]), field_tokens)

    def _blocks(self) -> list[TransformerBlock]:
        return [module for module in self.modules() if isinstance(module, TransformerBlock)]

    def contexts(self, text_states: Tensor, field_BFHW: Tensor) -> TextKeysValues:
        """What all steps of a video share: `keys_values` of the text (B, L, D), and the field's values for each block.

        Args:
            field_BFHW: (B, 2, N, h, w) at the latents' resolution, pixels a frame; zeros where none is given.
        """
        batch, _, frames, _, _ = field_BFHW.shape
        plain = field_BFHW.transpose(1, 2).flatten(0, 1).to(self.dtype) / self.flow_scale
        maps = [x.flatten(2).transpose(1, 2).unflatten(0, (batch, frames)) for x in self.motion_encoder(plain)]
        made = dict(self.keys_values(text_states))
        for block, level in self._levels():
            values = cast(FieldAttention, block.field).values(maps[level])
            made[block] = (values, values)
        return made

    def _levels(self) -> list[tuple[TransformerBlock, int]]:
        """Every block with the level of its resolution."""
        last = len(self.down_blocks) - 1
        stages = [*enumerate(self.down_blocks), (last, self.mid_block)]
        stages += [(last - place, stage) for place, stage in enumerate(self.up_blocks)]
        return [
            (block, level)
            for level, stage in stages
            for block in stage.modules()
            if isinstance(block, TransformerBlock)
        ]

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text_states: Tensor | TextKeysValues,
        field_BFHW: Tensor | None,
        strength: Tensor | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """Predict for ``sample`` (B, C, N, h, w).

        Args:
            text_states: (B, L, D) beside a field (B, 2, N, h, w); or what `contexts` made of both, and no field.
            strength: (B,) in the place of Cinemo's motion ids; NaN where none is given.
        """
        if isinstance(text_states, Tensor):
            assert field_BFHW is not None
            text_states = self.contexts(text_states, field_BFHW)
        return super().forward(sample, timestep, text_states, strength, deep)


def is_field(name: str) -> bool:
    """Whether a parameter of `FieldUNet` belongs to what LaVie's UNet lacks."""
    return "motion_encoder" in name.split(".") or "field" in name.split(".")


def learns(name: str) -> bool:
    """Whether the paper trains a parameter: all but the spatial layers (section 4.1)."""
    return is_field(name) or is_temporal(name)


def load_field_unet(
    config: FieldUNetConfig, location: str, dtype: torch.dtype | None = None, base: bool = False
) -> FieldUNet:
    """A network with the weights at ``location``, on the CPU.

    Args:
        base: those of a `LavieUNet` do as well: what it lacks is then fresh (global torch RNG).

    Raises:
        InputError: the file has missing, extra or misshapen entries, or cannot be read.
    """
    state = read_tensors(weight_files(location), location, dtype)
    with torch.device("meta"):
        unet = FieldUNet(**config.model_dump())
    expected = unet.state_dict()
    if base and not any(map(is_field, state)):
        fresh = FieldUNet(**config.model_dump()).state_dict()
        state |= {name: value for name, value in fresh.items() if is_field(name)}
    if base and not any(name.startswith("add_embedding.") for name in state):
        state |= fresh_motion(config)
    compare(state, expected, location)
    state = state if dtype is None else {name: value.to(dtype) for name, value in state.items()}
    unet.load_state_dict(state, assign=True)
    return unet
