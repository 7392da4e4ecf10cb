from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from goldens import Family, golden_files
from torch import Tensor, nn

from cinemo.networks.blocks import sinusoid
from cinemo.networks.dynamicrafter_blocks import (
    DualAttention,
    SpatialBlock,
    SpatialTransformer,
    TemporalConvolutions,
    TemporalTransformer,
)
from cinemo.networks.dynamicrafter_unet import (
    DynamiCrafterConfig,
    DynamiCrafterUNet,
    is_image_context,
    is_temporal,
)
from cinemo.networks.features import DeepFeatures
from cinemo.networks.resampler import Resampler
from cinemo.types import Condition, InputError

SMALL: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "attention_resolutions": (1, 2),
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "context_dim": 12,
}
TEXT, IMAGE = 77, 16  # tokens: what the published code takes for granted, and so do goldens that do not say otherwise
Arrays = dict[str, np.ndarray]


# --- goldens ---------------------------------------------------------------------------------------------------------


def load(module: nn.Module, arrays: Arrays) -> nn.Module:
    """Strictly: a name or shape that differs fails."""
    module.load_state_dict({name[2:]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith("w/")})
    return module


def split(meta: dict[str, Any], context: Tensor, frames: int = 1) -> tuple[Tensor, Tensor | None]:
    """A published context: text, then image tokens, for each frame its own where there are as many."""
    text, image = context.split([meta.get("text_len", TEXT), context.shape[1] - meta.get("text_len", TEXT)], dim=1)
    if frames > 1 and image.shape[1] == frames * meta.get("img_len", IMAGE):
        image = image.unflatten(1, (frames, -1))
    return text, image if image.shape[1] else None


def dual_attention(meta: dict[str, Any], arrays: Arrays, prefix: str = "w/") -> DualAttention:
    width, context_width = arrays[f"{prefix}to_q.weight"].shape[1], arrays[f"{prefix}to_k.weight"].shape[1]
    image, learned = f"{prefix}to_k_ip.weight" in arrays, meta["learnable"]
    scale = meta.get("scale", 1.0)
    return DualAttention(width, meta["heads"], context_width, meta["dim_head"], image, learned, scale)


@pytest.mark.golden
def test_golden_dual_attention(say: Callable[[str], None]) -> None:
    family = Family("dc_dual_xattn")
    for where, meta, arrays in family:
        attention = load(dual_attention(meta, arrays), arrays)
        if meta["alpha"] is not None:
            assert attention.alpha.item() == pytest.approx(meta["alpha"])
        for dtype, kind, tolerance in ((torch.float32, "y", 1e-5), (torch.float64, "y64", 1e-9)):
            attention.to(dtype)
            x, context = (torch.from_numpy(arrays[name]).to(dtype) for name in ("x", "context"))
            text, image = split(meta, context)
            for enabled in (True, False):
                # One frame, whose tokens may be said to be all frames' or its own.
                for tokens in (image, None if image is None else image[:, None]):
                    with torch.set_grad_enabled(enabled):
                        y = attention(x[:, None], attention.keys_values(text, tokens))[:, 0]
                    family.check(where, kind, y.detach(), arrays[kind], tolerance)
            if dtype == torch.float32 and "y_text_only" in arrays:
                y = attention(x[:, None], attention.keys_values(text))[:, 0]
                family.check(where, "text only", y.detach(), arrays["y_text_only"], tolerance)
    family.finish(say)


@pytest.mark.golden
def test_golden_blocks(say: Callable[[str], None]) -> None:
    family = Family("dc_block")
    for where, meta, arrays in family:
        block = SpatialBlock(arrays["x"].shape[2], dual_attention(meta, arrays, "w/attn2."))
        load(block, arrays)
        for dtype, kind in ((torch.float32, "y"), (torch.float64, "y64")):
            if kind in arrays:
                block.to(dtype)
                for enabled in (True, False):
                    x, context = (torch.from_numpy(arrays[name]).to(dtype).clone() for name in ("x", "context"))
                    with torch.set_grad_enabled(enabled):
                        y = block(x[:, None], block.attn2.keys_values(*split(meta, context)))[:, 0]
                    family.check(where, kind, y.detach(), arrays[kind], 1e-5)
    family.finish(say)


