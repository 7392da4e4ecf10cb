"""Latents as colours: close to the picture, the same for equal weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cinemo.media.synthetic import render_scene
from cinemo.media.transforms import prepare_image
from cinemo.networks.frozen import Vae
from cinemo.networks.latent_colours import coloured, latent_colours
from cinemo.recipes import load_recipe


@pytest.fixture(scope="module")
def vae() -> Vae:
    return Vae(load_recipe("cinemo-tiny").encoders.vae)


def test_a_linear_map_shows_a_picture_that_it_was_not_made_of(vae: Vae) -> None:
    colours = latent_colours(vae)
    assert colours.shape == (vae.latent_channels + 1, 3)
    assert torch.equal(colours, latent_colours(vae))
    for kind in ("object", "pan", "flow"):
        picture = prepare_image(render_scene(99, 0, kind=kind).draw(3), (64, 96))[None]
        seen = coloured(vae.encode(picture)[0][:, None], colours)
        assert seen.shape == (1, 8, 12, 3)
        assert seen.dtype == torch.uint8
        true = (F.avg_pool2d(picture, vae.downscale)[0].permute(1, 2, 0) / 2 + 0.5) * 255
        error = (seen[0].float() - true).square().mean().sqrt()
        assert error < 0.35 * true.std(), f"{kind}: {error:.1f} of {true.std():.1f} levels"
