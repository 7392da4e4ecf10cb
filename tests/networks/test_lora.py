"""LoRA begins as the network it is put into, learns beside it, and leaves it merged or alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from cinemo.config import TrainConfig
from cinemo.methods.cinemo import CinemoTrain
from cinemo.networks.lavie_unet import LavieUNet
from cinemo.networks.lora import LoraLinear, add_lora, lora_scale, merge_lora, save_adapter
from cinemo.networks.memory import checkpoint_activations
from cinemo.types import InputError

SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 1,
    "addition_time_embed_dim": 16,
}
LAYERS = ("to_q", "attn2.to_k", "to_out.0", "ff.net.0.proj", "ff.net.2")


def lora(**keys: object) -> TrainConfig:
    return TrainConfig.model_validate({"trainable": "lora", "lora_rank": 3, "lora_layers": LAYERS} | keys)


def network() -> LavieUNet:
    """Random weights, the layers that begin at zero included."""
    torch.manual_seed(0)
    unet = LavieUNet(**SMALL)  # type: ignore[arg-type]
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet


def learnt(unet: LavieUNet, train: TrainConfig) -> LavieUNet:
    """``unet`` with LoRA whose B is no longer zero."""
    add_lora(unet, train)
    for module in unet.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_B.weight, std=0.1)
    return unet


def answer(unet: LavieUNet, text: object = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, states = torch.randn(2, 4, 5, 4, 6, generator=generator), torch.randn(2, 7, 12, generator=generator)
    text = unet.keys_values(states) if text == "kept" else states
    return unet(sample, torch.tensor([10, 800]), text, torch.tensor([3.0, 15.0]))


@pytest.mark.parametrize("grad", [True, False])
def test_it_begins_as_the_network_itself(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        unet = network()
        before = answer(unet)
        names = add_lora(unet, lora())
        assert torch.equal(answer(unet), before)
    expected = {name for name, module in network().named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in expected if name.endswith(tuple(f".{layer}" for layer in LAYERS))}
    assert set(names) == expected
    assert {name for name, module in unet.named_modules() if isinstance(module, LoraLinear)} == expected
    assert any("attn_temp.to_q" in name for name in names)
    assert not any("attn1.to_k" in name for name in names)


def test_every_path_through_the_network_has_it() -> None:
    """With and without gradients (in place), in pieces, with kept keys and values, and recomputed."""
    before = answer(network())
    unet = learnt(network(), lora())
    with_gradients = answer(unet)
    assert not torch.allclose(with_gradients, before, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(answer(unet), with_gradients, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answer(unet, "kept"), with_gradients, rtol=1e-4, atol=1e-5)
    with_gradients.square().mean().backward()
    plain = {name: parameter.grad for name, parameter in unet.named_parameters()}
    for again in ("selective", "whole"):
        unet.zero_grad()
        checkpoint_activations(unet, again)
        answer(unet).square().mean().backward()
        for name, parameter in unet.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-4, atol=1e-6)
    unused = [name for name, p in unet.named_parameters() if "lora" in name and not p.grad.any()]  # type: ignore[union-attr]
    assert unused == []


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_merged_it_is_the_same_network_under_the_old_names(alpha: float | None) -> None:
    train = lora(lora_alpha=alpha)
    unet = learnt(network(), train)
    plain = LavieUNet(**SMALL)  # type: ignore[arg-type]
    plain.load_state_dict(merge_lora(unet.state_dict(), train))
    with torch.no_grad():
        torch.testing.assert_close(answer(plain), answer(unet), rtol=1e-4, atol=1e-5)
    untouched = network().state_dict()
    adapted = {f"{name}.weight" for name, module in unet.named_modules() if isinstance(module, LoraLinear)}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, untouched[name]) == (name not in adapted), name
    assert merge_lora(untouched, train).keys() == untouched.keys()


@settings(max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.one_of(st.none(), st.floats(0.25, 64)), st.booleans()
)
def test_a_layer_is_w_plus_alpha_over_r_b_a(
    inputs: int, outputs: int, rank: int, alpha: float | None, bias: bool
) -> None:
    """For any rank, larger than the layer's sides too."""
    train = lora(lora_rank=rank, lora_alpha=alpha, lora_layers=("0",))
    holder = nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).double()
    x = torch.randn(5, inputs, dtype=torch.float64)
    before = holder(x)
    add_lora(holder, train)
    assert torch.equal(holder(x), before)
    layer = holder[0]
    nn.init.normal_(layer.lora_B.weight)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    assert (a.shape, b.shape) == ((rank, inputs), (outputs, rank))
    expected = before + x @ (b @ a).T * ((alpha or rank) / rank)
    torch.testing.assert_close(holder(x), expected)
    merged = merge_lora(holder.state_dict(), train)
    torch.testing.assert_close(nn.functional.linear(x, merged["0.weight"], merged.get("0.bias")), expected)


