"""Between two reports the host gives a device its work and never waits for it: a step on a device that cannot be read
(`device.DEVICE`), forward and backward, of every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from device import DEVICE, Waits
from torch import Tensor, nn

from cinemo.config import Recipe
from cinemo.data.loading.loader import StepBatch
from cinemo.methods import Method, build_method, method_class
from cinemo.networks.attention import TemporalAttention, _computed_positions, _positions
from cinemo.recipes import RECIPES, override
from cinemo.training.report.metrics import LossSums
from cinemo.training.run import loop
from cinemo.training.run.batch import FrozenStates, _blank_field, latent_shape
from cinemo.types import LatentBatch, LatentSample

METHODS = ("cinemo-tiny", "dynamicrafter-tiny", "trip-tiny", "longer-tiny", "longer-tiny-refiner")


def recipe_of(name: str) -> Recipe:
    small = ["train.workers=1", "train.lanes=1", "train.global_batch=4", "train.micro_batch=2", "train.max_steps=2"]
    return override(RECIPES[name](), [*small, "train.init=null"])


def batch_of(recipe: Recipe, step: int) -> StepBatch:
    fields = {field: _blank_field(recipe, field) for field in method_class(recipe).stored_fields(recipe)}
    latents, interval = np.zeros(latent_shape(recipe), np.float16), recipe.data.frame_interval[0]
    keys = [f"clip{number}" for number in range(recipe.train.global_batch)]
    samples = [LatentSample(key, key, "", "a cat", latents, 0.5, 24.0, interval, 0, fields=fields) for key in keys]
    return StepBatch(step, 0, samples)


def frozen_of(recipe: Recipe) -> FrozenStates:
    frozen = FrozenStates.of(recipe)
    for encoder in (frozen._encoder, frozen._image):
        if encoder is not None:
            encoder.network.to(DEVICE)
    return frozen


class UnreadableEngine:
    """What the loop asks of `cinemo.training.run.engine.Engine`, without an optimiser: gradients are added up."""

    rank, world, device, dtype, lr, moved = 0, 1, DEVICE, torch.float32, 1e-4, True

    def __init__(self, method: Method) -> None:
        self.method: nn.Module = method.to(DEVICE)

    def loss(self, batch: LatentBatch, t_B: Tensor, noise_BCFHW: Tensor) -> Tensor:
        return self.method(batch, t_B, noise_BCFHW, reduction="none")

    def step(self, loss: Tensor) -> None:
        loss.backward()

    def mean(self, values: Tensor) -> Tensor:
        return values


class OpenWindow:
    """A report reads the device; here it is left out."""

    waited = 0.0

    def __init__(self, *_: Any) -> None:
        self._losses = LossSums(1000)

    def add(self, losses_B: Tensor, batch: Any, weight_B: Tensor) -> None:
        self._losses.add(losses_B, batch, 0, weight_B)

    def end_step(self, *_: Any, **__: Any) -> None: ...

    def leave_out(self, *_: Any) -> None: ...

    def close(self, *_: Any) -> None: ...

    def restart(self) -> None: ...


@pytest.mark.parametrize(("name", "on_damaged"), [*((name, "stop") for name in METHODS), ("cinemo-tiny", "skip")])
def test_a_step_never_waits_for_the_device(name: str, on_damaged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = override(recipe_of(name), [f"train.on_damaged={on_damaged}", "train.min_snr_gamma=5"])
    monkeypatch.setattr(loop, "Window", OpenWindow)
    engine, frozen = UnreadableEngine(build_method(recipe)), frozen_of(recipe)
    # What is copied once, to be kept, is copied in the first step.
    warm = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})})
    loop.train(warm, engine, [batch_of(recipe, 0)], frozen)
    frozen._kept.clear()  # captions that were not seen before
    with Waits() as waits:
        loop.train(recipe, engine, [batch_of(recipe, 1)], frozen, start_step=1)
    assert waits.found == []
    assert len(waits.uploaded) >= 2 * 4, "two micro batches of latents, noise, steps and weights"
    assert any(parameter.grad is not None for parameter in engine.method.parameters())


def test_what_goes_up_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from other memory waits for the device, whatever it is asked."""
    recipe = recipe_of("cinemo-tiny")
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.clone().as_subclass(Pinned))
    [(_, micros)] = loop._prepare([batch_of(recipe, 0)], recipe, pin=True)
    for micro, weights_B in micros:
        tensors = [weights_B, micro.video_BCFHW, micro.t_B, micro.noise_BCFHW, *micro.fields.values()]
        assert all(isinstance(tensor, Pinned) for tensor in tensors)


class Pinned(Tensor):
    pass


def test_a_compiled_graph_holds_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporal attention makes its tables where it computes, and they are those of the uncompiled network."""
    attend = TemporalAttention(64, 2).to(DEVICE)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Waits() as waits:
        attend(torch.zeros(3, 16, 64, device=DEVICE)).sum().backward()
    assert waits.found == waits.uploaded == []
    for frames in (1, 8, 9, 16, 64, 130):
        for dtype in (torch.float32, torch.float64):
            computed, kept = (make(frames, torch.device("cpu"), dtype) for make in (_computed_positions, _positions))
            assert torch.equal(computed.buckets_NN, kept.buckets_NN)
            torch.testing.assert_close(computed.turns, kept.turns, rtol=0, atol=frames * 2**-24)


def test_the_device_notices() -> None:
    """The test above could fail."""
    there = torch.zeros(2, device=DEVICE)
    with Waits() as waits:
        torch.zeros(2).to(DEVICE)
        there.copy_(torch.zeros(2))
        torch.zeros(2).to(DEVICE, non_blocking=True)
    assert len(waits.found) == 2
    with pytest.raises(RuntimeError):
        there.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        there.cpu()
