"""Latents as colours without a decoder: a linear map of each cell, for small pictures of what is being made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cinemo.media.synthetic import render_scene
from cinemo.media.transforms import prepare_image
from cinemo.networks.frozen import Vae

_SEED, _PICTURES, _SIZE = 7005, 16, (64, 96)  # small: an autoencoder of full size takes seconds for them on a CPU


def latent_colours(vae: Vae) -> Tensor:
    """(C + 1, 3) float32, on the CPU: RGB of a cell in -1..1 is [its scaled latent, 1] times it.

    Least squares over pictures that are always the same, so that equal weights give an equal map.
    """
    scenes = (render_scene(_SEED, index) for index in range(_PICTURES))
    pictures_NCHW = torch.stack([prepare_image(scene.draw(0), _SIZE) for scene in scenes])
    latents_NCHW = vae.encode(pictures_NCHW).double().cpu()
    colours_NCHW = F.avg_pool2d(pictures_NCHW.double(), vae.downscale)
    cells, colours = (each.permute(0, 2, 3, 1).flatten(0, 2) for each in (latents_NCHW, colours_NCHW))
    constant = torch.ones(len(cells), 1, dtype=torch.float64)
    found: Tensor = torch.linalg.lstsq(torch.cat([cells, constant], 1), colours).solution
    return found.float()


def coloured(latents_CFHW: Tensor, colours: Tensor) -> Tensor:
    """(F, h, w, 3) uint8 of scaled latents, by `latent_colours` on their device."""
    rgb = latents_CFHW.float().permute(1, 2, 3, 0) @ colours[:-1] + colours[-1]
    return ((rgb / 2 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
