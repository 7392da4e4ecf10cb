"""What the blocks do about memory changes no number: against the published order of operations, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from published_unet import published_forward
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cinemo.config import Checkpointing
from cinemo.networks import memory
from cinemo.networks.attention import _kept_positions
from cinemo.networks.blocks import TransformerBlock
from cinemo.networks.lavie_unet import LavieUNet
from cinemo.networks.memory import checkpoint_activations
from cinemo.training.plan.activations import PeakMemory

SMALL = {
    "block_out_channels": (64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "addition_time_embed_dim": 16,
}


@pytest.fixture
def unet() -> LavieUNet:
    """Random weights everywhere, the zero-initialised ones too."""
    torch.manual_seed(0)
    network = LavieUNet(**SMALL).double()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network


def inputs(batch: int = 2, frames: int = 5, h: int = 6, w: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, frames, h, w, dtype=torch.float64, generator=generator)
    text = torch.randn(batch, 9, 12, dtype=torch.float64, generator=generator)
    return sample, torch.arange(batch) * 300 + 7, text, torch.arange(batch) * 5.0


def gradients(unet: LavieUNet, forward: Callable[..., Tensor]) -> list[Tensor]:
    """Of all parameters, the sample and the text, after the output."""
    sample, t, text, motion = inputs()
    wanted = [*unet.parameters(), sample.requires_grad_(), text.requires_grad_()]
    out = forward(sample, t, text, motion)
    return [out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 2, out.shape[-1])).sum(), wanted)]


@pytest.mark.parametrize("values", [1, 3000, 2**40])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "whole"])
def test_output_and_gradients_are_the_published_ones(
    unet: LavieUNet, monkeypatch: pytest.MonkeyPatch, values: int, checkpointing: Checkpointing
) -> None:
    monkeypatch.setattr(memory, "_CPU_PIECE", values)
    expected = gradients(unet, lambda *given: published_forward(unet, *given))
    checkpoint_activations(unet, checkpointing)
    for name, ours, theirs in zip(
        ["output", *(name for name, _ in unet.named_parameters()), "sample", "text"],
        gradients(unet, unet),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("values", [1, 3000, 2**40])
def test_without_gradients_the_output_is_the_same_and_the_inputs_stay(
    unet: LavieUNet, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    monkeypatch.setattr(memory, "_CPU_PIECE", values)
    given = inputs()
    expected = published_forward(unet, *given)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with torch.no_grad():
        for text in (given[2], unet.keys_values(given[2])):
            for _ in range(2):
                out = unet(given[0], given[1], text, given[3])
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    for mine, original in zip(given, inputs(), strict=True):
        assert torch.equal(mine, original)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_bfloat16_is_as_close_to_float32_as_the_published_order(unet: LavieUNet) -> None:
    sample, t, text, motion = (x.float() if x.is_floating_point() else x for x in inputs())
    exact = unet.float()(sample, t, text, motion)
    unet.bfloat16()
    given = sample.bfloat16(), t, text.bfloat16(), motion
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
    ours, published = (peak_activations(forward, mode, dtype) for forward in (LavieUNet.forward, published_forward))
    assert 0 < ours < 0.7 * published, f"{ours / 1e9:.2f} GB against {published / 1e9:.2f} GB"


def peak_activations(forward: Callable[..., Tensor], mode: str, dtype: torch.dtype) -> int:
    """Bytes at 320x512, 16 frames, batch 1: everything but weights and their gradients."""
    _kept_positions.cache_clear()  # no table of an earlier mode, and below none of this one
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            unet = LavieUNet()
            checkpoint_activations(unet, "whole" if mode == "gradient checkpointing" else "none")
        finally:
            torch.set_default_dtype(torch.float32)
        for parameter in unet.parameters():
            parameter.grad = torch.zeros_like(parameter)
        sample, text = torch.randn(1, 4, 16, 40, 64, dtype=dtype), torch.randn(1, 77, 768, dtype=dtype)
        with PeakMemory() as memory_used, torch.set_grad_enabled(mode != "sampling"):
            out = forward(unet, sample, 500, text, torch.tensor([5.0]))
            if mode != "sampling":
                out.float().square().mean().backward()
        _kept_positions.cache_clear()
        return memory_used.peak


@pytest.mark.slow
def test_selective_checkpointing_works_in_a_compiled_graph() -> None:
    """As one graph, with the same gradients, and with less kept for the backward pass."""
    torch.manual_seed(0)
    block, kept = TransformerBlock(32, 1, 12), {}
    cells, text = torch.randn(6, 20, 32), torch.randn(2, 5, 12)
    expected: list[Tensor] = []
    for what in get_args(Checkpointing)[:2]:
        checkpoint_activations(block, what)
        torch._dynamo.reset()
        compiled = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):  # type: ignore[misc,func-returns-value]
            out = compiled(cells, block.attn2.keys_values(text), None)
        gradients = torch.autograd.grad(out.square().sum(), [p for p in block.parameters() if p.requires_grad])
        expected = expected or list(gradients)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        kept[what] = sum(sizes)
    assert kept["selective"] < 0.8 * kept["none"]
