"""What may be asked of a method: checked, filled in from a recipe, and shown as flags and schemas."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinemo import cli
from cinemo.methods import Input, at_motion, controls_of, method_named, served_controls
from cinemo.methods.cinemo import CinemoControls, CinemoMethod
from cinemo.methods.controls import Controls, check_names, control, expectation
from cinemo.methods.dynamicrafter import DynamiCrafterControls
from cinemo.methods.longer import LongerControls
from cinemo.methods.sampling_controls import FastSampling
from cinemo.recipes import RECIPES
from cinemo.recipes.cinemo import cinemo_tiny
from cinemo.recipes.dynamicrafter import dynamicrafter_tiny
from cinemo.recipes.longer import longer_tiny
from cinemo.serving.http.form import form_schema
from cinemo.types import InputError

TINY = cinemo_tiny()
EVERY = list(dict.fromkeys(method_named(make().method) for make in RECIPES.values()))


def flags(method: Any) -> argparse.ArgumentParser:
    parser = cli.parser(None, recipe=None)
    cli.add_controls(parser, method)
    cli.add_inputs(parser, method)
    return parser


@pytest.mark.parametrize("method", EVERY)
def test_flags_form_and_settings_have_every_control(method: Any) -> None:
    infos = controls_of(method.controls_type)
    given_flags = vars(flags(method).parse_args([]))
    assert infos.keys() <= given_flags.keys()
    assert {info.alias for info in served_controls(TINY).values()} <= form_schema(TINY)["properties"].keys()
    assert all(info.title and info.description for info in infos.values())
    assert all(
        info.minimum is not None and info.maximum is not None
        for info in infos.values()
        if info.kind in ("integer", "number")
    )
    # Flags that nobody gives are the recipe's defaults.
    own = {name: value for name, value in given_flags.items() if name in infos}
    assert method.controls_type.of(own, "x").settings(TINY) == method.controls_type().settings(TINY)


@given(
    bucket=st.integers(0, 19), steps=st.integers(1, 999), scale=st.floats(1, 50), seed=st.integers(0, 2**63 - 1),
    interval=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), dct_init=st.booleans(),
)  # fmt: skip
def test_flags_stored_jobs_and_python_say_the_same(
    bucket: int, steps: int, scale: float, seed: int, interval: list[float], dct_init: bool
) -> None:
    """A control has one meaning, whether it comes as text, as JSON or as a value of NumPy's."""
    words = [
        f"--motion-bucket={bucket}", f"--steps={steps}", f"--guidance-scale={scale!r}", f"--seed={seed}",
        "--dct-init" if dct_init else "--no-dct-init", "--guidance-interval", *map(repr, interval),
    ]  # fmt: skip
    parsed = vars(flags(CinemoMethod).parse_args(words))
    as_flags = CinemoControls.of({name: parsed[name] for name in CinemoControls.model_fields}, "x")
    kept = as_flags.settings(TINY)
    assert CinemoControls.of(kept, "x").settings(TINY) == kept
    plain = CinemoControls.of({"motion_bucket": np.int64(bucket), "steps": np.int32(steps), "seed": seed}, "x")
    assert plain.settings(TINY)["motion_bucket"] == kept["motion_bucket"] == bucket
    text = CinemoControls.model_validate(
        {"guidance_interval": ",".join(map(repr, interval)), "dct_init": str(dct_init)}
    )
    assert text.settings(TINY)["guidance_interval"] == kept["guidance_interval"] == interval
    assert text.settings(TINY)["dct_init"] is dct_init


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"motion_bucket": 20}, "motion_bucket is 20, expected a whole number 0..19"),
        ({"motion_bucket": True}, "motion_bucket is True, expected a whole number 0..19"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high', expected a number 1..50"),
        ({"solver": "euler"}, "solver is 'euler', expected ddim or multistep"),
        ({"dct_init": 1}, "dct_init is 1, expected true or false"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval is (0.9, 0.1); expected 0 <= low <= high <= 1"),
        ({"guidance_interval": (0.9,)}, "guidance_interval is (0.9,), expected two numbers"),
        ({"seed": 2**63}, f"seed is {2**63}, expected a whole number 0..2^63 - 1"),
        ({"motion_bucket": 3, "motion_strength": 0.3}, "motion_bucket and motion_strength are both given"),
        ({"speed": 3}, "speed: tiny has no such control; it has negative_prompt, seed, steps"),
        ({"negative_prompt": "a\0b"}, "negative_prompt: holds a null character"),
    ],
)  # fmt: skip
def test_a_wrong_control_is_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as caught:
        CinemoControls.of(values, "tiny")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_share_of_motion_is_a_bucket_and_a_source_brings_its_own_defaults() -> None:
    assert CinemoControls(motion_strength=1.0).settings(TINY)["motion_bucket"] == 19
    assert "motion_strength" not in CinemoControls(motion_strength=1.0).settings(TINY)
    edits = CinemoControls(source_prompt="rain").settings(TINY, ["source"])
    assert (edits["motion_bucket"], edits["guidance_scale"], edits["source_prompt"]) == (None, 1.0, "rain")
    assert CinemoControls(guidance_scale=5.0).settings(TINY, ["source"])["guidance_scale"] == 5.0
    assert "source_prompt" not in CinemoControls().settings(TINY)


