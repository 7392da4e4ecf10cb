from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from goldens import FLOAT32, FLOAT64, Golden, Tally, golden_files
from hypothesis import given
from hypothesis import strategies as st

from cinemo.config import DiffusionConfig
from cinemo.diffusion.dct import dct, dct_init, dct_matrix, idct
from cinemo.diffusion.schedule import noise_schedule
from cinemo.types import InputError

MODES = ["spatial", "3d", "fft"]
SIDES = st.integers(1, 17)
SEEDS = st.integers(0, 2**31)


@pytest.mark.golden
def test_golden_dct_init(say: Callable[[str], None]) -> None:
    tally, alpha_bar = Tally("dctinit"), noise_schedule(DiffusionConfig()).alpha_bar
    for golden in map(Golden, golden_files("cinemo/dctinit*.npz")):
        for case in golden.meta["cases"]:
            name, level, keep = case["name"], alpha_bar[case["timestep"]], case["percentage"]
            z_1, noise = golden.tensor(f"{name}.base_content"), golden.tensor(f"{name}.noise")
            tally.check(golden, name, "float64", dct_init(z_1, noise, level, keep), "out_f64", FLOAT64)
            tally.check(golden, name, "noised", dct_init(z_1, noise, level, 1.0), "noised", FLOAT64)
            tally.check(golden, name, "dct", dct(noise.double(), (2, 3, 4)), "noise_dct3", FLOAT64)
            tally.check(golden, name, "float32", dct_init(z_1.float(), noise, level, keep), "out_f64", FLOAT32)
            tally.check(golden, name, "fp16", dct_init(z_1, noise, level, keep).half(), "out_official_fp16", 1e-3)
    tally.finish(say)


@given(st.integers(1, 64))
def test_dct_matrix_is_orthonormal(n: int) -> None:
    matrix = dct_matrix(n, torch.zeros(0, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@given(SIDES, SIDES, SEEDS)
def test_dct_is_undone_and_keeps_energy(h: int, w: int, seed: int) -> None:
    x = torch.randn(2, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    coefficients = dct(x, (1, 2))
    torch.testing.assert_close(idct(coefficients, (1, 2)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(coefficients.norm(), x.norm())


def test_dct_is_scipys() -> None:
    fft = pytest.importorskip("scipy.fft")
    x = np.random.default_rng(0).standard_normal((3, 5, 8))
    np.testing.assert_allclose(dct(torch.tensor(x), (1, 2)).numpy(), fft.dctn(x, axes=(1, 2), norm="ortho"), atol=1e-12)


def draw(frames: int, h: int, w: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_1 = torch.randn(2, 3, 1, h, w, dtype=torch.float64, generator=generator)
    return z_1, torch.randn(2, 3, frames, h, w, dtype=torch.float64, generator=generator)


@given(st.sampled_from(MODES), st.integers(1, 8), SIDES, SIDES, SEEDS)
def test_the_ends_of_keep(mode: str, frames: int, h: int, w: int, seed: int) -> None:
    z_1, noise = draw(frames, h, w, seed)
    torch.testing.assert_close(dct_init(z_1, noise, 0.3, 0.0, mode), noise, rtol=0, atol=1e-12)
    z_tau = 0.3**0.5 * z_1 + 0.7**0.5 * noise
    torch.testing.assert_close(dct_init(z_1, noise, 0.3, 1.0, mode), z_tau, rtol=0, atol=1e-12)


@given(st.sampled_from(["spatial", "3d"]), SIDES, SIDES, st.floats(0, 1), SEEDS)
def test_low_coefficients_are_the_images_and_high_ones_the_noises(
    mode: str, h: int, w: int, keep: float, seed: int
) -> None:
    z_1, noise = draw(6, h, w, seed)
    dims = (3, 4) if mode == "spatial" else (2, 3, 4)
    z_tau = 0.2**0.5 * z_1 + 0.8**0.5 * noise
    low = torch.zeros(6, h, w, dtype=torch.bool)
    low[: 6 if mode == "spatial" else int(keep * 6), : int(keep * h), : int(keep * w)] = True
    expected = torch.where(low, dct(z_tau, dims), dct(noise, dims))
    torch.testing.assert_close(dct(dct_init(z_1, noise, 0.2, keep, mode), dims), expected, rtol=0, atol=1e-10)


@given(st.integers(2, 16), st.integers(2, 16), st.floats(0, 1), SEEDS)
def test_fourier_variant_keeps_the_same_share(h: int, w: int, keep: float, seed: int) -> None:
    """The result is real and linear, and the trace of the filter counts the kept frequencies."""
    zero = torch.zeros(1, h * w, 1, h, w, dtype=torch.float64)
    impulses = torch.eye(h * w, dtype=torch.float64).view(1, h * w, 1, h, w)
    # With a zero image the change is (sqrt(1-a) - 1) noise, so the filter acts on the impulses themselves.
    filtered = (dct_init(zero, impulses, 0.75, keep, "fft") - impulses) / (0.25**0.5 - 1)
    trace = filtered.reshape(h * w, h * w).diagonal().sum()
    assert float(trace) == pytest.approx(int(keep * h) * int(keep * w), abs=1e-9)


def test_gradients_and_half_precision() -> None:
    z_1, noise = draw(3, 4, 5, 0)
    z_1.requires_grad_()
    dct_init(z_1, noise, 0.5, 0.5).sum().backward()
    assert z_1.grad is not None
    assert float(z_1.grad.abs().sum()) > 0
    assert dct_init(z_1.detach().bfloat16(), noise.bfloat16(), 0.5, 0.5).dtype == torch.float32


def test_bad_arguments_are_named() -> None:
    z_1, noise = draw(3, 4, 5, 0)
    with pytest.raises(InputError, match=r"keep is 1\.5"):
        dct_init(z_1, noise, 0.5, 1.5)
    with pytest.raises(InputError, match="first_frame_latent"):
        dct_init(z_1[:, :, 0], noise, 0.5, 0.5)
