"""The stages without Ray: one row for every view whatever happens, bytes that depend on clip, view and seed alone."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data.small_data import film

from cinemo.config import Recipe
from cinemo.data.dataset import shards
from cinemo.data.dataset.shards import read_ledger
from cinemo.data.manifest.manifest import read_manifest
from cinemo.data.precompute import stages
from cinemo.data.precompute.plan import Plan, make_plan
from cinemo.media.motion import adjacent_ssim, mean_adjacent_ssim
from cinemo.media.mp4 import write_video
from cinemo.media.scores import clip_scores
from cinemo.media.video import decode_clip
from cinemo.recipes import override
from cinemo.types import Clip, keyed_generator


def planned(folder: Path, recipe: Recipe) -> Plan:
    return make_plan(read_manifest(str(folder), names_as_captions=True), recipe)


def encoder(recipe: Recipe) -> stages.Encoder:
    return stages.Encoder(recipe.data, recipe.encoders.vae, recipe.encoders.latent, "float32")


def encoded(rows: pa.Table, recipe: Recipe) -> pa.Table:
    return encoder(recipe)(stages.score(stages.decode(rows, recipe.data), recipe.data))


def test_every_planned_view_keeps_its_row(clips_folder: Path, small_recipe: Recipe) -> None:
    recipe = override(small_recipe, ["data.views=2"])
    rows = encoded(planned(clips_folder, recipe).rows([0, 1, 2]).slice(), recipe).to_pylist()
    assert [(row["position"], row["view"]) for row in rows] == [(p, v) for p in range(12) for v in range(2)]
    faults = {row["clip_id"]: (row["stage"], row["reason"]) for row in rows if row["reason"]}
    assert faults == {
        "film-1b": ("open", "unreadable"),
        "film-3b": ("open", "unreadable"),
        "film-5b": ("decode", "too_few_frames"),
    }
    for row in rows:
        assert (row["latents"] is None) == (row["ssim"] is None) == bool(row["reason"])
        assert row["latents"] is None or len(row["latents"]) == 2 * np.prod(row["shape"])


def test_rows_hold_what_the_clip_shows(clips_folder: Path, small_recipe: Recipe) -> None:
    plan = planned(clips_folder, small_recipe)
    row = encoded(plan.rows([0]).slice(1, 1), small_recipe).to_pylist()[0]
    view = decode_clip(Clip(row["clip_id"], row["uri"], row["caption"]), small_recipe.data)[0]
    assert (row["start_frame"], row["frame_interval"], row["fps"]) == (view.start_frame, view.frame_interval, 25.0)
    assert row["ssim"] == mean_adjacent_ssim(view.frames_FHWC)
    alone = encoder(small_recipe)
    latents = np.frombuffer(row["latents"], np.float16).reshape(row["shape"])
    np.testing.assert_array_equal(latents, alone.encode(view.frames_FHWC, row["clip_id"], 0))
    noise = keyed_generator(0, row["clip_id"], 0, "posterior")
    import torch

    frames_FCHW = torch.tensor(view.frames_FHWC).permute(0, 3, 1, 2) / 255 * 2 - 1
    expected = alone.vae.encode(frames_FCHW, noise)
    np.testing.assert_allclose(latents, expected.numpy(), atol=2e-3)


def test_latents_do_not_depend_on_company(clips_folder: Path, small_recipe: Recipe) -> None:
    plan = planned(clips_folder, small_recipe)
    together = encoded(plan.rows([0, 1]).slice(), small_recipe)["latents"].to_pylist()
    apart = [encoded(plan.rows([0, 1]).slice(k, 1), small_recipe)["latents"].to_pylist()[0] for k in reversed(range(8))]
    assert together == apart[::-1]


def test_modes_have_no_noise(clips_folder: Path, small_recipe: Recipe) -> None:
    frames_FHWC = film("x", 6, *small_recipe.data.size)
    mode = encoder(override(small_recipe, ["encoders.latent=mode"]))
    np.testing.assert_array_equal(mode.encode(frames_FHWC, "a", 0), mode.encode(frames_FHWC, "b", 1))
    sample = encoder(small_recipe)
    assert (sample.encode(frames_FHWC, "a", 0) != sample.encode(frames_FHWC, "a", 1)).any()


def commit(table: pa.Table, output: Path, views: int = 1, **more: Any) -> dict[str, Any]:
    totals: dict[str, Any] = stages.commit(table, str(output), "f", views, **more).to_pylist()[0]
    return totals


def test_commit_counts_and_quarantines(clips_folder: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    table = encoded(planned(clips_folder, small_recipe).rows([0]).slice(), small_recipe)
    totals = commit(table, tmp_path)
    assert (totals["clips"], totals["samples"], totals["quarantined"]) == (4, 3, 1)
    assert [refusal.clip_id for refusal in read_ledger(str(tmp_path), 0)] == ["film-1b"]


def test_commit_refuses_a_block_that_is_no_shard(clips_folder: Path, small_recipe: Recipe, tmp_path: Path) -> None:
    table = encoded(planned(clips_folder, small_recipe).rows([0, 1]).slice(), small_recipe)
    for wrong in (table.slice(0, 3), table.slice(1, 4), table.slice(0, 4).take([1, 0, 2, 3])):
        with pytest.raises(AssertionError, match="expected its 4 rows in order"):
            commit(wrong, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_clip_with_one_bad_view_is_refused_whole(tmp_path: Path, small_recipe: Recipe) -> None:
    write_video(tmp_path / "clips/a.mp4", film("a", 30), 25)
    write_video(tmp_path / "clips/b.mp4", film("b", 30), 25)
    recipe = override(small_recipe, ["data.views=2"])
    table = encoded(planned(tmp_path / "clips", recipe).rows([0]).slice(), recipe)
    place = table.schema.get_field_index("reason")
    table = table.set_column(place, "reason", pa.array([None, "not_finite", None, None]))
    totals = commit(table, tmp_path / "out", 2)
    assert (totals["samples"], totals["quarantined"]) == (2, 1)
    assert [refusal.clip_id for refusal in read_ledger(str(tmp_path / "out"), 0)] == ["a"]


def test_columns_of_the_manifest_stay_with_the_sample(tmp_path: Path, small_recipe: Recipe) -> None:
    write_video(tmp_path / "a.mp4", film("a", 30), 25)
    row = {"clip_id": "a", "uri": "a.mp4", "caption": "c", "licence": "CC0", "tags": ["x", "ü"], "fps": 24}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    plan = make_plan(read_manifest(str(tmp_path / "m.jsonl")), small_recipe)
    commit(encoded(plan.rows([0]).slice(), small_recipe), tmp_path / "out")
    with tarfile.open(tmp_path / "out/shards/shard-000000.tar") as tar:
        metadata = json.loads(tar.extractfile("000000000-0.json").read())  # type: ignore[union-attr]
    assert (metadata["licence"], metadata["tags"], metadata["manifest_fps"]) == ("CC0", ["x", "ü"], 24)
    assert metadata["fps"] == 25.0
    record = json.loads((tmp_path / "out/shards/shard-000000.json").read_text())
    content = memoryview((tmp_path / "out/shards/shard-000000.tar").read_bytes())
    sample = shards.read_sample(content, shards.Members(**record["members"]), 0)
    assert sample.extra == {"licence": "CC0", "tags": ["x", "ü"], "manifest_fps": 24}


def test_scores_stand_beside_what_was_stored_before(tmp_path: Path, small_recipe: Recipe) -> None:
    write_video(tmp_path / "a.mp4", film("a", 30), 25)
    row = {"clip_id": "a", "uri": "a.mp4", "caption": "c", "cut": "of the editor"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    rows = make_plan(read_manifest(str(tmp_path / "m.jsonl")), small_recipe).rows([0]).slice()
    found = {}
    for name, recipe in (("without", small_recipe), ("with", override(small_recipe, ["data.scores=true"]))):
        commit(encoded(rows, recipe), tmp_path / name)
        with tarfile.open(tmp_path / name / "shards/shard-000000.tar") as tar:
            metadata = json.loads(tar.extractfile("000000000-0.json").read())  # type: ignore[union-attr]
            latents = tar.extractfile("000000000-0.latents.npy").read()  # type: ignore[union-attr]
        found[name] = metadata, latents
    (before, latents), (after, same) = found["without"], found["with"]
    assert latents == same
    assert before["cut"] == after["manifest_cut"] == "of the editor"
    view = decode_clip(Clip("a", str(tmp_path / "a.mp4"), "c"), small_recipe.data)[0]
    scores = clip_scores(view.frames_FHWC, adjacent_ssim(view.frames_FHWC)[1])
    assert after == {**before, **scores, "manifest_cut": "of the editor"}
