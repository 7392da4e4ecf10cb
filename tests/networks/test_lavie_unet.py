from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from goldens import FLOAT32, FLOAT64, Golden, Tally, fill_golden, golden_files
from torch import Tensor, nn

from cinemo.networks.lavie_unet import DeepFeatures, LavieUNet, UNetConfig
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


def golden_unet(golden: Golden) -> LavieUNet:
    with torch.device("meta"):
        unet = LavieUNet(**golden.meta["config"])
    fill_golden(unet, golden.meta.get("checks"))
    return unet.requires_grad_(False)


def residual_prediction(unet: LavieUNet, golden: Golden, case: str, dtype: torch.dtype) -> Tensor:
    """The network as Cinemo calls it: base frame first and added to the residuals, its own output dropped."""
    base, residuals = golden.tensor(f"{case}.base_content", dtype), golden.tensor(f"{case}.sample", dtype)
    frames = torch.cat([base, base + residuals], dim=2)
    text, motion = golden.tensor(f"{case}.text", dtype), golden.tensor(f"{case}.motion_ids")
    return unet(frames, golden.tensor(f"{case}.timestep"), text, motion)[:, :, 1:]


@pytest.mark.golden
def test_golden_tiny(say: Callable[[str], None]) -> None:
    tally = Tally("unet_tiny")
    for path in golden_files("cinemo/unet_tiny*.npz"):
        if "intermediates" in path.name:
            continue
        golden = Golden(path)
        unet = golden_unet(golden)
        for dtype, suffix, tolerance in ((torch.float64, "f64", FLOAT64), (torch.float32, "f32", FLOAT32)):
            unet.to(dtype)
            for case in golden.meta["cases"]:
                name = case["name"]
                if golden.has(f"{name}.out_{suffix}"):
                    # With and without gradients the blocks do their work in different ways.
                    for gradients in (True, False):
                        with torch.set_grad_enabled(gradients):
                            out = residual_prediction(unet, golden, name, dtype)
                        tally.check(golden, name, suffix, out, f"out_{suffix}", tolerance)
    tally.finish(say)


@pytest.mark.golden
def test_golden_intermediates(say: Callable[[str], None]) -> None:
    """The output of every inner module that the published network has too: says where a difference begins."""
    compared, worst = 0, 0.0
    for path in golden_files("cinemo/unet_tiny_intermediates*.npz"):
        inner = Golden(path)
        case = path.stem.rsplit("_", 1)[1]
        got = inner_outputs(Golden(path.with_name("unet_tiny_golden.npz")), case)
        for name in sorted(got.keys() & inner.arrays.keys()):
            expected = inner.tensor(name, torch.float64)
            value = got[name]
            if expected.dim() == 5 and value.shape[0] == expected.shape[2]:  # images, frame by frame
                value = value.transpose(0, 1)[None]
            if name.endswith(("attn2.to_k", "attn2.to_v")):  # the published network repeats the text for each frame
                value = value.expand_as(expected)
            error = float((value.reshape(expected.shape) - expected).abs().max() / expected.abs().max())
            assert error < 1e-6, f"{name}: relative error {error:.2e}"
            compared, worst = compared + 1, max(worst, error)
        for name, numbers in json.loads(path.with_suffix(".json").read_text()).items():
            if name in got:
                assert float(got[name].mean()) == pytest.approx(numbers["mean"], abs=1e-6), name
                assert float(got[name].abs().max()) == pytest.approx(numbers["absmax"], rel=1e-6), name
                compared += 1
    assert compared >= 80
    say(f"golden unet intermediates: {compared} comparisons; worst relative {worst:.1e} (files are float32)")


def inner_outputs(golden: Golden, case: str) -> dict[str, Tensor]:
    unet = golden_unet(golden).double()
    got: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        module.register_forward_hook(lambda _module, _inputs, out, name=name: got.__setitem__(name, out))
    residual_prediction(unet, golden, case, torch.float64)
    return got


@pytest.mark.golden
@pytest.mark.slow
def test_golden_full_size(say: Callable[[str], None]) -> None:
    tally = Tally("unet_full")
    for golden in map(Golden, golden_files("cinemo/unet_full*.npz")):
        unet = golden_unet(golden)
        cases = golden.meta.get("cases") or [golden.meta["case"]]
        for case in cases:
            name = case["name"] if isinstance(case, dict) else case[0]
            with torch.no_grad():
                out = residual_prediction(unet, golden, name, torch.float32)
            tally.check(golden, name, "float32", out, "out_f32", FLOAT32)
        del unet
    tally.finish(say)


