"""Building blocks of DynamiCrafter's UNet (arXiv 2310.12190): an image model's layers, each followed by one along time.

Activations are images (B*F, C, h, w) in ``channels_last`` memory, as in `cinemo.networks.blocks`: the same bytes also
are (B, C, F, p) with the p = h*w cells of a frame side by side, for norms and convolutions over time, and tokens
(B, F, p, C), for linear layers and attention. Attention along time reads and writes those tokens where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cinemo.config import Checkpointing
from cinemo.networks.attention import Attention
from cinemo.networks.blocks import FeedForward, convolved
from cinemo.networks.memory import add, made_again, plainly, recomputed, residual, silu
from cinemo.networks.norms import GroupNorm
from cinemo.types import InputError

GROUPS = 32  # of every group norm

# For each attention to a context: keys and values of the text (B, L, heads, d), then, where there is an image, those
# of its tokens, (B, L', heads, d) for all frames alike or (B, F, L', heads, d). See `DualAttention.keys_values`.
ContextKeysValues = Mapping[nn.Module, tuple[Tensor, ...]]


def zeroed(module: nn.Module) -> nn.Module:
    """``module`` with all parameters zero: a branch that ends with it begins as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def learns_on_cpu(x: Tensor) -> bool:
    """Whether a backward pass on a CPU is to come: its convolutions are slow there in ``channels_last`` memory (AVX2: a
    third slower than in the plain layout, and those along time up to five times)."""
    return torch.is_grad_enabled() and x.device.type == "cpu"


Run = Callable[..., Tensor]
"""Calls a function with what follows it."""


def tokens(x: Tensor, batch: int) -> Tensor:
    """(B*F, C, h, w) -> (B, F, p, C)."""
    images, width, rows, columns = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch, images // batch, rows * columns, width)


def images(y: Tensor, rows: int, columns: int) -> Tensor:
    """(B, F, p, C) -> (B*F, C, h, w)."""
    return y.reshape(-1, rows, columns, y.shape[3]).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Two convolutions of each frame, with norms per frame, then four along time."""

    def __init__(self, in_width: int, out_width: int, embedding: int) -> None:
        super().__init__()
        # The places of the published activation functions and of its dropout are kept for the names in the state dict.
        conv_in = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.in_layers = nn.Sequential(GroupNorm(GROUPS, in_width), nn.SiLU(), conv_in)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_width))
        conv_out = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        self.out_layers = nn.Sequential(GroupNorm(GROUPS, out_width), nn.SiLU(), nn.Identity(), conv_out)
        self.skip_connection = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()
        self.temopral_conv = TemporalConvolutions(out_width)

    def forward(
        self, x: Tensor, activated_embedding_BE: Tensor, skip: Tensor | None = None, run: Run = plainly
    ) -> Tensor:
        """Of ``x`` with the channels of ``skip`` behind it.

        Args:
            run: calls what comes before the convolutions along time. Where whole layers are made again for the
                backward pass, that is; they are not, as published: they are much of the work.
        """
        h = run(self._in_space, x, skip, activated_embedding_BE)
        out: Tensor = self.temopral_conv(h, len(activated_embedding_BE))
        return out

    def _in_space(self, x: Tensor, skip: Tensor | None, activated_embedding_BE: Tensor) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        batch = len(activated_embedding_BE)
        h = recomputed(_activated(self.in_layers), x)
        embedding = self.emb_layers[1](activated_embedding_BE)[:, :, None, None]
        h = add(h, embedding.repeat_interleave(len(x) // batch, dim=0))
        return add(recomputed(_activated(self.out_layers), h), self.skip_connection(x))


class TemporalConvolutions(nn.Module):
    """Four convolutions over three frames each, at every cell, around which the input is added; norms over all frames.

    The last one begins as zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

        def stage(*dropout: nn.Module) -> nn.Sequential:
            return nn.Sequential(GroupNorm(GROUPS, width), nn.SiLU(), *dropout, _ConvolutionInTime(width))

        self.conv1 = stage()
        self.conv2, self.conv3, self.conv4 = (stage(nn.Identity()) for _ in range(3))
        zeroed(self.conv4[-1])

    def forward(self, x: Tensor, batch: int) -> Tensor:
        rows, columns = x.shape[2:]
        x_BCFp = tokens(x, batch).permute(0, 3, 1, 2)
        h = x_BCFp
        for stage in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = recomputed(_activated(stage), h)
        return images(add(h, x_BCFp).permute(0, 2, 3, 1), rows, columns)


