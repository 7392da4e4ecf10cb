"""DynamiCrafter's video UNet (arXiv 2310.12190), which is VideoCrafter's with attention to an image's tokens.

State-dict names and shapes are those of the published checkpoints. The network knows nothing of images or text: what
the further input channels and the two parts of the context are is the method's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cinemo.config import Checkpointing, Count, Part
from cinemo.networks.blocks import Upsample, sinusoid
from cinemo.networks.dynamicrafter_blocks import (
    GROUPS,
    ContextKeysValues,
    Downsample,
    DualAttention,
    ResBlock,
    SpatialBlock,
    SpatialTransformer,
    TemporalBlock,
    TemporalConvolutions,
    TemporalTransformer,
    learns_on_cpu,
    zeroed,
)
from cinemo.networks.features import DeepFeatures
from cinemo.networks.memory import made_again, plainly, silu
from cinemo.networks.norms import GroupNorm
from cinemo.types import InputError

# Entries of published configuration files that this network has no other choice for.
ONLY: dict[str, Any] = {
    "temporal_conv": True,
    "temporal_attention": True,
    "temporal_selfatt_only": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "tempspatial_aware": False,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "conv_resample": True,
    "num_heads": -1,
    "dims": 2,
}

# Entries that change no prediction. `dropout` (published: 0.1, in the residual blocks and convolutions along time)
# acts in training alone; it is left out, since a mask would have to be the same whatever the number of workers and
# when a layer is computed again in the backward pass. No layer looks at `temporal_length`: any number of frames works.
WITHOUT_EFFECT = ("dropout", "use_checkpoint", "temporal_length", "use_fp16")

_INITIAL_HEADS = 8  # of the attention along time behind the first convolution, whatever its width

# In every block the layer along time is the third; what stands there without attention is nothing.
_TEMPORAL = re.compile(r"(^|\.)(init_attn|temopral_conv|middle_block\.2|(input|output)_blocks\.\d+\.2)\.")


def is_temporal(name: str) -> bool:
    """Whether a parameter of `DynamiCrafterUNet`, by its name in the state dict, belongs to a layer along time.

    The others are the paper's spatial layers. The input for frames per second is one of them.
    """
    return _TEMPORAL.search(name) is not None


def is_image_context(name: str) -> bool:
    """Whether a parameter, by its name, is one of the attention to an image: a text-to-video model has none of them."""
    return not {"to_k_ip", "to_v_ip", "alpha"}.isdisjoint(name.split("."))


class DynamiCrafterConfig(Part):
    """Arguments of `DynamiCrafterUNet`, by their published names; the defaults are the 256x256 model."""

    in_channels: int = Field(8, ge=1, description="4 noisy latents, then 4 of the image; 4 for a text-to-video model")
    out_channels: int = Field(4, ge=1)
    model_channels: int = Field(320, ge=1, description="width of the outermost level")
    attention_resolutions: tuple[Count, ...] = Field((4, 2, 1), description="downscalings of the levels with attention")
    num_res_blocks: int = Field(2, ge=1)
    channel_mult: tuple[Count, ...] = Field(
        (1, 2, 4, 4), min_length=1, description="width of each level / model_channels"
    )
    num_head_channels: int = Field(64, ge=1)
    transformer_depth: int = Field(1, ge=1)
    context_dim: int = Field(1024, ge=1, description="width of text states and image tokens")
    use_linear: bool = Field(True, description="how the projections around attention are stored: linear or 1x1")
    addition_attention: bool = Field(True, description="attention along time behind the first convolution")
    image_cross_attention: bool = Field(True, description="False: a text-to-video model")
    image_cross_attention_scale_learnable: bool = Field(True, description="False for the 512 and 1024 models")
    fs_condition: bool = Field(True, description="whether frames per second (or their stride) are an input")
    default_fs: int = Field(3, ge=0, description="where none are given")


class DynamiCrafterUNet(nn.Module):
    """Epsilon (or v) prediction for F frames.

    Args:
        model_channels: width of the outermost level; that of level i is ``model_channels * channel_mult[i]``, a
            multiple of 32.
        attention_resolutions: the levels with attention, by how many times smaller than the input they are: 1, 2, 4...
            The innermost block always has attention.
        num_head_channels: width of a head.
        published: further entries of a published configuration; values other than the supported one are refused.
            Those of `WITHOUT_EFFECT` are accepted.

    Raises:
        InputError: a configuration this network cannot have.
    """

    gradient_checkpointing: Checkpointing = "none"  # see `cinemo.networks.memory.checkpoint_activations`
    # What is compiled where a network is not compiled whole. The convolutions in space are left out: how they are
    # called, with or without checkpointing, is made anew in each call.
    regions = (TemporalConvolutions, SpatialBlock, TemporalBlock)

    def __init__(
        self,
        in_channels: int = 8,
        out_channels: int = 4,
        model_channels: int = 320,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_res_blocks: int = 2,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_head_channels: int = 64,
        transformer_depth: int = 1,
        context_dim: int = 1024,
        use_linear: bool = True,
        addition_attention: bool = True,
        image_cross_attention: bool = True,
        image_cross_attention_scale_learnable: bool = True,
        fs_condition: bool = True,
        default_fs: int = 3,
        **published: Any,
    ) -> None:
        super().__init__()
        for key, value in published.items():
            if key not in WITHOUT_EFFECT and (key not in ONLY or value != ONLY[key]):
                expected = f"expected {ONLY[key]!r}" if key in ONLY else "no such setting"
                raise InputError(f"UNet config: {key} is {value!r}; {expected}: remove it")
        widths = [model_channels * factor for factor in channel_mult]
        for width in {model_channels, *widths}:
            if width % GROUPS or width < num_head_channels:
                raise InputError(
                    f"UNet config: model_channels * channel_mult has {width}, expected a multiple of {GROUPS} groups "
                    f"and at least one head of {num_head_channels} (num_head_channels)"
                )
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "model_channels": model_channels,
            "attention_resolutions": list(attention_resolutions),
            "num_res_blocks": num_res_blocks,
            "channel_mult": list(channel_mult),
            "num_head_channels": num_head_channels,
            "transformer_depth": transformer_depth,
            "context_dim": context_dim,
            "use_linear": use_linear,
            "addition_attention": addition_attention,
            "image_cross_attention": image_cross_attention,
            "image_cross_attention_scale_learnable": image_cross_attention_scale_learnable,
            "fs_condition": fs_condition,
            "default_fs": default_fs,
        }
        self.in_channels, self.model_channels, self.default_fs = in_channels, model_channels, default_fs
        embedding = 4 * model_channels

        def transformers(width: int) -> list[nn.Module]:
            heads, head, image = width // num_head_channels, num_head_channels, image_cross_attention
            learned = image_cross_attention_scale_learnable

            def attention() -> DualAttention:
                return DualAttention(heads * head, heads, context_dim, head, image, learned)

            shape = width, heads, head, transformer_depth, use_linear
            return [SpatialTransformer(*shape, attention), TemporalTransformer(*shape)]

        def layers(in_width: int, level: int) -> list[nn.Module]:
            attentive = 2**level in attention_resolutions
            return [ResBlock(in_width, widths[level], embedding), *(transformers(widths[level]) if attentive else [])]

        self.time_embed = _embedding(model_channels, embedding)
        self.fps_embedding = _embedding(model_channels, embedding) if fs_condition else None
        if self.fps_embedding is not None:
            zeroed(self.fps_embedding[-1])

        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, model_channels, 3, padding=1)])])
        self.init_attn = None
        if addition_attention:
            shape = model_channels, _INITIAL_HEADS, num_head_channels, transformer_depth
            self.init_attn = nn.ModuleList([TemporalTransformer(*shape, linear=False)])
        skips = [model_channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(nn.ModuleList(layers(skips[-1], level)))
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)

        current = widths[-1]
        first, last = (ResBlock(current, current, embedding) for _ in range(2))
        self.middle_block = nn.ModuleList([first, *transformers(current), last])

        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(num_res_blocks + 1):
                modules = layers(current + skips.pop(), level)
                current = widths[level]
                if level and i == num_res_blocks:
                    modules.append(Upsample(current))
                self.output_blocks.append(nn.ModuleList(modules))

        conv_out = zeroed(nn.Conv2d(current, out_channels, 3, padding=1))
        self.out = nn.Sequential(GroupNorm(GROUPS, current), nn.SiLU(), conv_out)

    @property
    def dtype(self) -> torch.dtype:
        return cast(Tensor, self.time_embed[0].weight).dtype

    def keys_values(self, text_states: Tensor, image_states: Tensor | None = None) -> ContextKeysValues:
        """Keys and values of the context for every attention to it, made once for all steps of a video.

        Args:
            text_states, image_states: as `forward` takes them.
        """
        attentions = [module for module in self.modules() if isinstance(module, DualAttention)]
        return {attention: attention.keys_values(text_states, image_states) for attention in attentions}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        text_states: Tensor | ContextKeysValues,
        image_states: Tensor | None = None,
        fs: Tensor | float | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """Predict for ``sample`` (B, C, F, h, w), of any number of frames and any size.

        Args:
            timestep: a number, or a tensor of shape () or (B,).
            text_states: (B, L, D), shared by all frames of an item; no mask. Or what `keys_values` made of both parts
                of the context, with ``image_states`` None.
            image_states: tokens of an image, (B, F, L', D) for each frame its own, or (B, L', D) shared by all; None
                leaves the attention to images out.
            fs: (B,) frames per second, or whatever the checkpoint was trained with; None: ``default_fs``.
            deep: features to use again, or to fill, of a call with the same batch and frames.

        Returns:
            (B, out_channels, F, h, w).

        Raises:
            InputError: image tokens for another number of frames; an image or ``fs`` for a network without such an
                input.
        """
        batch, _, frames, _, _ = sample.shape
        embedding = self._embedding(sample, timestep, fs)
        context = (text_states, image_states) if isinstance(text_states, Tensor) else text_states

        def block(modules: Iterable[nn.Module], x: Tensor, skips: list[Tensor] | None = None) -> Tensor:
            """Of ``x``, with the last of ``skips`` beside it; the one after that has the size to upsample to."""

            skip = skips.pop() if skips else None
            size = cast(tuple[int, int], tuple(skips[-1].shape[2:])) if skips else (0, 0)
            for module in modules:
                if isinstance(module, ResBlock):
                    x, skip = module(x, embedding, skip, kept_or_made_again), None
                elif isinstance(module, SpatialTransformer):
                    x = kept_or_made_again(module, x, batch, context)
                elif isinstance(module, TemporalTransformer):
                    x = kept_or_made_again(module, x, batch)
                elif isinstance(module, Upsample):
                    x = module(x.contiguous() if learns_on_cpu(x) else x, size)
                else:
                    x = module(x)
            return x

        def kept_or_made_again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
            """Attention and convolutions in space."""
            return (made_again if self.gradient_checkpointing == "whole" else plainly)(function, *inputs)

        def begun(x: Tensor) -> Tensor:
            x = block(inputs[0], x)
            return x if self.init_attn is None else block(self.init_attn, x)

        inputs = cast(Sequence[Iterable[nn.Module]], self.input_blocks)
        outputs = cast(Sequence[Iterable[nn.Module]], self.output_blocks)
        # (B, C, F, h, w) -> (B*F, C, h, w) with channels innermost, see `cinemo.networks.dynamicrafter_blocks`.
        x = begun(sample.permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous().permute(0, 3, 1, 2))
        skips = [x]
        reused = deep is not None and deep.kept is not None
        if deep is not None and reused:
            inputs, outputs = inputs[: deep.depth], outputs[-deep.depth :]
        for modules in inputs[1:]:
            x = block(modules, x)
            skips.append(x)
        if deep is not None and deep.kept is not None:
            x = deep.kept
        else:
            x = block(cast(Iterable[nn.Module], self.middle_block), x)
        for modules in outputs:
            if deep is not None and not reused and len(skips) == deep.depth:
                deep.kept = x
            x = block(modules, x, skips)

        norm, _, conv = self.out
        out: Tensor = conv(silu(norm(x)))
        return out.reshape(batch, frames, *out.shape[1:]).transpose(1, 2)

    def _embedding(self, sample: Tensor, timestep: Tensor | float, fs: Tensor | float | None) -> Tensor:
        """(B, E), activated: all residual blocks begin with that."""
        batch = len(sample)
        embedding = self.time_embed(sinusoid(timestep, batch, self.model_channels, sample))
        if self.fps_embedding is not None:
            fs = self.default_fs if fs is None else fs
            embedding = embedding + self.fps_embedding(sinusoid(fs, batch, self.model_channels, sample))
        elif fs is not None:
            raise InputError("frames per second for a network that has no such input (fs_condition is false)")
        return F.silu(embedding)


def _embedding(sinusoid: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(sinusoid, width), nn.SiLU(), nn.Linear(width, width))
