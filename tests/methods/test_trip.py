"""TRIP: goldens of every formula, the four identities, what the UNet is shown and what is made of its answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goldens import Family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import FRAMES, SIZE, WIDTH, save_encoders, tiny_recipe
from torch import Tensor, nn

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import load_bundle, save_bundle
from cinemo.config import DiffusionConfig, Recipe
from cinemo.diffusion.ddim import ddim_step
from cinemo.diffusion.schedule import NoiseSchedule, noise_schedule
from cinemo.methods import Method, build_method, mark_trainable
from cinemo.methods.base import run
from cinemo.methods.trip import (
    TripLinearMethod,
    TripLinearModel,
    TripLinearRecipe,
    TripMethod,
    TripModel,
    TripRecipe,
    TripSample,
    TripTrain,
    image_noise_prior,
    lambda_schedule,
    linear_fusion,
    noise_as_output,
    reference_output,
    replace_first,
    unet_input,
    unet_output,
)
from cinemo.networks.dynamicrafter_unet import DynamiCrafterConfig, DynamiCrafterUNet, is_image_context
from cinemo.networks.lavie_unet import LavieUNet, UNetConfig
from cinemo.networks.noise_fusion import FusionConfig
from cinemo.recipes import parse_recipe
from cinemo.serving.engine.sampling import SamplingEngine
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator

UNET = UNetConfig(
    block_out_channels=(32, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=12,
    attention_head_dim=1,
    addition_time_embed_dim=16,
)
FUSION = FusionConfig(width=32, heads=4)
LINEAR = TripLinearRecipe(name="test", model=TripLinearModel(unet=UNET))
TRIP = TripRecipe(name="test", model=TripModel(unet=UNET, fusion=FUSION))
LAYOUTS = ("trip", "te", "c", "replace")
PREDICTIONS = ("epsilon", "v")


def changed(recipe: Recipe, part: str, **values: Any) -> Any:
    return recipe.model_copy(update={part: getattr(recipe, part).model_copy(update=values)})


# --- goldens ---------------------------------------------------------------------------------------------------------

BETAS = {
    "linear": DiffusionConfig(),
    "scaled_linear": DiffusionConfig(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
}


@pytest.mark.golden
def test_golden_formulas_on_linear_betas(say: Callable[[str], None]) -> None:
    compare_formulas(Family("trip_linear"), say)


@pytest.mark.golden
def test_golden_formulas_on_stable_diffusion_s_betas(say: Callable[[str], None]) -> None:
    compare_formulas(Family("trip_sd"), say)


def compare_formulas(family: Family, say: Callable[[str], None]) -> None:
    for where, meta, arrays in family:
        assert meta["t"] == "1-based"
        compared = set()

        def check(
            kind: str, got: Any, tolerance: float = 1e-10, of: Any = (where, arrays, compared), only: Any = ...
        ) -> None:
            where, arrays, compared = of
            expected = arrays[kind][only]
            largest = float(np.abs(expected).max(initial=1.0))
            as_float = "" if tolerance == 1e-10 else " (float32)"
            family.check(where, kind + as_float, got, expected, tolerance * largest)
            compared.add(kind)

        tensors = {key: torch.from_numpy(np.atleast_1d(value)) for key, value in arrays.items()}
        z_0, z_1, eps, residual = (tensors[key] for key in ("z0", "z01", "eps", "residual"))
        batch, frames = z_0.shape[0], z_0.shape[2]
        schedule = noise_schedule(BETAS[meta["schedule"]])
        check("alpha_bar", schedule.alpha_bar[tensors["t"] - 1], 1e-4)

        # Exactly the file's levels: of each item its own and the one that its DDIM step leads to.
        each = [
            (NoiseSchedule(torch.stack([below, level])), NoiseSchedule(torch.stack([below, level]), "v"))
            for below, level in zip(tensors["alpha_bar_prev"], tensors["alpha_bar"], strict=True)
        ]
        here = NoiseSchedule(tensors["alpha_bar"])
        here_v, t = NoiseSchedule(here.alpha_bar, "v"), torch.arange(batch)
        z_t = here.add_noise(z_0, eps, t)
        prior = image_noise_prior(here, z_t, z_1, t)
        lam = lambda_schedule(frames, meta["lambda_start"], meta["lambda_end"])
        fused = linear_fusion(prior, residual, lam)
        check("zt", z_t)
        check("prior", prior)
        check("delta_z", z_0 - z_1)
        check("C", prior - eps)
        check("lam", lam)
        check("fused", fused)
        check("loss", (eps - fused).square().mean())
        check("x0_fused", here.predict_x0_eps(z_t, fused, t)[0])
        check("x0_residual", here.predict_x0_eps(z_t, residual, t)[0])
        wanted = (eps - lam.view(-1, 1, 1) * prior) / (1 - lam.view(-1, 1, 1))
        some = (lam < 1).numpy()  # where lambda is 1, nothing is asked of the network
        compared.add("residual_needed_for_zero_loss")
        if some.any():
            check("residual_needed_for_zero_loss", wanted[:, :, some], only=(slice(None), slice(None), some))
        assert not np.isfinite(arrays["residual_needed_for_zero_loss"][:, :, ~some]).any()
        torch.testing.assert_close(linear_fusion(prior, wanted, lam)[:, :, some], eps[:, :, some])

        v_prior, v_residual = reference_output(here_v, z_t, z_1, t), noise_as_output(here_v, z_t, residual, t)
        check("v_prior", v_prior)
        check("v_residual", v_residual)
        check("v_fused", linear_fusion(v_prior, v_residual, lam))
        for layout, kind in (("trip", "unet_input"), ("te", "unet_input_TE"), ("c", "unet_input_C")):
            check(kind, unet_input(layout, z_1, z_t))
        for prediction in (0, 1):
            output = (fused, linear_fusion(v_prior, v_residual, lam))[prediction]
            steps = [ddim_step(each[k][prediction], z_t[k], output[k], 1, 0)[0] for k in range(batch)]
            check("zprev_ddim", torch.stack(steps))

        # The method, in float32, around a network that gives the file's residual as noise or as v.
        model = TripLinearModel(unet=UNET, lambda_start=meta["lambda_start"], lambda_end=meta["lambda_end"])
        for prediction, answer in zip(PREDICTIONS, (residual, v_residual), strict=True):
            network = Recorder(unet_input("trip", torch.full_like(z_1, torch.nan), answer).float())
            levels = NoiseSchedule(here.alpha_bar, prediction)
            method = TripLinearMethod({"unet": network}, levels, model, TripSample())
            data = LatentBatch(z_0, Condition(image=z_1[:, :, 0], text=torch.zeros(batch, 1, 12)))
            with torch.no_grad():
                loss, got = method(data, t, eps), method.predict(z_t.float(), t, data.condition)
            if prediction == "epsilon":
                check("loss", loss, 1e-4)
            check("fused" if prediction == "epsilon" else "v_fused", got, 1e-4)
            check("unet_input", network.frames, 1e-4)
        assert compared == arrays.keys() - {"z0", "z01", "eps", "t", "residual", "alpha_bar_prev"}
    family.finish(say)


class Recorder(nn.Module):
    """A UNet that keeps what it was shown and answers with known tensors, one after another, the last for ever."""

    def __init__(self, *answers: Tensor) -> None:
        super().__init__()
        self.answers, self.dtype = list(answers), torch.float32
        self.weight = nn.Parameter(torch.zeros(()))

    def keys_values(self, text: Tensor) -> Tensor:
        return text

    def forward(self, frames: Tensor, t: Tensor, text: Tensor, deep: object = None) -> Tensor:
        self.frames, self.t, self.text = frames, t, text
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer.expand(len(frames), *answer.shape[1:]) + 0 * self.weight


# --- the identities --------------------------------------------------------------------------------------------------


@st.composite
def worlds(draw: st.DrawFn) -> tuple[NoiseSchedule, Tensor, dict[str, Tensor], Tensor]:
    """A v schedule of any kind, steps (B,), z_0, eps and a network's v (B, C, N, h, w), and lambda (N,), in float64."""
    kind = draw(st.sampled_from(["linear", "scaled_linear"]))
    zero = draw(st.booleans())
    schedule = noise_schedule(
        BETAS[kind].model_copy(update={"prediction": "v", "zero_terminal_snr": zero, "train_steps": 1000})
    )
    shape = tuple(draw(st.integers(1, most)) for most in (3, 5, 6, 4, 4))
    any_step = st.one_of(st.integers(0, 999), st.sampled_from([0, 998, 999]))
    t = torch.tensor([draw(any_step) for _ in range(shape[0])])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    drawn = {
        name: torch.randn(shape, dtype=torch.float64, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0]))
        for name in ("z_0", "eps", "v")
    }
    ends = [draw(st.floats(0, 1)) for _ in range(2)]
    return schedule, t, drawn, lambda_schedule(shape[2], *ends)


