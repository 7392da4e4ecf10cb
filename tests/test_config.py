"""Recipes: complete, frozen, round-tripping, and strict about what they are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo.config import Recipe, keys
from cinemo.methods.cinemo import CinemoRecipe, CinemoTrain
from cinemo.recipes import RECIPES, load_recipe, override, parse_recipe
from cinemo.recipes.cinemo import cinemo_320x512
from cinemo.recipes.dynamicrafter import dynamicrafter_256
from cinemo.recipes.trip import trip_256, trip_w_256
from cinemo.types import InputError


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_own_json(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json())
    assert load_recipe(str(path)) == recipe
    assert recipe.name == name


def test_the_paper_is_the_paper() -> None:
    recipe = load_recipe("cinemo-320x512")
    assert recipe.data.size == (320, 512)
    assert (recipe.data.frames, recipe.data.frame_interval) == (16, (3, 10))
    assert (recipe.train.workers, recipe.train.global_batch, recipe.train.prompt_dropout) == (8, 80, 0.5)
    assert (recipe.sample.steps, recipe.sample.guidance_scale, recipe.sample.solver) == (50, 7.5, "ddim")
    train = recipe.train
    assert isinstance(train, CinemoTrain)
    assert train.workers * train.gpus_per_worker == 8
    assert (train.weight_decay, train.betas, train.trainable) == (0.0, (0.9, 0.999), "all")
    assert (train.image_dropout, train.motion_dropout, train.noise_offset, train.min_snr_gamma) == (0, 0, 0, None)
    assert train.init is not None
    assert "lavie" in train.init
    assert recipe.diffusion.prediction == "epsilon"


@pytest.mark.parametrize("made", [cinemo_320x512, dynamicrafter_256, trip_256])
def test_every_number_of_a_paper_s_recipe_has_its_source(made: Callable[[], Recipe]) -> None:
    """Each key is named once in the docstring, under where its value is from."""
    named = re.findall(
        r"\b(?:data|encoders|model|diffusion|train|sample)\.[a-z_]+(?:\.[a-z_]+)?|``compile``", made.__doc__ or ""
    )
    expected = [key for key in keys(type(made())) if key not in ("name", "method", "compile")]
    assert sorted(named) == sorted([*expected, "``compile``"])


def test_trip_s_paper_is_the_paper() -> None:
    recipe = trip_256()
    assert (recipe.data.size, recipe.data.frames, recipe.sample.fps) == ((256, 256), 16, 4)
    diffusion = recipe.diffusion
    assert (diffusion.train_steps, diffusion.beta_start, diffusion.beta_end) == (1000, 1e-4, 2e-2)
    assert (diffusion.beta_schedule, diffusion.prediction, diffusion.data_scale) == ("linear", "epsilon", 1)
    train = recipe.train
    assert (train.lr, train.fusion_lr) == (2e-6, 2e-4)
    assert train.workers * train.gpus_per_worker == 8
    assert train.weight_decay > 0  # AdamW
    assert (recipe.model.layout, recipe.model.tnf_space, recipe.model.tnf_ref_scale) == ("trip", "noise", False)
    assert (recipe.sample.steps, recipe.sample.solver, recipe.sample.eta) == (50, "ddim", 0)
    linear = trip_w_256()
    assert (linear.model.lambda_start, linear.model.lambda_end) == (1, 0)
    same = {"name", "method", "model", "train"}
    assert linear.model_dump(exclude=same) == recipe.model_dump(exclude=same)
    assert linear.train.model_dump() == train.model_dump(exclude={"fusion_lr"})


def test_set_reads_json_values_and_plain_strings() -> None:
    recipe = load_recipe("cinemo-tiny", ["train.lr=1e-3", "data.size=[64, 64]", "encoders.vae=s3://bucket/vae"])
    assert (recipe.train.lr, recipe.data.size, recipe.encoders.vae) == (1e-3, (64, 64), "s3://bucket/vae")


def test_one_assignment_may_need_another() -> None:
    recipe = load_recipe("cinemo-tiny", ["train.workers=1", "train.global_batch=4", "train.micro_batch=2"])
    assert recipe.train.global_batch == 4


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean train.lr?"),
        ("lr=1", "did you mean train.lr?"),
        ("train.lr", "expected dotted.key=value"),
        ("train.lr=fast", "train.lr: Input should be a valid number"),
        ("train.lr=-1", "train.lr: Input should be greater than 0"),
        ("train.global_batch=7", "multiple of workers x micro_batch"),
        ("data.size=[60, 96]", "expected multiples of 8"),
        ("data.frame_interval=[5, 3]", "expected 1 <= low <= high"),
        ("data.bucket_edges=[0.5]", "expected 19"),
        ("train=3", "train"),
    ],
)
def test_a_wrong_assignment_is_one_line_that_names_the_key(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("cinemo-tiny", [assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_recipes_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one of cinemo-320x512"):
        load_recipe("cinemo-huge")
    with pytest.raises(InputError, match="no such file"):
        load_recipe(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_recipe(str(tmp_path / "broken.json"))
    (tmp_path / "extra.json").write_text(json.dumps({"name": "x", "data": {"framez": 3}}))
    with pytest.raises(InputError, match=r"data\.framez.*data\.frames"):
        load_recipe(str(tmp_path / "extra.json"))


@given(st.sampled_from(keys(CinemoRecipe)))
def test_every_listed_key_can_be_set_to_its_own_value(key: str) -> None:
    recipe = load_recipe("cinemo-tiny")
    value: object = recipe.model_dump(mode="json")
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    assert override(recipe, [f"{key}={json.dumps(value)}"]) == recipe


def test_recipes_are_frozen() -> None:
    recipe = parse_recipe({"name": "x"}, "test")
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "y"  # type: ignore[misc]
