"""DynamiCrafter's forward pass, operation by operation as the released code orders them (arXiv 2310.12190).

What ours is measured against: images (B*F, C, h, w) in the plain layout, rearranged around whatever works along time;
the embedding and the context repeated for each frame; convolutions along time in three dimensions; every attention
through SDPA on copies with the heads apart. It runs on the parameters of a `DynamiCrafterUNet`, so both compute the
same function.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cinemo.networks.blocks import Upsample, sinusoid
from cinemo.networks.dynamicrafter_blocks import ResBlock, SpatialTransformer, TemporalTransformer
from cinemo.networks.dynamicrafter_unet import DynamiCrafterUNet


def published_forward(
    unet: DynamiCrafterUNet,
    sample: Tensor,
    timestep: Tensor | float,
    text_BLD: Tensor,
    image_states: Tensor | None = None,
    fs: Tensor | float | None = None,
) -> Tensor:
    """The arguments and the result of `DynamiCrafterUNet.forward`; honours ``unet.gradient_checkpointing``."""
    batch, _, frames, _, _ = sample.shape
    embedding = unet.time_embed(sinusoid(timestep, batch, unet.model_channels, sample)).repeat_interleave(frames, 0)
    if unet.fps_embedding is not None:
        fs = unet.default_fs if fs is None else fs
        waves = sinusoid(fs, batch, unet.model_channels, sample)
        embedding = embedding + unet.fps_embedding(waves).repeat_interleave(frames, 0)
    context, words = text_BLD.repeat_interleave(frames, 0), text_BLD.shape[1]
    if image_states is not None:
        image = image_states.flatten(0, 1) if image_states.dim() == 4 else image_states.repeat_interleave(frames, 0)
        context = torch.cat([context, image], dim=1)

    def run(function: Any, *inputs: Any) -> Tensor:
        if unet.gradient_checkpointing == "whole" and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def block(modules: Any, x: Tensor, size: Any = None) -> Tensor:
        for module in modules:
            if isinstance(module, ResBlock):
                x = along_time(convolutions_in_time, module, run(resblock, module, x, embedding), batch)
            elif isinstance(module, SpatialTransformer):
                x = spatial_transformer(module, x, context, words, run)
            elif isinstance(module, TemporalTransformer):
                x = along_time(temporal_transformer, module, x, batch, run)
            elif isinstance(module, Upsample):
                x = module.conv(F.interpolate(x, size=size, mode="nearest"))
            else:
                x = (module if isinstance(module, nn.Conv2d) else module.op)(x)
        return x

    x = sample.transpose(1, 2).reshape(batch * frames, -1, *sample.shape[3:])
    skips: list[Tensor] = []
    for modules in unet.input_blocks:
        x = block(modules, x)
        if not skips and unet.init_attn is not None:
            x = block(unet.init_attn, x)
        skips.append(x)
    x = block(unet.middle_block, x)
    for modules in unet.output_blocks:
        x = torch.cat([x, skips.pop()], dim=1)
        x = block(modules, x, skips[-1].shape[2:] if skips else None)
    x = unet.out(x)
    return x.reshape(batch, frames, *x.shape[1:]).transpose(1, 2)


def along_time(function: Any, module: Any, x: Tensor, batch: int, *more: Any) -> Tensor:
    """((b f) c h w) -> (b c f h w) and back."""
    video = x.reshape(batch, -1, *x.shape[1:]).transpose(1, 2).contiguous()
    return function(module, video, *more).transpose(1, 2).reshape(x.shape)


def resblock(module: Any, x: Tensor, embedding: Tensor) -> Tensor:
    h = module.in_layers(x)
    h = h + module.emb_layers(embedding)[:, :, None, None]
    return module.skip_connection(x) + module.out_layers(h)


def convolutions_in_time(module: Any, video: Tensor) -> Tensor:
    h = video
    for stage in (getattr(module.temopral_conv, f"conv{i}") for i in (1, 2, 3, 4)):
        conv = stage[-1]
        h = F.conv3d(F.silu(stage[0](h)), conv.weight, conv.bias, padding=(1, 0, 0))
    return video + h


def spatial_transformer(module: Any, x: Tensor, context: Tensor, words: int, run: Any) -> Tensor:
    images, _, rows, columns = x.shape
    y = projected(module.proj_in, module.norm(x).permute(0, 2, 3, 1).reshape(images, rows * columns, -1))
    for block in module.transformer_blocks:
        y = run(spatial_block, block, y, context, words)
    y = projected(module.proj_out, y)
    return y.reshape(images, rows, columns, -1).permute(0, 3, 1, 2).contiguous() + x


def spatial_block(block: Any, y: Tensor, context: Tensor, words: int) -> Tensor:
    y = attention(block.attn1, block.norm1(y)) + y
    y = dual_attention(block.attn2, block.norm2(y), context, words) + y
    return feed_forward(block.ff, block.norm3(y)) + y


def temporal_transformer(module: Any, video: Tensor, run: Any) -> Tensor:
    batch, _, frames, rows, columns = video.shape
    y = module.norm(video).permute(0, 3, 4, 2, 1).reshape(batch * rows * columns, frames, -1).contiguous()
    y = projected(module.proj_in, y)
    for block in module.transformer_blocks:
        y = run(temporal_block, block, y)
    y = projected(module.proj_out, y)
    return y.reshape(batch, rows, columns, frames, -1).permute(0, 4, 3, 1, 2).contiguous() + video


def temporal_block(block: Any, y: Tensor) -> Tensor:
    y = attention(block.attn1, block.norm1(y)) + y
    y = attention(block.attn2, block.norm2(y)) + y
    return feed_forward(block.ff, block.norm3(y)) + y


def projected(module: Any, y: Tensor) -> Tensor:
    return F.linear(y, module.weight.flatten(1), module.bias)


def heads_apart(module: Any, y: Tensor) -> Tensor:
    return y.reshape(len(y), y.shape[1], module.heads, -1).transpose(1, 2).contiguous()


def mixed(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(*(heads_apart(module, z) for z in (q, k, v)))
    return out.transpose(1, 2).reshape(q.shape)


def attention(module: Any, y: Tensor) -> Tensor:
    return module.to_out[0](mixed(module, module.to_q(y), module.to_k(y), module.to_v(y)))


def dual_attention(module: Any, y: Tensor, context: Tensor, words: int) -> Tensor:
    text, image = context[:, :words], context[:, words:]
    q = module.to_q(y)
    out = mixed(module, q, module.to_k(text), module.to_v(text))
    if image.shape[1]:
        of_image = mixed(module, q, module.to_k_ip(image), module.to_v_ip(image))
        factor = module.scale if module.alpha is None else module.scale * (module.alpha.tanh() + 1)
        out = out + factor * of_image
    return module.to_out[0](out)


def feed_forward(module: Any, y: Tensor) -> Tensor:
    value, gate = module.net[0].proj(y).chunk(2, dim=-1)
    return module.net[2](value * F.gelu(gate))