def close(got: Tensor, expected: Tensor, gain: float = 1.0) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * max(1.0, gain))


@settings(max_examples=60)
@given(worlds())
def test_the_four_identities(world: tuple[NoiseSchedule, Tensor, dict[str, Tensor], Tensor]) -> None:
    schedule, t, drawn, lambda_N = world
    z_0, eps, v = drawn["z_0"], drawn["eps"], drawn["v"]
    z_1 = z_0[:, :, :1]
    z_t = schedule.add_noise(z_0, eps, t)
    r, v_r = image_noise_prior(schedule, z_t, z_1, t), reference_output(schedule, z_t, z_1, t)
    levels = schedule.alpha_bar[t].double()
    gain = float((levels / (1 - levels)).max()) ** 0.5
    x_0, x_noise = schedule.predict_x0_eps(z_t, v_r, t)
    # 1. x_0 implied by r is the picture on every frame, and r the noise that v_r stands for.
    close(x_0, z_1.expand_as(z_0), gain)
    close(x_noise, r, gain)
    # 2. On frame 1 it is the noise.
    close(r[:, :, 0], eps[:, :, 0], gain)
    # C of equation 5.
    close(r - eps, (levels / (1 - levels)).sqrt().view(-1, 1, 1, 1, 1) * (z_0 - z_1), gain)
    # 3. In x_0, fusion is a pull towards the picture.
    own, d = schedule.predict_x0_eps(z_t, v, t)
    v_e = linear_fusion(v_r, v, lambda_N)
    of_e, noise_e = schedule.predict_x0_eps(z_t, v_e, t)
    weights = lambda_N.view(-1, 1, 1)
    close(of_e, weights * z_1 + (1 - weights) * own, gain)
    # 4. In noise it is the same as in v, also where no signal is left.
    e = linear_fusion(r, d, lambda_N)
    close(noise_e, e, gain)
    if float(levels.min()) > 0:
        worst = float(levels.min()) ** -0.5
        close(noise_as_output(schedule, z_t, e, t), v_e, worst * gain)
        by_noise = NoiseSchedule(schedule.alpha_bar)
        assert noise_as_output(by_noise, z_t, e, t) is e
        close(by_noise.predict_x0_eps(z_t, e, t)[0], weights * z_1 + (1 - weights) * own, worst * gain)


