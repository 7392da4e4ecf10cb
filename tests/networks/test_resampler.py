from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from goldens import Family
from torch import Tensor

from cinemo.networks.resampler import Resampler, ResamplerConfig
from cinemo.types import InputError

SMALL = {"dim": 24, "depth": 2, "dim_head": 8, "heads": 2, "num_queries": 4, "embedding_dim": 10, "output_dim": 12}


@pytest.mark.golden
@torch.no_grad()
def test_golden_resamplers(say: Callable[[str], None]) -> None:
    family = Family("dc_resampler")
    for where, meta, arrays in family:
        resampler = Resampler(**meta["cfg"])
        weights = {name.removeprefix("w/"): torch.from_numpy(arrays[name]) for name in arrays if name[:2] == "w/"}
        resampler.load_state_dict(weights)
        x = torch.from_numpy(arrays["x"])
        y = resampler(x)
        frames = [] if meta["cfg"]["video_length"] is None else [meta["cfg"]["video_length"]]
        assert list(y.shape) == [len(x), *frames, meta["cfg"]["num_queries"], meta["cfg"]["output_dim"]]
        family.check(where, "float32", y.reshape(arrays["y"].shape), arrays["y"], 1e-5)
        if "y64" in arrays:
            y = resampler.double()(x.double())
            family.check(where, "float64", y.reshape(arrays["y64"].shape), arrays["y64"], 2e-6)
    family.finish(say)


def small(video_length: int | None = 3) -> tuple[Resampler, Tensor]:
    torch.manual_seed(0)
    return Resampler(**SMALL, video_length=video_length).double(), torch.randn(2, 7, 10, dtype=torch.float64)


def test_the_order_of_an_images_tokens_does_not_matter_and_that_of_the_queries_is_the_frames() -> None:
    resampler, tokens = small()
    out = resampler(tokens)
    torch.testing.assert_close(resampler(tokens.flip(1)), out, rtol=0, atol=1e-12)
    assert float((out[:, 0] - out[:, 1]).detach().abs().max()) > 1e-2
    with torch.no_grad():
        resampler.latents.copy_(resampler.latents.unflatten(1, (3, 4)).flip(1).flatten(1, 2))
    torch.testing.assert_close(resampler(tokens), out.flip(1), rtol=0, atol=1e-12)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    resampler, tokens = small(None)
    together = resampler(tokens)
    assert together.shape == (2, 4, 12)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], resampler(tokens[i : i + 1]), rtol=0, atol=1e-12)
    assert (together[0] - together[1]).abs().max().item() > 1e-3


def test_gradients_reach_every_weight_and_without_them_nothing_that_is_kept_is_overwritten() -> None:
    resampler, tokens = small()
    before = {name: value.clone() for name, value in resampler.state_dict().items()}
    given = tokens.clone()
    with torch.no_grad():
        quietly = resampler(tokens)
    out = resampler(tokens)
    torch.testing.assert_close(quietly, out, rtol=0, atol=1e-12)
    assert torch.equal(tokens, given)
    assert all(torch.equal(value, before[name]) for name, value in resampler.state_dict().items())
    (out * torch.linspace(-1, 2, out.shape[-1])).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in resampler.parameters())


def test_bfloat16_stays_near_float32() -> None:
    resampler, tokens = small()
    expected = resampler(tokens)
    got = resampler.bfloat16()(tokens.bfloat16())
    assert got.dtype == resampler.dtype == torch.bfloat16
    assert float((got.double() - expected).std() / expected.std()) < 0.05


def test_configurations_and_tokens_that_do_not_fit_are_refused() -> None:
    with torch.device("meta"):
        assert (
            Resampler().config == Resampler(**ResamplerConfig().model_dump()).config == ResamplerConfig().model_dump()
        )
    with pytest.raises(ValueError, match="num_queries"):
        ResamplerConfig(num_queries=0)
    with pytest.raises(InputError, match="image tokens are 9 wide, expected 10"):
        small()[0](torch.randn(1, 5, 9))
