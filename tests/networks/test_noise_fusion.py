"""TRIP's fusion module: a golden, how a fresh one behaves, what sees what, and memory that changes no number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from goldens import Family
from pydantic import ValidationError
from torch import Tensor

from cinemo.config import Checkpointing
from cinemo.networks import memory
from cinemo.networks.memory import checkpoint_activations
from cinemo.networks.noise_fusion import FusionConfig, TemporalNoiseFusion
from cinemo.networks.weights import load_network, save_network
from cinemo.types import InputError

# The golden's names of the layers, and ours.
NAMES = {
    "residual_in": "proj_res", "reference_in": "proj_ref", "step_embedding.linear_1": "t1",
    "step_embedding.linear_2": "t2", "norm1.modulation": "ada1", "norm2.modulation": "ada2", "attn1.to_q": "sq",
    "attn1.to_k": "sk", "attn1.to_v": "sv", "attn1.to_out.0": "so", "attn2.to_q": "cq", "attn2.to_k": "ck",
    "attn2.to_v": "cv", "attn2.to_out.0": "co", "noise_out": "proj_out",
}  # fmt: skip


@pytest.mark.golden
def test_golden_noise_fusion(say: Callable[[str], None]) -> None:
    family = Family("trip_tnf")
    for where, meta, arrays in family:
        assert meta["ln_eps"] == 1e-6
        channels = arrays["residual"].shape[1]
        fusion = TemporalNoiseFusion(channels, meta["width"], meta["heads"], meta["patch"], positions=False).double()
        weights = {name.removeprefix("w/"): torch.from_numpy(arrays[name]) for name in arrays if name.startswith("w/")}
        layers = {name: name.rpartition(".")[::2] for name in fusion.state_dict()}
        fusion.load_state_dict({name: weights.pop(f"{NAMES[layer]}.{kind}") for name, (layer, kind) in layers.items()})
        assert not weights
        given = [torch.from_numpy(arrays[name]) for name in ("residual", "reference", "t")]
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            residual, reference = (x.to(dtype) for x in given[:2])
            for enabled in (True, False):
                with torch.set_grad_enabled(enabled):
                    out = fusion.to(dtype)(residual, reference, given[2]).detach()
                kind = str(dtype).removeprefix("torch.")
                for name, got in (("out", out), ("delta", out - residual)):
                    largest = max(1.0, float(abs(arrays[name]).max()))
                    family.check(where, f"{name} {kind}", got, arrays[name], tolerance * largest)
    family.finish(say)


def noises(shape: tuple[int, ...] = (2, 4, 3, 4, 6), dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    residual, reference = torch.randn(2, *shape, dtype=dtype, generator=generator)
    return residual, reference


def random_fusion(**config: Any) -> TemporalNoiseFusion:
    """In float64, with weights in the last layer, too."""
    torch.manual_seed(0)
    fusion = TemporalNoiseFusion(**({"width": 32, "heads": 4} | config)).double()
    torch.nn.init.normal_(fusion.noise_out.weight, std=0.2)
    torch.nn.init.normal_(fusion.noise_out.bias, std=0.2)
    return fusion


STEPS = torch.tensor([20, 700])


@pytest.mark.parametrize("axis", ["space", "time"])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_a_fresh_module_returns_the_residual_noise(axis: Any, patch: int) -> None:
    residual, reference = noises((2, 4, 3, 5, 7))
    fresh = TemporalNoiseFusion(width=32, heads=4, patch=patch, axis=axis).double()
    assert torch.equal(fresh(residual, reference, STEPS), residual)
    moved = random_fusion(patch=patch, axis=axis)(residual, reference, STEPS)
    assert moved.shape == residual.shape
    assert not torch.allclose(moved, residual, atol=0.01)


def changed(fusion: TemporalNoiseFusion, frame: int, row: int, column: int) -> Tensor:
    """Where (N, h, w) the output depends on one cell of the reference."""
    residual, reference = noises((1, 4, 3, 4, 6))
    other = reference.clone()
    other[:, :, frame, row, column] += 1
    return (fusion(residual, other, 5) - fusion(residual, reference, 5)).abs().amax((0, 1)) > 1e-9


@pytest.mark.parametrize("patch", [1, 2])
def test_what_sees_what(patch: int) -> None:
    inside = changed(random_fusion(patch=patch), 1, 2, 3)
    assert inside.any(2).any(1).tolist() == [False, True, False]  # other frames are none of its business
    assert inside[1].all()
    along = changed(random_fusion(patch=patch, axis="time"), 1, 2, 3)
    assert along[:, 2, 3].all()
    assert int(along.sum()) == 3 * patch**2


def test_only_positions_tell_where_a_token_is() -> None:
    residual, reference = noises()
    for positions in (False, True):
        fusion = random_fusion(positions=positions)
        out = fusion(residual, reference, STEPS)
        turned = fusion(residual.flip(3, 4), reference.flip(3, 4), STEPS).flip(3, 4)
        assert torch.allclose(out, turned) is not positions
        along = random_fusion(positions=positions, axis="time")
        out, turned = along(residual, reference, STEPS), along(residual.flip(2), reference.flip(2), STEPS).flip(2)
        assert torch.allclose(out, turned) is not positions


def test_it_is_told_the_step_of_each_item_and_which_noise_is_which() -> None:
    residual, reference = noises()
    fusion = random_fusion()
    out = fusion(residual, reference, STEPS)
    alone = torch.cat([fusion(residual[k : k + 1], reference[k : k + 1], int(STEPS[k])) for k in (0, 1)])
    torch.testing.assert_close(out, alone)
    assert not torch.allclose(fusion(residual, reference, 20), out)
    assert not torch.allclose(fusion(residual, residual, STEPS), out)


def gradients(fusion: TemporalNoiseFusion) -> list[Tensor]:
    residual, reference = (x.requires_grad_() for x in noises())
    out = fusion(residual, reference, STEPS)
    wanted = [*fusion.parameters(), residual, reference]
    return [out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 2, out.shape[-1])).sum(), wanted)]


@pytest.mark.parametrize("config", [{"patch": 2}, {"axis": "time"}, {"positions": False}])
def test_pieces_and_recomputation_change_no_number(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fusion = random_fusion(**config)
    expected = gradients(fusion)
    assert all(float(gradient.abs().max()) > 0 for gradient in expected)
    monkeypatch.setattr(memory, "_CPU_PIECE", 1)  # a frame at a time
    for again in get_args(Checkpointing):
        checkpoint_activations(fusion, again)
        for ours, whole in zip(gradients(fusion), expected, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(fusion(*noises(), STEPS), expected[0], rtol=0, atol=1e-11)


def test_bfloat16_weights_leave_the_sum_in_float32() -> None:
    residual, reference = noises(dtype=torch.float32)
    fusion = random_fusion().float()
    exact = fusion(residual, reference, STEPS).detach()
    half = fusion.bfloat16()(residual, reference, STEPS).detach()
    assert half.dtype == torch.float32
    # Rounded is what is added, not what it is added to.
    assert float((half - exact).abs().max()) < 0.05 * float((exact - residual).abs().max())
    torch.nn.init.zeros_(fusion.noise_out.weight)
    torch.nn.init.zeros_(fusion.noise_out.bias)
    assert torch.equal(fusion(residual, reference, STEPS), residual)


def test_configuration() -> None:
    assert FusionConfig().patch_for(32, 32) == 1
    assert FusionConfig().patch_for(40, 64) == 2
    assert FusionConfig(patch=4).patch_for(8, 8) == 4
    for wrong in ({"width": 30, "heads": 8}, {"width": 6, "heads": 3}, {"patch": 0}, {"axis": "both"}):
        with pytest.raises(ValidationError):
            FusionConfig(**wrong)
    assert FusionConfig(width=6, heads=3, positions=False).width == 6


def test_weights_come_back_and_others_are_refused(tmp_path: Path) -> None:
    fusion = random_fusion(patch=2)
    save_network(fusion.float(), tmp_path / "fusion")
    with torch.device("meta"):
        again = TemporalNoiseFusion(**fusion.config)
        other = TemporalNoiseFusion(**fusion.config | {"patch": 1})
    load_network(again, str(tmp_path), "fusion", torch.bfloat16)
    for name, value in fusion.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.bfloat16(), rtol=0, atol=0)
    with pytest.raises(InputError, match=r"do not fit.*residual_in\.weight is \(32, 16\), expected \(32, 4\)"):
        load_network(other, str(tmp_path / "fusion"), "fusion")
    with pytest.raises(InputError, match="no other weights there"):
        load_network(other, str(tmp_path), "other")