@pytest.mark.parametrize("zero", [False, True])
def test_the_prior_of_rescaled_data(zero: bool) -> None:
    """With DynamiCrafter's dynamic rescale it is still exact on frame 1, and as v implies the (scaled) picture."""
    config = DiffusionConfig(prediction="v", dynamic_rescale=0.7, zero_terminal_snr=zero)
    schedule, t = noise_schedule(config), torch.tensor([30, 600])
    z_0, eps = torch.randn(2, 2, 4, 3, 2, 2, dtype=torch.float64)
    z_t, z_1 = schedule.add_noise(z_0, eps, t), z_0[:, :, :1]
    close(image_noise_prior(schedule, z_t, z_1, t)[:, :, 0], eps[:, :, 0])
    v_r = reference_output(schedule, z_t, z_1, t)
    assert schedule.clean_scale is not None
    close(schedule.predict_x0_eps(z_t, v_r, t)[0], (schedule.clean_scale[t].view(2, 1, 1, 1, 1) * z_1).expand_as(z_0))
    v = torch.randn_like(z_0)
    close(noise_as_output(schedule, z_t, schedule.predict_x0_eps(z_t, v, t)[1], t), v)


def test_the_prior_is_float32_whatever_it_is_made_of() -> None:
    schedule, t = noise_schedule(DiffusionConfig()), torch.tensor([0, 0])
    z_0, eps = torch.randn(2, 2, 4, 3, 2, 2)
    z_t = schedule.add_noise(z_0, eps, t)
    exact = image_noise_prior(schedule, z_t, z_0[:, :, :1], t)
    assert float(exact.abs().max()) > 50
    half = image_noise_prior(schedule, z_t.bfloat16(), z_0[:, :, :1].bfloat16(), t)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=2)  # 100 times what bfloat16 leaves of z_t


def test_lambda() -> None:
    assert lambda_schedule(6).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    assert lambda_schedule(3, 0.2, 0.4).tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert lambda_schedule(1, 0.7, 0.1).tolist() == [0.7]


# --- what the UNet sees ----------------------------------------------------------------------------------------------