def test_a_small_update_survives_merging_into_bfloat16_weights() -> None:
    state = {"a.weight": torch.ones(2, 2, dtype=torch.bfloat16), "a.lora_A.weight": torch.ones(1, 2)}
    merged = merge_lora(state | {"a.lora_B.weight": torch.full((2, 1), 1e-4)}, lora())["a.weight"]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, torch.full((2, 2), 1.0001))


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(
        InputError, match=r"train\.lora_layers: no linear layer's name ends with 'to_qq'; did you mean .*to_q"
    ):
        add_lora(network(), lora(lora_layers=("to_q", "to_qq")))
    with pytest.raises(InputError, match=r"'attn_tmp\.to_q'; did you mean attn_temp\.to_q"):
        add_lora(network(), lora(lora_layers=("attn_tmp.to_q",)))
    with pytest.raises(InputError, match="'conv1'; "):  # a convolution
        add_lora(network(), lora(lora_layers=("conv1",)))
    with pytest.raises(InputError, match="ends with 'q'"):  # only whole parts of a name
        add_lora(network(), lora(lora_layers=("q",)))


def test_an_adapter_as_peft_and_diffusers_read_it(tmp_path: Path) -> None:
    """By their rules, written out, and by peft itself: neither needs anything of ours."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils.peft_utils import get_peft_kwargs

    train = lora(lora_alpha=12.0)
    unet = learnt(network(), train)
    names = save_adapter(unet.state_dict(), train, tmp_path / "adapter")
    merged = merge_lora(unet.state_dict(), train)
    base = network()
    linear = {name: module.weight.detach() for name, module in base.named_modules() if isinstance(module, nn.Linear)}

    # peft: target_modules are ends of names; keys carry its wrappers' names; the update is scaled by lora_alpha / r.
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 3, 12.0, "none")
    targets = [name for name in linear if any(name.endswith(f".{end}") for end in config["target_modules"])]
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(stored) == {f"base_model.model.{name}.lora_{part}.weight" for name in targets for part in "AB"}
    assert sorted(names) == sorted(targets)
    for name in targets:
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert (a.shape, b.shape) == ((3, linear[name].shape[1]), (linear[name].shape[0], 3))
        expected = linear[name] + config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"], expected)

    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(network(), tmp_path / "adapter").base_model.model
    torch.testing.assert_close(answer(wrapped), answer(unet), rtol=1e-4, atol=1e-5)
    assert (answer(wrapped) - answer(base)).abs().max() > 0.01

    # diffusers: its own reader, and its own idea of the settings, which has no alpha.
    read, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path / "adapter"), weight_name="pytorch_lora_weights.safetensors", return_lora_metadata=True
    )
    assert (alphas, metadata) == (None, None)
    own = {key.removeprefix("unet."): value for key, value in read.items() if key.startswith("unet.")}
    ranks = {f"^{key}": value.shape[1] for key, value in own.items() if "lora_B" in key}
    settings = get_peft_kwargs(ranks, None, own)
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (3, 3, {})
    assert sorted(settings["target_modules"]) == sorted(targets)
    for name in settings["target_modules"]:
        expected = linear[name] + own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"]
        torch.testing.assert_close(merged[f"{name}.weight"], expected)

    with pytest.raises(InputError, match=r"train\.trainable is all, expected lora"):
        save_adapter(base.state_dict(), CinemoTrain(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_without_an_alpha_the_update_is_not_scaled() -> None:
    assert [lora_scale(lora(lora_rank=rank)) for rank in (1, 7, 64)] == [1.0, 1.0, 1.0]
    assert lora_scale(lora(lora_rank=8, lora_alpha=16)) == 2.0