@pytest.mark.golden
def test_golden_names_and_shapes(say: Callable[[str], None]) -> None:
    """Every state-dict entry of the published networks, on the meta device; LaVie lacks the motion network alone."""
    files = golden_files("cinemo/*unet*schema*.json")
    files = [path for path in files if not path.stem.endswith("_meta")]
    tiny = Golden(golden_files("cinemo/unet_tiny_golden.npz")[0]).meta["config"]
    for path in files:
        with torch.device("meta"):
            unet = LavieUNet(**(tiny if "tiny" in path.name else UNetConfig().model_dump()))
        state = {
            name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
            for name, value in unet.state_dict().items()
        }
        if "lavie" in path.name:
            state = {name: entry for name, entry in state.items() if not name.startswith("add_embedding.")}
        assert state == json.loads(path.read_text()), path.name
    meta = json.loads(golden_files("cinemo/unet_schema_full_meta.json")[0].read_text())
    with torch.device("meta"):
        unet = LavieUNet(**meta["config"])
    assert sum(p.numel() for p in unet.parameters()) == meta["n_params"]
    assert sorted(name for name, _ in unet.named_buffers()) == sorted(meta["buffers"])
    say(f"golden unet schemas: {len(files) + 1} files")


@pytest.mark.golden
def test_every_golden_file_belongs_to_a_tested_family() -> None:
    families = [
        "unet_tiny*.npz",
        "unet_full*.npz",
        "dctinit*.npz",
        "ddim*.npz",
        "pipeline_tiny*.npz",
        "image_prep*.npz",
    ]
    families += ["*unet*schema*.json", "vae_*schema.json", "unet_tiny_intermediates*.json", "recipe.py", "*.md"]
    strangers = [
        path.name
        for path in golden_files("cinemo/*")
        if path.is_file() and not any(path.match(family) for family in families)
    ]
    assert not strangers, f"golden files that no test reads: {strangers}"


@pytest.fixture(scope="module")
def unet() -> LavieUNet:
    """Random weights everywhere, the zero-initialised ones too, so that every path matters."""
    torch.manual_seed(0)
    network = LavieUNet(**SMALL).double().requires_grad_(False)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network


def inputs(batch: int = 2, frames: int = 5, h: int = 6, w: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, frames, h, w, dtype=torch.float64, generator=generator)
    text = torch.randn(batch, 9, 12, dtype=torch.float64, generator=generator)
    return sample, torch.arange(batch) * 300 + 7, text, torch.arange(batch) * 5.0


