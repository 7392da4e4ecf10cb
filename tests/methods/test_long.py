"""Other lengths and sizes than a network was trained for: the same laws for every method that ships weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FRAMES, tiny_bundle

from cinemo.animate import AnimateRequest, animate, prepare
from cinemo.bundle import ModelBundle, load_bundle, save_bundle
from cinemo.methods import method_class
from cinemo.methods.base import run
from cinemo.methods.long import parts
from cinemo.recipes import RECIPES, load_recipe
from cinemo.types import Animation, InputError

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
WAYS = ("phased", "windows", "chain")


def shipped(name: str) -> bool:
    recipe = load_recipe(name)
    return name.endswith("-tiny") and "frames" in method_class(recipe).controls_type.model_fields


@pytest.fixture(scope="module", params=[name for name in RECIPES if shipped(name)])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    recipe, place = load_recipe(request.param), tmp_path_factory.mktemp("long") / "bundle"
    method = method_class(recipe)
    networks = {
        part: method.load_network(recipe, part, recipe.train.init or "", torch.float32, base=True)
        for part in method.parts
    }
    save_bundle(place, recipe, networks, {"made": "by a test"})
    return load_bundle(place, "cpu")


def video(bundle: ModelBundle, **controls: Any) -> Animation:
    return animate(bundle, AnimateRequest(PICTURE, "waves", seed=3, steps=3, **controls))


@pytest.mark.parametrize("size", [(72, 40), (64, 136)])
def test_of_any_size_whose_sides_are_multiples_of_8(bundle: ModelBundle, size: tuple[int, int]) -> None:
    made = video(bundle, size=size)
    assert made.frames_FHWC.shape[1:3] == size
    assert made.settings["size"] == list(size)
    assert np.isfinite(made.latents_CFHW.numpy()).all()
    with pytest.raises(InputError, match=r"size 44x64: size is .* expected multiples of 8"):
        video(bundle, size=(64, 44))
    with pytest.raises(InputError, match="size 80000x8000: 640000000 pixels, expected at most"):
        video(bundle, size=(8000, 80000))


@pytest.mark.parametrize("way", WAYS)
def test_as_many_frames_as_asked_for(bundle: ModelBundle, way: str) -> None:
    seen: list[tuple[int, int]] = []
    request = AnimateRequest(PICTURE, "waves", seed=3, steps=3, frames=37, long_video=way)
    long = animate(bundle, request, lambda done, calls: seen.append((done, calls)))
    assert len(long.frames_FHWC) == long.latents_CFHW.shape[1] == long.settings["frames"] == 37
    assert long.settings["long_video"] == way
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert np.isfinite(long.latents_CFHW.numpy()).all()
    np.testing.assert_array_equal(long.frames_FHWC, animate(bundle, request).frames_FHWC)
    native = bundle.recipe.data.frames
    if way != "windows":  # the first part is the video that one would have had
        assert torch.equal(long.latents_CFHW[:, :native], video(bundle).latents_CFHW)


def test_fewer_frames_are_the_first_ones(bundle: ModelBundle) -> None:
    whole, few = video(bundle), video(bundle, frames=5)
    assert torch.equal(few.latents_CFHW, whole.latents_CFHW[:, :5])
    assert len(few.frames_FHWC) == few.settings["frames"] == 5
    assert video(bundle, frames=bundle.recipe.data.frames).settings == whole.settings


@pytest.mark.parametrize("way", ["phased", "windows"])
def test_calls_hold_no_more_rows_however_long_the_video(bundle: ModelBundle, way: str) -> None:
    together, rows = bundle.recipe.sample.long.together, []
    request = AnimateRequest(
        PICTURE, "waves", steps=5, frames=130, long_video=way, guidance_scale=2.0, guidance_interval=(0.0, 1.0)
    )
    with torch.inference_mode():
        asked = prepare(bundle, request)
        query = next(asked.sampling)
        for _ in range(asked.calls - 1):
            rows.append(len(query.x))
            assert query.x.shape[2] <= bundle.recipe.data.frames
            query = asked.sampling.send(torch.zeros_like(query.x))
        with pytest.raises(StopIteration) as end:
            asked.sampling.send(torch.zeros_like(query.x))
    assert end.value.value.shape[2] == 130
    branches = 3 if getattr(bundle.recipe.sample, "motion_guidance_scale", 1) > 1 else 2  # of guidance
    assert max(rows) == branches * together


def test_options_of_phased_videos_have_an_effect(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path), "cpu")

    def sampled(**long: Any) -> torch.Tensor:
        sample = bundle.method.sample
        bundle.method.sample = sample.model_copy(update={"long": sample.long.model_copy(update=long)})
        try:
            with torch.inference_mode():
                request = AnimateRequest(PICTURE, "waves", frames=3 * FRAMES, steps=6, long_video="phased")
                return run(bundle.method, prepare(bundle, request).sampling)
        finally:
            bundle.method.sample = sample

    plain = sampled()
    for change in (
        {"gamma": 0.5}, {"omega": 0.5}, {"shuffle": "segment"}, {"noise": "image"}, {"renormalise": True}
    ):  # fmt: skip
        other = sampled(**change)
        assert torch.equal(other[:, :, :FRAMES], plain[:, :, :FRAMES])
        assert not torch.allclose(other[:, :, FRAMES:], plain[:, :, FRAMES:], atol=1e-4), change
    assert torch.allclose(sampled(together=1), plain, atol=1e-4)


def test_features_are_not_used_again_across_segments(tmp_path: Path) -> None:
    """Each part of a long video begins with a whole call: kept features belong to another segment."""
    bundle = load_bundle(tiny_bundle(tmp_path), "cpu")
    for way in ("phased", "windows"):
        request = AnimateRequest(
            PICTURE, "waves", frames=40, steps=8, long_video=way, reuse_features=2, guidance_scale=1.0
        )
        with torch.inference_mode():
            sampling, kept_t = prepare(bundle, request).sampling, None
            query = next(sampling)
            while True:
                if query.features == "again":
                    assert kept_t is not None
                    assert query.t < kept_t
                kept_t = query.t
                try:
                    query = sampling.send(torch.zeros_like(query.x))
                except StopIteration:
                    break


def test_what_cannot_be_long_says_so(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle(tmp_path), "cpu")
    source = np.zeros((FRAMES, 40, 60, 3), np.uint8)
    for way in WAYS:
        with pytest.raises(InputError, match="frames is 30, expected at most 6 where a source video gives the motion"):
            prepare(bundle, AnimateRequest(PICTURE, "waves", inputs={"source": source}, frames=30, long_video=way))
    for frames in (1, 1025):
        with pytest.raises(InputError, match=r"frames is \d+, expected a whole number 2\.\.1024"):
            prepare(bundle, AnimateRequest(PICTURE, "waves", frames=frames))
    with pytest.raises(InputError, match="long_video is 'x', expected phased or windows or chain"):
        prepare(bundle, AnimateRequest(PICTURE, "waves", frames=30, long_video="x"))
    assert "frames" not in method_class(load_recipe("dynamicrafter-512-interp")).controls_type.model_fields


def test_parts_of_a_chain() -> None:
    assert parts(16, 16) == [16]
    assert parts(17, 16) == [16, 2]
    assert parts(31, 16) == [16, 16]
    assert parts(40, 16) == [16, 16, 10]
    for frames in range(2, 200):
        assert sum(parts(frames, 16)) - len(parts(frames, 16)) + 1 == frames
