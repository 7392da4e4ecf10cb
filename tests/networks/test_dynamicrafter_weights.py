from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cinemo.networks.dynamicrafter_unet import DynamiCrafterConfig, DynamiCrafterUNet, is_image_context, is_temporal
from cinemo.networks.dynamicrafter_weights import (
    IMAGE_PROJ,
    UNET,
    load_resampler,
    load_unet,
    published_config,
    save_published,
)
from cinemo.networks.resampler import Resampler, ResamplerConfig
from cinemo.networks.weights import save_network
from cinemo.types import InputError

CONFIG = DynamiCrafterConfig(
    model_channels=32,
    channel_mult=(1, 2),
    attention_resolutions=(1, 2),
    num_res_blocks=1,
    num_head_channels=16,
    context_dim=12,
)
TEXT_TO_VIDEO = CONFIG.model_copy(update={"in_channels": 4, "image_cross_attention": False, "fs_condition": False})
QUERIES = ResamplerConfig(dim=24, depth=1, dim_head=8, heads=2, num_queries=4, embedding_dim=10, output_dim=12)
State = dict[str, Tensor]


def random_unet(config: DynamiCrafterConfig = CONFIG) -> DynamiCrafterUNet:
    torch.manual_seed(0)
    unet = DynamiCrafterUNet(**config.model_dump()).requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return unet


@pytest.fixture
def networks() -> tuple[DynamiCrafterUNet, Resampler]:
    return random_unet(), Resampler(**QUERIES.model_dump())


def is_loaded(network: nn.Module, original: nn.Module) -> bool:
    state = original.state_dict()
    assert network.state_dict().keys() == state.keys()
    return all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("stride_names", [False, True])
def test_a_published_checkpoint_goes_round(
    networks: tuple[DynamiCrafterUNet, Resampler], stride_names: bool, tmp_path: Path
) -> None:
    unet, resampler = networks
    save_published(tmp_path / "out" / "model.ckpt", unet, resampler, stride_names)
    state = torch.load(tmp_path / "out" / "model.ckpt", weights_only=True)["state_dict"]
    fps, other = ("framestride_embed", "fps_embedding")[:: 1 if stride_names else -1]
    assert torch.equal(state[f"{UNET}{fps}.2.weight"], unet.fps_embedding[2].weight)
    assert not [name for name in state if other in name]
    assert len(state) == len(unet.state_dict()) + len(resampler.state_dict())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.ckpt"]

    # As a training job's own file: encoders beside the networks, and other tables beside theirs.
    state |= {"first_stage_model.encoder.weight": torch.zeros(3), "cond_stage_model.x": torch.zeros(1)}
    torch.save({"state_dict": state, "epoch": 3, "optimizer_states": [{"lr": 1e-5}]}, tmp_path / "training.ckpt")
    torch.save({"module": {f"_forward_module.{name}": v for name, v in state.items()}}, tmp_path / "deepspeed.pt")
    for name in ("out/model.ckpt", "training.ckpt", "deepspeed.pt"):
        loaded = load_unet(CONFIG, str(tmp_path / name))
        assert is_loaded(loaded, unet)
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        assert is_loaded(load_resampler(QUERIES, str(tmp_path / name)), resampler)
    save_published(tmp_path / "again.ckpt", loaded, load_resampler(QUERIES, str(tmp_path / name)), stride_names)
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert again.keys() == torch.load(tmp_path / "out" / "model.ckpt", weights_only=True)["state_dict"].keys()
    assert all(torch.equal(value, state[name]) for name, value in again.items())


