"""``report.html`` of a dataset: equal edges cut equally, sheets show the ends, strangers' words stay words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from data.small_data import film
from hypothesis import given
from hypothesis import strategies as st

from cinemo import storage
from cinemo.config import DataConfig
from cinemo.data.dataset import shards, sidecars
from cinemo.evaluation import dataset_report
from cinemo.evaluation.dataset_report import equal_population_edges, write_dataset_report
from cinemo.evaluation.dataset_scores import look_alikes
from cinemo.media.motion import motion_bucket
from cinemo.media.mp4 import write_video
from cinemo.recipes import override
from cinemo.recipes.cinemo import cinemo_tiny
from cinemo.types import LatentSample, Refusal

SUMMARY = {
    "clips": 8, "done": 8, "samples": 6, "quarantined": 2, "reasons": {"unreadable": 2}, "shards": 2, "bytes": 100,
    "seconds": 10.0, "clips_per_second": 0.8, "stage_seconds": {"decode": 6.0, "score": 1.0, "encode": 4.0},
    "capacity": {"decode": 2, "encode": 1},
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Six samples of real films with SSIM 0.3 to 0.8 in two shards, and two refusals of unfriendly words."""
    uri, records = str(tmp_path / "made <b>"), []
    for shard in range(2):
        samples = []
        for number in range(3 * shard, 3 * shard + 3):
            path = tmp_path / f"film {number}.mp4"
            write_video(path, film(str(number), 40), 25)
            latents = np.zeros((6, 4, 4, 6), np.float16)
            sample = LatentSample(f"k{number}", f"clip-{number}", str(path), "", latents, 0.3 + 0.1 * number, 25, 2, 3)
            samples.append(sample)
        refusal = Refusal(f"bad-{shard}", "<script>.mp4", "open", "unreadable", "not <i>video</i>")
        records.append(shards.commit(uri, shard, samples, [refusal], "f" * 64))
    storage.write_bytes(f"{uri}/index.parquet", shards.index_bytes(records))
    recipe = override(cinemo_tiny(), ["data.frames=6", "data.size=[32,48]"])
    info = {
        "schema": shards.SCHEMA_VERSION, "complete": True, "fingerprint": "f" * 64, "samples": 6, "quarantined": 2,
        "bucket_edges": list(recipe.data.bucket_edges), "size": [32, 48], "frames": 6, "computed_from": {"vae": "abc"},
        "recipe": recipe.model_dump(mode="json"),
    }  # fmt: skip
    storage.write_json(f"{uri}/dataset.json", info)
    return uri


def test_what_spoils_motion_is_counted_where_it_is_stored(dataset: str, tmp_path: Path) -> None:
    assert write_dataset_report(dataset, SUMMARY) is not None
    assert "What spoils motion" not in (Path(dataset) / "report.html").read_text()
    fine = {"ssim_min": 0.9, "cut": 0, "cut_change": 3.0, "bar_rows": 0.0, "bar_columns": 0.0, "overlay": 0.0}
    hashes = [0x0F0F_3355_AA55_F00F, 0x0F0F_3355_AA55_F00E, 0x7123_9955_1234_5678, 0, 0]
    latents, samples = np.zeros((6, 4, 4, 6), np.float16), []
    for number, bits in enumerate(hashes):
        scores = {
            **fine,
            "cut": int(number == 2),
            "bar_rows": 0.2 * (number == 3),
            "hash_first": bits,
            "hash_middle": 0,
        }
        sample = LatentSample(f"k{number}", f"<clip-{number}>", "x.mp4", "", latents, 0.5, 25, 2, 3, extra=scores)
        samples.append(sample)
    uri = str(tmp_path / "scored")
    storage.write_bytes(f"{uri}/index.parquet", shards.index_bytes([shards.commit(uri, 0, samples, [], "f" * 64)]))
    info = storage.read_json(f"{dataset}/dataset.json")
    storage.write_json(f"{uri}/dataset.json", {**info, "samples": 5, "computed_from": {"scores": 1}})
    assert write_dataset_report(uri, {**SUMMARY, "reasons": {}}) is not None
    page = (tmp_path / "scored" / "report.html").read_text()
    assert "Of 5 samples that were read." in page
    assert "1 groups look alike: &lt;clip-0&gt;, &lt;clip-1&gt;<" in page  # hashes of plain pictures make no group
    (group,) = look_alikes([{"clip_id": str(k), "hash_first": bits, "hash_middle": 0} for k, bits in enumerate(hashes)])
    assert [row["clip_id"] for row in group] == ["0", "1"]


def test_a_planned_run_is_compared_in_the_words_of_the_command_line(dataset: str) -> None:
    figures = {"bytes": {"value": 3e6, "low": 2e6, "high": 4e6}, "samples": {"value": 7, "low": 5, "high": 8}}
    storage.write_json(f"{dataset}/plan.json", {"clips": 8, "figures": figures})
    page = write_dataset_report(dataset, SUMMARY)
    assert page is not None
    text = re.sub(r"<[^>]+>", " ", (Path(dataset) / "report.html").read_text())
    assert re.search(r"size, MB\s+3\s+2\s+4\s+0\.0001", text)
    assert re.search(r"samples\s+7\s+5\s+8\s+6", text)


