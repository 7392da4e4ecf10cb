"""Training of the tiny VAE: a diffusers `AutoencoderKL`, 8x down, 16 latent channels, mean squared error.

Four stages share one wall-clock budget. ``core``: everything from quarter resolution inwards, trained in the space of
4x4 block coefficients, where a step costs a third. ``fine``: the decoder's last levels on the frozen core. ``joint``:
everything on pixels. ``broad``: the same with dead leaves mixed in, against learning the few clips by heart. The first
two begin at a closed-form linear codec (`linear_start`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from cinemo.types import keyed_seed
from tools.tiny_encoders import linear_start
from tools.tiny_encoders.frames import FrameSets, psnr

ARCHITECTURE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 96, 128),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 96,
    "force_upcast": False,
}
# Share of the budget, peak learning rate, batch, crop width (of 96; height stays 64).
STAGES = {
    "core": (0.21, 1e-3, 16, 64),
    "fine": (0.03, 1.5e-3, 8, 64),
    "joint": (0.18, 6e-4, 8, 96),
    "broad": (0.58, 6e-4, 8, 96),
}
LEAF_SHARE = 0.42  # of a batch in the broad stage
KL_WEIGHT = 1e-5
WARMUP_STEPS = 100
EMA_HORIZON = 500

Log = Callable[[str], None]


def train_vae(frames: FrameSets, minutes: float, seed: int, checkpoints: Path | None, log: Log) -> AutoencoderKL:
    """Train within ``minutes`` and return the averaged weights, with the scaling factor of their latents set.

    Args:
        checkpoints: each report's weights go here, so that a stopped run leaves something.
    """
    torch.manual_seed(keyed_seed(seed, "vae"))
    vae = AutoencoderKL(**ARCHITECTURE)
    rng = np.random.default_rng(keyed_seed(seed, "vae", "batches"))
    sample = _to_unit(torch.from_numpy(frames.train_NHWC[:: max(1, len(frames.train_NHWC) // 1000)]))
    coarse = linear_start.coarse_basis(sample)
    decoder = vae.decoder
    fine = [decoder.up_blocks[1].upsamplers, decoder.up_blocks[2:], decoder.conv_norm_out, decoder.conv_out]
    started = time.monotonic()

    linear_start.write_core(vae, coarse, sample)
    vae = vae.to(memory_format=torch.channels_last)
    core = linear_start.core_modules(vae)
    _stage("core", vae, core, lambda x: _core_loss(vae, coarse, x), frames, rng, minutes, log, coarse, checkpoints)
    linear_start.write_fine(vae, coarse, sample[::10])
    _stage("fine", vae, fine, lambda x: _fine_loss(vae, x), frames, rng, minutes, log, None, checkpoints)
    for name in ("joint", "broad"):
        _stage(name, vae, [vae], lambda x: _joint_loss(vae, x), frames, rng, minutes, log, None, checkpoints)

    vae = vae.to(memory_format=torch.contiguous_format).eval()
    mean, deviation = latent_statistics(vae, frames.train_NHWC[:: max(1, len(frames.train_NHWC) // 800)])
    vae.register_to_config(scaling_factor=1.0, latents_mean=mean, latents_std=deviation)
    log(f"vae: {time.monotonic() - started:.0f} s, deviation of the latents' channels {deviation}")
    return vae


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, frames_FHWC: np.ndarray, batch: int = 16) -> np.ndarray:
    """Encode to the mean latent and decode; uint8 in, uint8 out."""
    made = []
    for start in range(0, len(frames_FHWC), batch):
        latents = vae.encode(_to_unit(torch.from_numpy(frames_FHWC[start : start + batch]))).latent_dist.mode()
        pixels = (vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
        made.append(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(made)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, frames_NHWC: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the unscaled latents, over all frames and cells."""
    parts = [
        vae.encode(_to_unit(torch.from_numpy(frames_NHWC[start : start + 32]))).latent_dist.mode()
        for start in range(0, len(frames_NHWC), 32)
    ]
    latents = torch.cat(parts)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    return [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in deviation.tolist()]


def _stage(
    name: str,
    vae: AutoencoderKL,
    modules: list[nn.Module],
    loss_of: Callable[[Tensor], Tensor],
    frames: FrameSets,
    rng: np.random.Generator,
    minutes: float,
    log: Log,
    coarse: linear_start.Coarse | None,
    checkpoints: Path | None,
) -> None:
    """Train ``modules`` for the stage's share of the budget, then leave their averaged weights in place."""
    share, peak, batch, width = STAGES[name]
    budget = share * minutes * 60
    parameters = [parameter for module in modules for parameter in module.parameters()]
    averaged = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    started = reported = time.monotonic()
    step, losses = 0, []
    while (spent := time.monotonic() - started) < budget:
        rate = peak * min(1, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * spent / budget))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(_batch(frames, rng, batch, width, LEAF_SHARE if name == "broad" else 0.0))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        vae.zero_grad(set_to_none=True)
        step += 1
        keep = min(1 - 1 / EMA_HORIZON, step / (step + 10))
        torch._foreach_lerp_(averaged, [parameter.detach() for parameter in parameters], 1 - keep)
        losses.append(loss.item())
        if time.monotonic() - reported > 120:
            with torch.no_grad():
                _swap(parameters, averaged)
                scores = _held_out(vae, coarse, frames.held_out)
                if checkpoints is not None:
                    vae.save_pretrained(checkpoints / name)
                _swap(parameters, averaged)
            log(_line(name, spent, step, losses[-200:], scores))
            reported = time.monotonic()
    with torch.no_grad():
        _swap(parameters, averaged)
        log(_line(f"{name} done", budget, step, losses[-200:], _held_out(vae, coarse, frames.held_out)))