@pytest.mark.golden
def test_golden_spatial_transformers(say: Callable[[str], None]) -> None:
    family = Family("dc_spatial")
    for where, meta, arrays in family:
        depth = len({name.split(".")[1] for name in arrays if name.startswith("w/transformer_blocks.")})
        attentions = [dual_attention(meta, arrays, f"w/transformer_blocks.{i}.attn2.") for i in range(depth)]
        shape = arrays["x"].shape[1], meta["heads"], meta["dim_head"], depth, meta["use_linear"]
        transformer = SpatialTransformer(*shape, iter(attentions).__next__)
        load(transformer, arrays)
        x, context = (torch.from_numpy(arrays[name]) for name in ("x", "context"))
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                y = transformer(x, len(x), split(meta, context))
            family.check(where, "float32", y.detach(), arrays["y"], 1e-5)
    family.finish(say)


@pytest.mark.golden
def test_golden_timestep_embeddings(say: Callable[[str], None]) -> None:
    family = Family("dc_timestep_embedding")
    for where, _, arrays in family:
        t = torch.from_numpy(arrays["t"])
        for name in arrays.keys() - {"t"}:
            width = int(name.removeprefix("e"))
            got = sinusoid(t, len(t), width, torch.empty(0))
            for i, at in enumerate(t.tolist()):
                # The last bit of a frequency is 2^-24, and exponential functions differ in it between processors.
                tolerance = max(1e-5, at * 2**-24)
                family.check(where, "to t = 100" if at <= 100 else "beyond", got[i], arrays[name][i], tolerance)
    family.finish(say)


def drawn_unet(meta: dict[str, Any]) -> DynamiCrafterUNet:
    """Weights drawn from their names, as the goldens' description says, and held to their stored sums."""
    with torch.device("meta"):
        unet = DynamiCrafterUNet(**meta["cfg"])
    norms = {
        f"{name}.weight" for name, module in unet.named_modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)
    }
    state = {}
    for name, value in unet.state_dict().items():
        drawn = 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        state[name] = 1 + drawn if name in norms else drawn
        if name.endswith(".alpha") and meta.get("alpha") is not None:
            state[name].fill_(meta["alpha"])
    assert {name: list(value.shape) for name, value in state.items()} == dict(meta["params"])
    for name, sums in meta["param_sum_abssum"].items():
        got = [float(state[name].double().sum()), float(state[name].double().abs().sum())]
        assert got == pytest.approx(sums, rel=1e-5, abs=1e-4), f"{name} drawn differently"
    unet.load_state_dict(state, assign=True)
    return unet


@pytest.mark.golden
def test_golden_unets(say: Callable[[str], None]) -> None:
    family = Family("dc_unet_tiny")
    for where, meta, arrays in family:
        unet = drawn_unet(meta)
        x, context, t = (torch.from_numpy(arrays[name]) for name in ("x", "context", "timesteps"))
        text, image = split(meta, context, x.shape[2])
        fs = torch.from_numpy(arrays["fs"]) if "fs" in arrays else None
        with torch.no_grad():
            made = unet.keys_values(text, image)
            for of_context in ((text, image), (made, None)):
                family.check(where, "without gradients", unet(x, t, *of_context, fs), arrays["y"], 1e-4)
        family.check(where, "with gradients", unet(x, t, text, image, fs).detach(), arrays["y"], 1e-4)
    family.finish(say)


@pytest.mark.golden
def test_golden_names_and_shapes(say: Callable[[str], None]) -> None:
    """Every entry of the published checkpoints; the 512 and 1024 models have no alphas."""
    files = golden_files("sisters/dc_schema_full*.json")
    for path in files:
        schema = json.loads(path.read_text())
        without = {name: shape for name, shape in schema["unet"].items() if not name.endswith(".alpha")}
        assert len(schema["unet"]) - len(without) == 16
        for learned, expected in ((True, schema["unet"]), (False, without)):
            with torch.device("meta"):
                unet = DynamiCrafterUNet(**{**schema["unet_config"], "image_cross_attention_scale_learnable": learned})
            assert {name: list(value.shape) for name, value in unet.state_dict().items()} == expected
        with torch.device("meta"):
            assert DynamiCrafterUNet().config == DynamiCrafterUNet(**schema["unet_config"]).config
            networks = DynamiCrafterUNet(), Resampler()
        assert {name: list(value.shape) for name, value in networks[1].state_dict().items()} == schema["image_proj"]
        assert [sum(p.numel() for p in network.parameters()) for network in networks] == [1_438_854_996, 48_787_456]
    say(f"golden dc_schema_full: {len(files)} file(s); 1532 and 51 names and shapes")


