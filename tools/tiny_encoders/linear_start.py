"""A linear codec written into an untrained `AutoencoderKL`, so that training starts near block PCA, not at noise.

Every residual branch starts small; what remains is the trunk of convolutions and shortcuts. The encoder's trunk is
set to a two-stage PCA of 4x4 and 8x8 blocks, the decoder's is fitted by ridge regression, stage by stage. Group
normalisation would remove an image's brightness and contrast, so anchor channels of constant value are placed into
each group: they dominate its statistics, and ``silu(v) - silu(-v) = v`` lets mirrored pairs pass linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

ANCHOR = 3.0
COARSE = 32  # 4x4-block coefficients carried between pixels and the network's core
RESIDUAL_SCALE = 0.1


@dataclass(frozen=True)
class Coarse:
    """4x4 block PCA with each coefficient divided by the square root of its standard deviation (half whitened).

    ``analysis_KCHW``: filters of stride 4. ``energy_K``: what a squared error of 1 weighs in pixel terms.
    """

    analysis_KCHW: Tensor
    energy_K: Tensor

    def encode(self, images_BCHW: Tensor) -> Tensor:
        return F.conv2d(images_BCHW, self.analysis_KCHW, stride=4)

    def decode(self, coefficients_BKHW: Tensor) -> Tensor:
        return F.conv_transpose2d(coefficients_BKHW * self.energy_K[:, None, None], self.analysis_KCHW, stride=4)


def principal_filters(maps_BCHW: Tensor, side: int, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` strongest principal filters of ``side`` x ``side`` blocks, and their standard deviations."""
    batch, channels, height, width = maps_BCHW.shape
    grid = maps_BCHW.reshape(batch, channels, height // side, side, width // side, side).permute(0, 2, 4, 1, 3, 5)
    blocks = grid.reshape(-1, channels * side * side).double()
    values, vectors = torch.linalg.eigh(blocks.T @ blocks / len(blocks))
    filters = vectors.flip(1)[:, :count].T.reshape(count, channels, side, side)
    return filters.float(), values.flip(0)[:count].clamp_min(0).sqrt().float()


def coarse_basis(images_BCHW: Tensor) -> Coarse:
    filters, deviation = principal_filters(images_BCHW, 4, COARSE)
    return Coarse(filters / deviation.sqrt()[:, None, None, None], deviation)


@torch.no_grad()
def write_core(vae: AutoencoderKL, coarse: Coarse, images_BCHW: Tensor) -> None:
    """Encoder from its third level on, and decoder up to quarter resolution."""
    encoder, decoder = vae.encoder, vae.decoder
    for name, parameter in vae.named_parameters():
        if "resnets" in name and name.endswith("conv2.weight"):
            parameter.mul_(RESIDUAL_SCALE)
    coefficients = coarse.encode(images_BCHW)
    kept = vae.config.block_out_channels[2] * 2 // 3
    filters, deviation = principal_filters(coefficients * coarse.energy_K.sqrt()[:, None, None], 2, kept)
    filters = filters * coarse.energy_K.sqrt()[:, None, None] / deviation.sqrt()[:, None, None, None]
    latents = F.conv2d(coefficients, filters, stride=2)[:, : vae.config.latent_channels]

    _pass_through(encoder.down_blocks[2].resnets[0].conv_shortcut, COARSE)
    shrink = encoder.down_blocks[2].downsamplers[0].conv
    shrink.weight[:kept], shrink.bias[:kept] = 0, 0
    shrink.weight[:kept, :COARSE, :2, :2] = filters
    groups = vae.config.norm_num_groups
    _mirror_in_groups(encoder.down_blocks[3].resnets[0].conv_shortcut, groups, kept, mirrored=latents.shape[1])
    features = _core_features(encoder, coefficients)
    weight, bias = ridge(features, latents / latents.square().mean().sqrt(), 1)
    encoder.conv_out.weight.zero_()
    encoder.conv_out.bias.zero_()
    encoder.conv_out.weight[: latents.shape[1], :, 1:2, 1:2] = weight
    encoder.conv_out.bias[: latents.shape[1]] = bias
    encoder.conv_out.bias[latents.shape[1] :] = -8  # log variance

    _mirror_in_groups(decoder.conv_in, groups, latents.shape[1], mirrored=latents.shape[1])
    hidden = decoder.mid_block(decoder.conv_in(encoder.conv_out(features)[:, : latents.shape[1]]))
    for resnet in decoder.up_blocks[0].resnets:
        hidden = resnet(hidden, None)
    _fit_upsampler(decoder.up_blocks[0].upsamplers[0].conv, hidden, coefficients)
    _pass_through(decoder.up_blocks[1].resnets[0].conv_shortcut, COARSE)


@torch.no_grad()
def write_fine(vae: AutoencoderKL, coarse: Coarse, images_BCHW: Tensor) -> None:
    """Encoder's first two levels (the exact 4x4 analysis), and decoder from quarter resolution to pixels.

    Follows the training of the core: the regressions use the features that the core really makes.
    """
    encoder, decoder = vae.encoder, vae.decoder
    pairs, _ = principal_filters(images_BCHW, 2, 12)
    encoder.conv_in.weight[:3], encoder.conv_in.bias[:3] = 0, 0
    encoder.conv_in.weight[:3, :, 1, 1] = torch.eye(3)
    # The first level passes unchanged, for its random residual branches would disturb what the core was trained on.
    for level in encoder.down_blocks[:2]:
        for resnet in level.resnets:
            resnet.conv2.weight.zero_()
            resnet.conv2.bias.zero_()
    first, second = (encoder.down_blocks[level].downsamplers[0].conv for level in (0, 1))
    first.weight[:12], first.bias[:12] = 0, 0
    first.weight[:12, :3, :2, :2] = pairs
    _pass_through(encoder.down_blocks[1].resnets[0].conv_shortcut, 12)
    # The 4x4 filters, expressed in 2x2 coefficients (12 of 12: nothing is lost).
    quads = coarse.analysis_KCHW.reshape(COARSE, 3, 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(COARSE, 4, 12)
    second.weight.zero_()
    second.bias.zero_()
    second.weight[:COARSE, :12, :2, :2] = (quads @ pairs.reshape(12, 12).T).permute(0, 2, 1).reshape(COARSE, 12, 2, 2)

    latents = encode_core(vae, coarse.encode(images_BCHW))[0]
    hidden = decode_core(vae, latents)
    half = F.conv2d(images_BCHW, pairs, stride=2)
    _fit_upsampler(decoder.up_blocks[1].upsamplers[0].conv, hidden, half)
    _pass_through(decoder.up_blocks[2].resnets[0].conv_shortcut, 12)
    hidden = decoder.up_blocks[1].upsamplers[0](hidden)
    for resnet in decoder.up_blocks[2].resnets:
        hidden = resnet(hidden, None)
    _fit_upsampler(decoder.up_blocks[2].upsamplers[0].conv, hidden, images_BCHW)
    _mirror_in_groups(
        decoder.up_blocks[3].resnets[0].conv_shortcut, vae.config.norm_num_groups, 3, mirrored=3, anchors=1
    )
    hidden = decoder.up_blocks[2].upsamplers[0](hidden)
    for resnet in decoder.up_blocks[3].resnets:
        hidden = resnet(hidden, None)
    weight, bias = ridge(F.silu(decoder.conv_norm_out(hidden)), images_BCHW, 3)
    decoder.conv_out.weight.copy_(weight)
    decoder.conv_out.bias.copy_(bias)


def encode_core(vae: AutoencoderKL, coefficients_BKHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents, from 4x4 coefficients."""
    mean, log_variance = vae.encoder.conv_out(_core_features(vae.encoder, coefficients_BKHW)).chunk(2, 1)
    return mean, log_variance


def decode_core(vae: AutoencoderKL, latents_BCHW: Tensor) -> Tensor:
    """Features at quarter resolution, whose first `COARSE` channels are 4x4 coefficients while the core is trained."""
    hidden: Tensor = vae.decoder.up_blocks[0](vae.decoder.mid_block(vae.decoder.conv_in(latents_BCHW)))
    for resnet in vae.decoder.up_blocks[1].resnets:
        hidden = resnet(hidden, None)
    return hidden


def core_modules(vae: AutoencoderKL) -> list[nn.Module]:
    encoder, decoder = vae.encoder, vae.decoder
    first = [encoder.down_blocks[2], encoder.down_blocks[3], encoder.mid_block, encoder.conv_norm_out, encoder.conv_out]
    return [*first, decoder.conv_in, decoder.mid_block, decoder.up_blocks[0], decoder.up_blocks[1].resnets]


def ridge(inputs_BCHW: Tensor, targets_BCHW: Tensor, side: int, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight and bias of the ``side`` x ``side`` convolution from inputs to targets with the least square error."""
    channels, outputs = inputs_BCHW.shape[1], targets_BCHW.shape[1]
    width = channels * side * side + 1
    gram, cross = torch.zeros(width, width, dtype=torch.double), torch.zeros(width, outputs, dtype=torch.double)
    rows = 0
    for inputs, targets in zip(torch.split(inputs_BCHW, 32), torch.split(targets_BCHW, 32), strict=True):
        columns = F.unfold(inputs, side, padding=side // 2).permute(0, 2, 1).reshape(-1, width - 1)
        columns = torch.cat([columns, torch.ones(len(columns), 1)], 1)
        gram += (columns.T @ columns).double()
        cross += (columns.T @ targets.permute(0, 2, 3, 1).reshape(-1, outputs)).double()
        rows += len(columns)
    scale = gram.diagonal() + 1e-6 * rows
    solved = torch.linalg.solve(gram + strength * torch.diag(scale), cross).float()
    return solved[:-1].T.reshape(outputs, channels, side, side), solved[-1]


def _core_features(encoder: Any, coefficients_BKHW: Tensor) -> Tensor:
    hidden = encoder.mid_block(encoder.down_blocks[3](encoder.down_blocks[2](coefficients_BKHW)))
    return F.silu(encoder.conv_norm_out(hidden))


def _pass_through(shortcut: Any, channels: int) -> None:
    shortcut.weight[:channels], shortcut.bias[:channels] = 0, 0
    shortcut.weight[:channels, :channels, 0, 0] = torch.eye(channels)


def _mirror_in_groups(conv: Any, groups: int, channels: int, mirrored: int, anchors: int = 2) -> None:
    """Deal input channels out to the normalisation groups, the first ``mirrored`` also negated, with anchor pairs."""
    width = conv.out_channels // groups
    centre = conv.kernel_size[0] // 2
    for group in range(groups):
        dealt = [(index, 1.0) for index in range(group, channels, groups)]
        dealt += [(index, -1.0) for index in range(group, mirrored, groups)]
        start = group * width
        used = min(len(dealt), width - 2 * anchors) + 2 * anchors
        conv.weight[start : start + used], conv.bias[start : start + used] = 0, 0
        for place, (index, sign) in enumerate(dealt[: width - 2 * anchors]):
            conv.weight[start + 2 * anchors + place, index, centre, centre] = sign
        for place in range(2 * anchors):
            conv.bias[start + place] = ANCHOR * (-1) ** place


def _fit_upsampler(conv: Any, inputs_BCHW: Tensor, targets_BCHW: Tensor) -> None:
    weight, bias = ridge(F.interpolate(inputs_BCHW, scale_factor=2.0, mode="nearest"), targets_BCHW, 3)
    conv.weight[: len(weight)], conv.bias[: len(bias)] = weight, bias
