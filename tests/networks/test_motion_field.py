"""Motion fields in the UNet: nothing at first, then equation 4, and weights that come from a network without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cinemo.networks.lavie_unet import LavieUNet, UNetConfig
from cinemo.networks.memory import checkpoint_activations
from cinemo.networks.motion_field import (
    FieldAttention,
    FieldUNet,
    FieldUNetConfig,
    MotionEncoder,
    is_field,
    learns,
    load_field_unet,
)
from cinemo.networks.weights import save_network
from cinemo.types import InputError

SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 1,
    "addition_time_embed_dim": 32,
}
FIELD = FieldUNetConfig(**SMALL, field_widths=(8,), flow_scale=4.0)  # type: ignore[arg-type]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INPUTS = (drawn(2, 4, 5, 8, 6), torch.tensor([3, 700]), drawn(2, 7, 24, seed=1), drawn(2, 2, 5, 8, 6, seed=2))
STRENGTH = torch.tensor([2.0, float("nan")])


def shaken(unet: FieldUNet) -> FieldUNet:
    """With weights in the place of the branch's zeros."""
    for name, parameter in unet.named_parameters():
        if "field.to_out" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return unet.eval()


def test_a_base_without_fields_starts_it_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = LavieUNet(**UNetConfig(**SMALL).model_dump()).eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(plain.add_embedding.linear_2.weight, std=0.1)
    save_network(plain, tmp_path / "unet")
    unet = load_field_unet(FIELD, str(tmp_path / "unet"), base=True).eval()
    x, t, text, field = INPUTS
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, text, field, STRENGTH), plain(x, t, text, STRENGTH), rtol=0, atol=0)
        shaken(unet)
        seen = unet(x, t, text, field, STRENGTH)
        assert not torch.allclose(seen, plain(x, t, text, STRENGTH), atol=1e-2)
        assert not torch.allclose(seen, unet(x, t, text, -field, STRENGTH), atol=1e-2)
        still = unet(x, t, text, 2 * torch.ones_like(field), STRENGTH)
        fast = unet(x, t, text, 8 * torch.ones_like(field), STRENGTH)
        assert not torch.allclose(still, fast, atol=1e-2), "how fast a field is that is the same everywhere"
    with pytest.raises(InputError, match=r"missing .*field"):
        load_field_unet(FIELD, str(tmp_path / "unet"))
    save_network(unet, tmp_path / "whole")
    again = load_field_unet(FIELD, str(tmp_path / "whole")).eval()
    with torch.no_grad():
        assert torch.equal(again(x, t, text, field, STRENGTH), seen)


def test_contexts_made_once_are_those_of_every_step() -> None:
    torch.manual_seed(0)
    unet = shaken(FieldUNet(**FIELD.model_dump()))
    x, t, text, field = INPUTS
    with torch.no_grad():
        made = unet.contexts(text, field)
        torch.testing.assert_close(unet(x, t, made, None, STRENGTH), unet(x, t, text, field, STRENGTH))


def test_equation_4_by_hand() -> None:
    torch.manual_seed(0)
    branch = FieldAttention(8, 2, most_tokens=100)
    torch.nn.init.normal_(branch.to_out.weight, std=0.5)
    y, z_m = drawn(2, 3, 4, 8), drawn(2, 3, 4, 8, seed=1)
    with torch.no_grad():
        q, k, v = (
            w(x).view(2, 12, 2, 4).transpose(1, 2)
            for w, x in ((branch.to_q, branch.norm(y)), (branch.to_k, branch.norm(y)), (branch.to_v, z_m))
        )
        mixed = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
        expected = y + branch.to_out(mixed.transpose(1, 2).reshape(2, 3, 4, 8))
        torch.testing.assert_close(branch(y, branch.values(z_m)), expected)
        # Factorised, cells of all frames still reach each other.
        branch.most_tokens = 1
        before = branch(y, branch.values(z_m))
        z_m[0, 2, 3] += 1
        moved = (branch(y, branch.values(z_m)) - before).abs().amax(-1)
        assert (moved[0] > 1e-6).all()
        assert (moved[1] == 0).all()


def test_maps_have_the_grids_of_the_levels() -> None:
    maps = MotionEncoder((8,), (16, 32, 64))(torch.zeros(3, 2, 9, 14))
    assert [tuple(x.shape) for x in maps] == [(3, 16, 9, 14), (3, 32, 5, 7), (3, 64, 3, 4)]


def test_odd_grids_and_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = FieldUNet(**FIELD.model_dump())
    shaken(unet).train()
    checkpoint_activations(unet, "whole")
    out = unet(drawn(1, 4, 3, 7, 5), 5, drawn(1, 7, 24), drawn(1, 2, 3, 7, 5), torch.tensor([1.0]))
    torch.autograd.backward(out.square().mean())
    without = [name for name, parameter in unet.named_parameters() if parameter.grad is None]
    assert without == []


def test_what_the_paper_trains() -> None:
    names = dict(FieldUNet(**FIELD.model_dump()).named_parameters())
    kept = [name for name in names if not learns(name)]
    assert any("attn1" in name for name in kept)
    assert not any("temp" in name or is_field(name) for name in kept)
    assert {name.split(".")[0] for name in names if is_field(name)} == {
        "motion_encoder", "down_blocks", "mid_block", "up_blocks"
    }  # fmt: skip
