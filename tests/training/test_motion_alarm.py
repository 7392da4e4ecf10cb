"""Fine-tuning the shipped base on clips that stand still kills its motion, and its first sheet says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cinemo.media.motion import mean_adjacent_ssim
from cinemo.media.synthetic import FPS, render_scene
from cinemo.methods import build_method
from cinemo.networks.frozen import Vae
from cinemo.recipes.cinemo import cinemo_tiny
from cinemo.training.report.progress import motion_lost
from cinemo.training.report.sheets import decoded, motion_of, sheet_latents
from cinemo.training.run.base_weights import base_networks
from cinemo.training.run.batch import FrozenStates, host_batch, on_device
from cinemo.types import LatentSample

BATCH = 4


def clip(vae: Vae, number: int, kind: str) -> LatentSample:
    recipe = cinemo_tiny()
    scene = render_scene(77, number, recipe.data.size, kind=kind)
    frames_FHWC = scene.frames(range(0, 4 * recipe.data.frames, 4))
    pixels = torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents, ssim = vae.encode(pixels).half().numpy(), mean_adjacent_ssim(frames_FHWC)
    return LatentSample(f"{kind}-{number}", f"{number}", "", scene.caption, latents, ssim, FPS, 4, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps", "dies"), [("still", 100, True), ("pan", 20, False)])
def test_motion_dies_on_still_clips_and_not_on_others(kind: str, steps: int, dies: bool) -> None:
    recipe = cinemo_tiny()
    device, vae, frozen = torch.device("cpu"), Vae(recipe.encoders.vae), FrozenStates.of(recipe)
    method = build_method(recipe, base_networks(recipe))
    shown = [clip(vae, number, kind) for number in (100, 101)]
    samples = [clip(vae, number, kind) for number in range(BATCH)]

    def motion() -> dict[str, float]:
        method.eval()
        return motion_of(recipe, decoded(recipe, vae, shown, sheet_latents(recipe, method, frozen, shown, device)))

    before = motion()
    method.train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=recipe.train.lr)
    for step in range(steps):
        batch = [replace(sample, key=f"{step}-{sample.key}") for sample in samples]
        loss = method(*on_device(host_batch(batch, step, recipe), frozen, device, torch.float32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = motion()
    assert (motion_lost(before, after) is not None) == dies, f"{before} became {after}"
