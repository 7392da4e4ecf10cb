"""One image in, one video out: reproducible in the seed, every control has an effect, and bad input is named."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hearing import STRAY
from PIL import Image
from tiny import FRAMES, SIZE, tiny_bundle

from cinemo.animate import (
    AnimateRequest,
    animate,
    load_image,
    load_source,
    sample,
    sentences,
)
from cinemo.bundle import ModelBundle, load_bundle
from cinemo.media.mp4 import read_metadata, write_video
from cinemo.media.saving import save_animation, save_latents
from cinemo.media.transforms import prepare_image
from cinemo.media.video import probe, read_frames
from cinemo.methods.base import run
from cinemo.networks import frozen
from cinemo.recipes.cinemo import cinemo_tiny
from cinemo.types import Condition, InputError, Sampled, keyed_generator
from pipelines.animate import main

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("tiny")), "cpu")


def ask(bundle: ModelBundle, **controls: Any) -> np.ndarray:
    return animate(bundle, AnimateRequest(**({"image": PICTURE, "prompt": "waves", "seed": 3} | controls))).frames_FHWC


def test_equal_requests_give_equal_frames_whatever_the_global_seed(bundle: ModelBundle) -> None:
    torch.manual_seed(0)
    first = animate(bundle, AnimateRequest(PICTURE, "waves", seed=3))
    torch.manual_seed(99)
    second = animate(bundle, AnimateRequest(PICTURE, "waves", seed=3))
    assert first.frames_FHWC.shape == (FRAMES, *SIZE, 3)
    assert first.latents_CFHW.shape == (4, FRAMES, SIZE[0] // 8, SIZE[1] // 8)
    assert first.latents_CFHW.dtype == torch.float32
    assert torch.equal(first.latents_CFHW, second.latents_CFHW)
    np.testing.assert_array_equal(first.frames_FHWC, second.frames_FHWC)
    assert first.settings == second.settings


@pytest.mark.parametrize(
    "control",
    [
        {"seed": 4}, {"prompt": "snow"}, {"negative_prompt": "blur"}, {"motion_bucket": 19}, {"steps": 5},
        {"guidance_scale": 5.0}, {"guidance_scale": 1.0}, {"dct_init": False}, {"image": PICTURE[::-1]},
        {"solver": "multistep"}, {"guidance_interval": (0.3, 0.7)}, {"reuse_features": 2},
    ],
    ids=lambda control: next(iter(control)),
)  # fmt: skip
def test_every_control_has_an_effect(bundle: ModelBundle, control: dict[str, Any]) -> None:
    plain = animate(bundle, AnimateRequest(PICTURE, "waves", seed=3)).latents_CFHW
    changed = animate(bundle, AnimateRequest(**({"image": PICTURE, "prompt": "waves", "seed": 3} | control)))
    assert not torch.allclose(plain[:, 1:], changed.latents_CFHW[:, 1:], atol=1e-5)


def test_the_negative_prompt_does_nothing_without_guidance(bundle: ModelBundle) -> None:
    plain = ask(bundle, guidance_scale=1.0)
    np.testing.assert_array_equal(plain, ask(bundle, guidance_scale=1.0, negative_prompt="blur"))


def test_the_first_frame_is_the_encoded_and_decoded_input(bundle: ModelBundle) -> None:
    animation = animate(bundle, AnimateRequest(PICTURE, "waves", seed=3))
    latent = bundle.vae.encode(prepare_image(PICTURE, SIZE)[None], keyed_generator(3, "image"))
    torch.testing.assert_close(animation.latents_CFHW[:, 0], latent[0], rtol=0, atol=0)
    np.testing.assert_array_equal(animation.frames_FHWC[0], bundle.decoder.decode(latent)[0])
    assert not np.array_equal(animation.frames_FHWC[0], animation.frames_FHWC[1])


def test_motion_strength_is_a_bucket_by_another_name(bundle: ModelBundle) -> None:
    np.testing.assert_array_equal(ask(bundle, motion_strength=1.0), ask(bundle, motion_bucket=19))


def test_motion_strength_follows_the_motion_that_was_measured_on_the_bundle(bundle: ModelBundle) -> None:
    measured = {"values": [0, 10, 19], "curve": [0.1, 0.1, 0.4]}
    calibrated = replace(bundle, motion=replace(bundle.motion, calibration=measured))
    np.testing.assert_array_equal(ask(calibrated, motion_strength=0.5), ask(bundle, motion_bucket=14))


def test_a_pil_image_is_the_same_as_its_array(bundle: ModelBundle) -> None:
    np.testing.assert_array_equal(ask(bundle), ask(bundle, image=Image.fromarray(PICTURE)))


def test_defaults_are_the_recipes_and_settings_say_everything(bundle: ModelBundle) -> None:
    settings = animate(bundle, AnimateRequest(PICTURE, "waves")).settings
    sample = bundle.recipe.sample
    assert settings["steps"] == sample.steps
    assert settings["guidance_scale"] == sample.guidance_scale
    assert settings["motion_bucket"] == sample.motion_bucket
    assert settings["dct_init"] is True
    assert (settings["recipe"], settings["bundle"]) == ("random-32x48", bundle.digest)
    again = AnimateRequest(
        PICTURE, **{name: settings[name] for name in ("prompt", "negative_prompt", "motion_bucket", "steps",
                                                      "guidance_scale", "seed", "dct_init")}
    )  # fmt: skip
    np.testing.assert_array_equal(ask(bundle, seed=0), animate(bundle, again).frames_FHWC)


def test_progress_counts_every_step_and_may_stop_the_sampling(bundle: ModelBundle) -> None:
    seen: list[tuple[int, int]] = []
    animate(bundle, AnimateRequest(PICTURE, "waves", steps=3), lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done: int, steps: int) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        animate(bundle, AnimateRequest(PICTURE, "waves", steps=3), stop)


def test_a_batch_gives_what_its_members_give_alone(bundle: ModelBundle) -> None:
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randn(2, 4, 4, 6, generator=generator)
    noise_BCFHW = torch.randn(2, 4, FRAMES - 1, 4, 6, generator=generator)
    text_BLD = bundle.text.encode(["waves", "snow"])
    negative_BLD = bundle.text.encode(["", "blur"])
    bucket_B = torch.tensor([2.0, 15.0])
    with torch.inference_mode():
        condition, method = Condition(image=image_BCHW, text=text_BLD, motion_bucket=bucket_B), bundle.method
        both = run(method, method.sampling(condition, Condition(text=negative_BLD), noise_BCFHW, 3, 4.0))
        for k in range(2):
            one = slice(k, k + 1)
            own = Condition({name: tensor[one] for name, tensor in condition.items()})
            alone = run(method, method.sampling(own, Condition(text=negative_BLD[one]), noise_BCFHW[one], 3, 4.0))
            torch.testing.assert_close(both[one], alone, rtol=1e-4, atol=1e-4)
    assert both.shape == (2, 4, FRAMES, 4, 6)
    torch.testing.assert_close(both[:, :, 0], image_BCHW)


def test_frames_are_decoded_a_few_at_a_time(bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    request = AnimateRequest(PICTURE, "waves")
    frames_FHWC = animate(bundle, request).frames_FHWC
    monkeypatch.setattr(frozen, "_CHUNK_PIXELS", 2 * SIZE[0] * SIZE[1])
    pieces = [*bundle.decoder.decoding(sample(bundle, request).latents_CFHW.transpose(0, 1))]
    assert [len(piece) for piece in pieces] == [2] * (FRAMES // 2)
    # A batch of another size rounds differently in a few places.
    assert np.abs(np.concatenate(pieces).astype(int) - frames_FHWC).max() <= 1


def test_the_mp4_says_how_it_was_made(bundle: ModelBundle, tmp_path: Path) -> None:
    animation = animate(bundle, AnimateRequest(PICTURE, 'größe "quoted"\nand a second line', seed=2**63 - 1))
    save_animation(tmp_path / "deep" / "out.mp4", animation)
    info = probe(tmp_path / "deep" / "out.mp4")
    assert (info.frames, info.height, info.width) == (FRAMES, *SIZE)
    metadata = read_metadata(tmp_path / "deep" / "out.mp4")
    assert json.loads(metadata["comment"]) == animation.settings
    assert metadata["seed"] == str(2**63 - 1)
    assert metadata["bundle"] == bundle.digest
    assert metadata["recipe"] == "random-32x48"
    assert metadata["prompt"] == 'größe "quoted"\nand a second line'
    shown = read_frames(tmp_path / "deep" / "out.mp4", list(range(FRAMES)))
    assert np.abs(shown.astype(int) - animation.frames_FHWC.astype(int)).mean() < 12
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.mp4"]


def test_latents_are_saved_with_their_settings(bundle: ModelBundle, tmp_path: Path) -> None:
    animation = animate(bundle, AnimateRequest(PICTURE, "waves"))
    save_latents(tmp_path / "a.npz", animation)
    with np.load(tmp_path / "a.npz") as saved:
        np.testing.assert_array_equal(saved["latents"], animation.latents_CFHW.numpy())
        assert saved["latents"].dtype == np.float32
        assert json.loads(str(saved["settings"])) == animation.settings


@pytest.mark.parametrize(
    ("controls", "named"),
    [
        ({"motion_bucket": 20}, "motion_bucket"), ({"motion_bucket": -1}, "motion_bucket"),
        ({"motion_bucket": 2.5}, "motion_bucket"), ({"motion_bucket": True}, "motion_bucket"),
        ({"motion_strength": 1.01}, "motion_strength"), ({"motion_strength": float("nan")}, "motion_strength"),
        ({"motion_bucket": 3, "motion_strength": 0.3}, "motion_bucket and motion_strength"),
        ({"steps": 0}, "steps"), ({"steps": 1000}, "steps"), ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"),
        ({"prompt": "x" * 4001}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": "a\0b"}, "prompt"),
        ({"negative_prompt": "\ud800"}, "negative_prompt"),
        ({"solver": "euler"}, "solver"), ({"reuse_features": 0}, "reuse_features"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0, 1.5)}, "guidance_interval"),
        ({"inputs": {"source": PICTURE}}, "source"), ({"source_prompt": 3}, "source_prompt"),
        ({"inputs": {"mask": PICTURE}}, "mask"), ({"inputs": {"source": "a.mp4"}}, "source"), ({"speed": 1}, "speed"),
    ],
)  # fmt: skip
def test_bad_controls_are_named(controls: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=f"^{named}") as error:
        AnimateRequest(**({"image": PICTURE, "prompt": "waves"} | controls)).settings(cinemo_tiny())
    assert "\n" not in str(error.value)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_images_stand_upright() -> None:
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).repeat(3).reshape(2, 12, 3)).resize((48, 8), 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    loaded = load_image(encoded(picture, exif=exif.tobytes()))
    np.testing.assert_array_equal(loaded, np.rot90(np.asarray(picture), -1))


def test_transparency_shows_white() -> None:
    picture = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    picture.paste((10, 20, 30, 255), (0, 0, 8, 16))
    loaded = load_image(encoded(picture))
    assert loaded[0, 0].tolist() == [10, 20, 30]
    assert loaded[0, 15].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    loaded = load_image(encoded(Image.new("RGB", (16, 16), "white").convert(mode), form))
    assert loaded.shape == (16, 16, 3)
    assert loaded.dtype == np.uint8
    assert loaded.min() > 250


def test_sixteen_bit_grey_keeps_its_range() -> None:
    levels = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    loaded = load_image(encoded(Image.fromarray(levels)))
    np.testing.assert_array_equal(loaded[..., 0], levels >> 8)


def tiff(levels: np.ndarray, **tags: Any) -> bytes:
    return encoded(Image.fromarray(levels), "TIFF", **tags)


def test_twelve_bit_grey_keeps_its_range() -> None:
    """Pillow reads a 12-bit TIFF as 16-bit levels up to 4095; here two of them are packed into three bytes."""
    levels = np.linspace(0, 4095, 16 * 16).astype(np.uint16).reshape(16, 16)
    pairs = levels.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=-1)
    entries = [(256, 16), (257, 16), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 16), (279, packed.size)]
    start = 8 + packed.size
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in entries)
    content = struct.pack("<2sHI", b"II", 42, start) + packed.astype(np.uint8).tobytes() + directory + bytes(4)
    np.testing.assert_array_equal(load_image(content)[..., 0], levels >> 4)


def test_levels_without_a_known_range_are_refused() -> None:
    """Pillow would clip them, so that 0..1 becomes black and 0..65535 white."""
    ramp = np.linspace(0, 1, 16 * 16).reshape(16, 16)
    for levels, kind in ((ramp.astype(np.float32), "floating-point"), ((255 * ramp).astype(np.int32), "32-bit")):
        for shown in (lambda x: load_image(tiff(x)), lambda x: prepare_image(Image.fromarray(x), (8, 8))):
            with pytest.raises(
                InputError, match=f"^image: its levels are {kind}.*; save it with 8 or 16 bits"
            ) as error:
                shown(levels)
            assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="whose white is 0"):
        load_image(tiff((65535 * ramp).astype(np.uint16), tiffinfo={262: 0}))


def test_sixteen_bit_tiffs_of_either_byte_order_keep_their_range() -> None:
    levels = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    for stored in (levels, levels.astype(">u2")):
        np.testing.assert_array_equal(load_image(tiff(stored))[..., 1], levels >> 8)


def test_bad_images_are_named(tmp_path: Path) -> None:
    good = encoded(Image.fromarray(PICTURE))
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "tiny.png").write_bytes(encoded(Image.new("RGB", (4, 64))))
    (tmp_path / "long.png").write_bytes(encoded(Image.new("RGB", (8, 400))))
    for name, reason in {
        "none.png": "no such file", "cut.png": "damaged", "text.png": "not a picture", "empty.png": "not a picture",
        "tiny.png": "4x64", "long.png": "8x400",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=reason.replace("no such file", "(?i)no such file")) as error:
            load_image(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="cannot be read"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="megapixels"):
        load_image(good, max_pixels=3000)


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    header = encoded(Image.new("1", (8, 8)))
    huge = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:29]
    import zlib

    huge += zlib.crc32(huge[12:29]).to_bytes(4, "big") + header[33:]
    with pytest.raises(InputError, match="megapixels"):
        load_image(huge)


def moving_video() -> np.ndarray:
    """A bright square that walks over dark noise, (F, H, W, 3)."""
    frames = np.repeat(PICTURE[None] // 16, FRAMES, axis=0)
    for k in range(FRAMES):
        frames[k, 10:30, 5 + 6 * k : 25 + 6 * k] = 230
    return frames


@pytest.mark.slow
def test_a_video_inverted_and_sampled_again_comes_back(bundle: ModelBundle) -> None:
    """The law behind editing: with its own first frame and prompt, the inverted noise is the video."""
    frames = moving_video()
    own: dict[str, Any] = {"inputs": {"source": frames}, "source_prompt": "a square", "dct_init": False}
    latents = bundle.vae.encode(torch.stack([prepare_image(frame, SIZE) for frame in frames]))
    again = animate(bundle, AnimateRequest(frames[0], "a square", steps=200, **own)).latents_CFHW.transpose(0, 1)
    drawn = animate(bundle, AnimateRequest(frames[0], "a square", dct_init=False, steps=200)).latents_CFHW
    error, usual = (again - latents).square().mean(), (drawn.transpose(0, 1) - latents).square().mean()
    assert error < 0.1 * usual, (error, usual)


def test_editing_uses_its_own_defaults_and_the_measured_bucket(bundle: ModelBundle) -> None:
    still = np.repeat(PICTURE[None], FRAMES, axis=0)
    moving = np.random.default_rng(1).integers(0, 256, (FRAMES, 50, 70, 3), dtype=np.uint8)
    for source, bucket in ((still, 0), (moving, 19)):
        settings = animate(
            bundle, AnimateRequest(PICTURE, "snow", inputs={"source": source}, source_prompt="rain")
        ).settings
        assert settings["motion_bucket"] == bucket
        assert settings["guidance_scale"] == bundle.recipe.sample.edit_guidance_scale
        assert settings["source_prompt"] == "rain"
        assert len(settings["source_sha256"]) == 64
    assert (
        animate(bundle, AnimateRequest(PICTURE, "snow", inputs={"source": still}, motion_bucket=4)).settings[
            "motion_bucket"
        ]
        == 4
    )
    with pytest.raises(InputError, match="source: got 3 frames, recipe random-32x48 takes 6"):
        animate(bundle, AnimateRequest(PICTURE, "snow", inputs={"source": still[:3]}))


def test_a_source_video_is_read_as_asked(bundle: ModelBundle, tmp_path: Path) -> None:
    frames = np.repeat(moving_video(), 3, axis=0)[:, :48, :64]
    write_video(tmp_path / "source.mp4", np.ascontiguousarray(frames), 8)
    every_third = load_source(str(tmp_path / "source.mp4"), bundle.recipe, 3)
    assert every_third.shape == (FRAMES, 48, 64, 3)
    assert np.abs(every_third.astype(int) - frames[::3]).mean() < 6
    with pytest.raises(InputError, match=r"18 frames, recipe random-32x48 needs 21 \(interval 4\)"):
        load_source(str(tmp_path / "source.mp4"), bundle.recipe, 4)
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "none.mp4"):
        with pytest.raises(InputError, match=f"source .*{name}"):
            load_source(str(tmp_path / name), bundle.recipe)


def test_a_missing_picture_is_named_before_any_weights_are_loaded(bundle: ModelBundle, tmp_path: Path) -> None:
    words = ["--bundle", bundle.location, "--image", "i", "--prompt", "p", "--output", str(tmp_path / "o.mp4")]
    with pytest.raises(InputError, match="image i: cannot be read"):
        main(words)
    assert not (tmp_path / "o.mp4").exists()


def test_a_flag_of_another_model_is_one_line_that_says_what_this_one_has(bundle: ModelBundle, tmp_path: Path) -> None:
    words = ["--bundle", bundle.location, "--image", "i", "--prompt", "p", "--output", str(tmp_path / "o.mp4")]
    with pytest.raises(InputError, match=r"--pace: random-32x48 has no such control; it has .*--motion-bucket"):
        main([*words, "--pace", "2"])


def test_a_prompt_of_which_the_end_is_not_read_is_one_warning(
    bundle: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "i.png")
    words = ["--bundle", bundle.location, "--image", str(tmp_path / "i.png"), "--output", str(tmp_path / "o.mp4")]
    for prompt, count in (("x" * 75, 0), ("x" * 76, 1)):
        main([*words, "--prompt", prompt, "--steps", "1"])
        told = capsys.readouterr().err
        assert told.count("has 76 tokens, of which the text encoder reads the first 75") == count, told


def test_a_result_is_told_in_words() -> None:
    settings = {
        "recipe": "cinemo-tiny", "bundle": "4b250cabcfd8d6d5", "cinemo_version": "0", "size": [64, 96], "frames": 16,
        "fps": 8.0, "image_sha256": "ab12", "prompt": "a ball rolls", "negative_prompt": "", "guidance_scale": 7.5,
        "dct_init": True, "last": None, "guidance_interval": (0.5, 1.0), "arrows": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "predicted_motion": {"mean": 0.0121, "low": 0.009, "high": 0.02},
    }  # fmt: skip
    told = sentences(Sampled(torch.empty(0), 8.0, settings))
    assert told == [
        "16 frames of 96x64 at 8 a second, by cinemo-tiny, bundle 4b250cabcfd8",
        "  prompt: a ball rolls",
        "  guidance scale: 7.5",
        "  dct init: yes",
        "  guidance interval: 0.5, 1",
        "  arrows: 1, 2, 3, 4; 5, 6, 7, 8",
        "  predicted motion: mean 0.0121, low 0.009, high 0.02",
    ]
    assert not any(map(STRAY.search, told))
