"""The refinement network of arrows' fields (arXiv 2405.17306, section 3.2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cinemo.networks.field_refiner import FieldRefiner, RefinerConfig, load_refiner
from cinemo.networks.weights import save_network
from cinemo.types import InputError

CONFIG = RefinerConfig(widths=(16, 32), critic_widths=(8, 16), scale=2.0)


def refiner(trained: bool = False) -> FieldRefiner:
    torch.manual_seed(0)
    network = FieldRefiner(**CONFIG.model_dump())
    if trained:
        torch.nn.init.normal_(network.exit.weight, std=0.1)
    return network


def scenes(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(arrows, pictures, truth): a bright half of the picture moves, a dark one stands; arrows reach everywhere."""
    generator = torch.Generator().manual_seed(seed)
    way = torch.randn(count, 2, 1, 1, generator=generator)
    picture = torch.full((count, 3, 8, 12), -0.8)
    for number in range(count):
        side = slice(0, 6) if number % 2 else slice(6, 12)
        picture[number, :, :, side] = 0.8
    arrows = way.expand(-1, -1, 8, 12).clone()
    return arrows, picture, arrows * (picture[:, :1] > 0)


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (40, 64)])
def test_a_fresh_one_leaves_fields_as_they_are(size: tuple[int, int]) -> None:
    field = torch.randn(2, 2, *size)
    assert torch.equal(refiner()(field, torch.rand(2, 3, *size)), field)


def test_no_motion_stays_none() -> None:
    assert not refiner(trained=True)(torch.zeros(1, 2, 8, 12), torch.rand(1, 3, 8, 12)).any()


def test_arrows_twice_as_fast_make_a_field_twice_as_fast() -> None:
    network, (arrows, picture, _) = refiner(trained=True), scenes(2)
    once = network(arrows, picture)
    assert (once - arrows).abs().max() > 0.01
    torch.testing.assert_close(network(2 * arrows, picture), 2 * once)


def test_generator_and_critic_hold_each_other_still() -> None:
    """One backward pass gives each party the gradient that it has alone."""
    network, (arrows, picture, truth) = refiner(trained=True), scenes(4)
    network.loss(arrows, picture, truth).sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    made = network(arrows, picture)
    given = torch.cat([arrows / 2, picture], dim=1)
    critic = [network.critic(torch.cat([given, field / 2], dim=1)) for field in (truth, made.detach())]
    ((F.softplus(-critic[0]) + F.softplus(critic[1])).flatten(1).mean(1) / 2).sum().backward()
    for name, parameter in network.critic.named_parameters():
        torch.testing.assert_close(got[f"critic.{name}"], parameter.grad)
    network.zero_grad()
    fooled = network.critic(torch.cat([given, made / 2], dim=1))
    (F.softplus(-fooled).flatten(1).mean(1) + 100 * (made - truth).abs().flatten(1).mean(1) / 2).sum().backward()
    for name, parameter in network.named_parameters():
        if not name.startswith("critic."):
            torch.testing.assert_close(got[name], parameter.grad)


def test_it_learns_where_the_picture_moves() -> None:
    """The given field is wrong by the motion of the half that stands; of other scenes, most of that goes."""
    network = refiner()
    adam = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.999))
    before = network.loss(*scenes(16, seed=99), plain=True).mean()
    for step in range(150):
        adam.zero_grad()
        network.loss(*scenes(16, seed=step)).mean().backward()
        adam.step()
    with torch.no_grad():
        assert network.loss(*scenes(16, seed=99), plain=True).mean() < 0.3 * before


def test_weights_come_back_and_a_base_without_them_gives_fresh_ones(tmp_path: Path) -> None:
    network = refiner(trained=True)
    save_network(network, tmp_path / "bundle" / "refiner")
    loaded = load_refiner(CONFIG, str(tmp_path / "bundle"), torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    fresh = load_refiner(CONFIG, "package:tiny/unet", torch.float32, base=True)
    assert not fresh.exit.weight.any()
    with pytest.raises(InputError, match="missing"):
        load_refiner(CONFIG, "package:tiny/unet", torch.float32)
