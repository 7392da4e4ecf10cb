"""The figures of motion are right where the answer is known: the truth, a still picture, the way back, a flicker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cinemo.bundle import ModelBundle, load_bundle, save_bundle
from cinemo.evaluation import rendered
from cinemo.evaluation.rendered import (
    BARS,
    MOVING,
    explained,
    explained_samples,
    measure_motion,
    misses,
    rendered_test_set,
)
from cinemo.media.motion import mean_adjacent_ssim
from cinemo.networks.weights import load_unet
from cinemo.recipes import load_recipe
from cinemo.types import Animation, InputError, LatentSample
from pipelines.evaluate import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """The shipped weights as a bundle."""
    recipe, place = load_recipe("cinemo-tiny"), tmp_path_factory.mktemp("base") / "bundle"
    save_bundle(place, recipe, {"unet": load_unet(recipe.model, "package:tiny/unet")}, {"made": "by a test"})
    return load_bundle(place)


def measured(base: ModelBundle, monkeypatch: pytest.MonkeyPatch, answer: Any) -> dict[str, Any]:
    """All figures, with ``answer(clip)`` in the place of what a model would make of each test clip."""
    clips: dict[bytes, Any] = {}

    def remember(*arguments: Any, **more: Any) -> Any:
        made = rendered_test_set(*arguments, **more)
        clips.update({clip.frames_FHWC[0].tobytes(): clip for clip in made})
        return made

    def animate(bundle: ModelBundle, request: Any) -> Animation:
        clip = clips[request.image.tobytes()]
        return Animation(np.zeros(()), 8, {}, answer(clip, request.controls["motion_bucket"]))

    # One step of the network is not what is looked at here, and takes most of the time.
    monkeypatch.setattr(rendered, "explained", lambda *_: dict.fromkeys(rendered._ASKED, 1.0))
    monkeypatch.setattr(rendered, "rendered_test_set", remember)
    monkeypatch.setattr(rendered, "animate", animate)
    return measure_motion(base, count=5)


def test_the_truth_passes_every_bar_that_videos_can_pass(base: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def truth(clip: Any, bucket: int) -> np.ndarray:
        if bucket == clip.bucket:
            return np.asarray(clip.frames_FHWC)
        # Another bucket: the same scene, slower or faster.
        pace = bucket / 10
        return np.asarray(clip.scene.frames(clip.times[0] + pace * (time - clip.times[0]) for time in clip.times))

    figures = measured(base, monkeypatch, truth)
    # The network is not asked here, and the first frame is compared with the picture as a network is given it.
    assert not misses(figures).keys() - {"unexplained", "unexplained_opposite_prompt", "first_frame_psnr_gap"}, figures
    assert figures["pan_direction_cosine"] > 0.99
    assert figures["object_iou"] > 0.94  # soft, shaded edges: a pixel of them may look nearer to the backdrop
    assert figures["pan_flow_gain"] == pytest.approx(1, abs=0.1)
    assert figures["fluid_flow_gain"] == pytest.approx(1, abs=0.15)
    assert figures["object_flow_gain"] > 0.65  # flow is blurred where the shape ends
    errors = {kind: figures[f"{kind}_end_point_error"] for kind in ("pan", "object", "fluid")}
    assert max(errors.values()) < 0.5, errors


def test_a_still_picture_fails_all_that_is_about_motion(base: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def still(clip: Any, bucket: int) -> np.ndarray:
        return np.repeat(clip.frames_FHWC[:1], len(clip.frames_FHWC), axis=0)

    figures = measured(base, monkeypatch, still)
    moving = {name for name in BARS if name in figures and name not in ("first_frame_psnr_gap", "still_ssim")}
    assert moving - {"object_iou"} <= misses(figures).keys() | {"unexplained", "unexplained_opposite_prompt"}
    for kind in ("pan", "object", "fluid"):
        assert abs(figures[f"{kind}_flow_gain"]) < 0.05
        assert figures[f"{kind}_end_point_error"] == pytest.approx(1, abs=0.05)


def test_the_way_back_is_the_wrong_direction(base: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(clip: Any, bucket: int) -> np.ndarray:
        return np.asarray(clip.scene.frames(2 * clip.times[0] - time for time in clip.times))

    figures = measured(base, monkeypatch, backwards)
    assert figures["pan_direction_cosine"] < -0.9
    assert figures["fluid_direction_cosine"] < -0.9
    assert figures["object_direction_share"] == 0
    assert figures["pan_flow_gain"] < -0.7
    assert figures["pan_end_point_error"] > 1.7


def test_a_flicker_moves_nothing(base: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def flicker(clip: Any, bucket: int) -> np.ndarray:
        light = 1 + 0.01 * bucket * rng.normal(size=len(clip.frames_FHWC))
        light[0] = 1
        frames = clip.frames_FHWC[:1] * light[:, None, None, None]
        return np.asarray(np.clip(frames, 0, 255), np.uint8)

    figures = measured(base, monkeypatch, flicker)
    assert figures["bucket_rank"] > 0.9  # SSIM is satisfied
    assert abs(figures["pan_flow_gain"]) < 0.3
    assert {"pan_direction_cosine", "pan_flow_gain", "object_direction_share"} <= misses(figures).keys()


def test_test_clips_are_unseen_and_have_what_they_are_asked_with(base: ModelBundle) -> None:
    for kind in MOVING:
        clips = rendered_test_set(base, kind, 4)
        assert len({clip.times[1] - clip.times[0] for clip in clips}) > 1
        assert all(clip.kind == kind and clip.pixels_per_frame >= 0.1 for clip in clips)
        assert all(clip.frames_FHWC.shape == (16, 64, 96, 3) for clip in clips)


def test_a_scene_as_a_file_asks_for_more_motion_and_is_judged_by_the_same_truth(base: ModelBundle) -> None:
    pairs = list(zip(rendered_test_set(base, "pan", 4), rendered_test_set(base, "pan", 4, as_files=True), strict=True))
    for clip, stored in pairs:
        assert np.array_equal(clip.frames_FHWC, stored.frames_FHWC)
        assert clip.times == stored.times
        assert clip.bucket <= stored.bucket <= clip.bucket + 4
        assert stored.controls["motion_bucket"] == stored.bucket
    assert np.mean([stored.bucket - clip.bucket for clip, stored in pairs]) >= 0.5
    [still] = rendered_test_set(base, "still", 1, as_files=True)
    assert still.bucket <= 1


def test_a_network_that_says_nothing_leaves_everything_unexplained(tmp_path: Path, base: ModelBundle) -> None:
    recipe = load_recipe("cinemo-tiny")
    unet = load_unet(recipe.model, "package:tiny/unet")
    for parameter in unet.conv_out.parameters():
        parameter.data.zero_()
    save_bundle(tmp_path / "silent", recipe, {"unet": unet}, {"made": "by a test"})
    figures = explained(load_bundle(tmp_path / "silent"), rendered_test_set(base, "pan", 2))
    assert figures["unexplained"] == pytest.approx(1, abs=0.01)
    assert figures["unexplained_opposite_prompt"] == pytest.approx(1, abs=0.01)


def test_samples_of_a_dataset_are_asked_as_rendered_clips_are(base: ModelBundle) -> None:
    clips = [clip for kind in MOVING for clip in rendered_test_set(base, kind, 1)]
    samples = []
    for number, clip in enumerate(clips):
        pixels = torch.from_numpy(clip.frames_FHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents_FCHW, ssim = base.vae.encode(pixels).half().numpy(), mean_adjacent_ssim(clip.frames_FHWC)
        samples.append(LatentSample(str(number), "a", "a.mp4", clip.scene.caption, latents_FCHW, ssim, 24, 3, 0))
    figures, expected = explained_samples(base, samples), explained(base, clips)
    assert figures.keys() == expected.keys() - {"unexplained_opposite_prompt"}
    for name, value in figures.items():
        assert value == pytest.approx(expected[name], rel=0.01)


def test_a_figure_that_is_no_number_is_a_miss() -> None:
    figures = {name: bar for name, (_, bar) in BARS.items()}
    assert misses(figures) == {}
    assert "object_iou" in misses(figures | {"object_iou": float("nan")})
    assert misses(figures | {"unexplained": 0.3, "unexplained_opposite_prompt": 0.55}).keys() == {
        "unexplained",
        "unexplained_opposite_prompt",
    }


@pytest.mark.parametrize("words", [[], ["--data", "x", "--rendered", "4"]])
def test_the_command_asks_for_a_dataset_or_rendered_scenes(words: list[str]) -> None:
    with pytest.raises(InputError, match="expected one of them"):
        main(["--bundle", "x", "--output", "y", *words])