def world(frames: int = 5, seed: int = 0) -> tuple[LatentBatch, Tensor, Tensor]:
    """A batch of two videos 4x6, steps, noise."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(2, 4, frames, 4, 6, generator=generator)
    condition = Condition(image=video[:, :, 0], text=torch.randn(2, 7, 12, generator=generator))
    return LatentBatch(video, condition), torch.tensor([10, 800]), torch.randn(video.shape, generator=generator)


@pytest.mark.parametrize("frames", [2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: Any, frames: int) -> None:
    data, t, noise = world(frames)
    numbered = torch.arange(float(frames + 1)).view(1, 1, -1, 1, 1).expand(2, 4, -1, 4, 6)
    seen = frames + 1 if layout in ("trip", "te") else frames
    network = Recorder(numbered[:, :, :seen])
    recipe = changed(LINEAR, "model", layout=layout, lambda_start=0.0)
    method = TripLinearMethod.of(recipe, {"unet": network})
    z_t, z_1 = method.schedule.add_noise(data.video_BCFHW, noise, t), data.video_BCFHW[:, :, :1]
    output = method.predict(z_t, t, data.condition)
    assert output.shape == data.video_BCFHW.shape
    of_frames = output[0, 0, :, 0, 0].tolist()
    if layout == "c":
        assert torch.equal(network.frames[:, :4], z_t)
        assert torch.equal(network.frames[:, 4:], z_1.expand_as(z_t))
        assert of_frames == list(range(frames))
    elif layout == "te":
        assert torch.equal(network.frames, torch.cat([z_t, z_1], 2))
        assert of_frames == list(range(frames))
    elif layout == "trip":
        assert torch.equal(network.frames, torch.cat([z_1, z_t], 2))
        assert of_frames == list(range(1, frames + 1))
    else:
        assert torch.equal(network.frames, torch.cat([z_1, z_t[:, :, 1:]], 2))
        assert of_frames[1:] == list(range(1, frames))
        torch.testing.assert_close(output[:, :, 0], noise[:, :, 0], rtol=0, atol=1e-4)
    assert torch.equal(network.t, t)
    assert torch.equal(network.text, data.condition["text"])


@pytest.mark.parametrize("recipe", [LINEAR, TRIP], ids=["linear", "attention"])
def test_the_frame_that_stands_for_the_picture_has_no_loss(recipe: Recipe) -> None:
    data, t, noise = world()
    torch.manual_seed(0)
    networks = build_method(recipe).networks | {"unet": Recorder(torch.zeros(2, 4, 5, 4, 6))}
    method = build_method(changed(recipe, "model", layout="replace"), networks)
    loss = method(data, t, noise)
    z_t = method.schedule.add_noise(data.video_BCFHW, noise, t)
    errors = (method.predict(z_t, t, data.condition) - noise).square().detach()
    assert float(errors[:, :, 0].max()) < 1e-8
    torch.testing.assert_close(loss, errors[:, :, 1:].mean())


def test_equation_10_line_by_line() -> None:
    data, t, noise = world()
    answer = torch.randn(2, 4, 6, 4, 6, generator=torch.Generator().manual_seed(3))
    network = Recorder(answer)
    method = TripLinearMethod.of(LINEAR, {"unet": network})
    each = method(data, t, noise, reduction="none")
    a = method.schedule.alpha_bar[t].view(2, 1, 1, 1, 1)
    z_t = a.sqrt() * data.video_BCFHW + (1 - a).sqrt() * noise  # equation 1
    reference = (z_t - a.sqrt() * data.video_BCFHW[:, :, :1]) / (1 - a).sqrt()  # equation 8
    lam = torch.tensor([1, 0.75, 0.5, 0.25, 0]).view(5, 1, 1)
    estimate = lam * reference + (1 - lam) * answer[:, :, 1:]  # equation 9
    torch.testing.assert_close(each, (noise - estimate).square().mean((1, 2, 3, 4)))
    torch.testing.assert_close(method(data, t, noise), each.mean())


@pytest.mark.parametrize("recipe", [LINEAR, TRIP], ids=["linear", "attention"])
def test_what_is_diffused_is_scaled_and_scaled_back(recipe: Recipe) -> None:
    data, t, noise = world()
    torch.manual_seed(0)
    networks = build_method(recipe).networks | {"unet": Recorder(torch.zeros(2, 4, 6, 4, 6))}
    scaled = build_method(changed(recipe, "diffusion", data_scale=2.5), networks)
    torch.testing.assert_close(scaled.target(data), 2.5 * data.video_BCFHW)
    scaled(data, t, noise)
    z_t = scaled.schedule.add_noise(2.5 * data.video_BCFHW, noise, t)
    torch.testing.assert_close(networks["unet"].frames, torch.cat([2.5 * data.video_BCFHW[:, :, :1], z_t], 2))
    asked = changed(changed(recipe, "diffusion", data_scale=2.5), "sample", final_level="clean", replace_first=False)
    constant = build_method(changed(asked, "model", **({"lambda_end": 1.0} if recipe is LINEAR else {})), networks)
    video = run(constant, constant.sampling(data.condition, None, noise, 3, 1.0))
    if recipe is LINEAR:  # the reference alone: every frame is the picture, unscaled
        torch.testing.assert_close(video, data.video_BCFHW[:, :, :1].expand_as(video), rtol=0, atol=1e-4)


# --- the fusion module in the method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["noise", "output"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_fusion_module_leaves_the_unet_as_it_is(layout: Any, prediction: Any, space: Any) -> None:
    torch.manual_seed(0)
    wide = UNET.model_copy(update={"in_channels": 8 if layout == "c" else 4})
    model = changed(TRIP, "model", layout=layout, unet=wide, tnf_space=space)
    recipe = changed(model, "diffusion", prediction=prediction)
    method = TripMethod.of(recipe, TripMethod.fresh_networks(recipe))
    data, t, noise = world()
    z_t, z_1 = method.schedule.add_noise(data.video_BCFHW, noise, t), data.video_BCFHW[:, :, :1]
    with torch.no_grad():
        alone = unet_output(layout, method.unet(unet_input(layout, z_1, z_t), t, data.condition["text"]))
        fused = method.predict(z_t, t, data.condition)
        first = 1 if layout == "replace" else 0
        tolerance = 0 if prediction == "epsilon" or space == "output" else 1e-4  # from v to noise and back
        torch.testing.assert_close(fused[:, :, first:], alone[:, :, first:], rtol=0, atol=tolerance)
        nn.init.normal_(method.fusion.noise_out.bias, std=0.5)
        assert not torch.allclose(method.predict(z_t, t, data.condition), fused, atol=0.1)


class Seen(nn.Module):
    """A fusion module that keeps what it was given and returns a mixture of both."""

    def forward(self, residual: Tensor, reference: Tensor, step: Tensor) -> Tensor:
        self.residual, self.reference, self.step = residual, reference, step
        return 0.3 * residual + 0.7 * reference


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_fusion_module_is_given_noise(prediction: Any) -> None:
    data, t, noise = world()
    recipe = changed(TRIP, "diffusion", prediction=prediction)
    schedule = noise_schedule(recipe.diffusion)
    z_t, z_1 = schedule.add_noise(data.video_BCFHW, noise, t), data.video_BCFHW[:, :, :1]
    d = torch.randn(z_t.shape, generator=torch.Generator().manual_seed(3))
    fusion, network = Seen(), Recorder(torch.cat([z_1, noise_as_output(schedule, z_t, d, t)], 2))
    output = TripMethod.of(recipe, {"unet": network, "fusion": fusion}).predict(z_t, t, data.condition)
    r = image_noise_prior(schedule, z_t, z_1, t)
    torch.testing.assert_close(fusion.residual, d, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fusion.reference, r)
    assert torch.equal(fusion.step, t)
    expected = noise_as_output(schedule, z_t, 0.3 * d + 0.7 * r, t)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)
    scaled = TripMethod.of(changed(recipe, "model", tnf_ref_scale=True), {"unet": network, "fusion": fusion})
    scaled.predict(z_t, t, data.condition)
    spread = (1 - schedule.alpha_bar[t]).sqrt().view(2, 1, 1, 1, 1)
    torch.testing.assert_close(fusion.reference, spread * r)
    # Or what the network predicts.
    own = TripMethod.of(changed(recipe, "model", tnf_space="output"), {"unet": network, "fusion": fusion})
    output = own.predict(z_t, t, data.condition)
    assert torch.equal(fusion.residual, network.answers[0][:, :, 1:])
    torch.testing.assert_close(fusion.reference, reference_output(schedule, z_t, z_1, t))
    torch.testing.assert_close(output, 0.3 * fusion.residual + 0.7 * fusion.reference)


@pytest.mark.parametrize("recipe", [LINEAR, TRIP], ids=["linear", "attention"])
def test_noise_and_v_have_the_same_fused_data(recipe: Recipe) -> None:
    data, t, noise = world()
    torch.manual_seed(0)
    networks = build_method(recipe).networks
    if "fusion" in networks:
        nn.init.normal_(networks["fusion"].noise_out.weight, std=0.1)
    answers, d = [], torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    for prediction in PREDICTIONS:
        schedule = noise_schedule(DiffusionConfig(prediction=prediction))
        z_t = schedule.add_noise(data.video_BCFHW, noise, t)
        network = Recorder(torch.cat([noise[:, :, :1], noise_as_output(schedule, z_t, d, t)], 2))
        method = build_method(changed(recipe, "diffusion", prediction=prediction), networks | {"unet": network})
        answers.append(schedule.predict_x0_eps(z_t, method.predict(z_t, t, data.condition), t)[0].detach())
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-3)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_frame_1_is_the_picture_where_lambda_is_1(prediction: Any, scale: float) -> None:
    """Identities 2 and 3: the reference is exact there, in every branch of guidance, so x_0 is z_0^1 at every step."""
    torch.manual_seed(0)
    data, _, noise = world()
    recipe = changed(LINEAR, "diffusion", prediction=prediction)
    networks = build_method(recipe).networks

    def sampled(**sample: Any) -> Tensor:
        method = build_method(changed(recipe, "sample", replace_first=False, **sample), networks)
        with torch.inference_mode():
            return run(method, method.sampling(data.condition, Condition(text=torch.zeros(2, 7, 12)), noise, 5, scale))

    picture = data.condition["image"]
    torch.testing.assert_close(sampled(final_level="clean")[:, :, 0], picture, rtol=0, atol=2e-4)
    # With the published last level a little noise stays, as in every frame.
    left = sampled()[:, :, 0] - picture
    assert 0.005 < float(left.std()) < 0.02
    torch.testing.assert_close(sampled(solver="multistep")[:, :, 0], picture, rtol=0, atol=0.1)
    free = build_method(
        changed(changed(recipe, "model", lambda_start=0.5), "sample", replace_first=False, final_level="clean"),
        networks,
    )
    with torch.inference_mode():
        video = run(free, free.sampling(data.condition, Condition(text=torch.zeros(2, 7, 12)), noise, 5, scale))
    assert not torch.allclose(video[:, :, 0], picture, atol=0.1)


@pytest.mark.parametrize("recipe", [LINEAR, TRIP], ids=["linear", "attention"])
@pytest.mark.parametrize("layout", ["trip", "replace"])
def test_sampling_end_to_end(recipe: Recipe, layout: Any) -> None:
    torch.manual_seed(0)
    recipe = changed(recipe, "model", layout=layout)
    data, _, noise = world()
    networks = build_method(recipe).networks
    for network in networks.values():
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)

    def sampled(scale: float = 7.5, steps: int = 6, **sample: Any) -> tuple[Tensor, list[int], list[int]]:
        rows, whole = [], []
        method = build_method(changed(recipe, "sample", **sample), networks)
        unet = method.networks["unet"]
        hooks = [
            unet.register_forward_pre_hook(lambda module, given: rows.append(len(given[0]))),
            unet.mid_block.resnets[0].register_forward_pre_hook(lambda module, given: whole.append(1)),
        ]
        untold = Condition(text=torch.zeros(2, 7, 12))
        with torch.inference_mode():
            video = run(method, method.sampling(data.condition, untold, noise, steps, scale, keyed_generator(0, "e")))
        for hook in hooks:
            hook.remove()
        return video, rows, whole

    video, rows, _ = sampled()
    assert torch.equal(video, sampled()[0])
    assert torch.equal(video[:, :, 0], data.condition["image"])
    assert (video.shape, rows) == (noise.shape, [4] * 6)
    free, _, _ = sampled(replace_first=False)
    assert torch.equal(free[:, :, 1:], video[:, :, 1:])
    assert torch.equal(free[:, :, 0], data.condition["image"]) is False
    assert sampled(1.0)[1] == [2] * 6
    assert not torch.allclose(sampled(1.0)[0], video, atol=1e-3)
    assert sampled(guidance_interval=(0.3, 0.7))[1] == [2, 4, 4, 4, 2, 2]  # of 831, 665, 499, 333, 167, 1
    again, _, whole = sampled(reuse_features=3)
    assert len(whole) == 2
    assert not torch.equal(again, video)
    for other in ({"solver": "multistep"}, {"eta": 1.0}, {"spacing": "trailing"}, {"guidance_rescale": 0.7}):
        moved, _, _ = sampled(**other)
        assert not torch.allclose(moved, video, atol=1e-4), other
        assert torch.isfinite(moved).all()


def test_sampling_without_what_it_needs_is_one_line() -> None:
    data, _, noise = world()
    method = build_method(LINEAR)
    with pytest.raises(InputError, match="expected text states of the negative prompt"):
        next(method.sampling(data.condition, None, noise, 5, 2.0))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [LINEAR, TRIP], ids=["linear", "attention"])
def test_gradients_reach_what_learns(recipe: Recipe) -> None:
    torch.manual_seed(0)
    method = build_method(recipe)
    for parameter in method.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    method(*world()).backward()
    for name, parameter in method.named_parameters():
        idle = name.startswith("unet.add_embedding.")  # Cinemo's, which TRIP does not call
        assert parameter.requires_grad is not idle, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) is not idle, name
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == set(method.parts)


def test_temporal_layers_and_the_fusion_module_are_what_an_image_model_lacks() -> None:
    method = build_method(TRIP)
    mark_trainable(method, TripTrain(trainable="temporal"))
    for name, parameter in method.named_parameters():
        temporal = name.startswith("fusion.") or "attn_temp" in name or "norm_temp" in name
        assert parameter.requires_grad is temporal, name
        assert TripMethod.learns(name, "temporal") is temporal, name
    mark_trainable(method, TripTrain(trainable="lora", lora_rank=2))
    learning = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in learning} == {"unet", "fusion"}
    assert all("lora_" in name for name in learning)


@pytest.mark.slow
def test_training_learns_a_toy_batch_at_two_rates() -> None:
    torch.manual_seed(0)
    method = build_method(TRIP)
    train = TripTrain(lr=1e-3, fusion_lr=5e-3)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(TripMethod.learning_rate(name, train), []).append(parameter)
    assert groups.keys() == {1e-3, 5e-3}
    assert {id(p) for p in groups[5e-3]} == {id(p) for p in method.fusion.parameters()}
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": lr} for lr, parameters in groups.items()])
    data, _, _ = world(3)
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(50):
        t = torch.randint(200, 1000, (2,), generator=generator)
        loss = method(data, t, torch.randn(data.video_BCFHW.shape, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5]), losses
    moved = {
        part: max(
            float((p.detach() - before[name]).abs().max())
            for name, p in method.named_parameters()
            if name.startswith(part)
        )
        for part in ("unet", "fusion")
    }
    assert moved["fusion"] > 2 * moved["unet"] > 0


@pytest.mark.parametrize("recipe", [LINEAR, TRIP], ids=["linear", "attention"])
def test_bf16_weights_and_fp16_latents_give_a_float32_loss(recipe: Recipe) -> None:
    torch.manual_seed(0)
    data, t, noise = world()
    method = build_method(recipe)
    expected = method(data, t, noise)
    half = LatentBatch(data.video_BCFHW.half(), data.condition.to(dtype=torch.float16))
    loss = method.bfloat16()(half, t, noise)
    assert loss.dtype == torch.float32
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_what_is_returned(prediction: Any) -> None:
    torch.manual_seed(0)
    recipe = changed(LINEAR, "diffusion", prediction=prediction)
    method = build_method(recipe)
    each = method(*world(), reduction="none")
    weighted = build_method(changed(recipe, "train", min_snr_gamma=5.0), method.networks)
    weights = method.schedule.min_snr_weights(world()[1], 5.0)
    torch.testing.assert_close(weighted(*world(), reduction="none"), each * weights)
    torch.testing.assert_close(weighted(*world(), reduction="none", weighted=False), each)


def test_prompts_are_dropped_and_nothing_else_is_told() -> None:
    sample = LatentSample("k", "k", "a.mp4", "waves", np.zeros((3, 4, 2, 2), np.float16), 0.5, 24, 6, 0)
    told = [
        TripMethod.example(changed(TRIP, "train", prompt_dropout=share), sample, lambda what: keyed_generator(0, what))
        for share in (0.0, 1.0)
    ]
    assert [dict(example.texts) for example in told] == [{"text": "waves"}, {"text": ""}]
    assert not told[0].fields
    video, text = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 7, 12)
    condition = TripMethod.condition(video, {}, {"text": text})
    assert set(condition) == {"image", "text"}
    assert torch.equal(condition["image"], video[:, :, 0])


# --- recipes and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "trip", "diffusion": {"zero_terminal_snr": True, "prediction": "v"}},
            "diffusion.zero_terminal_snr is true, but the fusion module works on noise.*use method trip-w",
        ),
        ({"method": "trip", "model": {"layout": "c"}}, "in_channels is 4 with layout c and 4 latent.*expected 8"),
        ({"method": "trip-w", "model": {"unet": {"in_channels": 8}}}, "in_channels is 8 with layout trip.*expected 4"),
        ({"method": "trip", "model": {"backbone": "sora"}}, r"model\.backbone: .*'lavie'"),
        (
            {"method": "trip", "model": {"backbone": "dynamicrafter", "unet": {"norm_num_groups": 8}}},
            r"model\.unet\.norm_num_groups: Extra inputs",
        ),
        ({"method": "trip", "model": {"unet": {"model_channels": 8}}}, r"model\.unet\.model_channels: Extra inputs"),
        ({"method": "trip-w", "model": {"fusion": {}}}, r"model\.fusion: Extra inputs"),
        ({"method": "trip", "model": {"lambda_start": 1}}, r"model\.lambda_start: Extra inputs"),
        ({"method": "trip-w", "train": {"fusion_lr": 1}}, r"train\.fusion_lr: Extra inputs"),
        ({"method": "trip-w", "model": {"lambda_end": 2}}, r"model\.lambda_end: .*less than or equal to 1"),
        ({"method": "trip", "model": {"fusion": {"width": 30}}}, r"model\.fusion: .*multiple of 8 heads"),
        ({"method": "trip", "sample": {"motion_bucket": 3}}, r"sample\.motion_bucket: Extra inputs"),
    ],
)
def test_a_wrong_recipe_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_recipe({"name": "x", **values}, "recipe x.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", [LINEAR, changed(TRIP, "model", tnf_space="output")], ids=["linear", "attention"])
def test_zero_terminal_snr_works_where_v_is_fused(recipe: Recipe) -> None:
    values = recipe.model_dump(mode="json") | {"diffusion": {"zero_terminal_snr": True, "prediction": "v"}}
    torch.manual_seed(0)
    method = build_method(parse_recipe(values, "test"))
    data, _, noise = world()
    loss = method(data, torch.tensor([999, 5]), noise)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("recipe", [LINEAR, TRIP], ids=["linear", "attention"])
def test_a_base_lacks_what_the_method_adds(recipe: Recipe, tmp_path: Path) -> None:
    """As LaVie's file: no motion input, and for the channel layout half of the input channels."""
    torch.manual_seed(0)
    base = LavieUNet(**UNET.model_dump())
    state = {name: value for name, value in base.state_dict().items() if not name.startswith("add_embedding.")}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "base.safetensors")
    init, kind = str(tmp_path / "base.safetensors"), type(build_method(recipe))
    beside = changed(recipe, "model", layout="c", unet=UNET.model_copy(update={"in_channels": 8}))
    data, t, noise = world()
    for asked in (recipe, beside):
        networks = {part: kind.load_network(asked, part, init, torch.float32, base=True) for part in kind.parts}
        unet = networks["unet"]
        shown = torch.cat([noise, data.video_BCFHW], 1)[:, : unet.config["in_channels"]]
        with torch.no_grad():
            torch.testing.assert_close(
                unet(shown, t, data.condition["text"]), base(noise, t, data.condition["text"]), rtol=1e-5, atol=1e-5
            )
        assert torch.isfinite(build_method(asked, networks)(data, t, noise))
    for asked, message in ((recipe, "missing add_embedding"), (beside, r"conv_in\.weight is \(32, 4, 3, 3\)")):
        with pytest.raises(InputError, match=message):
            kind.load_network(asked, "unet", init)
    narrow = changed(recipe, "model", unet=UNET.model_copy(update={"in_channels": 2, "out_channels": 2}))
    with pytest.raises(InputError, match="do not fit"):
        kind.load_network(narrow, "unet", init, base=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dynamicrafter_s_unet_may_be_the_backbone(layout: Any, tmp_path: Path) -> None:
    """As a text-to-video model or as one that was trained to see pictures: that part of it is never asked."""
    unet = DynamiCrafterConfig(
        in_channels=8 if layout == "c" else 4,
        model_channels=32,
        channel_mult=(1, 2),
        attention_resolutions=(1, 2),
        num_res_blocks=1,
        num_head_channels=16,
        context_dim=12,
    )
    model = TripModel(backbone="dynamicrafter", unet=unet, fusion=FUSION, layout=layout, text_layers=23)
    recipe = TripRecipe(name="test", model=model, sample=TripSample(reuse_features=2))
    assert parse_recipe(recipe.model_dump(mode="json"), "test") == recipe
    assert (TripMethod.text_width(recipe), TripMethod.text_layers(recipe)) == (12, 23)
    assert TripMethod.learns("unet.init_attn.0.proj_in.weight", "temporal")
    torch.manual_seed(0)
    base = DynamiCrafterUNet(**{**unet.model_dump(), "in_channels": 4, "image_cross_attention": False})
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.05)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    init = str(tmp_path / "base.safetensors")
    method = TripMethod.of(
        recipe, {part: TripMethod.load_network(recipe, part, init, base=True) for part in TripMethod.parts}
    )
    data, t, noise = world()
    z_t = method.schedule.add_noise(data.video_BCFHW, noise, t)
    with torch.no_grad():
        seen = unet_input(layout, data.video_BCFHW[:, :, :1], z_t)[:, :4]  # what is beside them adds nothing at first
        expected = unet_output(layout, base(seen, t, data.condition["text"]))
        first = 1 if layout == "replace" else 0
        got = method.predict(z_t, t, data.condition)
    torch.testing.assert_close(got[:, :, first:], expected[:, :, first:], rtol=1e-4, atol=1e-5)
    method(data, t, noise).backward()
    idle = {name for name, parameter in method.unet.named_parameters() if not parameter.requires_grad}
    assert idle == {name for name, _ in method.unet.named_parameters() if is_image_context(name)}
    assert all(p.grad is None for name, p in method.unet.named_parameters() if name in idle)
    with torch.inference_mode():
        video = run(method, method.sampling(data.condition, Condition(text=torch.zeros(2, 7, 12)), noise, 4, 2.0))
    assert torch.isfinite(video).all()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoders") / "encoders"
    save_encoders(directory)
    return directory