# --- the network -----------------------------------------------------------------------------------------------------


def random_unet(**config: Any) -> DynamiCrafterUNet:
    """Random weights everywhere, the zero-initialised ones too, so that every path matters."""
    torch.manual_seed(0)
    network = DynamiCrafterUNet(**{**SMALL, **config}).double()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def unet() -> DynamiCrafterUNet:
    return random_unet()


def inputs(batch: int = 2, frames: int = 4, h: int = 6, w: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 8, frames, h, w, dtype=torch.float64, generator=generator)
    text = torch.randn(batch, 9, 12, dtype=torch.float64, generator=generator)
    image = torch.randn(batch, frames, 3, 12, dtype=torch.float64, generator=generator)
    return sample, torch.arange(batch) * 300 + 7, text, image, torch.arange(batch) * 5 + 2


def test_items_of_a_batch_do_not_see_each_other(unet: DynamiCrafterUNet) -> None:
    given = inputs()
    together = unet(*given)
    for i in range(2):
        alone = unet(*(x[i : i + 1] for x in given))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-11)


def test_every_input_matters(unet: DynamiCrafterUNet) -> None:
    sample, t, text, image, fs = inputs()
    out = unet(sample, t, text, image, fs)
    half = torch.tensor([1.0] * 4 + [2.0] * 4, dtype=torch.float64)[None, :, None, None, None]
    for changed in (
        unet(sample * half, t, text, image, fs),
        unet(sample, t + 50, text, image, fs),
        unet(sample, t, text.flip(0), image, fs),
        unet(sample, t, text, image.flip(0), fs),
        unet(sample, t, text, image.flip(1), fs),
        unet(sample, t, text, None, fs),
        unet(sample, t, text, image, fs + 1),
        unet(sample, t, text, image),
    ):
        assert float((out - changed).abs().max()) > 1e-3
    torch.testing.assert_close(unet(sample, t, text, image), unet(sample, t, text, image, torch.tensor([3, 3])))


def test_only_convolutions_know_the_order_of_frames() -> None:
    """Attention along time has no positions: without the convolutions, frames in another order, with their image
    tokens, give the output in that order."""
    unet, order = random_unet(), torch.tensor([3, 0, 2, 1])
    sample, t, text, image, fs = inputs()
    plain, mixed = unet(sample, t, text, image, fs), unet(sample[:, :, order], t, text, image[:, order], fs)
    assert float((plain[:, :, order] - mixed).abs().max()) > 1e-3
    for module in unet.modules():
        if isinstance(module, TemporalConvolutions):
            for parameter in module.conv4.parameters():
                parameter.zero_()
    plain, mixed = unet(sample, t, text, image, fs), unet(sample[:, :, order], t, text, image[:, order], fs)
    torch.testing.assert_close(plain[:, :, order], mixed, rtol=0, atol=1e-11)
    moved = unet(sample + torch.eye(4, dtype=torch.float64)[0][None, None, :, None, None], t, text, image, fs)
    assert float((moved - plain)[:, :, 1:].abs().max()) > 1e-3, "frames see each other through attention"


def test_tokens_for_all_frames_are_each_frames_own(unet: DynamiCrafterUNet) -> None:
    sample, t, text, image, fs = inputs()
    shared = unet(sample, t, text, image[:, 1], fs)
    torch.testing.assert_close(shared, unet(sample, t, text, image[:, 1:2].expand_as(image), fs), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["per frame", "shared", "none"])
