"""The fingerprint covers what decides a sample's bytes, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cinemo.config import Recipe, keys
from cinemo.data.dataset import identity
from cinemo.data.dataset.identity import differences, fingerprint
from cinemo.methods.cinemo import CinemoRecipe
from cinemo.recipes import override

EDGES = [round(0.5 + k * 0.02, 3) for k in range(19)]
# Another value for every recipe key that decides bytes (or a share of an accelerator, which decides the precision).
COVERED: dict[str, Any] = {
    "data.frames": 7,
    "data.size": [32, 56],
    "data.other_shapes": [[5, 32, 32]],
    "data.frame_interval": [1, 4],
    "data.views": 2,
    "data.seed": 1,
    "data.decoder": "decord",
    "data.ssim": "rgb",
    "data.scores": True,
    "data.encode_gpus": 1.0,
    "encoders.latent": "mode",
}
# And for those that do not. How shards are cut is part of the plan's identity; fields have fingerprints of their own.
UNCOVERED: dict[str, Any] = {
    "data.clips_per_shard": 5,
    "data.bucket_edges": EDGES,
    "data.max_quarantine_share": 0.5,
    "data.encode_batch": 4,
    "data.encode_actors": 3,
    "data.decode_cpus": 2.0,
    "data.decode_tasks": 7,
    "data.wait_for_nodes": 3.0,
    "data.decode_resource": "decode",
    "data.encode_resource": "encode",
    "data.clip_timeout": 5.0,
    "data.clip_memory": 1.0,
    "data.fields": ["text_states", "flow"],
    "encoders.text_encoder": "nowhere",
    "encoders.tokenizer": "nowhere",
    "encoders.image_encoder": "nowhere",
    "encoders.flow": "nowhere",
    "encoders.vae_decoder": "nowhere",
    "encoders.normalize": True,
    "encoders.latents_mean": None,
    "encoders.latents_std": None,
    "name": "another",
    "compile": True,
    "train.lr": 0.5,
    "train.seed": 5,
    "sample.steps": 3,
    "diffusion.prediction": "epsilon",
}
# Parts that precompute never looks at, and keys whose effect has a test of its own.
ELSEWHERE = ("method", "encoders.vae", "model.", "diffusion.", "train.", "sample.")


def changed(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    return override(recipe, [f"{name}={json.dumps(value)}" for name, value in values.items()])


@given(
    one=st.sets(st.sampled_from(sorted(COVERED | UNCOVERED))),
    other=st.sets(st.sampled_from(sorted(COVERED | UNCOVERED))),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equal_exactly_where_all_covered_keys_are(small_recipe: Recipe, one: set[str], other: set[str]) -> None:
    values = COVERED | UNCOVERED
    (a, there), (b, here) = (
        fingerprint(changed(small_recipe, {name: values[name] for name in names})) for names in (one, other)
    )
    covered = (one ^ other) & COVERED.keys()
    assert (a == b) == (not covered)
    assert bool(differences(there, here)) == bool(covered)


def test_every_key_of_a_recipe_is_sorted_here() -> None:
    """A new key must be put into one of the tables above: forgotten in a fingerprint, it would mix datasets."""
    known = COVERED | UNCOVERED
    assert [key for key in keys(CinemoRecipe) if key not in known and not key.startswith(ELSEWHERE)] == []


@pytest.mark.parametrize(
    ("module", "name", "value", "field"),
    [
        (identity, "SAMPLE_VERSION", 99, "sample_version"),
        (identity, "SCHEMA_VERSION", 99, "schema"),
        (identity, "RESIZE", "squeezed", "resize"),
        (identity, "INTERVAL_POLICY", "always 3", "interval_policy"),
        ("cinemo.media.motion", "_WINDOW", 7, "ssim_window"),
        ("cinemo.media.motion", "_SIGMA", 2.0, "ssim_sigma"),
        ("cinemo.media.motion", "_LUMA", [[0.2126, 0.7152, 0.0722]], "ssim_luma"),
    ],
)
def test_what_the_code_decides_is_covered_by_name(
    small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any, field: str
) -> None:
    before = fingerprint(small_recipe)
    monkeypatch.setattr(f"{module}.{name}" if isinstance(module, str) else f"{module.__name__}.{name}", value)
    after = fingerprint(small_recipe)
    assert before[0] != after[0]
    (difference,) = differences(before[1], after[1])
    assert difference.startswith(f"{field} is ")


def test_weights_and_scaling_are_covered_and_where_they_lie_is_not(small_recipe: Recipe, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_recipe.encoders.vae, tmp_path / "vae"))
    elsewhere = override(small_recipe, [f"encoders.vae={copy}"])
    there = fingerprint(small_recipe)

    config = json.loads((copy / "config.json").read_text())
    (copy / "README.md").write_text("nothing is read from this")
    (copy / "config.json").write_text(json.dumps({**config, "_diffusers_version": "0.0.1"}))
    assert fingerprint(elsewhere) == there

    (copy / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    found = differences(there[1], fingerprint(elsewhere)[1])
    assert f"vae_scaling is {config['scaling_factor']} there and 0.5 here" in found

    (copy / "config.json").write_text(json.dumps(config))
    weights = load_file(copy / "diffusion_pytorch_model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-6
    save_file(weights, copy / "diffusion_pytorch_model.safetensors")
    (difference,) = differences(there[1], fingerprint(elsewhere)[1])
    assert difference.startswith("vae is ")


def test_differences_name_fields() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b is 2 there and 3 here"]
    assert differences({"a": 1}, {"a": 1, "c": "x"}) == ["c is None there and 'x' here"]
