"""What DynamiCrafter's blocks do about memory changes no number: against the published order, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from published_dynamicrafter import published_forward
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cinemo.config import Checkpointing
from cinemo.networks import memory
from cinemo.networks.dynamicrafter_unet import DynamiCrafterUNet
from cinemo.networks.memory import checkpoint_activations
from cinemo.training.plan.activations import PeakMemory

SMALL: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "attention_resolutions": (1, 2),
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "context_dim": 12,
}


def random_unet() -> DynamiCrafterUNet:
    """Random weights everywhere, the zero-initialised ones too."""
    torch.manual_seed(0)
    network = DynamiCrafterUNet(**SMALL).double()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network


def inputs(tokens: str = "per frame", dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    sample, text, image = drawn(2, 8, 3, 6, 5), drawn(2, 9, 12), drawn(2, 3, 4, 12)
    given = {"per frame": image, "shared": image[:, 1], "none": None}[tokens]
    return sample, torch.tensor([7, 307]), text, given, torch.tensor([3, 24])


def gradients(unet: DynamiCrafterUNet, forward: Callable[..., Tensor], given: tuple[Any, ...]) -> list[Tensor]:
    """Of all parameters, the sample, the text and the image's tokens, after the output."""
    inputs = [x.requires_grad_() for x in given if x is not None and x.is_floating_point()]
    out = forward(*given)
    loss = (out * torch.linspace(-1, 2, out.shape[-1], dtype=out.dtype)).sum()
    found = torch.autograd.grad(loss, [*unet.parameters(), *inputs], allow_unused=given[3] is None)
    return [out.detach(), *(torch.zeros(()) if gradient is None else gradient for gradient in found)]


@pytest.mark.parametrize(
    ("values", "checkpointing", "tokens", "dtype"),
    [
        (1500, "none", "per frame", torch.float64),
        (6000, "whole", "per frame", torch.float64),
        (6000, "selective", "per frame", torch.float64),
        (2**40, "none", "shared", torch.float64),
        (6000, "selective", "none", torch.float64),
        (2**40, "none", "per frame", torch.float32),
        (6000, "whole", "shared", torch.float32),
    ],
)
def test_output_and_gradients_are_the_published_ones(
    monkeypatch: pytest.MonkeyPatch, values: int, checkpointing: Checkpointing, tokens: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(memory, "_CPU_PIECE", values)
    unet = random_unet().to(dtype)
    expected = gradients(unet, lambda *given: published_forward(unet, *given), inputs(tokens, dtype))
    checkpoint_activations(unet, checkpointing)
    got = gradients(unet, unet, inputs(tokens, dtype))
    names = ["output", *(name for name, _ in unet.named_parameters()), "sample", "text", "image"]
    # Some biases stand before a norm that takes them out again: of their gradients, float32 shows rounding alone.
    largest = max(float(gradient.abs().max()) for gradient in expected)
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (0, 2e-5 * largest)
    for name, ours, theirs in zip(names, got, expected, strict=tokens != "none"):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("values", [1500, 6000, 2**40])
@pytest.mark.parametrize("tokens", ["per frame", "shared"])
@torch.no_grad()
def test_without_gradients_the_output_is_the_same_and_the_inputs_stay(
    monkeypatch: pytest.MonkeyPatch, values: int, tokens: str
) -> None:
    monkeypatch.setattr(memory, "_CPU_PIECE", values)
    unet, given = random_unet(), inputs(tokens)
    expected = published_forward(unet, *given)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    made = unet.keys_values(given[2], given[3])
    for context in ((given[2], given[3]), (made, None)):
        for _ in range(2):
            out = unet(given[0], given[1], *context, given[4])
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    for mine, original in zip(given, inputs(tokens), strict=True):
        assert torch.equal(mine, original)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_bfloat16_is_as_close_to_float32_as_the_published_order() -> None:
    unet = random_unet().float()
    exact = unet(*inputs(dtype=torch.float32))
    unet.bfloat16()
    given = inputs(dtype=torch.bfloat16)
    theirs = (published_forward(unet, *given).float() - exact).square().mean()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            ours = (unet(*given).float() - exact).square().mean()
        assert ours < 1.2 * theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("sampling", torch.float32),
        pytest.param("training", torch.bfloat16, marks=pytest.mark.release),
        pytest.param("gradient checkpointing", torch.bfloat16, marks=pytest.mark.release),
    ],
)
def test_activations_of_the_full_network_take_less_than_0_7_of_the_published_ones(
    mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # the size of a piece follows it
    forwards = DynamiCrafterUNet.forward, published_forward
    ours, published = (peak_activations(forward, mode, dtype) for forward in forwards)
    assert 0 < ours < 0.7 * published, f"{ours / 1e9:.2f} GB against {published / 1e9:.2f} GB"


def peak_activations(forward: Callable[..., Tensor], mode: str, dtype: torch.dtype) -> int:
    """Bytes at 320x512, 16 frames, batch 1: everything but weights and their gradients."""
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            unet = DynamiCrafterUNet()
            checkpoint_activations(unet, "whole" if mode == "gradient checkpointing" else "none")
        finally:
            torch.set_default_dtype(torch.float32)
        for parameter in unet.parameters():
            parameter.grad = torch.zeros_like(parameter)
        sample, text = torch.randn(1, 8, 16, 40, 64, dtype=dtype), torch.randn(1, 77, 1024, dtype=dtype)
        image = torch.randn(1, 16, 16, 1024, dtype=dtype)
        with PeakMemory() as memory_used, torch.set_grad_enabled(mode != "sampling"):
            out = forward(unet, sample, 500, text, image, torch.tensor([3]))
            if mode != "sampling":
                out.float().square().mean().backward()
        return memory_used.peak