@torch.no_grad()
def test_keys_and_values_can_be_made_once_and_travel_in_a_condition(unet: DynamiCrafterUNet, kind: str) -> None:
    sample, t, text, image, fs = inputs()
    tokens = {"per frame": image, "shared": image[:, 1], "none": None}[kind]
    expected = unet(sample, t, text, tokens, fs)
    halves = [slice(0, 1), slice(1, 2)]
    made = [
        Condition(context=unet.keys_values(text[half], None if tokens is None else tokens[half])) for half in halves
    ]
    together = Condition.cat(made).to(dtype=torch.float64)
    torch.testing.assert_close(unet(sample, t, together["context"], fs=fs), expected, rtol=0, atol=1e-11)
    one = made[0].expand(2)["context"]
    twice = unet(sample[:1].expand(2, -1, -1, -1, -1), t[:1].expand(2), one, fs=fs[:1].expand(2))
    torch.testing.assert_close(twice, expected[:1].expand_as(twice), rtol=0, atol=1e-11)


def test_without_an_image_it_is_the_text_to_video_model(unet: DynamiCrafterUNet) -> None:
    """The same network without the image's layers, and the same whose values of the image are zero."""
    sample, t, text, image, fs = inputs()
    expected = unet(sample, t, text, None, fs)
    plain = random_unet(image_cross_attention=False)
    plain.load_state_dict({name: value for name, value in unet.state_dict().items() if not is_image_context(name)})
    torch.testing.assert_close(plain(sample, t, text, None, fs), expected, rtol=0, atol=0)
    blind = random_unet()
    for name, parameter in blind.named_parameters():
        if name.endswith("to_v_ip.weight"):
            parameter.zero_()
    torch.testing.assert_close(blind(sample, t, text, image, fs), expected, rtol=0, atol=1e-11)
    with pytest.raises(InputError, match="text-to-video network"):
        plain(sample, t, text, image, fs)


def test_a_scale_that_is_not_learned_is_an_alpha_of_zero(unet: DynamiCrafterUNet) -> None:
    given = inputs()
    fixed = random_unet(image_cross_attention_scale_learnable=False)
    fixed.load_state_dict({name: value for name, value in unet.state_dict().items() if not name.endswith(".alpha")})
    still = random_unet()
    for name, parameter in still.named_parameters():
        if name.endswith(".alpha"):
            parameter.zero_()
    torch.testing.assert_close(still(*given), fixed(*given), rtol=0, atol=1e-12)
    assert float((unet(*given) - fixed(*given)).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("h", "w", "config"),
    [
        (8, 12, {"channel_mult": (1, 2, 2), "attention_resolutions": (4, 1)}),
        (5, 9, {"channel_mult": (1, 2, 2), "attention_resolutions": ()}),
        (1, 3, {"num_res_blocks": 2, "transformer_depth": 2}),
        (4, 4, {"channel_mult": (2,), "addition_attention": False, "use_linear": False, "num_head_channels": 24}),
    ],
)
def test_any_size_and_depth(h: int, w: int, config: dict[str, Any]) -> None:
    unet = DynamiCrafterUNet(**{**SMALL, **config}, in_channels=6, out_channels=3)
    sample = torch.randn(1, 6, 2, h, w)
    assert unet(sample, 10, torch.randn(1, 3, 12), torch.randn(1, 5, 12)).shape == (1, 3, 2, h, w)


