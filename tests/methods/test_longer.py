"""Controllable Longer Image Animation: its condition, dropouts and branches, and what arrows become."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FRAMES, SIZE, WIDTH, longer_recipe, tiny_longer_bundle
from torch import Tensor

from cinemo.animate import AnimateRequest, animate, prepare
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.media.stills import jpeg
from cinemo.methods import build_method, method_class
from cinemo.methods.longer import (
    LongerControls,
    LongerMethod,
    hinted,
)
from cinemo.methods.trainable import mark_trainable
from cinemo.recipes import load_recipe, override
from cinemo.training.run.batch import host_batch
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator

PICTURE = np.random.default_rng(0).integers(0, 256, (66, 98, 3), dtype=np.uint8)
H, W = SIZE


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(tiny_longer_bundle(tmp_path_factory.mktemp("longer")), "cpu")


def sample_of(flow: np.ndarray) -> LatentSample:
    latents = np.zeros((FRAMES, 4, H // 8, W // 8), np.float16)
    return LatentSample("a", "a", "", "waves", latents, 0.9, 24, 3, 0, fields={"flow": flow.astype(np.float16)})


def first_query(bundle: ModelBundle, **asked: Any) -> tuple[Condition, dict[str, Any]]:
    """The condition of the method's own branches, before it is made ready, and the settings."""
    given: list[Condition] = []
    inputs = asked.pop("inputs", {})
    method = bundle.method

    def seen(condition: Condition) -> Condition:
        given.append(condition)
        return ready(condition)

    with torch.inference_mode():
        prepared = prepare(bundle, AnimateRequest(PICTURE, "waves", inputs=inputs, **asked))
        sampling_method = prepared.sampling.gi_frame.f_locals["self"]  # type: ignore[attr-defined]
        ready = sampling_method.ready
        sampling_method.ready = seen
        next(prepared.sampling)
    assert isinstance(method, LongerMethod)
    return given[0], dict(prepared.settings)


def test_a_field_says_how_each_frame_came_about(tmp_path: Path) -> None:
    recipe = longer_recipe(tmp_path, field_dropout=0.0, strength_dropout=0.0)
    flow = np.zeros((FRAMES - 1, 2, 4, 6))
    flow[:, 0], flow[:, 1] = 3, -4
    example = LongerMethod.example(recipe, sample_of(flow), lambda what: keyed_generator(0, what))
    assert example.fields["flow"].shape == (2, FRAMES, 4, 6)
    assert not example.fields["flow"][:, 0].any()
    torch.testing.assert_close(example.fields["flow"][:, 1:], torch.from_numpy(flow).float().transpose(0, 1))
    assert float(example.fields["strength"]) == pytest.approx(2.0 * 5 * 512 / 32)  # factor x pixels, at 512
    assert LongerMethod.controls_like(recipe, sample_of(flow)) == {"motion_speed": 8000}


def test_what_is_dropped_and_hinted(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).normal(size=(FRAMES - 1, 2, 4, 6))

    def drawn(number: int, **train: float) -> Any:
        recipe = longer_recipe(tmp_path, **train)
        return LongerMethod.example(recipe, sample_of(flow), lambda what: keyed_generator(number, what))

    without = [drawn(k, field_dropout=0.3, strength_dropout=0.2, prompt_dropout=0.1) for k in range(300)]
    assert np.mean([not each.fields["flow"].any() for each in without]) == pytest.approx(0.3, abs=0.08)
    assert np.mean([bool(each.fields["strength"].isnan()) for each in without]) == pytest.approx(0.2, abs=0.07)
    assert np.mean([each.texts["text"] == "" for each in without]) == pytest.approx(0.1, abs=0.05)
    hints = drawn(0, hint_share=1.0, field_dropout=0.0, strength_dropout=0.0).fields
    assert torch.equal(hints["flow"][:, 1:2].expand(-1, FRAMES - 1, -1, -1), hints["flow"][:, 1:])  # constant
    length = hints["flow"][:, 1].square().sum(0).sqrt().mean()
    assert float(hints["strength"]) == pytest.approx(2.0 * float(length) * 512 / 32, rel=1e-3)


def test_hints_point_along_the_motion() -> None:
    flow = np.zeros((5, 2, 8, 12), np.float32)
    flow[:, 0, 2:5, 3:6] = 2  # a shape moves right before what stands still
    for seed in range(10):
        field = hinted(flow, torch.Generator().manual_seed(seed))
        assert field.shape == flow.shape
        assert (field[:, 1] == 0).all()
        assert field[0, 0, 3, 4] == pytest.approx(2, rel=1e-6)
    assert not hinted(np.zeros_like(flow), torch.Generator()).any()


