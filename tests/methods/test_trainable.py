"""What a recipe says learns is what moves; everything else keeps its bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cinemo.methods import CinemoMethod, build_method, mark_trainable
from cinemo.methods.cinemo import CinemoRecipe, CinemoTrain
from cinemo.networks.lavie_unet import LavieUNet, UNetConfig, is_temporal
from cinemo.types import Condition, LatentBatch

RECIPE = CinemoRecipe(
    name="test",
    model=UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=1,
        addition_time_embed_dim=16,
    ),
)


def method() -> CinemoMethod:
    """Nothing in it is zero, so that every layer has a gradient in the first step."""
    torch.manual_seed(0)
    made = build_method(RECIPE)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return made


def trained(made: CinemoMethod, steps: int = 2) -> set[str]:
    """Names of what a few steps have moved."""
    before = {name: value.clone() for name, value in made.unet.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        video = torch.randn(2, 4, 5, 4, 6, generator=generator)
        text = torch.randn(2, 7, 12, generator=generator)
        batch = LatentBatch(video, Condition(image=video[:, :, 0], text=text, motion_bucket=torch.tensor([3.0, 15.0])))
        made(batch, torch.tensor([10, 800]), torch.randn(2, 4, 4, 4, 6, generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, value in made.unet.state_dict().items() if not torch.equal(value, before[name])}


def test_all_is_every_parameter() -> None:
    made = method()
    mark_trainable(made, CinemoTrain())
    assert trained(made) == {name for name, _ in made.unet.named_parameters()}


def test_temporal_is_what_lavie_and_cinemo_added() -> None:
    """The counts are those of the published networks."""
    with torch.device("meta"):
        published = LavieUNet()
    sizes = {name: value.numel() for name, value in published.named_parameters()}
    temporal = {name: size for name, size in sizes.items() if is_temporal(name)}
    motion = sum(size for name, size in temporal.items() if name.startswith("add_embedding."))
    assert motion == 1_968_640
    assert sum(temporal.values()) - motion == 49_603_136
    assert sum(sizes.values()) - sum(temporal.values()) == 859_520_964  # Stable Diffusion v1.4

    made = method()
    mark_trainable(made, CinemoTrain(trainable="temporal"))
    names = {name for name, _ in made.unet.named_parameters() if is_temporal(name)}
    assert len(names) < len(list(made.parameters())) / 2
    assert trained(made) == names


@pytest.mark.parametrize("layers", [("to_q", "ff.net.2"), ("attn_temp.to_v",)])
def test_lora_moves_its_own_matrices_alone(layers: tuple[str, ...]) -> None:
    made = method()
    mark_trainable(made, CinemoTrain(trainable="lora", lora_rank=2, lora_layers=layers))
    moved = trained(made)
    assert moved == {name for name, _ in made.unet.named_parameters() if ".lora_" in name}
    assert {name.split(".lora_")[0] for name in moved} == {
        name for name, _ in method().unet.named_modules() if name.endswith(layers)
    }
