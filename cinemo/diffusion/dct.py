"""DCTInit (Cinemo, arXiv 2407.15642, section 3.3): put the image's layout into the initial noise.

The low frequencies of the noised image latent take the place of the low frequencies of the noise. All transforms are
linear, so with a low-pass L the mix L(z_tau) + noise - L(noise) is computed as noise + L(z_tau - noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cinemo.types import InputError


def dct_matrix(n: int, like: Tensor) -> Tensor:
    """Orthonormal DCT-II matrix D (n, n) in ``like``'s dtype and device: ``D.T`` undoes it."""
    k = torch.arange(n, dtype=torch.float64)
    matrix: Tensor = torch.cos(torch.pi / n * (k + 0.5) * k[:, None]) * (2 / n) ** 0.5
    matrix[0] *= 0.5**0.5
    return matrix.to(like.device, like.dtype)


def dct(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Orthonormal DCT-II along each of ``dims`` (scipy ``dctn(norm="ortho")``)."""
    for dim in dims:
        x = (x.movedim(dim, -1) @ dct_matrix(x.shape[dim], x).T).movedim(-1, dim)
    return x


def idct(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Inverse of `dct`: orthonormal DCT-III along each of ``dims``."""
    for dim in dims:
        x = (x.movedim(dim, -1) @ dct_matrix(x.shape[dim], x)).movedim(-1, dim)
    return x


def dct_init(
    first_frame_latent: Tensor,
    noise: Tensor,
    alpha_bar_tau: float | Tensor,
    keep: float,
    mode: Literal["spatial", "3d", "fft"] = "spatial",
) -> Tensor:
    """Refine the initial noise of the motion residuals with the layout of the first frame.

    Args:
        first_frame_latent: (B, C, 1, h, w), scaled VAE latent of the given image.
        noise: (B, C, F, h, w), N(0, 1); the same noise also takes the image latent to step tau.
        alpha_bar_tau: a_tau of the schedule (published: tau = 975).
        keep: share of each axis that counts as low, 0..1; int(keep * n) frequencies of n. 0 returns the noise, 1 the
            noised image latent.
        mode: ``spatial`` filters rows and columns of each frame (the published code: its mask spans all temporal
            frequencies). ``3d`` also filters over time (the paper's text). ``fft`` filters rows and columns with a
            Fourier transform for comparison (figure 3): centred on frequency 0 and symmetric, with the same number of
            kept frequencies per axis (an even count gives the two outermost half weight each).

    Returns:
        (B, C, F, h, w) initial latents, in the wider dtype of the inputs and at least float32.
    """
    if not 0 <= keep <= 1:
        raise InputError(f"keep is {keep}, expected a share 0..1 of each axis")
    if first_frame_latent.shape != (*noise.shape[:2], 1, *noise.shape[3:]) or noise.dim() != 5:
        raise InputError(
            f"dct_init: first_frame_latent is {tuple(first_frame_latent.shape)} and noise {tuple(noise.shape)}, "
            "expected (B, C, 1, h, w) and (B, C, F, h, w)"
        )
    dtype = torch.promote_types(torch.promote_types(first_frame_latent.dtype, noise.dtype), torch.float32)
    z_1, noise = first_frame_latent.to(dtype), noise.to(dtype)
    a = torch.as_tensor(alpha_bar_tau, dtype=torch.float64)
    z_tau = float(a.sqrt()) * z_1 + float((1 - a).sqrt()) * noise
    change = z_tau - noise
    if mode == "fft":
        low_hw = _centred(noise.shape[3], keep, noise)[:, None] * _centred(noise.shape[4], keep, noise)
        change_low: Tensor = torch.fft.ifft2(torch.fft.fft2(change) * low_hw).real
        return noise + change_low
    dims = (3, 4) if mode == "spatial" else (2, 3, 4)
    coefficients, kept = dct(change, dims), torch.zeros_like(change)
    low = tuple(slice(int(keep * n) if dim in dims else n) for dim, n in enumerate(noise.shape))
    kept[low] = coefficients[low]
    return noise + idct(kept, dims)


def _centred(n: int, keep: float, like: Tensor) -> Tensor:
    """Weights (n,) of a symmetric Fourier low-pass whose sum is int(keep * n), in the order of ``fftfreq``."""
    count = int(keep * n)
    if count in (0, n):
        return torch.full((n,), count / n, dtype=like.dtype, device=like.device)
    distance = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64).abs()
    weights: Tensor = (0.5 * (count + 1) - distance).clamp(0, 1)
    return weights.to(like.device, like.dtype)