def test_arrows_are_in_the_given_picture_and_say_the_way_of_all_frames(bundle: ModelBundle) -> None:
    # The picture is twice the recipe's size, and a pixel more: an arrow of 20 pixels is one of 10.
    condition, settings = first_query(bundle, arrows=[[49, 33, 69, 33]], guidance_scale=1.0)
    flow = condition["flow"][0]
    assert flow.shape == (2, FRAMES, H // 8, W // 8)
    assert not flow[:, 0].any()
    assert float(flow[0, 1].max()) == pytest.approx(10 / (FRAMES - 1), rel=0.02)
    assert not flow[1].any()
    speed_at_512 = float(flow[0, 1].mean()) * 512 / 32
    assert settings["motion_speed"] == pytest.approx(100 * speed_at_512, rel=0.05)
    assert float(condition["strength"]) == pytest.approx(2.0 * settings["motion_speed"] / 100)
    assert settings["arrows"] == [[49.0, 33.0, 69.0, 33.0]]
    again, _ = first_query(bundle, **{name: settings[name] for name in ("arrows", "motion_speed")}, guidance_scale=1.0)
    assert torch.equal(again["flow"][0], flow)  # a video's settings make it again
    # A speed of its own makes the same field faster.
    fast, settings = first_query(
        bundle, arrows=[[49, 33, 69, 33]], motion_speed=3 * settings["motion_speed"], guidance_scale=1.0
    )
    torch.testing.assert_close(fast["flow"][0], 3 * flow, rtol=0.05, atol=0.05)


def test_arrows_stay_where_they_were_drawn_in_every_part_of_a_chain(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later parts begin with a picture of the recipe's size, in which the arrow would start outside."""
    fields: list[Tensor] = []
    sampling = LongerMethod.sampling

    def seen(self: LongerMethod, condition: Condition, *given: Any) -> Any:
        fields.append(condition["flow"])
        return sampling(self, condition, *given)

    monkeypatch.setattr(LongerMethod, "sampling", seen)
    asked = AnimateRequest(PICTURE, "waves", arrows=[[80, 50, 95, 50]], frames=14, long_video="chain")
    settings = animate(bundle, asked).settings
    assert len(fields) == 3
    assert fields[0].any()
    assert torch.equal(fields[0], fields[1])
    assert torch.equal(fields[0], fields[2])
    assert (settings["picture_size"], settings["frames"]) == ([66, 98], 14)


def test_without_arrows_the_speed_alone_is_told(bundle: ModelBundle) -> None:
    condition, settings = first_query(bundle, guidance_scale=1.0)
    assert not condition["flow"].any()
    assert (settings["motion_speed"], "arrows" in settings) == (200, False)
    assert float(condition["strength"]) == 4.0
    condition, settings = first_query(bundle, motion_strength=1.0, guidance_scale=1.0)
    assert (settings["motion_speed"], float(condition["strength"])) == (1000, 20.0)


def test_a_mask_holds_what_is_black(bundle: ModelBundle) -> None:
    mask = np.zeros((66, 98, 3), np.uint8)
    mask[:, :49] = 255
    condition, _ = first_query(bundle, inputs={"mask": mask}, arrows=[[49, 33, 69, 33]], guidance_scale=1.0)
    assert condition["flow"][0, 0, 1, 1:3, 1:3].all()
    assert not condition["flow"][0, :, :, :, 4:].any()
    with pytest.raises(InputError, match="mask: says where arrows move the picture, but there are none"):
        prepare(bundle, AnimateRequest(PICTURE, "waves", inputs={"mask": mask}))


def test_branches_of_guidance(bundle: ModelBundle) -> None:
    condition, _ = first_query(bundle, arrows=[[49, 33, 69, 33]], guidance_scale=3.0)
    text, flow = condition["text"], condition["flow"]
    assert len(text) == 2
    assert not torch.equal(text[0], text[1])
    assert torch.equal(flow[0], flow[1])  # motion is in both
    condition, _ = first_query(bundle, arrows=[[49, 33, 69, 33]], guidance_scale=3.0, motion_guidance_scale=2.0)
    text, flow, strength = condition["text"], condition["flow"], condition["strength"]
    assert len(text) == 3
    assert torch.equal(text[0], text[1])
    assert not flow[0].any()
    assert strength.isnan().tolist() == [True, False, False]
    assert torch.equal(flow[1], flow[2])


@pytest.mark.parametrize(
    "control",
    [
        {"arrows": [[20, 20, 60, 20]]}, {"arrows": [[20, 20, 20, 60]]}, {"motion_speed": 900},
        {"motion_guidance_scale": 3.0}, {"arrows": [[20, 20, 60, 20]], "motion_speed": 50},
    ],
    ids=str,
)  # fmt: skip
def test_every_control_has_an_effect(bundle: ModelBundle, control: dict[str, Any]) -> None:
    def latents(**asked: Any) -> Tensor:
        return animate(bundle, AnimateRequest(PICTURE, "waves", seed=3, **asked)).latents_CFHW

    assert not torch.allclose(latents(), latents(**control), atol=1e-4)


def test_training_and_sampling_ask_the_same_network(bundle: ModelBundle, tmp_path: Path) -> None:
    method = build_method(bundle.recipe, bundle.method.networks)
    video = torch.randn(2, 4, FRAMES, H // 8, W // 8, generator=torch.Generator().manual_seed(0))
    flow = torch.randn(2, 2, FRAMES, H // 8, W // 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, 77, WIDTH, generator=torch.Generator().manual_seed(2))
    condition = method_class(bundle.recipe).condition(
        video, {"flow": flow, "strength": torch.tensor([1.0, 9.0])}, {"text": text}
    )
    t, noise = torch.tensor([10, 900]), torch.randn(2, 4, FRAMES - 1, H // 8, W // 8)
    with torch.no_grad():
        losses = method(LatentBatch(video, condition), t, noise, reduction="none")
        x_t = method.schedule.add_noise(video[:, :, 1:] - video[:, :, :1], noise, t)
        plain = method.predict(x_t, t, condition)
        torch.testing.assert_close(plain, method.predict(x_t, t, method.ready(condition)))
        torch.testing.assert_close(losses, (plain - noise).square().mean((1, 2, 3, 4)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2,3,4", ((1, 2, 3, 4),)),
        ("1,2,3,4;5,6,7,8.5", ((1, 2, 3, 4), (5, 6, 7, 8.5))),
        ("[[1, 2, 3, 4]]", ((1, 2, 3, 4),)),
        (["1,2,3,4", "5,6,7,8"], ((1, 2, 3, 4), (5, 6, 7, 8))),
    ],
)
def test_how_arrows_are_written(text: Any, expected: Any) -> None:
    assert LongerControls.model_validate({"arrows": text}).arrows == expected
    assert LongerControls.of({"arrows": [list(arrow) for arrow in expected]}, "x").arrows == expected


@pytest.mark.parametrize(
    "text", ["1,2,3", "a,b,c,d", "[[1, 2]]", "[[1, 2", [[1, 2, 3, 4]] * 65, "1,2,3,nan", [[10**400] * 4], "[" * 9999]
)
def test_what_no_arrow_is(text: Any) -> None:
    with pytest.raises(InputError, match=r"arrows is .*; expected four numbers|arrows is .*expected"):
        LongerControls.of({"arrows": text}, "x")


def test_the_refinement_network_learns_alone_from_stored_flow_and_pictures(tmp_path: Path) -> None:
    recipe = longer_recipe(tmp_path, trainable="refiner", lr=2e-3)
    assert LongerMethod.stored_fields(recipe) == ("flow", "first_frame")
    flow = np.zeros((FRAMES - 1, 2, H // 8, W // 8), np.float16)
    flow[:, 0, :, :2] = 3  # the left third moves to the right
    sample = sample_of(flow)
    fields = {**sample.fields, "first_frame": jpeg(PICTURE[:H, :W])}
    batch = host_batch([dataclasses.replace(sample, fields=fields)] * 2, 0, recipe)
    method = build_method(recipe)
    mark_trainable(method, recipe.train)
    states = {"text": torch.zeros(2, 5, WIDTH)}
    condition = LongerMethod.condition(batch.video_BCFHW, batch.fields, states)
    np.testing.assert_array_equal(condition["truth"][0], flow.mean(0))
    torch.testing.assert_close(
        condition["picture"][0, :, 0, 0], torch.from_numpy(PICTURE[:8, :8].mean((0, 1)) / 127.5 - 1).float(), atol=0.03,
        rtol=0,
    )  # fmt: skip
    inputs = LatentBatch(batch.video_BCFHW, condition, batch.keys), batch.t_B, batch.noise_BCFHW
    method(*inputs).backward()
    learning = {name.split(".")[0] for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert learning == {"refiner"}
    plain = method(*inputs, reduction="none", weighted=False)
    error = (condition["arrows"] - condition["truth"]).abs().flatten(1).mean(1) / recipe.model.refiner.scale
    torch.testing.assert_close(plain, error)  # a fresh network leaves the arrows' field as it is


def test_the_refinement_network_is_not_cut_up() -> None:
    with pytest.raises(InputError, match=r"zero_stage is 3, expected 0\.\.2"):
        override(load_recipe("longer-tiny-refiner"), ["train.zero_stage=3"])


def test_arrows_are_refined_where_the_recipe_says_so(bundle: ModelBundle) -> None:
    method = bundle.method
    assert isinstance(method, LongerMethod)
    plain, _ = first_query(bundle, arrows=[[49, 33, 80, 33]])
    torch.nn.init.normal_(method.refiner.exit.weight, std=0.3)
    try:
        refined, _ = first_query(bundle, arrows=[[49, 33, 80, 33]])
        still, _ = first_query(bundle)
        method.sample = method.sample.model_copy(update={"refine": False})
        switched_off, _ = first_query(bundle, arrows=[[49, 33, 80, 33]])
    finally:
        method.sample = bundle.recipe.sample
        torch.nn.init.zeros_(method.refiner.exit.weight)
    assert not torch.equal(refined["flow"], plain["flow"])
    assert torch.equal(switched_off["flow"], plain["flow"])
    assert not still["flow"].any()