class _ConvolutionInTime(nn.Conv3d):
    """A convolution over (3, 1, 1) of (B, C, F, p): one over (3, 1) of images whose rows are the frames, or a matrix
    product of all threes of frames, where a CPU is slow at that or would have to rearrange weights that are larger."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x_BCFp: Tensor) -> Tensor:
        few = x_BCFp.device.type == "cpu" and x_BCFp.numel() // self.in_channels < 3 * self.out_channels
        if few or learns_on_cpu(x_BCFp):
            threes = F.pad(x_BCFp.permute(0, 2, 3, 1), (0, 0, 0, 0, 1, 1)).unfold(1, 3, 1).flatten(3)
            return F.linear(threes, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return F.conv2d(x_BCFp, self.weight[..., 0], self.bias, padding=(1, 0))


def _activated(layers: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The convolution that ``layers`` ends with, of the activated norm that they begin with."""
    norm, conv = layers[0], layers[-1]
    if isinstance(conv, nn.Conv2d):
        return lambda x: convolved(conv, silu(norm(x)), plain=learns_on_cpu(x))
    return lambda x: cast(Tensor, conv(silu(norm(x))))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(self.op, x, plain=learns_on_cpu(x))


class DualAttention(Attention):
    """Attention to a text and, with the same queries, to an image: the two are added (equation 2 of the paper).

    Args:
        image: whether there are keys and values for an image.
        learned_scale: the image's part counts tanh(alpha) + 1 times as much, alpha being learned and 0 at first. The
            paper's text has tanh alone; this is the published code.
        scale: a further, constant factor of the image's part.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int,
        head_width: int | None = None,
        image: bool = True,
        learned_scale: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(width, heads, context_width, head_width)
        self.scale = scale
        self.to_k_ip: nn.Linear | None = None
        self.to_v_ip: nn.Linear | None = None
        self.alpha: nn.Parameter | None = None
        if image:
            inner = self.to_q.out_features
            self.to_k_ip = nn.Linear(context_width, inner, bias=False)
            self.to_v_ip = nn.Linear(context_width, inner, bias=False)
            if learned_scale:
                self.alpha = nn.Parameter(torch.zeros(1))  # DeepSpeed cannot broadcast what has no dimension

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As published, alpha has no dimension in files."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.alpha is not None:
            destination[f"{prefix}alpha"] = destination[f"{prefix}alpha"].reshape(())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if self.alpha is not None and (name := f"{prefix}alpha") in state_dict:
            state_dict = {**state_dict, name: state_dict[name].reshape(1)}
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def keys_values(self, context: Tensor, image: Tensor | None = None) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Keys and values (B, L, heads, d) of a text (B, L, D); then those of an image's tokens (B, ..., L', D).

        Raises:
            InputError: an image for a network that has no attention to images.
        """
        text = super().keys_values(context)
        if image is None:
            return text
        if self.to_k_ip is None or self.to_v_ip is None:
            raise InputError("image tokens for a text-to-video network (image_cross_attention is false)")
        k, v = (layer(image).unflatten(-1, (self.heads, -1)) for layer in (self.to_k_ip, self.to_v_ip))
        return *text, k, v

    def forward(self, x_BFpC: Tensor, keys_values: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]
        batch, frames, cells, _ = x_BFpC.shape
        q = self.to_q(x_BFpC).unflatten(-1, (self.heads, -1))
        k, v, *image = keys_values
        mixed = attend(q.flatten(1, 2), k, v)
        if image:
            k, v = image[0], self._image_scale() * image[1]
            if k.dim() == 5:
                if k.shape[1] != frames:
                    raise InputError(f"image tokens for {k.shape[1]} frames, and the sample has {frames}")
                of_image = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
            else:
                of_image = attend(q.flatten(1, 2), k, v)
            mixed = add(mixed, of_image.reshape(mixed.shape))
        out: Tensor = self.to_out[0](mixed.reshape(batch, frames, cells, -1))
        return out

    def _image_scale(self) -> Tensor | float:
        return self.scale if self.alpha is None else self.scale * (self.alpha.tanh() + 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, N, heads, d); logits are scaled by d^-0.5."""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class AttentionInTime(Attention):
    """Self-attention over the frames of (B, F, p, C) at each cell; it knows no order of frames."""

    def forward(self, x_BFpC: Tensor) -> Tensor:  # type: ignore[override]
        # The cells as further heads: nothing is moved, neither here nor behind the kernel.
        q, k, v = (to(x_BFpC).unflatten(-1, (self.heads, -1)).flatten(2, 3) for to in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out[0](attend(q, k, v).reshape(*x_BFpC.shape[:3], -1))
        return out


class SpatialBlock(nn.Module):
    """Attention inside each frame and to the context, then the feed-forward; norms before, residuals around."""

    gradient_checkpointing: Checkpointing = "none"  # see `cinemo.networks.memory.checkpoint_activations`

    def __init__(self, width: int, attn2: DualAttention) -> None:
        super().__init__()
        self.attn1 = Attention(width, attn2.heads, head_width=attn2.to_q.out_features // attn2.heads)
        self.ff = FeedForward(width)
        self.attn2 = attn2
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, y: Tensor, keys_values: Any) -> Tensor:
        """``y``: (B, F, p, C), overwritten where no gradients are asked for.

        Args:
            keys_values: what `DualAttention.keys_values` made of text and tokens of an image.
        """
        shape, run = y.shape, made_again if self.gradient_checkpointing == "selective" else plainly
        y = residual(y.flatten(0, 1), 0, lambda y: self.attn1(self.norm1(y)), widest=4).view(shape)
        y = residual(y, 2, lambda y: run(lambda y: self.attn2(self.norm2(y), keys_values), y), widest=4)
        return residual(y.view(-1, shape[3]), 0, lambda y: run(self.ff, y, self.norm3), widest=8).view(shape)


class TemporalBlock(nn.Module):
    """Attention over the frames at each cell, twice, then the feed-forward; norms before, residuals around."""

    gradient_checkpointing: Checkpointing = "none"  # see `cinemo.networks.memory.checkpoint_activations`

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.attn1 = AttentionInTime(width, heads, head_width=head_width)
        self.ff = FeedForward(width)
        self.attn2 = AttentionInTime(width, heads, head_width=head_width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, y: Tensor) -> Tensor:
        """``y``: (B, F, p, C), overwritten where no gradients are asked for."""
        shape, run = y.shape, made_again if self.gradient_checkpointing == "selective" else plainly
        y = residual(y, 2, lambda y: run(lambda y: self.attn1(self.norm1(y)), y), widest=4)
        y = residual(y, 2, lambda y: run(lambda y: self.attn2(self.norm2(y)), y), widest=4)
        return residual(y.reshape(-1, shape[3]), 0, lambda y: run(self.ff, y, self.norm3), widest=8).view(shape)


class SpatialTransformer(nn.Module):
    """`SpatialBlock`s on the cells of each frame; the group norm before them is per frame (eps 1e-6).

    Args:
        linear: whether the projections around the blocks are stored as linear layers or as 1x1 convolutions.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        depth: int,
        linear: bool,
        attention: Callable[[], DualAttention],
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.norm = GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Linear(width, inner) if linear else _PointwiseInSpace(width, inner)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(inner, attention()) for _ in range(depth)])
        self.proj_out = zeroed(nn.Linear(inner, width) if linear else _PointwiseInSpace(inner, width))

    def forward(self, x: Tensor, batch: int, context: tuple[Tensor, Tensor | None] | ContextKeysValues) -> Tensor:
        y = recomputed(lambda x: self.proj_in(tokens(self.norm(x), batch)), x)
        for block in self.transformer_blocks:
            attn2 = cast(SpatialBlock, block).attn2
            y = block(y, context[attn2] if isinstance(context, Mapping) else attn2.keys_values(*context))
        return add(images(self.proj_out(y), *x.shape[2:]), x)


