"""DynamiCrafter: what is given and dropped, three branches of guidance, two pictures and loops, bundles and videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from goldens import Family
from tiny import FRAMES, IMAGE_TOKENS, SIZE, WIDTH
from torch import Tensor

from cinemo.animate import AnimateRequest, animate
from cinemo.bundle import ModelBundle, load_bundle, save_bundle
from cinemo.config import Recipe
from cinemo.data.dataset.fields import VERSIONS
from cinemo.media.stills import jpeg, jpeg_strip
from cinemo.methods import at_motion, build_method, mark_trainable, run
from cinemo.methods.dynamicrafter import (
    DynamiCrafterMethod,
    DynamiCrafterRecipe,
    dropped,
    visual_detail,
)
from cinemo.methods.interpolation import InterpolationMethod, InterpolationRecipe
from cinemo.networks.dynamicrafter_unet import DynamiCrafterUNet
from cinemo.networks.dynamicrafter_weights import load_unet, save_published
from cinemo.networks.frozen import ImageEncoder
from cinemo.networks.weights import save_network
from cinemo.recipes import override
from cinemo.training.checkpoint.export import as_published, from_published
from cinemo.training.run.batch import FrozenStates, host_batch, on_device
from cinemo.types import Condition, InputError, LatentBatch, LatentSample, keyed_generator


@pytest.fixture(scope="module")
def recipe(dynamicrafter_recipe: DynamiCrafterRecipe) -> DynamiCrafterRecipe:
    return dynamicrafter_recipe


@pytest.fixture(scope="module")
def interpolation(recipe: DynamiCrafterRecipe) -> InterpolationRecipe:
    values = recipe.model_dump() | {"method": "dynamicrafter-interp", "name": "interp-32x48"}
    return InterpolationRecipe.model_validate(values)


def random_networks(recipe: Recipe) -> dict[str, torch.nn.Module]:
    """Weights everywhere, the zero-initialised layers too."""
    torch.manual_seed(0)
    networks = build_method(recipe).networks
    for network in networks.values():
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return networks


@pytest.fixture(scope="module")
def method(recipe: DynamiCrafterRecipe) -> DynamiCrafterMethod:
    made = build_method(recipe, random_networks(recipe))
    assert isinstance(made, DynamiCrafterMethod)
    return made.eval().requires_grad_(False)


def sample_of(recipe: Recipe, key: str = "a", **fields: Any) -> LatentSample:
    frames, (height, width) = recipe.data.frames, recipe.data.size
    drawn = torch.randn(frames, 4, height // 8, width // 8, generator=keyed_generator(0, key))
    return LatentSample(key, key, "", "a dog", drawn.half().numpy(), 0.7, 24.0, 4, 0, fields=fields)


def pictures(recipe: Recipe) -> np.ndarray:
    """Frames that differ: (F, H, W, 3)."""
    frames = np.zeros((recipe.data.frames, *recipe.data.size, 3), np.uint8)
    frames[:] = 40 * np.arange(recipe.data.frames)[:, None, None, None]
    return frames


def condition_of(rows: int, seed: int = 0) -> Condition:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=keyed_generator(seed, str(shape)))

    return Condition(
        image=drawn(4, 4, 6),
        image_tokens=drawn(IMAGE_TOKENS, WIDTH),
        text=drawn(5, WIDTH),
        frame_rate=torch.arange(rows) + 1,
    )


def test_goldens_of_conditions(say: Callable[[str], None]) -> None:
    family = Family("dc_cond")
    for where, meta, arrays in family:
        latents = torch.from_numpy(arrays["z"])
        kind = InterpolationMethod if meta["interp"] else DynamiCrafterMethod
        frame = 0 if meta["interp"] else meta["cond_frame_index"]
        fields = {"frame": torch.full((len(latents),), frame), "frame_rate": torch.from_numpy(arrays["fs"])}
        told = kind.condition(latents, fields, {"text": torch.zeros(0), "image_tokens": torch.zeros(0)})
        shown = visual_detail(told["image"], latents.shape[2], told.get("last_image"))
        family.check(where, "concatenated", shown, arrays["c_concat"], 1e-7)
        family.check(where, "rate", told["frame_rate"], arrays["fs"], 0)
        without = [dropped(float(u), meta["p"]) for u in arrays["u"]]
        family.check(where, "text dropped", [text for text, _ in without], arrays["text_dropped"], 0)
        family.check(where, "image dropped", [image for _, image in without], arrays["image_dropped"], 0)
        texts = ["" if text else "caption" for text, _ in without]
        assert [text == "" for text in texts] == [not row.any() for row in arrays["text_tokens"]]
        given = arrays["video"][:, :, frame].mean((-1, -2)) * 10 * ~arrays["image_dropped"][:, None]
        family.check(where, "picture", given, arrays["image_tokens"][..., 0], 1e-5)
    family.finish(say)


def test_each_of_three_things_is_dropped_in_a_twentieth_of_the_samples(recipe: DynamiCrafterRecipe) -> None:
    counted = [dropped((number + 0.5) / 1000, 0.05) for number in range(1000)]
    assert {kind: counted.count(kind) for kind in set(counted)} == {
        (True, False): 50, (True, True): 50, (False, True): 50, (False, False): 850,
    }  # fmt: skip
    sample, seen = sample_of(recipe, frames=jpeg_strip(pictures(recipe))), []
    for step in range(400):
        batch = host_batch([sample], step, recipe)
        seen.append((batch.texts["text"] == ("",), batch.images["image_tokens"][0] is None))
    assert 20 < sum(kind != (False, False) for kind in seen) < 100
    assert len(set(seen)) == 4


def test_the_given_frame_is_any_of_the_clips_own(recipe: DynamiCrafterRecipe) -> None:
    whole = override(recipe, ["train.condition_dropout=0"])
    sample, frames = sample_of(recipe, frames=jpeg_strip(pictures(recipe))), pictures(recipe)
    places = set()
    for step in range(60):
        batch = host_batch([sample], step, whole)
        place = int(batch.fields["frame"][0])
        (picture,) = batch.images["image_tokens"]
        assert isinstance(picture, np.ndarray)
        np.testing.assert_allclose(picture, frames[place], atol=3)  # JPEG
        told = DynamiCrafterMethod.condition(
            batch.video_BCFHW, batch.fields, {"text": torch.zeros(0), "image_tokens": torch.zeros(0)}
        )
        assert torch.equal(told["image"], batch.video_BCFHW[:, :, place])
        places.add(place)
    assert places == set(range(FRAMES))
    first = override(whole, ["train.condition_frame=first"])
    batch = host_batch([sample_of(recipe, first_frame=jpeg(frames[0]))], 3, first)
    assert int(batch.fields["frame"][0]) == 0


@pytest.mark.parametrize(
    ("frame", "tokens", "field"),
    [
        ("random", "encoded", "frames"),
        ("random", "stored", "frame_tokens"),
        ("first", "encoded", "first_frame"),
        ("first", "stored", "image_tokens"),
    ],
)
def test_tokens_are_the_same_stored_or_made_in_training(
    recipe: DynamiCrafterRecipe, frame: str, tokens: str, field: str
) -> None:
    changed = override(
        recipe,
        [f"train.condition_frame={frame}", f"train.image_tokens={tokens}", "train.condition_dropout=0"],
    )
    assert DynamiCrafterMethod.stored_fields(changed) == (field,)
    assert field in VERSIONS
    frames, encoder = pictures(recipe), ImageEncoder(str(recipe.encoders.image_encoder))
    every = encoder.encode(list(frames)).half().numpy()
    content: dict[str, Any] = {
        "frames": jpeg_strip(frames), "first_frame": jpeg(frames[0]), "frame_tokens": every, "image_tokens": every[0],
    }  # fmt: skip
    batch = host_batch([sample_of(recipe, **{field: content[field]})], 5, changed)
    made, _, _ = on_device(batch, FrozenStates.of(changed), torch.device("cpu"), torch.float32)
    expected = torch.from_numpy(every[int(batch.fields["frame"][0])]).float()
    torch.testing.assert_close(made.condition["image_tokens"][0], expected, atol=0.05, rtol=0.05)


def test_a_sample_whose_frames_are_gone_goes_without_a_picture(recipe: DynamiCrafterRecipe) -> None:
    whole = override(recipe, ["train.condition_dropout=0"])
    batch = host_batch([sample_of(recipe), sample_of(recipe, "b", frames=jpeg_strip(pictures(recipe)))], 0, whole)
    frozen = FrozenStates.of(whole)
    made, _, _ = on_device(batch, frozen, torch.device("cpu"), torch.float32)
    grey = frozen({}, {"image_tokens": [None]})["image_tokens"][0]
    assert torch.equal(made.condition["image_tokens"][0], grey)
    assert not torch.allclose(made.condition["image_tokens"][1], grey)


def test_grey_is_zeros_before_the_models_own_normalisation(recipe: DynamiCrafterRecipe) -> None:
    encoder = ImageEncoder(str(recipe.encoders.image_encoder))
    darker, lighter = (encoder.encode([np.full((8, 8, 3), level, np.uint8)])[0] for level in (127, 128))
    between = (darker + lighter) / 2
    assert float((encoder.grey_LD - between).abs().max()) < 0.2 * float((darker - lighter).abs().max())


def test_what_is_made_ready_once_answers_as_what_is_not(method: DynamiCrafterMethod) -> None:
    condition, x = condition_of(2), torch.randn(2, 4, FRAMES, 4, 6)
    plain = method.predict(x, 300, condition)
    torch.testing.assert_close(method.predict(x, 300, method.ready(condition)), plain)
    for name in condition:  # everything that it is told matters
        other = Condition(condition, **{name: condition[name] * 2 + 1})
        assert not torch.allclose(method.predict(x, 300, other), plain, atol=1e-4), name


def rows_asked(
    method: DynamiCrafterMethod, scale: float, image_scale: float | None, **sample: Any
) -> tuple[Tensor, list[int]]:
    changed = {"image_guidance_scale": image_scale, "eta": 0.0, **sample}
    asked = type(method)(method.unet, method.image_proj, method.schedule, method.sample.model_copy(update=changed))
    untold = Condition(text=torch.zeros(1, 5, WIDTH), image_tokens=torch.zeros(1, IMAGE_TOKENS, WIDTH))
    sampling = asked.sampling(condition_of(1), untold, torch.ones(1, 4, FRAMES, 4, 6), 2, scale)
    rows, query = [], next(sampling)
    while True:
        rows.append(len(query.x))
        try:
            query = sampling.send(asked.predict(query.x, query.t, query.condition))
        except StopIteration as end:
            return end.value, rows


@pytest.mark.parametrize(
    ("scale", "image_scale", "rows"), [(7.5, None, 2), (7.5, 7.5, 2), (7.5, 2.0, 3), (1.0, None, 1), (1.0, 4.0, 3)]
)
def test_guidance_asks_the_branches_that_it_needs(
    method: DynamiCrafterMethod, scale: float, image_scale: float | None, rows: int
) -> None:
    assert rows_asked(method, scale, image_scale)[1] == [rows, rows]


def test_multi_condition_guidance_is_equation_5(method: DynamiCrafterMethod) -> None:
    video, _ = rows_asked(method, 5.0, 2.0)
    full = condition_of(1)
    alone = Condition(full, text=torch.zeros(1, 5, WIDTH))
    nothing = Condition(alone, image_tokens=torch.zeros(1, IMAGE_TOKENS, WIDTH))

    def denoise(x: Tensor, t: int) -> Tensor:
        e_u, e_img, e_c = (method.predict(x, t, each) for each in (nothing, alone, full))
        return e_u + 2.0 * (e_img - e_u) + 5.0 * (e_c - e_img)

    from cinemo.diffusion.ddim import ddim_sample

    expected = ddim_sample(denoise, torch.ones(1, 4, FRAMES, 4, 6), method.schedule, 2)
    torch.testing.assert_close(video, expected, atol=1e-4, rtol=1e-4)


def test_the_factor_of_the_last_step_can_be_divided_out(recipe: DynamiCrafterRecipe) -> None:
    wide = override(
        recipe,
        [
            "diffusion.prediction=v",
            "diffusion.zero_terminal_snr=true",
            "diffusion.dynamic_rescale=0.7",
            "sample.spacing=trailing",
            "sample.guidance_rescale=0.7",
        ],
    )
    made = build_method(wide, random_networks(wide)).eval().requires_grad_(False)
    assert isinstance(made, DynamiCrafterMethod)
    as_published, _ = rows_asked(made, 3.0, None)
    divided, _ = rows_asked(made, 3.0, None, undo_rescale=True)
    assert made.schedule.clean_scale is not None
    torch.testing.assert_close(divided * float(made.schedule.clean_scale[499]), as_published)
    with pytest.raises(InputError, match="has dynamic_rescale, which only ddim can"):
        AnimateRequest(np.zeros((8, 8, 3), np.uint8), "", solver="multistep").settings(wide)


def test_a_fresh_start_leaves_the_text_to_video_model_as_it_is(recipe: DynamiCrafterRecipe, tmp_path: Path) -> None:
    config = recipe.model.unet.model_copy(update={"in_channels": 4, "image_cross_attention": False})
    torch.manual_seed(1)
    base = DynamiCrafterUNet(**config.model_dump())
    for parameter in base.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    save_network(base, tmp_path)
    begun = override(recipe, [f"train.init={tmp_path}"])
    networks = {
        part: DynamiCrafterMethod.load_network(begun, part, str(tmp_path), torch.float32, base=True)
        for part in DynamiCrafterMethod.parts
    }
    made, x, t = build_method(begun, networks), torch.randn(2, 4, FRAMES, 4, 6), torch.tensor([10, 700])
    for seed in range(2):
        condition = condition_of(2, seed)
        expected = base(x, t, condition["text"], None, condition["frame_rate"])
        torch.testing.assert_close(made.predict(x, t, condition), expected, atol=1e-5, rtol=1e-5)
        other = Condition(condition, image=condition["image"] + 1, image_tokens=condition["image_tokens"] * 3)
        torch.testing.assert_close(made.predict(x, t, other), expected, atol=1e-5, rtol=1e-5)
    drawn = load_unet(recipe.model.unet, str(tmp_path), torch.float32, base="video", image_init="published")
    as_published = build_method(begun, networks | {"unet": drawn})
    assert not torch.allclose(as_published.predict(x, t, condition), expected, atol=1e-4)


def test_what_learns_in_each_stage(recipe: DynamiCrafterRecipe) -> None:
    def learning(trainable: str) -> set[str]:
        made = build_method(recipe)
        mark_trainable(made, override(recipe, [f"train.trainable={trainable}"]).train)
        return {name for name, parameter in made.named_parameters() if parameter.requires_grad}

    every, spatial, context, temporal = map(learning, ("all", "spatial", "context", "temporal"))
    assert spatial | temporal == every
    assert not spatial & temporal
    assert context < spatial
    assert {name for name in context if name.startswith("unet.")} == {
        name for name in every if name.rpartition(".attn2.")[2].split(".")[0] in ("to_k_ip", "to_v_ip")
    }
    assert any(name.endswith(".alpha") for name in spatial)
    assert {name for name in every if name.startswith("image_proj.")} < context
    assert {"unet.input_blocks.0.0.weight", "unet.fps_embedding.0.weight"} < spatial
    assert any(name.startswith("unet.init_attn.") for name in temporal)
    assert any(".temopral_conv." in name for name in temporal)


@pytest.mark.slow
def test_it_learns(recipe: DynamiCrafterRecipe) -> None:
    torch.manual_seed(0)
    whole = override(recipe, ["train.condition_dropout=0", "diffusion.prediction=v"])
    made, frozen = build_method(whole), FrozenStates.of(whole)
    samples = [sample_of(recipe, key, frames=jpeg_strip(pictures(recipe))) for key in "ab"]
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    losses = []
    for step in range(24):
        batch = on_device(host_batch(samples, step % 4, whole), frozen, torch.device("cpu"), torch.float32)
        loss = made(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def bundle_of(recipe: Recipe, directory: Path) -> ModelBundle:
    save_bundle(directory, recipe, random_networks(recipe), {"made": "by a test"})
    return load_bundle(directory, "cpu")


@pytest.fixture(scope="module")
def bundle(recipe: DynamiCrafterRecipe, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return bundle_of(recipe, tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def between(interpolation: InterpolationRecipe, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return bundle_of(interpolation, tmp_path_factory.mktemp("interp") / "b")


PICTURE = np.linspace(0, 255, 40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8)


def test_a_bundle_holds_the_image_encoder_and_animates(bundle: ModelBundle) -> None:
    assert bundle.image is not None
    assert (
        json.loads((Path(bundle.location) / "recipe.json").read_text())["encoders"]["image_encoder"] == "image_encoder"
    )
    first = animate(bundle, AnimateRequest(PICTURE, "a dog", seed=3))
    assert first.frames_FHWC.shape == (FRAMES, *SIZE, 3)
    assert first.settings["frame_rate"] == 3
    again = animate(bundle, AnimateRequest(PICTURE, "a dog", seed=3))
    np.testing.assert_array_equal(first.frames_FHWC, again.frames_FHWC)
    for change in ({"seed": 4}, {"frame_rate": 6}, {"image_guidance_scale": 1.5}, {"reuse_features": 2}):
        other = animate(bundle, AnimateRequest(PICTURE, "a dog", **({"seed": 3} | change)))
        assert not torch.equal(other.latents_CFHW, first.latents_CFHW), change
    fresh = bundle.method.sample.model_copy(update={"eta": 1.0})
    assert isinstance(bundle.method, DynamiCrafterMethod)
    noisy = DynamiCrafterMethod(bundle.method.unet, bundle.method.image_proj, bundle.method.schedule, fresh)
    sampling, calls = noisy.prepare(bundle.recipe, bundle.encoders, {"image": PICTURE}, dict(first.settings))
    assert calls == 3
    assert not torch.allclose(run(noisy, sampling)[0], first.latents_CFHW)


def test_two_pictures_stand_at_their_own_ends(between: ModelBundle) -> None:
    shown = visual_detail(torch.ones(1, 4, 2, 2), 5, 2 * torch.ones(1, 4, 2, 2))
    assert shown[0, 0, :, 0, 0].tolist() == [1, 0, 0, 0, 2]
    made = animate(between, AnimateRequest(PICTURE, "a dog", inputs={"last_image": 255 - PICTURE}))
    other = animate(between, AnimateRequest(PICTURE, "a dog", inputs={"last_image": PICTURE}))
    assert made.frames_FHWC.shape[0] == FRAMES
    assert not torch.equal(made.latents_CFHW, other.latents_CFHW)
    assert "last_image_sha256" in made.settings


def test_a_loop_leaves_out_its_last_frame_and_has_one_picture_at_both_ends(between: ModelBundle) -> None:
    loop = animate(between, AnimateRequest(PICTURE, "a dog"))
    assert len(loop.frames_FHWC) == FRAMES - 1 == loop.settings["frames"]
    assert loop.settings["loop"] is True
    method = between.method
    assert isinstance(method, InterpolationMethod)
    given = method.given(between.recipe, between.encoders, {"image": PICTURE}, {"seed": 0, "loop": True})
    assert torch.equal(given["image"], given["last_image"])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"frame_rate": 61}, "frame_rate is 61, expected a number 1..60"),
        ({"motion_bucket": 3}, "motion_bucket: interp-32x48 has no such control; it has negative_prompt, seed"),
        ({"loop": False}, "loop: is off, but there is no last_image"),
        ({"loop": True, "inputs": {"last_image": PICTURE}}, "loop: a loop ends where it began, but there is"),
    ],
)
def test_what_interpolation_is_asked_wrongly_is_one_line(
    interpolation: InterpolationRecipe, ask: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        AnimateRequest(PICTURE, "", **ask).settings(interpolation)
    assert "\n" not in str(caught.value)


def test_a_loop_may_be_asked_for_by_name(interpolation: InterpolationRecipe) -> None:
    assert AnimateRequest(PICTURE, "", loop=True).settings(interpolation)["loop"] is True
    assert AnimateRequest(PICTURE, "").settings(interpolation)["loop"] is True
    given = AnimateRequest(PICTURE, "", inputs={"last_image": PICTURE}, loop=False)
    assert given.settings(interpolation)["loop"] is False
    assert InterpolationMethod.controls_type.defaults(interpolation)["loop"] is True  # what the page shows


def test_a_last_image_for_a_method_that_has_none(recipe: DynamiCrafterRecipe) -> None:
    with pytest.raises(InputError, match="last_image: random-32x48 takes no such input; it takes image"):
        AnimateRequest(PICTURE, "", inputs={"last_image": PICTURE}).settings(recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.resampler.video_length=5", "video_length is 5, expected data.frames = 6, or null"),
        ("model.resampler.output_dim=8", "output_dim is 8, expected model.unet.context_dim = 32"),
        ("train.prompt_dropout=0.1", "train.prompt_dropout"),
        ("train.condition_dropout=0.4", "train.condition_dropout"),
        ("model.block_out_channels=[32]", "unknown key"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(recipe: DynamiCrafterRecipe, change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(recipe, [change])


def test_a_missing_image_encoder_is_one_line(recipe: DynamiCrafterRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"encoders\.image_encoder is not set, expected the directory of a CLIPVision"):
        FrozenStates.of(override(recipe, ["encoders.image_encoder=null"]))
    with pytest.raises(InputError, match="nowhere"):
        FrozenStates.of(override(recipe, [f"encoders.image_encoder={tmp_path}/nowhere"]))


def test_levels_of_motion_are_strides_or_frames_in_a_second(recipe: DynamiCrafterRecipe) -> None:
    assert [at_motion(recipe, level)["frame_rate"] for level in (0, 10, 19)] == [1, 3.63, 6]
    told = override(recipe, ["model.rate=fps"])
    assert [at_motion(told, level)["frame_rate"] for level in (0, 19)] == [24, 4]
    assert DynamiCrafterMethod.controls_like(recipe, sample_of(recipe)) == {"frame_rate": 4}
    assert DynamiCrafterMethod.controls_like(told, sample_of(recipe)) == {"frame_rate": 6}


@pytest.mark.parametrize("ask", [lambda m, e, v: m.asked(e, v, PICTURE[:32, :48], ["a", "b"], [{"frame_rate": 1}] * 2)])
def test_prompts_can_be_compared_in_one_step(bundle: ModelBundle, ask: Callable[..., Condition]) -> None:
    video = torch.randn(1, 4, FRAMES, 4, 6)
    condition = ask(bundle.method, bundle.encoders, video)
    assert torch.equal(condition["image"][1], video[0, :, 0])
    target = bundle.method.target(LatentBatch(video, condition))
    answers = bundle.method.predict(target.expand(2, *target.shape[1:]), 999, condition)
    assert answers.shape == (2, 4, FRAMES, 4, 6)
    assert not torch.allclose(answers[0], answers[1])


def test_a_published_checkpoint_becomes_a_bundle_and_back(recipe: DynamiCrafterRecipe, tmp_path: Path) -> None:
    networks, file = random_networks(recipe), tmp_path / "model.ckpt"
    save_published(file, networks["unet"], networks["image_proj"], stride_names=True)
    # As they are published: the frozen encoders lie in the same table.
    table = torch.load(file, weights_only=True)
    table["state_dict"]["first_stage_model.encoder.conv_in.weight"] = torch.zeros(3)
    torch.save(table | {"global_step": 7}, file)
    line = from_published("dynamicrafter", str(file), str(tmp_path / "bundle"), recipe)
    assert "motion ids" not in line
    loaded = load_bundle(tmp_path / "bundle", "cpu")
    for part, network in networks.items():
        own = loaded.method.networks[part].state_dict()
        for name, value in network.state_dict().items():
            assert torch.equal(own[name], value), name
    as_published(str(tmp_path / "bundle"), str(tmp_path / "again.ckpt"))
    written = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    before = {name: value for name, value in table["state_dict"].items() if not name.startswith("first_stage")}
    assert written.keys() == before.keys()
    assert "model.diffusion_model.framestride_embed.0.weight" in written
    assert all(torch.equal(written[name], value) for name, value in before.items())

    for change, message in (
        (
            "model.unet.image_cross_attention_scale_learnable=false",
            "a checkpoint of another model: it has learned scales",
        ),
        ("model.unet.model_channels=64", "weights do not fit the recipe's model"),
        ("model.resampler.depth=2", "weights do not fit the recipe's model"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            from_published("dynamicrafter", str(file), str(tmp_path / "other"), override(recipe, [change]))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"again\.ckpt: exists; choose another --output"):
        as_published(str(tmp_path / "bundle"), str(tmp_path / "again.ckpt"))


def test_losses_are_weighted_by_timestep_where_the_recipe_asks_for_it(recipe: DynamiCrafterRecipe) -> None:
    weighted = build_method(override(recipe, ["train.min_snr_gamma=5"]), random_networks(recipe))
    batch, noise = LatentBatch(torch.randn(2, 4, FRAMES, 4, 6), condition_of(2)), torch.randn(2, 4, FRAMES, 4, 6)
    t_B = torch.tensor([3, 900])
    with torch.no_grad():
        plain = weighted(batch, t_B, noise, reduction="none", weighted=False)
        got = weighted(batch, t_B, noise, reduction="none")
    torch.testing.assert_close(got, plain * weighted.schedule.min_snr_weights(t_B, 5))
    assert not torch.allclose(got, plain)
