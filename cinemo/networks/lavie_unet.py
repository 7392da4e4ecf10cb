"""LaVie's video UNet with Cinemo's motion-intensity input (arXiv 2309.15103; arXiv 2407.15642, section 3.2).

State-dict names and shapes are those of the published checkpoints. The network knows nothing of a base frame: what
the frames are (Cinemo: the image, then image + noisy residuals) is the method's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cinemo.config import Checkpointing, Count, Part
from cinemo.networks.attention import ROTARY_DIM, TextKeysValues
from cinemo.networks.blocks import (
    Downsample,
    Embedding,
    Resnet,
    Stage,
    Transformer,
    TransformerBlock,
    Upsample,
    join_frames,
    part_frames,
    sinusoid,
)
from cinemo.networks.features import DeepFeatures
from cinemo.networks.memory import made_again, silu
from cinemo.networks.norms import GroupNorm
from cinemo.types import InputError

# Entries of published configuration files that this network has no other choice for.
ONLY: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "addition_embed_type": "motion_ids",
}

# The layers that an image model does not have, by parts of their names: what LaVie added to Stable Diffusion, and
# Cinemo's motion input. conv_in and conv_out see one frame at a time; the resnets' group norms take statistics over
# all frames, but their weights are the image model's own.
TEMPORAL = ("attn_temp", "norm_temp", "add_embedding")


def is_temporal(name: str) -> bool:
    """Whether a parameter of `LavieUNet`, by its name in the state dict, belongs to a temporal layer."""
    return not set(TEMPORAL).isdisjoint(name.split("."))


class UNetConfig(Part):
    """Arguments of `LavieUNet`; the defaults are the published network."""

    in_channels: int = Field(4, ge=1)
    out_channels: int = Field(4, ge=1)
    block_out_channels: tuple[Count, ...] = Field((320, 640, 1280, 1280), min_length=1)
    layers_per_block: int = Field(2, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    cross_attention_dim: int = Field(768, ge=1)
    attention_head_dim: int = Field(8, ge=1, description="number of heads (the published name is a misnomer)")
    addition_time_embed_dim: int = Field(256, ge=2, multiple_of=2)


class LavieUNet(nn.Module):
    """Epsilon (or v) prediction for N frames.

    Args:
        block_out_channels: width per level; all levels but the last have attention and a downsampler.
        attention_head_dim: the number of heads (the published name is a misnomer); each head has >= 32 channels.
        addition_time_embed_dim: width of the motion id's sinusoid.
        published: further entries of a published ``config.json``; values other than the supported one are refused.
            ``sample_size`` is accepted and has no meaning: any size works.

    Raises:
        InputError: a configuration this network cannot have.
    """

    gradient_checkpointing: Checkpointing = "none"  # see `cinemo.networks.memory.checkpoint_activations`
    regions = (Resnet, TransformerBlock)  # what is compiled where a network is not compiled whole

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        cross_attention_dim: int = 768,
        attention_head_dim: int = 8,
        addition_time_embed_dim: int = 256,
        **published: Any,
    ) -> None:
        super().__init__()
        for key, value in published.items():
            if key != "sample_size" and (key not in ONLY or value != ONLY[key]):
                expected = f"expected {ONLY[key]!r}" if key in ONLY else "no such setting"
                raise InputError(f"UNet config: {key} is {value!r}; {expected}: remove it")
        widths, heads, groups = tuple(block_out_channels), attention_head_dim, norm_num_groups
        for width in widths:
            if width % heads or width % groups or width // heads < ROTARY_DIM:
                raise InputError(
                    f"UNet config: block_out_channels has {width}, expected a multiple of {heads} heads "
                    f"(attention_head_dim) with >= {ROTARY_DIM} channels each and of {groups} groups (norm_num_groups)"
                )
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "block_out_channels": list(widths),
            "layers_per_block": layers_per_block,
            "norm_num_groups": groups,
            "cross_attention_dim": cross_attention_dim,
            "attention_head_dim": heads,
            "addition_time_embed_dim": addition_time_embed_dim,
        }
        self.time_width, self.motion_width = widths[0], addition_time_embed_dim
        embedding = 4 * widths[0]

        def resnet(in_width: int, out_width: int) -> Resnet:
            return Resnet(in_width, out_width, embedding, groups)

        def transformer(width: int) -> Transformer:
            return Transformer(width, heads, cross_attention_dim, groups)

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], embedding)
        self.add_embedding = Embedding(addition_time_embed_dim, embedding)
        nn.init.zeros_(self.add_embedding.linear_2.weight)

        last = len(widths) - 1
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            entries = [widths[max(level - 1, 0)]] + [width] * (layers_per_block - 1)
            resnets = [resnet(entry, width) for entry in entries]
            skips += [width] * layers_per_block
            if level < last:
                transformers = [transformer(width) for _ in entries]
                self.down_blocks.append(Stage(resnets, transformers, downsampler=Downsample(width)))
                skips.append(width)
            else:
                self.down_blocks.append(Stage(resnets, []))

        deepest = widths[-1]
        self.mid_block = Stage([resnet(deepest, deepest), resnet(deepest, deepest)], [transformer(deepest)])

        self.up_blocks = nn.ModuleList()
        current = deepest
        for level in range(last, -1, -1):
            width, resnets = widths[level], []
            for _ in range(layers_per_block + 1):
                resnets.append(resnet(current + skips.pop(), width))
                current = width
            transformers = [transformer(width) for _ in resnets] if level < last else []
            self.up_blocks.append(Stage(resnets, transformers, upsampler=Upsample(width) if level else None))

        self.conv_norm_out = GroupNorm(groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def keys_values(self, text_states: Tensor) -> TextKeysValues:
        """Keys and values of text states (B, L, D) for every attention to them: made once for all steps of a video."""
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        return {block.attn2: block.attn2.keys_values(text_states) for block in blocks}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text_states: Tensor | TextKeysValues,
        motion_ids: Tensor | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """Predict for ``sample`` (B, C, N, h, w).

        Args:
            timestep: a number, or a tensor of shape () or (B,).
            text_states: (B, L, D), shared by all frames of an item; no mask. Or what `keys_values` made of them.
            motion_ids: (B,) any real values; None leaves the motion input out, which is LaVie. NaN does so for an item.
            deep: features to use again, or to fill, of a call with the same batch and frames.

        Returns:
            (B, out_channels, N, h, w).
        """
        batch, _, frames, _, _ = sample.shape
        embedding = self.time_embedding(sinusoid(timestep, batch, self.time_width, sample))
        if motion_ids is not None:
            motion = self.add_embedding(sinusoid(motion_ids.nan_to_num(), batch, self.motion_width, sample))
            embedding = embedding + motion.masked_fill(motion_ids.isnan().expand(batch)[:, None].to(motion.device), 0)
        embedding = F.silu(embedding)

        def layer(modules: tuple[nn.Module, nn.Module | None], x: Tensor, skip: Tensor | None = None) -> Tensor:
            resnet, transformer = modules

            def run(x: Tensor, skip: Tensor | None) -> Tensor:
                x = resnet(x if skip is None else torch.cat([x, skip], dim=1), embedding)
                return x if transformer is None else transformer(x, text_states)

            return made_again(run, x, skip) if self.gradient_checkpointing == "whole" else run(x, skip)

        # (B, C, N, h, w) -> (B*N, C, h, w) with channels innermost, see `cinemo.networks.blocks`.
        x = sample.permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous().permute(0, 3, 1, 2)
        x = self.conv_in(x)
        skips = [x]
        if deep is not None and deep.kept is not None:
            for modules in list(cast(Stage, self.down_blocks[0]).layers())[: deep.depth - 1]:
                x = layer(modules, x)
                skips.append(x)
            x = deep.kept
            for modules in list(cast(Stage, self.up_blocks[-1]).layers())[-deep.depth :]:
                x = layer(modules, x, skips.pop())
            return self._output(x, batch, frames)

        for stage in cast(Iterable[Stage], self.down_blocks):
            for modules in stage.layers():
                x = layer(modules, x)
                skips.append(x)
            for downsample in stage.downsamplers:
                x = downsample(x)
                skips.append(x)

        for modules in self.mid_block.layers():
            x = layer(modules, x)

        for stage in cast(Iterable[Stage], self.up_blocks):
            for modules in stage.layers():
                if deep is not None and len(skips) == deep.depth:
                    deep.kept = x
                x = layer(modules, x, skips.pop())
            for upsample in stage.upsamplers:
                x = upsample(x, skips[-1].shape[2:])
        return self._output(x, batch, frames)

    def _output(self, x: Tensor, batch: int, frames: int) -> Tensor:
        x = silu(self.conv_norm_out(join_frames(x, batch)))
        out: Tensor = self.conv_out(part_frames(x, frames))
        return out.reshape(batch, frames, *out.shape[1:]).transpose(1, 2)