class TemporalTransformer(nn.Module):
    """`TemporalBlock`s on the frames of each cell; the group norm before them is over all frames (eps 1e-6)."""

    def __init__(self, width: int, heads: int, head_width: int, depth: int, linear: bool) -> None:
        super().__init__()
        inner = heads * head_width
        self.norm = GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Linear(width, inner) if linear else _PointwiseInTime(width, inner)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(inner, heads, head_width) for _ in range(depth)])
        self.proj_out = zeroed(nn.Linear(inner, width) if linear else _PointwiseInTime(inner, width))

    def forward(self, x: Tensor, batch: int) -> Tensor:
        def enter(x: Tensor) -> Tensor:
            y: Tensor = self.proj_in(self.norm(tokens(x, batch).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            return y

        y = recomputed(enter, x)
        for block in self.transformer_blocks:
            y = block(y)
        return add(images(self.proj_out(y), *x.shape[2:]), x)


class _PointwiseInSpace(nn.Conv2d):
    """A linear layer of tokens, stored as a 1x1 convolution of images."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width, 1)

    def forward(self, y: Tensor) -> Tensor:
        return F.linear(y, self.weight.flatten(1), self.bias)


class _PointwiseInTime(nn.Conv1d):
    """A linear layer of tokens, stored as a convolution over one frame."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width, 1)

    def forward(self, y: Tensor) -> Tensor:
        return F.linear(y, self.weight.flatten(1), self.bias)