def test_a_strength_is_linear_in_measured_motion_where_the_bundle_was_calibrated() -> None:
    measured = {"values": [0, 10, 19], "curve": [0.1, 0.1, 0.4], "interval": [[0.0] * 3, [1.0] * 3]}
    half = CinemoControls(motion_strength=0.5)
    assert half.settings(TINY)["motion_bucket"] == 10
    assert half.calibrated(TINY, measured).settings(TINY)["motion_bucket"] == 14
    assert CinemoControls(motion_bucket=3).calibrated(TINY, measured).settings(TINY)["motion_bucket"] == 3
    older = {"buckets": [0, 19], "mean_motion": [0.1, 0.4]}
    assert half.calibrated(TINY, older).settings(TINY)["motion_bucket"] == 10

    recipe = dynamicrafter_tiny()  # told the interval of frames, 3 to 10
    strong = DynamiCrafterControls(motion_strength=1.0)
    assert strong.settings(recipe)["frame_rate"] == 10
    saturated = {"values": [3, 6, 10], "curve": [0.1, 0.3, 0.3]}
    two_thirds = DynamiCrafterControls(motion_strength=0.67).calibrated(recipe, saturated).settings(recipe)
    assert two_thirds["frame_rate"] == pytest.approx(5, abs=0.2)  # between the values that were measured
    with pytest.raises(ValueError, match="frame_rate and motion_strength are both given"):
        DynamiCrafterControls(motion_strength=1.0, frame_rate=3)


def test_a_strength_that_was_measured_says_how_much_will_move_and_in_which_interval() -> None:
    measured = {"values": [0, 10, 19], "curve": [0.1, 0.2, 0.38], "interval": [[0.0, 0.1, 0.2], [0.2, 0.3, 0.48]]}
    told = CinemoControls(motion_strength=1.0).predicted(TINY, measured, None)
    assert told == {"predicted_motion": {"mean": 0.38, "low": 0.2, "high": 0.48}}
    half = CinemoControls(motion_strength=0.5)
    assert half.calibrated(TINY, measured).settings(TINY)["motion_bucket"] == 12  # between two that were measured
    assert half.predicted(TINY, measured, None)["predicted_motion"] == {"mean": 0.24, "low": 0.1222, "high": 0.34}
    assert CinemoControls(motion_bucket=19).predicted(TINY, measured, None) == {}
    assert half.predicted(TINY, None, None) == {}
    # Videos sampled otherwise than those that were measured move otherwise.
    assert CinemoControls(motion_strength=0.5, steps=2).predicted(TINY, measured, None) == {}
    assert CinemoControls(motion_strength=0.5, steps=2).predicted(TINY, measured | {"steps": 2}, None) != {}
    assert half.predicted(TINY, measured | {"steps": 2}, None) == {}
    assert CinemoControls(motion_strength=0.5, guidance_scale=9.0).predicted(TINY, measured, None) == {}
    assert CinemoControls(motion_strength=0.5, seed=7).predicted(TINY, measured, None) != {}

    frames_a_second = {"values": [8, 4], "curve": [0.1, 0.3], "interval": [[0.05, 0.2], [0.2, 0.4]]}
    recipe = dynamicrafter_tiny()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"rate": "fps"})})
    most = DynamiCrafterControls(motion_strength=1.0).predicted(recipe, frames_a_second, None)
    assert most == {"predicted_motion": {"mean": 0.3, "low": 0.2, "high": 0.4}}

    speeds = {"values": [0, 1200], "curve": [0.0, 0.1], "interval": [[0.0, 0.05], [0.0, 0.2]]}
    for arrows, said in ((None, True), (((0.0, 0.0, 5.0, 5.0),), False)):
        asked = LongerControls(motion_strength=1.0, arrows=arrows)
        assert ("predicted_motion" in asked.predicted(longer_tiny(), speeds, None)) == said, arrows


def test_a_method_says_which_control_is_motion_and_which_ways_to_be_fast_it_has() -> None:
    assert [at_motion(TINY, level) for level in (0, 19)] == [{"motion_bucket": 0}, {"motion_bucket": 19}]
    assert Controls.motion is None
    assert FastSampling.model_fields.keys() - Controls.model_fields.keys() == {
        "solver", "guidance_interval", "reuse_features", "quality",
    }  # fmt: skip
    assert expectation(Controls, "steps") == "a whole number 1..999"


def test_names_that_an_interface_needs_cannot_be_controls_or_inputs() -> None:
    class Seconds(Controls):
        seconds: float | None = control(None, "how long", ge=1, le=10)

    class Mixed(Controls):
        pace: int | str | None = control(None, "two kinds")

    with pytest.raises(TypeError, match="Seconds: seconds: taken by an interface or used twice"):
        check_names(Seconds, [])
    with pytest.raises(TypeError, match="Controls: image: taken"):
        check_names(Controls, ["image"])
    with pytest.raises(TypeError, match="Controls: seed: taken"):
        check_names(Controls, ["seed"])
    with pytest.raises(TypeError, match=r"control pace: .* is more than one type"):
        check_names(Mixed, [])


def test_a_flag_without_both_limits_and_with_a_per_cent_sign_has_a_help(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(Controls):
        pace: int | None = control(None, "50% of it", le=10)

    monkeypatch.setattr(CinemoMethod, "controls_type", Half)
    monkeypatch.setattr(CinemoMethod, "inputs", {"end": Input("image", "at 50% of it")})
    text = flags(CinemoMethod).format_help()
    assert "--pace" in text
    assert "at 50% of it" in text


def test_http_has_no_control_of_a_video_that_it_does_not_take() -> None:
    assert "source_prompt" in controls_of(CinemoControls)
    assert "source_prompt" not in served_controls(TINY)
    assert "source_prompt" not in form_schema(TINY)["properties"]
