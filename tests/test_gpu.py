"""What only an accelerator can show, in minutes on one; with ``CINEMO_TEST_DEVICE=cpu`` the same code runs without.

Without CUDA, and without that variable, all of it is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_bundle
from training.test_no_waiting import METHODS, OpenWindow, UnreadableEngine, batch_of, recipe_of

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle
from cinemo.config import Recipe
from cinemo.data.precompute.stages import Encoder
from cinemo.methods import Method, build_method
from cinemo.networks.frozen import Vae
from cinemo.networks.norms import group_norm
from cinemo.recipes import override
from cinemo.training.run import loop
from cinemo.training.run.batch import FrozenStates, host_batch, on_device

WANTED = os.environ.get("CINEMO_TEST_DEVICE", "cuda")
DEVICE = torch.device(WANTED, 0) if WANTED == "cuda" else torch.device(WANTED)
pytestmark = [pytest.mark.gpu, pytest.mark.slow]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 means float32, so that devices can be compared."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def method_of(recipe: Recipe) -> Method:
    """With what begins as zero drawn, so that all of it shows in the loss."""
    torch.manual_seed(0)
    method = build_method(recipe)
    for parameter in method.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return method


def losses_and_gradient(
    recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.float32, how: str = ""
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    method = method_of(recipe).to(device, dtype)
    method.checkpoint_activations("whole" if "whole" in how else "selective" if "selective" in how else "none")
    if "regional" in how:
        method.compile_networks(regional=True)
    host = host_batch(batch_of(recipe, 0).samples[:2], 0, recipe)
    losses_B = method(*on_device(host, FrozenStates.of(recipe, device, dtype), device, dtype), reduction="none")
    losses_B.mean().backward()
    found = {name: p.grad.float().cpu() for name, p in method.named_parameters() if p.grad is not None}
    return losses_B.detach().float().cpu(), found


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(gradients.values()))


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_a_cpu(name: str) -> None:
    recipe = recipe_of(name)
    (theirs, their_gradient), (ours, our_gradient) = (losses_and_gradient(recipe, place) for place in (CPU, DEVICE))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    apart = norm_of({key: our_gradient[key] - their_gradient[key] for key in their_gradient})
    assert apart < 1e-2 * norm_of(their_gradient)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_stays_finite_and_near(name: str) -> None:
    recipe = recipe_of(name)
    exact_B, _ = losses_and_gradient(recipe, DEVICE)
    losses_B, gradient = losses_and_gradient(recipe, DEVICE, torch.bfloat16)
    assert all(values.isfinite().all() for values in gradient.values())
    torch.testing.assert_close(losses_B, exact_B, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("how", ["selective", "whole", "regional", "regional, selective", "regional, whole"])
def test_other_ways_to_compute_it_change_nothing(how: str) -> None:
    recipe = override(recipe_of("cinemo-tiny"), ["data.size=[32,48]", "data.frames=4"])
    (plain_B, plain), (losses_B, gradient) = (losses_and_gradient(recipe, DEVICE, how=way) for way in ("", how))
    torch.testing.assert_close(losses_B, plain_B, rtol=1e-3, atol=1e-4)
    assert norm_of({key: gradient[key] - plain[key] for key in plain}) < 1e-2 * norm_of(plain)


def test_draws_are_the_same_bits_on_any_device() -> None:
    recipe = recipe_of("cinemo-tiny")
    host = host_batch(batch_of(recipe, 3).samples, 3, recipe)
    _, t_B, noise = on_device(host, FrozenStates.of(recipe, DEVICE), DEVICE, torch.float32)
    assert torch.equal(t_B.cpu(), host.t_B)
    assert torch.equal(noise.cpu(), host.noise_BCFHW)


def test_a_video_is_that_of_a_cpu(tmp_path: Path) -> None:
    place, picture = tiny_bundle(tmp_path), np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    theirs, ours = (
        animate(load_bundle(place, str(device)), AnimateRequest(picture, "waves")).frames_FHWC.astype(float)
        for device in (CPU, DEVICE)
    )
    error = ((ours - theirs) ** 2).mean()
    assert error < 255**2 / 10**4, "40 dB"


def test_clips_are_encoded_as_on_a_cpu() -> None:
    recipe = recipe_of("cinemo-tiny")
    data = recipe.data.model_copy(update={"encode_gpus": float(DEVICE.type == "cuda")})
    cpu = recipe.data.model_copy(update={"encode_gpus": 0.0})
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, 255, (data.frames, *data.size, 3), np.uint8) for _ in range(5)]
    views = [(clip, f"clip{number}", 0) for number, clip in enumerate(clips)]
    theirs, ours = (list(Encoder(one, recipe.encoders.vae, "sample", "float32")._encoded(views)) for one in (cpu, data))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=5e-3)


def test_pictures_are_decoded_as_on_a_cpu() -> None:
    place = recipe_of("cinemo-tiny").encoders.vae
    latents = torch.randn(5, Vae(place).latent_channels, 8, 12, generator=torch.Generator().manual_seed(0))
    theirs, ours = (Vae(place, device).decode(latents).astype(int) for device in (CPU, DEVICE))
    assert abs(theirs - ours).max() <= 1


@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA itself raises where the host would wait."""
    recipe = recipe_of(name)
    monkeypatch.setattr(loop, "Window", OpenWindow)
    monkeypatch.setattr(UnreadableEngine, "device", DEVICE)
    monkeypatch.setattr("training.test_no_waiting.DEVICE", DEVICE)
    engine, frozen = UnreadableEngine(build_method(recipe)), FrozenStates.of(recipe, DEVICE)
    engine.method.to(DEVICE)
    warm = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})})
    loop.train(warm, engine, [batch_of(recipe, 0)], frozen)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loop.train(recipe, engine, [batch_of(recipe, 1)], frozen, start_step=1)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_pytorchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64, 20, 12, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(64, device=DEVICE, dtype=dtype) for _ in range(2))
    expected = torch.nn.functional.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(group_norm(x, weight, bias, 8, 1e-5).double(), expected, rtol=tolerance, atol=tolerance)