def _core_loss(vae: AutoencoderKL, coarse: linear_start.Coarse, images_BCHW: Tensor) -> Tensor:
    # requires_grad: torch 2.13's group_norm backward crashes on channels_last input that needs no gradient.
    true = coarse.encode(images_BCHW).contiguous(memory_format=torch.channels_last).requires_grad_()
    mean, log_variance = linear_start.encode_core(vae, true)
    made = linear_start.decode_core(vae, _draw(mean, log_variance))[:, : linear_start.COARSE]
    error = ((made - true.detach()).square() * coarse.energy_K[:, None, None]).sum() / images_BCHW.numel()
    return error + KL_WEIGHT * _kl(mean, log_variance) / images_BCHW.numel()


def _fine_loss(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = linear_start.decode_core(vae, vae.encode(images_BCHW).latent_dist.sample())
    decoder = vae.decoder
    hidden = decoder.up_blocks[1].upsamplers[0](hidden)
    for block in decoder.up_blocks[2:]:
        hidden = block(hidden)
    made: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden)))
    return (made - images_BCHW).square().mean()


def _joint_loss(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    mean, log_variance = vae.encoder(images_BCHW).chunk(2, 1)
    made: Tensor = vae.decoder(_draw(mean, log_variance))
    return (made - images_BCHW).square().mean() + KL_WEIGHT * _kl(mean, log_variance) / images_BCHW.numel()


def _draw(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance.clamp(-30, 20)).exp()


def _kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()


def _batch(frames: FrameSets, rng: np.random.Generator, count: int, width: int, leaf_share: float) -> Tensor:
    """Random crops, mirrored, turned, blended, with channels exchanged and contrast changed now and then."""
    leaves = int(rng.binomial(count, leaf_share)) if len(frames.leaves_NHWC) else 0
    pools = ((frames.train_NHWC, count - leaves), (frames.leaves_NHWC, leaves))
    images_NHWC = np.concatenate([pool[np.sort(rng.integers(0, len(pool), some))] for pool, some in pools if some])
    left = int(rng.integers(0, images_NHWC.shape[2] - width + 1))
    images = _to_unit(torch.from_numpy(images_NHWC[:, :, left : left + width]))
    if rng.random() < 0.5:
        images = images.flip(3)
    if rng.random() < 0.3:
        images = images.transpose(2, 3)
    if rng.random() < 0.4:
        images = images[:, torch.from_numpy(rng.permutation(3))]
    if rng.random() < 0.4:
        gain, shift = rng.uniform(0.7, 1.25, (count, 1, 1, 1)), rng.uniform(-0.15, 0.15, (count, 3, 1, 1))
        images = (images * torch.from_numpy(gain).float() + torch.from_numpy(shift).float()).clamp(-1, 1)
    if leaf_share and rng.random() < 0.25:
        weight = torch.from_numpy(rng.uniform(0, 0.5, (count, 1, 1, 1))).float()
        images = torch.lerp(images, images.roll(1, 0), weight)
    return images.contiguous(memory_format=torch.channels_last)


def _held_out(
    vae: AutoencoderKL, coarse: linear_start.Coarse | None, held_out: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """PSNR per held-out clip; while only the core is trained (``coarse`` given), through the linear 4x4 synthesis."""
    scores = {}
    for name, frames_FHWC in held_out.items():
        if coarse is None:
            made = reconstruct(vae, frames_FHWC)
        else:
            mean, _ = linear_start.encode_core(vae, coarse.encode(_to_unit(torch.from_numpy(frames_FHWC))))
            pixels = coarse.decode(linear_start.decode_core(vae, mean)[:, : linear_start.COARSE])
            made = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        scores[name] = psnr(made, frames_FHWC)
    return scores


def _to_unit(images_NHWC: Tensor) -> Tensor:
    return images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def _swap(parameters: list[nn.Parameter], others: list[Tensor]) -> None:
    for parameter, other in zip(parameters, others, strict=True):
        kept = parameter.detach().clone()
        parameter.copy_(other)
        other.copy_(kept)


def _line(name: str, spent: float, step: int, losses: list[float], scores: Mapping[str, float]) -> str:
    train = 10 * math.log10(4 / float(np.mean(losses))) if losses else float("nan")
    shown = json.dumps({key: round(value, 2) for key, value in scores.items()})
    mean = float(np.mean(list(scores.values()))) if scores else float("nan")
    return f"{name}: {spent:.0f} s, step {step}, train {train:.2f} dB, held out {mean:.2f} dB {shown}"