def test_own_files_in_diffusers_layout(networks: tuple[DynamiCrafterUNet, Resampler], tmp_path: Path) -> None:
    unet, resampler = networks
    save_network(unet, tmp_path / "unet")
    save_network(resampler, tmp_path / "image_proj")
    for location in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"):
        assert is_loaded(load_unet(CONFIG, str(location)), unet)
    for location in (tmp_path, tmp_path / "image_proj"):
        assert is_loaded(load_resampler(QUERIES, str(location)), resampler)
    assert load_unet(CONFIG, str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_resampler(QUERIES, str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(InputError, match="no image_proj weights there"):
        load_resampler(QUERIES, str(tmp_path.parent))


@pytest.mark.parametrize("with_fps", [False, True])
@torch.no_grad()
def test_a_grown_text_to_video_network_does_what_it_did(with_fps: bool, tmp_path: Path) -> None:
    """Whatever the image's tokens and latents, and, where the base has no such input, the frames per second."""
    base = random_unet(TEXT_TO_VIDEO.model_copy(update={"fs_condition": with_fps}))
    save_published(tmp_path / "base.ckpt", base)
    torch.manual_seed(1)
    grown = load_unet(CONFIG, str(tmp_path / "base.ckpt"), base="video")
    sample, image_latents = torch.randn(2, 4, 3, 6, 7), torch.randn(2, 4, 3, 6, 7)
    text, tokens, t = torch.randn(2, 9, 12), torch.randn(2, 3, 5, 12), torch.tensor([999, 37])
    for fs in (None, torch.tensor([5, 24])):
        expected = base(sample, t, text, fs=fs if with_fps else None)
        got = grown(torch.cat([sample, image_latents], dim=1), t, text, tokens, fs)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert float(expected.abs().max()) > 0.1

    # It can learn to look: keys are there, and values get gradients.
    with torch.enable_grad():
        out = grown(torch.cat([sample, image_latents], dim=1), t, text, tokens, fs)
        out.square().mean().backward()
    for name, parameter in grown.named_parameters():
        if name.endswith("to_k_ip.weight"):
            assert parameter.any()
        if name.endswith("to_v_ip.weight") or name in ("input_blocks.0.0.weight", "fps_embedding.2.weight"):
            assert parameter.grad is not None
            assert parameter.grad.any(), name

    published = load_unet(CONFIG, str(tmp_path / "base.ckpt"), base="video", image_init="published")
    changed = published(torch.cat([sample, image_latents], dim=1), t, text, tokens, fs)
    assert float((changed - expected).abs().max()) > 1e-3


@torch.no_grad()
def test_a_text_to_image_base_makes_every_frame_as_it_would_make_it_alone(tmp_path: Path) -> None:
    image = {name: v for name, v in random_unet(TEXT_TO_VIDEO).state_dict().items() if not is_temporal(name)}
    save_file(image, tmp_path / "image.safetensors")
    with pytest.raises(InputError, match="it has no layers along time"):
        load_unet(TEXT_TO_VIDEO, str(tmp_path / "image.safetensors"), base="video")
    narrow = CONFIG.model_copy(update={"in_channels": 4})
    grown = load_unet(narrow, str(tmp_path / "image.safetensors"), base="image")
    sample, text, tokens, t = (
        torch.randn(2, 4, 3, 6, 7),
        torch.randn(2, 9, 12),
        torch.randn(2, 3, 5, 12),
        torch.tensor([999, 37]),
    )
    together = grown(sample, t, text, tokens)
    for place in range(3):
        alone = grown(sample[:, :, place : place + 1], t, text, tokens[:, place : place + 1])
        torch.testing.assert_close(together[:, :, place : place + 1], alone, rtol=0, atol=1e-6)
    assert {
        name for name, v in grown.state_dict().items() if is_temporal(name) and v.any() and v.dim() > 1
    }  # they can learn


def test_the_attention_to_an_image_of_an_earlier_stage_stands_beside_a_new_base(tmp_path: Path) -> None:
    earlier, base = random_unet(), random_unet(TEXT_TO_VIDEO)
    for name, network in (("earlier", earlier), ("base", base)):
        save_published(tmp_path / f"{name}.ckpt", network)
    both = load_unet(CONFIG, str(tmp_path / "base.ckpt"), base="video", context=str(tmp_path / "earlier.ckpt"))
    for name, value in both.state_dict().items():
        if is_image_context(name):
            torch.testing.assert_close(value, earlier.state_dict()[name], rtol=0, atol=0)
        elif name in base.state_dict() and name != "input_blocks.0.0.weight":
            torch.testing.assert_close(value, base.state_dict()[name], rtol=0, atol=0)
    with pytest.raises(InputError, match=r"base\.ckpt: no attention to an image there"):
        load_unet(CONFIG, str(tmp_path / "earlier.ckpt"), base="video", context=str(tmp_path / "base.ckpt"))


def test_a_base_may_be_in_half_precision_and_may_have_everything(tmp_path: Path) -> None:
    base = random_unet(TEXT_TO_VIDEO).half()
    save_published(tmp_path / "base.ckpt", base)
    grown = load_unet(CONFIG, str(tmp_path / "base.ckpt"), base="video")
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float16}
    assert {
        p.dtype for p in load_unet(CONFIG, str(tmp_path / "base.ckpt"), torch.float32, base="video").parameters()
    } == {torch.float32}
    unet = random_unet()
    save_published(tmp_path / "whole.ckpt", unet)
    assert is_loaded(load_unet(CONFIG, str(tmp_path / "whole.ckpt"), base="video"), unet)


@pytest.mark.parametrize(
    ("stored", "wanted", "message"),
    [
        (
            {},
            {"image_cross_attention_scale_learnable": False},
            "it has learned scales .*, and the recipe's network has",
        ),
        ({"image_cross_attention_scale_learnable": False}, {}, "it has no learned scales .* expects them"),
        ({"image_cross_attention": False}, {}, "it has no attention to an image .* expects them"),
        ({}, {"image_cross_attention": False}, "it has attention to an image"),
    ],
)
def test_a_checkpoint_of_another_model_is_said_to_be_one(
    stored: dict[str, Any], wanted: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_published(tmp_path / "other.ckpt", DynamiCrafterUNet(**{**CONFIG.model_dump(), **stored}))
    with pytest.raises(InputError, match=f"other.ckpt: a checkpoint of another model: {message}") as caught:
        load_unet(CONFIG.model_copy(update=wanted), str(tmp_path / "other.ckpt"))
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_said_to_be_some(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file(random_unet().middle_block.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"weights of another network, expected a UNet as VideoCrafter's") as caught:
        load_unet(CONFIG, str(tmp_path), base="video")
    assert len(str(caught.value)) < 300


def test_every_key_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    unet = random_unet()
    state = unet.state_dict()
    state["out.2.bias"] = torch.zeros(5)
    state["stranger"] = torch.zeros(1)
    del state["time_embed.0.bias"]
    save_file(state, tmp_path / "unet.safetensors")
    with pytest.raises(InputError) as caught:
        load_unet(CONFIG, str(tmp_path / "unet.safetensors"))
    for part in ("3 entries", "missing time_embed.0.bias", "extra stranger", "out.2.bias is (5,), expected (4,)"):
        assert part in str(caught.value)
    # A network that is grown may lack only what a text-to-video model lacks.
    partly = {name: v for name, v in unet.state_dict().items() if not is_image_context(name) or "to_k_ip" in name}
    save_file(partly, tmp_path / "partly.safetensors")
    with pytest.raises(InputError, match="another model"):
        load_unet(CONFIG, str(tmp_path / "partly.safetensors"), base="video")
    save_published(tmp_path / "alone.ckpt", unet)
    with pytest.raises(InputError, match=r"nothing in this checkpoint is named image_proj_model\."):
        load_resampler(QUERIES, str(tmp_path / "alone.ckpt"))
    torch.save({"state_dict": {IMAGE_PROJ + "x": 3}}, tmp_path / "numbers.ckpt")
    with pytest.raises(InputError, match="expected a table of tensors"):
        load_unet(CONFIG, str(tmp_path / "numbers.ckpt"))


def test_a_published_configuration_is_read() -> None:
    params = {"model_channels": 64, "dropout": 0.1, "use_checkpoint": True, "temporal_length": 16, "fs_condition": True}
    assert published_config(params, "x.yaml") == {"model_channels": 64, "fs_condition": True}
    with pytest.raises(InputError, match=r"x\.yaml: .* use_relative_position = True, this network supports only False"):
        published_config({"use_relative_position": True}, "x.yaml")
