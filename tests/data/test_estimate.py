"""The estimate before a run: what it counts, how sure it is, what it costs, and how it compares in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cinemo.config import Recipe
from cinemo.data.manifest.manifest import read_manifest
from cinemo.data.precompute import estimate
from cinemo.data.precompute.estimate import Known, compare, plan_only
from cinemo.data.precompute.nodes import parse_machines
from cinemo.data.precompute.plan import Plan, make_plan
from cinemo.data.precompute.prices import Prices, money, read_prices
from cinemo.data.precompute.wording import plan_lines, summary_lines
from cinemo.networks.frozen import Vae
from cinemo.networks.vae_cost import encoding
from cinemo.recipes import override
from cinemo.types import InputError

CLIP = {"decode": 0.5, "score": 0.25, "encode": 1.0, "refused": False, "reason": None, "bytes": 1000}
REFUSED = {**CLIP, "encode": 0.0, "refused": True, "reason": "missing", "bytes": None}


@pytest.fixture(scope="module")
def plan(clips_folder: Path, small_recipe: Recipe) -> Plan:
    return make_plan(read_manifest(str(clips_folder)), small_recipe)


def test_plan_measures_and_writes(clips_folder: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    made = plan_only(small_recipe, str(clips_folder), str(tmp_path), prices=Prices(core_hour=0.04, gb_month=0.02))
    assert json.loads((tmp_path / "plan.json").read_text()) == made
    assert (made["clips"], made["shards"], made["measured_clips"]) == (12, 3, 12)
    assert made["refused_in_sample"] == {"unreadable": 2, "too_few_frames": 1}
    figures = made["figures"]
    assert (figures["samples"]["value"], figures["quarantine_share"]["value"]) == (9, 0.25)
    assert figures["quarantine_share"]["low"] == pytest.approx(0.107, abs=0.01)
    assert all(value["low"] <= value["value"] <= value["high"] for value in figures.values())
    assert figures["core_hours"]["low"] < figures["core_hours"]["high"]
    assert made["costs"].keys() == {"cores", "total", "storage_per_month"}
    assert made["costs"]["total"]["value"] == pytest.approx(0.04 * figures["core_hours"]["value"])
    assert figures["put_requests"]["value"] == figures["get_requests"]["value"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    text = "\n".join(plan_lines(made, str(tmp_path)))
    assert "12 clips -> 3 shards" in text
    assert "unreadable 2" in text
    again = plan_only(small_recipe, str(clips_folder), str(tmp_path))["figures"]
    assert again["quarantine_share"] == figures["quarantine_share"]


def test_slow_clips_shorten_the_sample(
    clips_folder: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "SAMPLE_SECONDS", 0.0)
    assert plan_only(small_recipe, str(clips_folder), str(tmp_path))["measured_clips"] == 4


def test_decoders_and_encoders_share_the_cores(plan: Plan, small_recipe: Recipe) -> None:
    known = Known(override(small_recipe, ["data.encode_actors=1"]), plan, "/out", None)
    known.cores = 4
    figures = known.figures([CLIP, CLIP])
    assert figures["clips_per_second_per_core"] == pytest.approx(1 / 0.75)
    assert figures["clips_per_second_here"] == pytest.approx(1.0)  # one encoder, a second a clip
    assert figures["core_hours"] == pytest.approx(12 * 1.75 / 3600)
    assert known.bottleneck(figures, CLIP) == "encode"
    assert known.bottleneck(figures, {**CLIP, "decode": 2.0}) == "decode"
    assert "accelerator_hours" not in figures


def test_an_accelerator_is_given_or_assumed(plan: Plan, small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = override(small_recipe, ["data.encode_gpus=1", "data.encode_actors=2"])
    assumed = Known(recipe, plan, "/out", None)
    one, other = (assumed.figures([CLIP], share)["clips_per_second_per_accelerator"] for share in (0.1, 0.4))
    assert one == pytest.approx(
        0.1 * 312e12 / encoding(recipe.encoders.vae, recipe.data.size).flops / recipe.data.frames
    )
    assert other == pytest.approx(4 * one)
    known = Known(recipe, plan, "/out", 10.0)
    known.cores = 6
    figures = known.figures([CLIP])
    assert figures["accelerator_hours"] == pytest.approx(12 / 10 / 3600)
    assert figures["cores_per_accelerator"] == pytest.approx(7.5)
    assert figures["clips_per_second_here"] == pytest.approx(8.0)
    assert known.bottleneck(figures, CLIP) == "decode"
    known.cores = 60
    assert known.bottleneck(known.figures([CLIP]), CLIP) == "encode"


def test_stable_diffusions_encoder_is_counted_from_its_shapes() -> None:
    """10.9 TFLOP for 16 frames of 320x512 by hand; of an autoencoder that is not here, it is assumed."""
    made = encoding("nowhere/vae", (320, 512))
    assert made.assumed
    assert 16 * made.flops == pytest.approx(10.9e12, rel=0.02)
    assert made.latents_CHW == (4, 40, 64)
    shipped = encoding("package:tiny/vae", (64, 96))
    assert not shipped.assumed
    vae = Vae("package:tiny/vae")
    with FlopCounterMode(display=False) as real:
        latents_1CHW = vae.encode(torch.zeros(1, 3, 64, 96))
    assert (shipped.flops, shipped.latents_CHW) == (real.get_total_flops(), tuple(latents_1CHW.shape[1:]))


def test_a_plan_for_machines_that_are_not_here(
    clips_folder: Path, small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days, money, bytes and the bottleneck follow from the nodes asked for; what is assumed is said."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = override(small_recipe, ["data.encode_gpus=0.5", "encoders.vae=nowhere/vae"])
    machines = parse_machines(["3x16+1xL40S-48GB", "2x64"])
    prices = Prices(core_hour=0.1, accelerator_hour=2)
    made = plan_only(recipe, str(clips_folder), str(tmp_path), prices=prices, machines=machines)
    figures = {name: figure["value"] for name, figure in made["figures"].items()}
    assert made["encode_speed"] == "assumed"
    flops, share = made["encode"]["flops_per_clip"], made["encode"]["share_of_peak"]
    assert figures["encode_clips_per_second_there"] == pytest.approx(3 * share["value"] * 362e12 / flops)
    assert figures["decode_clips_per_second_there"] == pytest.approx((176 - 6) * figures["clips_per_second_per_core"])
    slower = min(figures[f"{stage}_clips_per_second_there"] for stage in ("decode", "encode"))
    hours = 12 / slower / 3600
    assert figures["days_there"] == pytest.approx(hours / 24)
    assert made["costs"]["total"]["value"] == pytest.approx(hours * (176 * 0.1 + 3 * 2))
    latents = 2 * 4 * (recipe.data.size[0] // 8) * (recipe.data.size[1] // 8) * recipe.data.frames
    assert 9 * latents < figures["bytes"] < 9 * (latents + 3000)
    days = made["figures"]["encode_clips_per_second_there"]
    assert days["low"] < 0.8 * days["value"]
    assert days["high"] > 1.2 * days["value"]
    text = "\n".join(plan_lines(made, str(tmp_path)))
    assert "on 3 nodes of 16 cores and 1 L40S-48GB and 2 nodes of 64 cores: " in text
    assert "assumed: encoding takes" in text
    assert "Stable Diffusion's, as encoders.vae is not here" in text
    given = plan_only(recipe, str(clips_folder), str(tmp_path), machines=machines, mfu=0.5)["figures"]
    assert given["encode_clips_per_second_there"]["value"] == pytest.approx(days["value"] * 0.5 / share["value"])


@pytest.mark.parametrize(
    ("text", "encode_gpus", "message"),
    [
        ("10", 0, "expected NODESxCORES"),
        ("0x4", 0, "at least one node"),
        ("1x" + "9" * 5000, 0, "expected NODESxCORES"),
        ("1x4+1xRTX", 1, "accelerator 'RTX': unknown; expected"),
        ("1x4+1xL4-24GB", 0, "--on has 1 accelerators, but recipe .* encodes on CPUs; --set data.encode_gpus=1"),
        ("1x4", 1, "--on has no accelerators, but recipe .* encodes on them; --set data.encode_gpus=0"),
    ],
)
def test_machines_that_cannot_be_planned_for(
    text: str, encode_gpus: int, message: str, plan: Plan, small_recipe: Recipe
) -> None:
    recipe = override(small_recipe, [f"data.encode_gpus={encode_gpus}"])
    with pytest.raises(InputError, match=message):
        Known(recipe, plan, "/out", None, parse_machines([text]))


def test_requests_to_s3_are_counted(plan: Plan, small_recipe: Recipe) -> None:
    known = Known(small_recipe, plan, "s3://bucket/out", None)
    figures = known.figures([CLIP, CLIP])
    # Three tars, columns and records; journal, index, dataset.json twice; a heartbeat every ten seconds.
    assert figures["put_requests"] == pytest.approx(3 * 3 + 4, abs=3)
    large = known.figures([{**CLIP, "bytes": 50 << 20}])["put_requests"]
    assert large == pytest.approx(figures["put_requests"] + 3 * 8, abs=1)  # four clips a shard, in parts of 32 MiB
    assert known.figures([REFUSED, CLIP])["put_requests"] > figures["put_requests"] + 2  # ledgers


def test_prices_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    for content, message in [
        ("{", "not JSON"),
        ("[1]", "a JSON list, expected an object with keys from currency"),
        ('{"core_hours": 1}', "core_hours: unknown key; known keys: currency, core_hour"),
        ('{"core_hour": -1}', "core_hour: Input should be greater than or equal to 0 .got -1."),
        ('{"core_hour": 1e999}', "core_hour: Input should be a finite number"),
        ("[" * 100_000, "not JSON .maximum recursion depth exceeded"),
        ('{"core_hour": "cheap"}', "core_hour: Input should be a valid number"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_prices(str(path))
    path.write_text('{"currency": "EUR", "core_hour": 0.05, "per_1000_put": 0.005}')
    prices = read_prices(str(path))
    assert money({"core_hours": 100, "put_requests": 2e6, "bytes": 1e12}, prices) == {
        "cores": 5.0, "puts": 10.0, "total": 15.0,
    }  # fmt: skip


def test_predicted_against_actual(clips_folder: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    made = plan_only(small_recipe, str(clips_folder), str(tmp_path))
    summary: dict[str, Any] = {
        "clips": 12, "samples": 9, "quarantined": 3, "reasons": {"missing": 3}, "shards": 3, "bytes": 10_000,
        "done": 12, "seconds": 6.0, "clips_per_second": 2.0, "output": str(tmp_path), "fields": {},
        "stage_seconds": {"decode": 3.0, "score": 1.0, "encode": 2.0, "commit": 0.1},
    }  # fmt: skip
    actual = {row["what"]: row["actual"] for row in compare(made, summary)}
    assert actual["clips_per_second_per_core"] == 3.0
    assert actual["core_hours"] == pytest.approx(6 / 3600)
    assert (actual["samples"], actual["quarantine_share"], actual["clips_per_second_here"]) == (9, 0.25, 2.0)
    assert {row["what"] for row in compare(made, {**summary, "clips": 5, "done": 0})} == set()
    text = "\n".join(summary_lines(summary))
    assert "predicted against actual:" in text
    assert "refused clips, %: 25" in text
    (tmp_path / "plan.json").write_text('{"older": 1}')
    assert "actual:" not in "\n".join(summary_lines(summary))