def test_items_of_a_batch_do_not_see_each_other(unet: LavieUNet) -> None:
    sample, t, text, motion = inputs()
    together = unet(sample, t, text, motion)
    for i in range(2):
        alone = unet(sample[i : i + 1], t[i], text[i : i + 1], motion[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-11)


def test_every_input_matters(unet: LavieUNet) -> None:
    sample, t, text, motion = inputs()
    out = unet(sample, t, text, motion)
    for changed in (
        unet(sample, t + 50, text, motion),
        unet(sample, t, text.flip(0), motion),
        unet(sample, t, text, motion + 1),
        unet(sample, t, text, None),
    ):
        assert float((out - changed).abs().max()) > 1e-3


def test_frames_are_ordered_but_symmetric_without_positions(unet: LavieUNet) -> None:
    """Only rotary positions and the distance bias tell frames apart: reversing frames is not the same as reversing
    the output, and with both switched off it is."""
    sample, t, text, motion = inputs()
    forward, backward = unet(sample, t, text, motion), unet(sample.flip(2), t, text, motion).flip(2)
    assert float((forward - backward).abs().max()) > 1e-3

    import cinemo.networks.attention as attention

    original = attention.temporal_positions

    def unordered(*args: object) -> attention.TemporalPositions:
        positions = original(*args)
        still = torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(positions.turns)
        return attention.TemporalPositions(still.contiguous(), positions.buckets_NN * 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "temporal_positions", unordered)
        order = torch.tensor([3, 0, 4, 1, 2])
        plain = unet(sample, t, text, motion)
        torch.testing.assert_close(unet(sample[:, :, order], t, text, motion), plain[:, :, order], rtol=0, atol=1e-11)


def test_time_shift_does_not_matter(unet: LavieUNet) -> None:
    """Rotary angles and the bias depend on frame distance alone: the first and second half of a long table agree."""
    from cinemo.networks.attention import rotate, temporal_positions

    positions = temporal_positions(12, torch.device("cpu"), torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 40, dtype=torch.float64).expand(2, 1, 12, 1, 40)
    q, k = rotate(q, positions.turns), rotate(k, positions.turns)
    logits = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(logits[:6, :6], logits[6:, 6:], rtol=0, atol=1e-12)
    assert torch.equal(positions.buckets_NN[:6, :6], positions.buckets_NN[6:, 6:])
    assert float((logits[0, 1] - logits[0, 2]).abs()) > 1e-6


def test_distance_buckets_are_the_published_table() -> None:
    from cinemo.networks.attention import distance_bucket

    table = {
        7: 7,
        8: 8,
        9: 8,
        10: 9,
        11: 9,
        12: 10,
        13: 10,
        14: 11,
        15: 11,
        16: 12,
        19: 12,
        20: 13,
        22: 13,
        23: 14,
        26: 14,
    }
    for distance, bucket in (table | {27: 15, 31: 15, 32: 15, 500: 15}).items():
        assert distance_bucket(distance, 0) == bucket
        assert distance_bucket(0, distance) == bucket + 16
    assert distance_bucket(4, 4) == 0


@pytest.mark.parametrize(("h", "w", "levels"), [(8, 12, 3), (5, 9, 3), (1, 3, 2), (4, 4, 1)])
def test_any_size_and_depth(h: int, w: int, levels: int) -> None:
    unet = LavieUNet(**{**SMALL, "block_out_channels": (32, 64, 64)[:levels]}, in_channels=16, out_channels=16)
    sample = torch.randn(1, 16, 2, h, w)
    assert unet(sample, 10, torch.randn(1, 3, 12), torch.tensor([1.0])).shape == sample.shape


def test_memory_layout_of_the_input_does_not_matter(unet: LavieUNet) -> None:
    sample, t, text, motion = inputs()
    scattered = sample.permute(2, 4, 0, 3, 1).contiguous().permute(2, 4, 0, 3, 1)
    torch.testing.assert_close(unet(scattered, t, text, motion), unet(sample, t, text, motion), rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    sample, t, text, motion = (x.float() for x in inputs())
    plain = LavieUNet(**SMALL)
    plain(sample, t, text, motion).square().mean().backward()
    for what in ("selective", "whole"):
        thrifty = LavieUNet(**SMALL)
        thrifty.load_state_dict(plain.state_dict())
        checkpoint_activations(thrifty, what)
        thrifty(sample, t, text, motion).square().mean().backward()
        for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
            assert a.grad is not None, name
            assert torch.equal(a.grad, b.grad), (what, name)


def test_bfloat16_stays_near_float32() -> None:
    torch.manual_seed(0)
    unet = LavieUNet(**SMALL).requires_grad_(False)
    sample, t, text, motion = (x.float() for x in inputs())
    expected = unet(sample, t, text, motion)
    got = unet.bfloat16()(sample.bfloat16(), t, text.bfloat16(), motion)
    assert got.dtype == torch.bfloat16
    assert float((got.float() - expected).std() / expected.std()) < 0.05


def test_training_works_after_a_first_call_in_inference_mode() -> None:
    """Position tables are kept between calls and must not be inference tensors."""
    unet = LavieUNet(**SMALL)
    sample, t, text, motion = (x.float() for x in inputs(frames=13))
    with torch.inference_mode():
        unet(sample, t, text, motion)
    unet(sample, t, text, motion).mean().backward()


def test_a_fresh_temporal_branch_is_only_its_bias() -> None:
    state = LavieUNet(**SMALL).state_dict()
    zeros = [name for name, value in state.items() if name.endswith("weight") and not value.any()]
    assert "add_embedding.linear_2.weight" in zeros
    assert len(zeros) == 1 + sum(name.endswith("attn_temp.to_out.0.weight") for name in state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; expected 'silu'"),
        ({"freq_shift": 1}, "freq_shift is 1; expected 0"),
        ({"use_linear_projection": True}, "no such setting"),
        ({"block_out_channels": (16, 32)}, "block_out_channels has 16"),
        ({"norm_num_groups": 5}, "5 groups"),
    ],
)
def test_unsupported_configurations_are_refused(config: dict, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        LavieUNet(**{**SMALL, **config})


def test_published_extras_are_accepted() -> None:
    LavieUNet(**SMALL, sample_size=64, center_input_sample=False, act_fn="silu", addition_embed_type="motion_ids")


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_deep_features_of_the_same_call_change_nothing_and_spare_the_inner_layers(depth: int) -> None:
    torch.manual_seed(0)
    unet = LavieUNet(**SMALL)
    inputs = torch.randn(2, 4, 3, 8, 8), 5, torch.randn(2, 7, 12), torch.tensor([1.0, 9.0])
    deep, runs = DeepFeatures(depth), 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    unet.mid_block.resnets[0].register_forward_hook(count)
    plain = unet(*inputs)
    torch.testing.assert_close(unet(*inputs, deep), plain, rtol=0, atol=0)
    torch.testing.assert_close(unet(*inputs, deep), plain, rtol=0, atol=1e-6)
    assert runs == 2
    moved = unet(inputs[0] + 0.1, *inputs[1:], deep)
    assert runs == 2
    assert not torch.allclose(moved, plain)


def test_an_item_may_go_without_a_motion_id() -> None:
    """NaN leaves it out for that item alone, as None does for all, and reaches no gradient."""
    torch.manual_seed(0)
    unet = LavieUNet(**SMALL)
    nn.init.normal_(unet.add_embedding.linear_2.weight)
    sample, text = torch.randn(3, 4, 2, 8, 8), torch.randn(3, 7, SMALL["cross_attention_dim"])
    some = unet(sample, 5, text, torch.tensor([3.0, torch.nan, 15.0]))
    given, none = unet(sample, 5, text, torch.tensor([3.0, 8.0, 15.0])), unet(sample, 5, text)
    torch.testing.assert_close(some[1], none[1])
    torch.testing.assert_close(some[[0, 2]], given[[0, 2]])
    assert not torch.allclose(some[1], given[1], atol=1e-3)
    some.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in unet.parameters())