def small(kind: str, encoders: Path) -> Recipe:
    """A recipe as small as `tiny.tiny_recipe`, with its encoders."""
    own = tiny_recipe(encoders)
    unet = UNET.model_copy(update={"cross_attention_dim": WIDTH})
    values = {"name": f"{kind}-32x48", "data": own.data, "encoders": own.encoders, "sample": TripSample(steps=3)}
    if kind == "trip":
        return TripRecipe(**values, model=TripModel(unet=unet, fusion=FUSION.model_copy(update={"patch": 2})))
    return TripLinearRecipe(**values, model=TripLinearModel(unet=unet))


@pytest.mark.parametrize("kind", ["trip", "trip-w"])
def test_a_bundle_comes_back_and_animates(kind: str, encoders: Path, tmp_path: Path) -> None:
    recipe = small(kind, encoders)
    torch.manual_seed(0)
    method: Method = build_method(recipe)
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.05)
    save_bundle(tmp_path / "bundle", recipe, method.networks, {"made": "by a test"})
    bundle = load_bundle(tmp_path / "bundle", "cpu")
    assert (type(bundle.method), bundle.method.parts) == (type(method), method.parts)
    assert all((tmp_path / "bundle" / part / "config.json").is_file() for part in method.parts)
    for name, value in method.state_dict().items():
        torch.testing.assert_close(bundle.method.state_dict()[name], value, rtol=0, atol=0)
    again = {
        part: type(method).load_network(recipe, part, str(tmp_path / "bundle"), base=True) for part in method.parts
    }
    for part, network in again.items():
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, method.networks[part].state_dict()[name], rtol=0, atol=0)

    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    made = animate(bundle, AnimateRequest(picture, "waves", seed=3))
    assert made.frames_FHWC.shape == (FRAMES, *SIZE, 3)
    assert made.settings["replace_first"] is True
    np.testing.assert_array_equal(
        animate(bundle, AnimateRequest(picture, "waves", seed=3)).frames_FHWC, made.frames_FHWC
    )
    free = animate(bundle, AnimateRequest(picture, "waves", seed=3, replace_first=False))
    assert torch.equal(free.latents_CFHW[:, 1:], made.latents_CFHW[:, 1:])
    assert not torch.equal(free.latents_CFHW[:, 0], made.latents_CFHW[:, 0])
    controls: tuple[dict[str, Any], ...] = (
        {"solver": "multistep"}, {"reuse_features": 2}, {"guidance_interval": (0.2, 0.6)}, {"guidance_scale": 1.0},
        {"negative_prompt": "blur"}, {"seed": 4}, {"steps": 4},
    )  # fmt: skip
    for control in controls:
        other = animate(bundle, AnimateRequest(picture, "waves", **{"seed": 3, **control}))
        assert not np.array_equal(other.frames_FHWC, made.frames_FHWC), control
    with pytest.raises(InputError, match=r"motion_bucket: .* has no such control"):
        animate(bundle, AnimateRequest(picture, "waves", motion_bucket=3))
    asked = bundle.method.asked(bundle.encoders, made.latents_CFHW[None], picture, ["waves", "a dog"], [{}, {}])
    assert (asked["image"].shape[0], asked["text"].shape[0]) == (2, 2)

    # Videos at different steps in one batch, one of them without guidance: each as it is alone.
    requests = {
        "a": AnimateRequest(picture, "waves", seed=3),
        "b": AnimateRequest(picture, "a dog", steps=5, guidance_scale=1.0),
    }
    engine, finished = SamplingEngine(bundle), {}
    for key, request in requests.items():
        engine.join(key, request)
    while len(engine):
        outcome = engine.step()
        assert not outcome.failed
        finished |= outcome.finished
    for key, request in requests.items():
        torch.testing.assert_close(
            finished[key].latents_CFHW, animate(bundle, request).latents_CFHW, rtol=1e-4, atol=1e-4
        )


def test_a_video_can_begin_with_the_picture() -> None:
    data, _, _ = world()
    video = torch.randn(2, 4, 5, 4, 6)
    got = replace_first(video, data.video_BCFHW[:, :, :1].double())
    assert got.dtype == video.dtype
    assert torch.equal(got[:, :, 0], data.video_BCFHW[:, :, 0])
    assert torch.equal(got[:, :, 1:], video[:, :, 1:])
