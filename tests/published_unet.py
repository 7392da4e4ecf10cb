"""The published network's forward pass, operation by operation as the released code orders them (arXiv 2407.15642).

What ours is measured against: tensors (B, C, N, h, w), rearranged around every convolution and transformer; text
repeated for each frame; spatial and text attention through SDPA; temporal attention in separate operations. It runs on
the parameters of a `LavieUNet`, so both compute the same function.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cinemo.networks.attention import distance_bucket, rotary_frequencies
from cinemo.networks.lavie_unet import LavieUNet, sinusoid


def published_forward(
    unet: LavieUNet, sample: Tensor, timestep: Tensor | float, text_BLD: Tensor, motion_ids_B: Tensor
) -> Tensor:
    """The arguments and the result of `LavieUNet.forward`; honours ``unet.gradient_checkpointing``."""
    batch, _, frames, _, _ = sample.shape
    embedding = unet.time_embedding(sinusoid(timestep, batch, unet.time_width, sample))
    embedding = embedding + unet.add_embedding(sinusoid(motion_ids_B, batch, unet.motion_width, sample))
    text = text_BLD.repeat_interleave(frames, dim=0)

    def run(function: Any, *inputs: Any) -> Tensor:
        if unet.gradient_checkpointing == "whole" and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def layer(x: Tensor, resnet_module: nn.Module, transformer_module: nn.Module | None) -> Tensor:
        x = run(resnet, resnet_module, x, embedding)
        return x if transformer_module is None else run(transformer, transformer_module, x, text)

    x = convolution(unet.conv_in, sample)
    skips = [x]
    for stage in unet.down_blocks:
        for modules in stage.layers():
            x = layer(x, *modules)
            skips.append(x)
        for downsample in stage.downsamplers:
            x = convolution(downsample.conv, x)
            skips.append(x)
    for modules in unet.mid_block.layers():
        x = layer(x, *modules)
    for stage in unet.up_blocks:
        for modules in stage.layers():
            x = layer(torch.cat([x, skips.pop()], dim=1), *modules)
        for upsample in stage.upsamplers:
            x = F.interpolate(x, size=(frames, *skips[-1].shape[3:]), mode="nearest")
            x = convolution(upsample.conv, x)
    return convolution(unet.conv_out, F.silu(unet.conv_norm_out(x)))


def convolution(module: nn.Module, x: Tensor) -> Tensor:
    """Per frame: (b c f h w) -> ((b f) c h w) and back."""
    batch, channels, frames, rows, columns = x.shape
    y = module(x.transpose(1, 2).reshape(batch * frames, channels, rows, columns))
    return y.reshape(batch, frames, *y.shape[1:]).transpose(1, 2)


def resnet(module: Any, x: Tensor, embedding: Tensor) -> Tensor:
    h = convolution(module.conv1, F.silu(module.norm1(x)))
    h = h + module.time_emb_proj(F.silu(embedding))[:, :, None, None, None]
    h = convolution(module.conv2, F.silu(module.norm2(h)))
    if isinstance(module.conv_shortcut, nn.Conv2d):
        x = convolution(module.conv_shortcut, x)
    return x + h


def transformer(module: Any, x: Tensor, text: Tensor) -> Tensor:
    batch, width, frames, rows, columns = x.shape
    images = x.transpose(1, 2).reshape(batch * frames, width, rows, columns)
    y = module.proj_in(module.norm(images)).permute(0, 2, 3, 1).reshape(batch * frames, rows * columns, width)
    block = module.transformer_blocks[0]
    y = attention(block.attn1, block.norm1(y)) + y
    y = attention(block.attn2, block.norm2(y), text) + y
    y = y.reshape(batch, frames, rows * columns, width).transpose(1, 2).reshape(-1, frames, width)
    y = temporal_attention(block.attn_temp, block.norm_temp(y)) + y
    y = y.reshape(batch, rows * columns, frames, width).transpose(1, 2).reshape(batch * frames, rows * columns, width)
    normed = block.norm3(y)
    value, gate = block.ff.net[0].proj(normed).chunk(2, dim=-1)
    y = block.ff.net[2](value * F.gelu(gate)) + y
    y = y.reshape(batch * frames, rows, columns, width).permute(0, 3, 1, 2).contiguous()
    y = module.proj_out(y) + images
    return y.reshape(batch, frames, width, rows, columns).transpose(1, 2)


def heads_apart(module: Any, y: Tensor) -> Tensor:
    return y.reshape(len(y), -1, module.heads, y.shape[2] // module.heads).transpose(1, 2)


def attention(module: Any, y: Tensor, context: Tensor | None = None) -> Tensor:
    context = y if context is None else context
    q, k, v = module.to_q(y), module.to_k(context), module.to_v(context)
    mixed = F.scaled_dot_product_attention(*(heads_apart(module, z) for z in (q, k, v)))
    return module.to_out[0](mixed.transpose(1, 2).reshape(y.shape))


def temporal_attention(module: Any, y: Tensor) -> Tensor:
    q, k, v = (heads_apart(module, z) for z in (module.to_q(y), module.to_k(y), module.to_v(y)))
    frames = y.shape[1]
    wide = torch.promote_types(y.dtype, torch.float32)
    angles = torch.arange(frames, dtype=wide, device=y.device)[:, None] * rotary_frequencies().to(y.device, wide)
    angles = angles.repeat_interleave(2, dim=1).to(y.dtype)
    q, k = rotate(q * q.shape[-1] ** -0.5, angles), rotate(k, angles)
    buckets = [[distance_bucket(i, j) for j in range(frames)] for i in range(frames)]
    table = module.time_rel_pos_bias.relative_attention_bias(torch.tensor(buckets, device=y.device))
    logits = q @ k.transpose(-1, -2) + table.permute(2, 0, 1)
    logits = logits - logits.amax(dim=-1, keepdim=True).detach()
    return module.to_out[0]((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(y.shape))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    partner = torch.stack([-second, first], dim=-1).flatten(-2)
    return torch.cat([turned * angles.cos() + partner * angles.sin(), rest], dim=-1)