def test_memory_layout_of_the_input_does_not_matter(unet: DynamiCrafterUNet) -> None:
    sample, *rest = inputs()
    scattered = sample.permute(2, 4, 0, 3, 1).contiguous().permute(2, 4, 0, 3, 1)
    torch.testing.assert_close(unet(scattered, *rest), unet(sample, *rest), rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_deep_features_of_the_same_call_change_nothing_and_spare_the_inner_layers(depth: int) -> None:
    unet, given, deep, runs = random_unet(), inputs(), DeepFeatures(depth), 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    unet.middle_block[0].register_forward_hook(count)
    plain = unet(*given)
    torch.testing.assert_close(unet(*given, deep), plain, rtol=0, atol=0)
    torch.testing.assert_close(unet(*given, deep), plain, rtol=0, atol=1e-11)
    assert runs == 2
    moved = unet(given[0] + 0.1, *given[1:], deep)
    assert runs == 2
    assert not torch.allclose(moved, plain)


def test_bfloat16_stays_near_float32() -> None:
    unet, given = random_unet().float(), tuple(x.float() if x.is_floating_point() else x for x in inputs())
    expected = unet(*given)
    got = unet.bfloat16()(*(x.bfloat16() if x.is_floating_point() else x for x in given))
    assert got.dtype == unet.dtype == torch.bfloat16
    assert float((got.float() - expected).std() / expected.std()) < 0.05


def test_a_fresh_network_begins_as_the_published_one() -> None:
    """Nothing comes out, and each branch that ends with a zero layer adds nothing."""
    unet = DynamiCrafterUNet(**SMALL)
    assert not unet(*(x.float() if x.is_floating_point() else x for x in inputs())).any()
    ends = ("out.2", "fps_embedding.2", "proj_out", "temopral_conv.conv4.3", "out_layers.3")
    for name, parameter in unet.named_parameters():
        module, _, part = name.rpartition(".")
        norm = isinstance(unet.get_submodule(module), nn.GroupNorm | nn.LayerNorm)
        zero = module.endswith(ends) or part == "alpha" or (norm and part == "bias")
        assert bool(parameter.any()) != zero, name


def test_names_say_what_is_temporal_and_what_belongs_to_the_image() -> None:
    with torch.device("meta"):
        unet = DynamiCrafterUNet()
    temporal = {
        f"{name}.{parameter}"
        for name, module in unet.named_modules()
        if isinstance(module, TemporalTransformer | TemporalConvolutions)
        for parameter, _ in module.named_parameters()
    }
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    assert {name for name in sizes if is_temporal(name)} == temporal
    assert {name for name in sizes if is_temporal(f"unet.{name}")} == temporal
    assert sum(sizes[name] for name in temporal) == 545_323_136
    image = {name: size for name, size in sizes.items() if is_image_context(name)}
    assert sum(image.values()) == 25_559_056
    assert len(image) == 3 * 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_causal_attention": True}, "use_causal_attention is True; expected False"),
        ({"temporal_conv": False}, "temporal_conv is False; expected True"),
        ({"block_out_channels": (32, 64)}, "no such setting"),
        ({"model_channels": 48}, "has 48, expected a multiple of 32 groups"),
        ({"num_head_channels": 40}, "has 32, .* at least one head of 40"),
    ],
)
def test_unsupported_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DynamiCrafterUNet(**{**SMALL, **config})


def test_published_extras_are_accepted_and_the_config_makes_the_same_network() -> None:
    with torch.device("meta"):
        unet = DynamiCrafterUNet(**SMALL, dropout=0.1, temporal_length=16, use_checkpoint=True, temporal_conv=True)
        assert DynamiCrafterUNet(**DynamiCrafterConfig(**unet.config).model_dump()).config == unet.config
        assert DynamiCrafterUNet().config == DynamiCrafterUNet(**DynamiCrafterConfig().model_dump()).config
    with pytest.raises(ValueError, match="dropout"):
        DynamiCrafterConfig(dropout=0.1)


def test_inputs_that_do_not_fit_are_refused_in_a_line(unet: DynamiCrafterUNet) -> None:
    sample, t, text, image, fs = inputs()
    with pytest.raises(InputError, match="image tokens for 3 frames, and the sample has 4"):
        unet(sample, t, text, image[:, :3], fs)
    with pytest.raises(InputError, match="fs_condition is false"):
        random_unet(fs_condition=False)(sample, t, text, image, fs)
    assert math.isfinite(float(random_unet(fs_condition=False)(sample, t, text, image).sum()))


def test_a_learned_scale_has_a_dimension_in_training_and_none_in_files(unet: DynamiCrafterUNet) -> None:
    """DeepSpeed broadcasts no parameter without one; published files have none."""
    scales = {name: value for name, value in unet.state_dict().items() if name.endswith(".alpha")}
    assert scales
    assert {value.dim() for value in scales.values()} == {0}
    assert all(parameter.dim() > 0 for parameter in unet.parameters())
    again = DynamiCrafterUNet(**unet.config).to(unet.dtype)
    again.load_state_dict(unet.state_dict())
    assert all(torch.equal(again.get_parameter(name).detach()[0], value) for name, value in scales.items())
