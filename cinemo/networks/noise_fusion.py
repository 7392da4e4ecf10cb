"""TRIP's Temporal Noise Fusion (arXiv 2403.17005, section 3.4): attention that merges residual and reference noise.

The paper's figure 3 gives the order of the layers; widths, heads, patches and positions are ours. Attention alone
cannot tell which pixel of the reference belongs to which of the residual noise: hence positions and kinds.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from cinemo.config import Checkpointing, Part
from cinemo.networks.attention import Attention
from cinemo.networks.blocks import Embedding
from cinemo.networks.memory import in_pieces, made_again, plainly

LARGEST_GRID = 1024  # cells of a frame, above which a token is a patch of 2x2

Axis = Literal["space", "time"]


class FusionConfig(Part):
    """Arguments of `TemporalNoiseFusion`."""

    width: int = Field(320, ge=1)
    heads: int = Field(8, ge=1)
    patch: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description=f"side of a token in cells; auto: 1 for frames of up to {LARGEST_GRID} cells, else 2"
    )
    positions: bool = Field(True, description="tell tokens where they are, and residual from reference noise")
    axis: Axis = Field("space", description="what is attended to: the tokens of a frame, or a token's own time")

    @model_validator(mode="after")
    def _check(self) -> FusionConfig:
        pairs = 4 if self.positions else 2  # sines and cosines, of rows and columns
        if self.width % self.heads or self.width % pairs:
            raise ValueError(f"width is {self.width}, expected a multiple of {self.heads} heads and of {pairs}")
        return self

    def patch_for(self, rows: int, columns: int) -> int:
        """The side of a token for frames of rows x columns cells."""
        if self.patch == "auto":
            return 1 if rows * columns <= LARGEST_GRID else 2
        return self.patch


class TemporalNoiseFusion(nn.Module):
    """phi of equation 11: residual noise, reference noise and timestep -> the noise of each frame.

    Adaptive norm, self-attention, adaptive norm, cross-attention to reference and residual tokens; what comes out is
    added to the residual noise. The last layer begins at zero, so that a fresh module returns the residual noise.

    Args:
        channels: of the noise.
        patch: side of a token in cells; a grid that it does not divide is filled up with zeros.
        positions: sine and cosine positions (of a token's row and column; with ``axis="time"`` of its frame), and a
            learned vector for residual and for reference tokens.
        axis: ``space``: all tokens of a frame attend to each other, frame by frame ("spatial feature normalization" in
            the paper); ``time``: all frames of a token, token by token.
    """

    gradient_checkpointing: Checkpointing = "none"  # all of it is made again unless none is

    def __init__(
        self,
        channels: int = 4,
        width: int = 320,
        heads: int = 8,
        patch: int = 1,
        positions: bool = True,
        axis: Axis = "space",
    ) -> None:
        super().__init__()
        self.config = {
            "channels": channels, "width": width, "heads": heads, "patch": patch, "positions": positions, "axis": axis
        }  # fmt: skip
        self.width, self.patch, self.positions, self.axis = width, patch, positions, axis
        values = channels * patch**2
        self.residual_in = nn.Linear(values, width)
        self.reference_in = nn.Linear(values, width)
        self.step_embedding = Embedding(width, width)
        self.norm1 = AdaptiveNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = AdaptiveNorm(width)
        self.attn2 = Attention(width, heads)
        self.noise_out = nn.Linear(width, values)
        nn.init.zeros_(self.noise_out.weight)
        nn.init.zeros_(self.noise_out.bias)
        if positions:
            self.kinds = nn.Parameter(0.02 * torch.randn(2, width))

    def forward(self, residual: Tensor, reference: Tensor, timestep: Tensor | float) -> Tensor:
        """The fused noise (B, C, N, h, w), float32 or wider, whatever the weights are.

        Args:
            residual: what the UNet makes of the noise of each frame, (B, C, N, h, w).
            reference: the image noise prior, shaped like it.
            timestep: a number, or a tensor of shape () or (B,).
        """
        batch, _, _, rows, columns = residual.shape
        dtype = self.noise_out.weight.dtype
        steps = torch.as_tensor(timestep, device=residual.device).expand(batch)
        embedding_BD = F.silu(self.step_embedding(waves(steps, self.width, dtype)))
        d, r = (self._tokens(x) for x in (residual, reference))
        grid = -(-rows // self.patch), -(-columns // self.patch)
        places_SD = self._places(d.shape[2], grid[1], d) if self.positions else None

        def change(d: Tensor, r: Tensor) -> Tensor:
            return self._change(d, r, embedding_BD, places_SD)

        run = plainly if self.gradient_checkpointing == "none" else made_again
        tokens = d.shape[0] * d.shape[1] * d.shape[2]
        delta = in_pieces(lambda d, r: run(change, d, r), (d, r), dim=1, widest=10 * tokens * self.width)
        if self.axis == "time":
            delta = delta.transpose(1, 2)
        # (B, N, rows * columns, C * p * p) -> (B, C, N, h, w)
        delta = delta.unflatten(2, grid).unflatten(4, (-1, self.patch, self.patch))  # type: ignore[no-untyped-call]
        delta = delta.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)[..., :rows, :columns]
        out: Tensor = residual.to(torch.promote_types(residual.dtype, torch.float32)) + delta
        return out

    def _change(self, d: Tensor, r: Tensor, embedding_BD: Tensor, places_SD: Tensor | None) -> Tensor:
        """What is added to the noise of tokens (B, R, S, values): R rows of S tokens that see each other."""
        d, r = self.residual_in(d), self.reference_in(r)
        if places_SD is not None:
            d, r = d + (places_SD + self.kinds[0]), r + (places_SD + self.kinds[1])
        shape, context = d.shape, torch.cat([r, d], dim=2).flatten(0, 1)
        x = d + self.attn1(self.norm1(d, embedding_BD).flatten(0, 1)).view(shape)
        keys_values = self.attn2.keys_values(context)
        x = x + self.attn2(self.norm2(x, embedding_BD).flatten(0, 1), keys_values).view(shape)
        out: Tensor = self.noise_out(x)
        return out

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, N, h, w) -> (B, R, S, C * p * p) in the weights' precision: rows are frames and tokens their patches,
        or with ``axis="time"`` rows are patches and tokens their frames."""
        x, p = x.to(self.noise_out.weight.dtype), self.patch
        x = F.pad(x, (0, -x.shape[4] % p, 0, -x.shape[3] % p))
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # type: ignore[no-untyped-call]
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4, 6).flatten(2, 3)
        return x.transpose(1, 2) if self.axis == "time" else x

    def _places(self, tokens: int, columns: int, like: Tensor) -> Tensor:
        """(S, D): the positions of a row's tokens."""
        numbers = torch.arange(tokens, device=like.device)
        if self.axis == "time":
            return waves(numbers, self.width, like.dtype)
        half = self.width // 2
        return torch.cat([waves(numbers // columns, half, like.dtype), waves(numbers % columns, half, like.dtype)], 1)


class AdaptiveNorm(nn.Module):
    """A layer norm whose scale and shift follow the timestep; it has none of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, activated_embedding_BD: Tensor) -> Tensor:
        scale, shift = self.modulation(activated_embedding_BD)[:, None, None].chunk(2, dim=-1)
        out: Tensor = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return out


def waves(values: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(L, width): cosines, then sines of values (L,) times 10000^(-k / (width/2)); at least float32, then ``dtype``."""
    wide, half = torch.promote_types(dtype, torch.float32), width // 2
    frequencies = (-math.log(10000) * torch.arange(half, dtype=wide, device=values.device) / half).exp()
    angles = values.to(wide)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
