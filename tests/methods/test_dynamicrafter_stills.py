"""DynamiCrafter's three stages: what each begins with, learns and hands on; single frames in the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import SIZE

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, save_bundle
from cinemo.media.stills import jpeg_strip
from cinemo.methods import build_method, mark_trainable
from cinemo.methods.dynamicrafter import DynamiCrafterRecipe
from cinemo.methods.dynamicrafter_stills import StillsMethod, StillsRecipe
from cinemo.networks.dynamicrafter_unet import DynamiCrafterUNet, is_temporal
from cinemo.networks.weights import save_network
from cinemo.recipes import load_recipe, override
from cinemo.training.run.base_weights import base_networks
from cinemo.training.run.batch import FrozenStates, host_batch, on_device
from cinemo.types import InputError, LatentSample, keyed_generator


@pytest.fixture(scope="module")
def recipe(dynamicrafter_recipe: DynamiCrafterRecipe) -> StillsRecipe:
    values = dynamicrafter_recipe.model_dump() | {"method": "dynamicrafter-stills", "name": "stills-32x48"}
    values["model"]["unet"]["in_channels"] = 4
    return StillsRecipe.model_validate(values)


def clip(recipe: DynamiCrafterRecipe, key: str) -> LatentSample:
    frames, (height, width) = recipe.data.frames, recipe.data.size
    drawn = torch.randn(frames, 4, height // 8, width // 8, generator=keyed_generator(0, key))
    seen = np.zeros((frames, height, width, 3), np.uint8)
    seen[:] = 40 * np.arange(frames)[:, None, None, None]
    return LatentSample(
        key, key, "", "a dog", drawn.half().numpy(), 0.7, 24.0, 4, 0, fields={"frames": jpeg_strip(seen)}
    )


def test_a_single_frame_is_learnt_with_the_queries_of_its_place(recipe: StillsRecipe) -> None:
    torch.manual_seed(0)
    made = build_method(override(recipe, ["train.condition_dropout=0", "train.trainable=context"]))
    assert isinstance(made, StillsMethod)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    mark_trainable(made, override(recipe, ["train.trainable=context"]).train)
    samples = [clip(recipe, key) for key in "abcd"]
    batch, t_B, noise = on_device(
        host_batch(samples, 1, recipe), FrozenStates.of(recipe), torch.device("cpu"), torch.float32
    )
    drawn = batch.condition["frame"].tolist()
    assert noise.shape[2] == 1
    for row, place in enumerate(drawn):
        torch.testing.assert_close(made.target(batch)[row, :, 0], batch.video_BCFHW[row, :, place].float())
    _, tokens_BFQD = made._context(batch.condition)
    every_BFQD = made.image_proj(batch.condition["image_tokens"])
    for row, place in enumerate(drawn):
        assert torch.equal(tokens_BFQD[row, 0], every_BFQD[row, place])
    assert len(set(drawn)) > 1
    made(batch, t_B, noise).backward()
    learnt = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert {name.rpartition("attn2.")[2] for name in learnt if name.startswith("unet.")} == {
        "to_k_ip.weight",
        "to_v_ip.weight",
    }


def test_its_video_is_one_frame(recipe: StillsRecipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_bundle(tmp_path, recipe, build_method(recipe).networks, {"made": "by a test"})
    request = AnimateRequest(np.zeros((*SIZE, 3), np.uint8), "a dog", seed=1)
    assert animate(load_bundle(tmp_path, "cpu"), request).frames_FHWC.shape == (1, *SIZE, 3)


def test_what_a_stage_learns_is_where_the_next_begins(recipe: StillsRecipe, tmp_path: Path) -> None:
    """From a text-to-image model over a text-to-video model to the picture's latent beside the noisy ones."""
    config = recipe.model.unet.model_copy(update={"image_cross_attention": False})
    torch.manual_seed(0)
    video = DynamiCrafterUNet(**config.model_dump())
    save_network(video, tmp_path / "video")
    image = {name: torch.randn_like(value) for name, value in video.state_dict().items() if not is_temporal(name)}
    save_file(image, tmp_path / "image.safetensors")

    first = base_networks(override(recipe, [f"train.init={tmp_path / 'image.safetensors'}"]))
    assert first is not None
    for part, network in first.items():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        save_network(network, tmp_path / "stage1" / part)

    values = recipe.model_dump() | {"method": "dynamicrafter", "name": "stage2"}
    second_recipe = DynamiCrafterRecipe.model_validate(values)
    begins = [f"train.init={tmp_path / 'video'}", f"train.context_init={tmp_path / 'stage1'}"]
    second = base_networks(override(second_recipe, begins))
    assert second is not None
    for name, value in second["image_proj"].state_dict().items():
        assert torch.equal(value, first["image_proj"].state_dict()[name])
    for name, value in second["unet"].state_dict().items():
        of_stage_1 = {"to_k_ip", "to_v_ip", "alpha"} & set(name.split("."))
        assert torch.equal(value, (first["unet"] if of_stage_1 else video).state_dict()[name]), name
    for part, network in second.items():
        save_network(network, tmp_path / "stage2" / part)

    third_recipe = override(second_recipe, ["model.unet.in_channels=8", f"train.init={tmp_path / 'stage2'}"])
    third = base_networks(third_recipe)
    assert third is not None
    entry = third["unet"].state_dict()["input_blocks.0.0.weight"]
    assert torch.equal(entry[:, :4], second["unet"].state_dict()["input_blocks.0.0.weight"])
    assert not entry[:, 4:].any()
    with pytest.raises(InputError, match="no attention to an image there"):
        base_networks(
            override(second_recipe, [f"train.init={tmp_path / 'video'}", f"train.context_init={tmp_path / 'video'}"])
        )


def test_the_paper_s_stages() -> None:
    stages = [
        load_recipe(name) for name in ("dynamicrafter-256-stage1", "dynamicrafter-256-stage2", "dynamicrafter-256")
    ]
    assert [recipe.train.max_steps for recipe in stages] == [1_000_000, 30_000, 100_000]
    assert [recipe.train.lr for recipe in stages] == [1e-4, 5e-5, 5e-5]
    assert [recipe.train.trainable for recipe in stages] == ["context", "spatial", "spatial"]
    assert {recipe.train.global_batch for recipe in stages} == {64}
    channels = [recipe.model.unet.in_channels for recipe in stages if isinstance(recipe, DynamiCrafterRecipe)]
    assert channels == [4, 4, 8]
