"""Recipes: complete, frozen, round-tripping, and strict about what they are told."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo import tracking
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
    assert load_recipe(str(path)) == recipe.with_lanes()
    assert recipe.name == name


def test_any_number_of_workers_that_divides_the_batch_will_do() -> None:
    paper = load_recipe("cinemo-320x512")
    assert paper.train.lanes is None
    assert json.loads(paper.to_json())["train"]["lanes"] == 8, "the recipes of bundles keep their bytes"
    for workers in (1, 5, 10, 16, 20, 40, 80):
        override(paper, [f"train.workers={workers}", "train.micro_batch=1"])
    for batch, lanes in ((64, 8), (36, 6), (22, 2), (7, 7), (83, 1)):
        settings = [f"train.global_batch={batch}", "train.workers=1", "train.micro_batch=1"]
        assert override(paper, settings).train.reading_lanes == lanes
    with pytest.raises(InputError, match=r"lanes is 3, expected a divisor of global_batch \(80\); train.lanes=null"):
        override(paper, ["train.lanes=3"])


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
        r"\b(?:data|encoders|model|diffusion|train|sample)\.[a-z_0-9]+(?:\.[a-z_]+)?|``compile``", made.__doc__ or ""
    )
    # DeepSpeed's own settings have one source together.
    every = dict.fromkeys(re.sub(r"^train\.deepspeed\..*", "train.deepspeed", key) for key in keys(type(made())))
    expected = [key for key in every if key not in ("name", "method", "compile")]
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
        ("train.micro_batch=many", "parse string as an integer or: Input should be 'auto' (got 'many')"),
        ("train.lr=-1", "train.lr: Input should be greater than 0"),
        ("train.global_batch=7", "multiple of workers x micro_batch"),
        ("data.size=[60, 96]", "expected multiples of 8"),
        ("data.frame_interval=[5, 3]", "expected 1 <= low <= high"),
        ("data.bucket_edges=[0.5]", "expected 19"),
        ("train=3", "train: has keys of its own; set one of them, as in train.betas=..."),
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


def _numbers(schema: dict[str, Any], node: dict[str, Any], key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place of a number in a recipe's JSON schema, with what is said of it there."""
    node = node | (schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else {})
    for name, inner in node.get("properties", {}).items():
        yield from _numbers(schema, inner, f"{key}.{name}" if key else name)
    for inner in node.get("anyOf", ()):
        yield from _numbers(schema, inner, key)
    for place, inner in enumerate([node["items"]] if "items" in node else node.get("prefixItems", ())):
        yield from _numbers(schema, inner, f"{key}.{place}")
    if node.get("type") in ("integer", "number") and "enum" not in node:
        yield key, node


def _every_number() -> list[tuple[str, str, dict[str, Any]]]:
    one_of_each = {type(load_recipe(name)): name for name in RECIPES}
    schemas = {name: kind.model_json_schema() for kind, name in one_of_each.items()}
    found = [(name, key, node) for name, schema in schemas.items() for key, node in _numbers(schema, schema)]
    # Of several networks that a method may be built on, the one that its recipe has.
    return [one for one in found if re.sub(r"\.\d+$", "", one[1]) in tracking.flatten(load_recipe(one[0]))]


_NUMBERS = _every_number()
# Checked against each other, not one by one; any whole number is a seed.
_PAIRS = (
    "data.size",
    "data.frame_interval",
    "sample.guidance_interval",
    "encoders.latents_mean",
    "encoders.latents_std",
)


def test_every_number_has_a_range() -> None:
    loose = {key for _, key, node in _NUMBERS if "minimum" not in node and "exclusiveMinimum" not in node}
    assert {key for key in loose if not key.startswith(_PAIRS)} == {"data.seed", "train.seed"}


@given(st.sampled_from(_NUMBERS), st.floats(1e-3, 1e6), st.booleans(), st.sampled_from([math.nan, math.inf, None]))
def test_what_lies_outside_a_range_is_refused_in_one_line(
    place: tuple[str, str, dict[str, Any]], distance: float, above: bool, no_number: float | None
) -> None:
    name, key, node = place
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    whole = node["type"] == "integer"
    step = math.ceil(distance) if whole else distance
    if no_number is not None:
        value: float = no_number
    elif above and high is not None:
        value = high + (step if "maximum" in node or whole else step - 1e-3)
    elif low is not None:
        value = low - (step if "minimum" in node or whole else step - 1e-3)
    else:
        value = 0.5 if whole else math.nan
    recipe = load_recipe(name)
    values: Any = recipe.model_dump(mode="json")
    *path, leaf = key.split(".")
    if leaf.isdigit():
        *path, leaf = path
        for part in path:
            values = values[part]
        entries = list(values[leaf] or [1.0])
        entries[min(int(key.rpartition(".")[2]), len(entries) - 1)] = value
        value_text = json.dumps(entries)
    else:
        value_text = json.dumps(value)
    with pytest.raises(InputError) as caught:
        override(recipe, [f"{'.'.join([*path, leaf])}={value_text}"])
    message = str(caught.value)
    assert "\n" not in message
    told = message.partition(": ")[2]
    assert leaf in told
    assert repr(value) in told
    assert re.search(r"should be|expected", told)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.gpus_per_worker=0.5", "train.gpus_per_worker: Input should be a multiple of 1 (got 0.5)"),
        ("train.gpus_per_worker=2", "train.gpus_per_worker: Input should be less than or equal to 1 (got 2)"),
        ("train.gpus_per_worker=-1", "train.gpus_per_worker: Input should be greater than or equal to 0 (got -1)"),
        ("train.cpus_per_worker=-2", "train.cpus_per_worker: Input should be greater than or equal to 0 (got -2)"),
        ("train.betas=[0.9, 5]", "train.betas.1: Input should be less than 1 (got 5)"),
        ("train.lr=NaN", "train.lr: Input should be a finite number"),
        ("diffusion.beta_start=0.5", "beta_start is 0.5, expected at most beta_end = 0.02"),
        ("sample.steps=1000", "sample.steps is 1000, expected 1..999 with diffusion.train_steps 1000"),
        ("sample.dct_tau=1000", "sample.dct_tau is 1000, expected less than diffusion.train_steps = 1000"),
    ],
)
def test_settings_that_cannot_work_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("cinemo-tiny", [assignment])
    assert message in str(caught.value)


def test_recipes_are_frozen() -> None:
    recipe = parse_recipe({"name": "x"}, "test")
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "y"  # type: ignore[misc]
