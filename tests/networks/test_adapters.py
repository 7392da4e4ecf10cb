"""Adapters beside the weights, row by row, are the merged weights of each row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_unet, tiny_bundle, tiny_recipe
from torch import nn

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, save_bundle
from cinemo.config import TrainConfig
from cinemo.networks import adapters, memory
from cinemo.networks.lora import add_lora, merge_lora, save_adapter
from cinemo.serving.engine.sampling import SamplingEngine
from cinemo.types import Condition, InputError
from pipelines import animate as command

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "net.2", "net.0.proj")


def train(rank: int) -> TrainConfig:
    return TrainConfig(trainable="lora", lora_rank=rank, lora_alpha=2.0 * rank, lora_layers=LAYERS)


def trained(unet: nn.Module, config: TrainConfig, seed: int) -> dict[str, torch.Tensor]:
    """The state of a network whose LoRA has learnt something."""
    network = copy.deepcopy(unet)
    torch.manual_seed(seed)
    add_lora(network, config)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return network.state_dict()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The plain bundle, those of two adapters merged, and the directory with the adapters."""
    directory = tmp_path_factory.mktemp("lora")
    found = {"plain": tiny_bundle(directory), "adapters": directory / "adapters"}
    recipe = tiny_recipe(directory / "encoders")
    for seed, (name, rank) in enumerate((("snow", 2), ("rain", 3))):
        state = trained(random_unet(recipe), train(rank), seed)
        save_adapter(state, train(rank), found["adapters"] / name)
        unet = random_unet(recipe)
        unet.load_state_dict(merge_lora(state, train(rank)))
        save_bundle(directory / name, recipe, {"unet": unet}, {})
        found[name] = directory / name
    (found["adapters"] / "rain" / "adapter_model.safetensors").unlink()  # of rain there is diffusers' file alone
    (found["adapters"] / "notes.txt").write_text("no adapter")
    return found


@pytest.mark.parametrize("piece", [2**21, 700])
def test_rows_of_a_batch_are_those_of_merged_weights(
    places: dict[str, Path], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pieces are in which the network goes through its activations."""
    bundle = load_bundle(places["plain"], "cpu", lora=str(places["adapters"]))
    assert sorted(bundle.adapters.found) == ["rain", "snow"]
    merged = {name: load_bundle(places[name], "cpu") for name in ("plain", "snow", "rain")}
    monkeypatch.setattr(memory, "_CPU_PIECE", piece)
    torch.manual_seed(0)
    order = ["snow", "snow", "plain", "rain", "snow"]
    x, text = torch.randn(5, 4, 5, 4, 6), torch.randn(5, 7, 32)
    condition = Condition(image=torch.randn(5, 4, 4, 6), text=text, motion_bucket=torch.arange(5.0))
    t = torch.tensor([10, 500, 300, 900, 40])
    with torch.inference_mode():
        rows = [None if name == "plain" else bundle.adapters.choose(name) for name in order]
        with bundle.adapters.using(rows):
            together = bundle.method.predict(x.clone(), t, condition)
        for row, name in enumerate(order):
            one = Condition({key: value[row : row + 1] for key, value in condition.items()})
            alone = merged[name].method.predict(x[row : row + 1].clone(), t[row : row + 1], one)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-4)
        plain = bundle.method.predict(x.clone(), t, condition)
        torch.testing.assert_close(plain, merged["plain"].method.predict(x.clone(), t, condition), rtol=0, atol=0)
        assert (plain[0] - together[0]).abs().max() > 0.01


def test_requests_with_different_adapters_share_calls(places: dict[str, Path]) -> None:
    bundle = load_bundle(places["plain"], "cpu", lora=str(places["adapters"]))
    merged = {name: load_bundle(places[name], "cpu") for name in ("plain", "snow", "rain")}
    asked: dict[str, Any] = {"snow": "snow", "plain": None, "rain": "rain:1", "none of it": "snow:0"}
    engine, sizes, finished = SamplingEngine(bundle, max_batch=4), [], {}
    hook = bundle.method.unet.register_forward_hook(lambda _m, given, _o: sizes.append(len(given[0])))
    for key, lora in asked.items():
        engine.join(key, AnimateRequest(PICTURE, "waves", lora=lora))
    while len(engine):
        outcome = engine.step()
        assert not outcome.failed
        finished |= outcome.finished
    hook.remove()
    assert sizes == [8] * 4, "four requests of two branches in each of four calls"
    for key in asked:
        alone = animate(merged.get(key, merged["plain"]), AnimateRequest(PICTURE, "waves"))
        torch.testing.assert_close(finished[key].latents_CFHW, alone.latents_CFHW, rtol=2e-3, atol=2e-3)
    one = animate(bundle, AnimateRequest(PICTURE, "waves", lora="rain"))
    torch.testing.assert_close(one.latents_CFHW, finished["rain"].latents_CFHW, rtol=2e-3, atol=2e-3)
    assert one.settings["lora"] == "rain:1"
    assert "lora" not in finished["plain"].settings
    assert not torch.allclose(one.latents_CFHW, finished["plain"].latents_CFHW, atol=0.01)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("fog", "there is no adapter 'fog'; there is rain, snow"), ("snow:9", "a scale of -4..4"),
        ("../x", "expected NAME"), ("snow:nan", "expected NAME"), ("", "expected NAME"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said(places: dict[str, Path], asked: str, said: str) -> None:
    found = adapters.load(places["adapters"])
    with pytest.raises(InputError, match=said):
        found.choose(asked)


def test_adapters_of_other_networks_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        load_bundle(places["plain"], "cpu", lora=str(tmp_path / "nowhere"))
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"adapter bad: .* cannot be read"):
        load_bundle(places["plain"], "cpu", lora=str(tmp_path))
    found = adapters.load(places["adapters"])
    with pytest.raises(InputError, match="has no linear layer"):
        found.attach({"unet": nn.Sequential(nn.Linear(2, 2))})
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    wrong = adapters.Adapter("wrong", {layer: (torch.zeros(2, 7), torch.zeros(9, 2))}, "")
    bundle = load_bundle(places["plain"], "cpu")
    with pytest.raises(InputError, match=r"adapter wrong: .* has \(2, 7\) and \(9, 2\), expected"):
        adapters.Adapters({"wrong": wrong}).attach(bundle.method.networks)


def test_the_command_takes_one(places: dict[str, Path], tmp_path: Path) -> None:
    picture, target = str(tmp_path / "a.png"), str(tmp_path / "o.mp4")
    Image.fromarray(PICTURE).save(picture)
    words = ["--bundle", str(places["plain"]), "--image", picture, "--prompt", "waves", "--output", target]
    command.main([*words, "--lora", str(places["adapters"] / "snow"), "--lora-scale", "0.5", "--steps", "2"])
    assert Path(target).is_file()
    with pytest.raises(InputError, match="holds rain, snow, expected one adapter"):
        command.main([*words, "--lora", str(places["adapters"])])