def test_the_page_says_what_was_made_and_needs_nothing_else(dataset: str) -> None:
    page = write_dataset_report(dataset, SUMMARY)
    assert page is not None
    assert (Path(dataset) / "report.html").read_text() == page
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]+)"', page))
    assert "<b>" not in page.replace("&lt;b&gt;", "")
    assert "<i>video" not in page
    assert "&lt;script&gt;.mp4" in page
    assert "2 (25.0%)" in page
    assert "30% of 2" in page, "decoding had two processes for ten seconds and used six of them"
    edges = json.loads(re.search(r"data\.bucket_edges=(\[[^<]+\])", page)[1])  # type: ignore[index]
    assert override(cinemo_tiny(), [f"data.bucket_edges={edges}"]).data.bucket_edges == tuple(edges)


def test_a_page_that_would_be_the_same_is_left_alone(dataset: str) -> None:
    write_dataset_report(dataset, SUMMARY)
    before = (Path(dataset) / "report.html").stat().st_mtime_ns
    idle = {**SUMMARY, "done": 0, "seconds": 1.0, "stage_seconds": {}, "capacity": {}}
    page = write_dataset_report(dataset, idle)
    assert (Path(dataset) / "report.html").stat().st_mtime_ns == before
    assert page is not None
    assert "30% of 2" in page, "the figures of the run that made it stay"
    info = storage.read_json(f"{dataset}/dataset.json")
    storage.write_json(f"{dataset}/dataset.json", info | {"bucket_edges": [0.01 * k for k in range(1, 20)]})
    page = write_dataset_report(dataset, idle) or ""
    assert re.search(r'<figure class="narrow"><img [^>]*alt="The edges in use."', page), "as large as those beside it"
    assert (Path(dataset) / "report.html").stat().st_mtime_ns != before


def test_sheets_show_the_ends_and_open_few_shards(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_report, "SHEET_CLIPS", 2)
    index = shards.DatasetIndex.load(dataset)
    assert [row["clip_id"] for row in dataset_report._extreme(index, largest=True)] == ["clip-5", "clip-4"]
    assert [row["clip_id"] for row in dataset_report._extreme(index, largest=False)] == ["clip-0", "clip-1"]
    monkeypatch.setattr(dataset_report, "SHEET_CLIPS", 1)
    (Path(dataset) / "shards/shard-000000.json").unlink()
    assert [row["clip_id"] for row in dataset_report._extreme(index, largest=True)] == ["clip-5"]


def test_stored_flow_is_beside_the_scores(dataset: str, tmp_path: Path) -> None:
    assert "<h2>Flow</h2>" not in (write_dataset_report(dataset, SUMMARY) or "")
    store = sidecars.FieldStore(dataset, "flow", "f" * 16, {"frames": 6}, None)
    store.begin()
    index = shards.DatasetIndex.load(dataset)
    for shard, digest in zip(index.shards, index.table["checksum"].to_pylist(), strict=True):
        values = {}
        for number in range(3 * shard, 3 * shard + 3):  # slower, the higher its SSIM; of one there is none
            field = np.zeros((5, 2, 4, 6), np.float16)
            field[:, 0] = 2 - 0.25 * number
            values |= {} if number == 4 else {f"k{number}": sidecars.array_bytes(field)}
        sidecars.commit(dataset, "flow", shard, digest, values, {}, "f" * 16)
    store.finish(index.shards)
    page = write_dataset_report(dataset, SUMMARY) or ""
    assert "<h2>Flow</h2>" in page
    # Of 32x48 pixels: 512 / 32 = 16 times as fast. 2, 1.75, 1.5, 1.25 and 0.75 pixels a frame.
    assert "It is 24 in the median of 5 samples" in page
    assert "rank correlation with 1 - SSIM is 1.00" in page
    assert re.search(r"agree on \d+% of the pixels of 4 clips", page)
    (tmp_path / "film 0.mp4").unlink()
    (Path(dataset) / "fields/flow/shard-000001.tar").unlink()
    assert "of 3 samples" in (write_dataset_report(dataset, SUMMARY) or ""), "what is there is shown"


def test_a_source_that_is_gone_is_said(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "film 0.mp4").unlink()
    page = write_dataset_report(dataset, SUMMARY) or ""
    assert page.count("the source cannot be read: clip-0") == 2, "at both ends, there being six clips in all"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_equal_edges_are_edges_a_recipe_takes(scores: list[float]) -> None:
    histogram = np.histogram(scores, shards.SSIM_BINS, (0, 1))[0]
    edges = equal_population_edges(histogram)
    assert DataConfig(bucket_edges=tuple(edges)).bucket_edges == tuple(edges)
    assert edges[0] > 0
    assert edges[-1] < 1


def test_equal_edges_cut_equally() -> None:
    scores = np.random.default_rng(0).beta(9, 2, 20_000)
    edges = equal_population_edges(np.histogram(scores, shards.SSIM_BINS, (0, 1))[0])
    counts = np.bincount([motion_bucket(score, edges) for score in scores], minlength=20)
    assert counts.min() > 0.9 * 1000
    assert counts.max() < 1.1 * 1000
